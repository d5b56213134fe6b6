//! Two workloads of one node: socket to socket, under the identity that the kernel verified.

use std::time::Duration;

use vm_tests::mesh::{check_patterns, dial, serve_patterns, worked};
use vm_tests::{Mesh, Process, on_host, process, repeats};

#[test]
fn six_close_patterns_lose_no_byte() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let mut server = serve_patterns(&b);
    check_patterns(&a, &b, &mut server, repeats(834), 16);
}

#[test]
fn policy_decides_by_identity() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    mesh.allow(&b, &[&a], &[8080]);
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080 whoami=[::]:8081");
    for port in [8080, 8081] {
        for target in [b.at4(port), b.at6(port)] {
            assert_eq!(worked(&dial(&a, &target)), port == 8080, "a to {target}");
            let refused = dial(&c, &format!("{target} --timeout-ms 1000"));
            assert!(!worked(&refused), "c to {target}: {refused}");
        }
    }
}

#[test]
fn strangers_are_anonymous() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    let stranger = mesh.stranger(0, "stranger");
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    assert!(worked(&dial(&a, &b.at4(8080))));
    // STRICT asks for an identity; nobody vouches for the stranger.
    for target in [b.at4(8080), b.at6(8080)] {
        let refused = dial(&stranger, &format!("{target} --timeout-ms 1000"));
        assert!(!worked(&refused), "{target}: {refused}");
    }
    mesh.manifests.mode("PERMISSIVE");
    let passed = vm_tests::mesh::dial_until(&stranger, &format!("{} --timeout-ms 1000", b.at4(8080)), worked);
    assert!(worked(&passed), "{passed}");
}

#[test]
fn the_agent_does_not_work_for_bytes_that_it_does_not_carry() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "sink=[::]:8080");
    let before = mesh.agents[0].cpu();
    let result = process::load(&a.place, &format!("bulk {} --millis 2000", b.at4(8080)));
    assert!(result["bytes"].as_u64().is_some_and(|bytes| bytes > repeats(1 << 30)), "{result}");
    let used = mesh.agents[0].cpu() - before;
    // On an emulated machine what the agent does once a second takes as long.
    assert!(!on_host() || used < Duration::from_millis(200), "{used:?} for {result}");
}

#[test]
fn a_stopped_reader_stops_its_writer() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "stall=[::]:8080");
    let flood = process::load(&a.place, &format!("flood {}", b.at4(8080)));
    assert!(flood["taken"].as_u64().is_some_and(|taken| taken < 32 << 20), "{flood}");
}
