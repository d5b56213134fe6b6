//! Certificates change under living traffic and nobody notices.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::{Agent, Mesh, Process, on_host, process, repeats};

const ROTATIONS: u64 = 20;
/// Lifetime in seconds; a certificate is renewed after about half of it. On an emulated machine a handshake takes seconds.
fn ttl() -> &'static str {
    if on_host() { "4" } else { "24" }
}

/// The serial number of the workload's certificate that an agent holds now; its own, the node's, lives a day.
fn serials(agent: &Agent) -> BTreeSet<String> {
    let output = agent.ask("certs -o json");
    let rows: Value = serde_json::from_slice(&output.stdout).expect("`weft certs -o json` prints JSON");
    let rows = rows.as_array().expect("a list");
    let workloads = rows.iter().filter(|row| row["identity"].as_str().is_some_and(|id| id.contains("/sa/")));
    workloads.map(|row| row["serial"].as_str().expect("a serial number").to_owned()).collect()
}

#[test]
fn twenty_rotations_under_load_fail_nothing() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start_with(&["--cert-ttl", ttl()]);
    let _server = Process::serve(&b.place, "echo=[::]:8080");
    let mut held = Process::load(&a.place, &format!("hold {} --every-ms 20", b.at4(8080)));
    assert_eq!(held.line()["held"], 1);

    let mut seen = [BTreeSet::new(), BTreeSet::new()];
    let mut good = 0;
    let end = Instant::now() + Duration::from_secs(240);
    let rotations = repeats(ROTATIONS) as usize;
    while seen.iter().any(|serials| serials.len() <= rotations) {
        assert!(Instant::now() < end, "{seen:?} after four minutes");
        for addr in [b.at4(8080), b.at6(8080)] {
            let count = if on_host() { 50 } else { 10 };
            let words = format!("talk raw {addr} --text through-every-rotation --count {count} --parallel 4");
            let result = process::load(&a.place, &words);
            assert_eq!(result["good"], count, "{addr} after {good} connections: {result}");
            good += count;
        }
        for (seen, agent) in seen.iter_mut().zip(&mesh.agents) {
            seen.extend(serials(agent));
        }
    }
    let counts = seen.map(|serials| serials.len());
    println!("{good} connections through {counts:?} certificates at client and server");
    assert!(
        held.line_within(Duration::ZERO).is_none(),
        "the connection that was open all the time has ended"
    );
}
