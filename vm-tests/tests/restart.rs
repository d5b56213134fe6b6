//! The agent may die.

use std::time::Duration;

use vm_tests::agent::wait_until;
use vm_tests::mesh::{dial, dial_until, worked};
use vm_tests::{Agent, Mesh, Process, agent};

#[test]
fn the_direct_path_survives_kill_9() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    mesh.allow(&b, &[&a], &[]);
    mesh.start();
    let _server = Process::serve(&b.place, "echo=[::]:8080");
    let mut held = Process::load(&a.place, &format!("hold {} --every-ms 2", b.at4(8080)));
    assert_eq!(held.line()["held"], 1);
    mesh.agents[0].kill9();
    // Without the agent: living and new connections go on, refusals too.
    assert!(worked(&dial(&a, &format!("{} --send x", b.at4(8080)))));
    assert!(worked(&dial(&a, &format!("{} --send x", b.at6(8080)))));
    assert!(!worked(&dial(&c, &format!("{} --send x --timeout-ms 1000", b.at4(8080)))));
    assert!(held.line_within(Duration::from_millis(500)).is_none(), "the held connection ended");
    mesh.restart(0);
    assert!(held.line_within(Duration::from_millis(500)).is_none(), "the held connection ended");
    assert!(worked(&dial(&a, &format!("{} --send x", b.at4(8080)))));
    assert!(!worked(&dial(&c, &format!("{} --send x --timeout-ms 1000", b.at4(8080)))));
    // The new agent is in charge: a change acts.
    mesh.allow(&b, &[&c], &[]);
    assert!(worked(&dial_until(&c, &format!("{} --send x --timeout-ms 500", b.at4(8080)), worked)));
    assert!(held.line_within(Duration::from_secs(3)).is_some(), "a revoked connection lives on");
}

#[test]
fn without_an_agent_the_tunnel_is_closed_and_comes_back() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    assert!(worked(&dial(&a, &b.at4(8080))));
    for node in [0, 1] {
        mesh.agents[node].kill9();
        let refused = dial(&a, &format!("{} --timeout-ms 1000", b.at4(8080)));
        assert!(!worked(&refused), "agent {node} is dead, but {refused}");
        mesh.restart(node);
        let again = dial_until(&a, &format!("{} --timeout-ms 2000", b.at4(8080)), worked);
        assert!(worked(&again), "agent {node} is back, but {again}");
    }
}

#[test]
fn a_planned_end_is_quick_and_clean() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let status = mesh.agents[0].terminate();
    assert!(status.success(), "{status}");
    assert!(worked(&dial(&a, &b.at4(8080))), "enforcement and the direct path stay");
    mesh.restart(0);
    assert!(worked(&dial(&a, &b.at4(8080))));
}

#[test]
fn state_of_another_abi_is_refused_and_goes_on_enforcing() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    mesh.allow(&b, &[&a], &[]);
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let status = mesh.agents[0].terminate();
    assert!(status.success(), "{status}");
    // As an agent of a former release would have left it.
    let pins = mesh.nodes[0].bpffs().join("weft");
    let version = std::fs::read_dir(&pins).expect("pins").flatten().next().expect("one version").path();
    std::fs::rename(&version, pins.join("v0")).expect("rename a directory of pins");

    let enforced = || {
        worked(&dial(&a, &b.at4(8080)))
            && !worked(&dial(&c, &format!("{} --timeout-ms 1000", b.at4(8080))))
            && !worked(&dial(&c, &format!("{} --timeout-ms 1000", b.at6(8080))))
    };
    assert!(enforced());
    let mut newer = Agent::launch(&mesh.nodes[0], &mesh.manifests, mesh.ca(), &[]);
    let mut status = None;
    assert!(wait_until(Duration::from_secs(60), || {
        status = newer.ended();
        status.is_some()
    }));
    assert!(status.is_some_and(|status| !status.success()), "{status:?}");
    let log = newer.log();
    assert!(
        log.contains("holds kernel state with ABI 0") && log.contains("run `weft detach` first"),
        "{log}"
    );
    assert!(enforced(), "what the former release left no longer enforces");

    agent::weft(&["detach", "--bpffs", pins.to_str().expect("our own paths are UTF-8")]);
    mesh.restart(0);
    assert!(enforced());
}
