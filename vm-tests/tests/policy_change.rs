//! A change of policy acts on living connections, idle ones included.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vm_tests::mesh::{dial, dial_until, worked};
use vm_tests::{Mesh, Process, on_host};

/// From the change of the file to the end of a connection, the watcher's own delay included; of several, the one in the
/// middle, as a loaded machine may hold up any single one.
const LIMIT_MS: u64 = 100;
const ROUNDS: usize = 3;

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_millis() as u64
}

/// Revokes what allowed `a` to reach `b` and watches an idle and a busy connection end; others stay.
fn revoked(nodes: (usize, usize), mut mesh: Mesh) {
    let (a, b, c) = (mesh.pod(nodes.0, "a"), mesh.pod(nodes.1, "b"), mesh.pod(nodes.0, "c"));
    mesh.allow(&b, &[&a, &c], &[]);
    mesh.start();
    let _server = Process::serve(&b.place, "echo=[::]:8080");
    let mut all = Vec::new();
    for target in [b.at4(8080), b.at6(8080)].iter().cycle().take(2 * ROUNDS) {
        let mut idle = Process::load(&a.place, &format!("hold {target}"));
        let mut busy = Process::load(&a.place, &format!("hold {target} --every-ms 2"));
        let mut kept = Process::load(&c.place, &format!("hold {target} --every-ms 2"));
        for process in [&mut idle, &mut busy, &mut kept] {
            let line = process.line();
            assert_eq!(line["held"], 1, "{target}: {line}");
        }
        let changed = now_ms();
        mesh.allow(&b, &[&c], &[]);
        for (what, process) in [("idle", &mut idle), ("busy", &mut busy)] {
            let ended = process.line_within(Duration::from_secs(5));
            let ended = ended.unwrap_or_else(|| panic!("{target}: the {what} connection lives on"));
            let after = ended["at_ms"].as_u64().expect("a time").saturating_sub(changed);
            println!("{target} {what}: ended with {} after {after} ms", ended["ended"]);
            all.push(after);
        }
        let ended = kept.line_within(Duration::from_millis(300));
        assert!(ended.is_none(), "{target}: an allowed connection was cut: {ended:?}");
        assert!(!worked(&dial(&a, &format!("{target} --send x --timeout-ms 1000"))));
        mesh.allow(&b, &[&a, &c], &[]);
        let again = dial_until(&a, &format!("{target} --send x --timeout-ms 1000"), worked);
        assert!(worked(&again), "{target}: {again}");
    }
    all.sort_unstable();
    println!("{} connections cut after {all:?} ms", all.len());
    // An emulated machine shows what happens, not how fast.
    if on_host() {
        assert!(all[all.len() / 2] < LIMIT_MS, "cut only after {all:?} ms");
    }
}

#[test]
fn a_revoked_rule_cuts_direct_connections() {
    revoked((0, 0), Mesh::one());
}

#[test]
fn a_revoked_rule_cuts_tunnelled_connections() {
    revoked((0, 1), Mesh::two());
}

#[test]
fn a_broken_file_does_not_hold_up_a_revocation() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.allow(&b, &[&a], &[]);
    mesh.start();
    let _server = Process::serve(&b.place, "echo=[::]:8080");
    assert!(worked(&dial(&a, &format!("{} --send x", b.at4(8080)))));
    mesh.manifests.put("broken", "apiVersion: v1\nkind: [");
    mesh.allow(&b, &[], &[]);
    let refused = |result: &serde_json::Value| !worked(result);
    let result = dial_until(&a, &format!("{} --send x --timeout-ms 500", b.at4(8080)), refused);
    assert!(!worked(&result), "{result}");
}
