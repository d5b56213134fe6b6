//! `weft detach` leaves a machine as it was found.

use std::process::Command;

use vm_tests::mesh::{dial, dial_until, worked};
use vm_tests::{Mesh, Node, Pod, Process, agent};

/// What tc(8) prints about `words`, and one more argument if there is one, in the node's namespace.
fn tc(node: &Node, words: &str, more: Option<&str>) -> String {
    let words = words.split_whitespace().chain(more);
    let output = Command::new("tc").args(["-n", node.netns().name()]).args(words).output();
    let output = output.expect("start tc: install iproute2");
    assert!(output.status.success(), "tc: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("tc prints text")
}

fn has_clsact(node: &Node, pod: &Pod) -> bool {
    tc(node, &format!("qdisc show dev {}", pod.veth), None).contains("clsact")
}

#[test]
fn nothing_is_enforced_and_only_what_others_made_remains() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    mesh.allow(&b, &[&a], &[]);
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let targets = [b.at4(8080), b.at6(8080)].map(|target| format!("{target} --timeout-ms 5000"));
    for target in &targets {
        assert!(worked(&dial(&a, target)) && !worked(&dial(&c, target)), "{target}");
    }
    // Somebody else's filter, which matches nothing, on an interface of ours.
    let node = &mesh.nodes[0];
    if !has_clsact(node, &c) {
        tc(node, &format!("qdisc add dev {} clsact", c.veth), None);
    }
    let filters = format!("filter show dev {} ingress", c.veth);
    let stranger = format!("filter add dev {} ingress prio 49000 protocol all bpf bytecode", c.veth);
    tc(node, &stranger, Some("1,6 0 0 0"));

    let ended = mesh.agents[0].terminate();
    assert!(ended.success(), "{ended}");
    let node = &mesh.nodes[0];
    let pins = node.bpffs().join("weft");
    let path = pins.to_str().expect("our own paths are UTF-8");
    // Twice: the second finds nothing and is content.
    for _ in 0..2 {
        node.netns().inside(|| agent::weft(&["detach", "--bpffs", path]));
    }
    assert!(!pins.exists());
    for target in &targets {
        let free = dial_until(&c, target, worked);
        assert!(worked(&free), "c to {target} after `weft detach`: {free}");
    }
    for pod in [&a, &b] {
        assert!(!has_clsact(node, pod), "{} keeps a qdisc", pod.veth);
    }
    let left = tc(node, &filters, None);
    assert!(left.contains("pref 49000") && !left.contains("weft"), "{left}");
}
