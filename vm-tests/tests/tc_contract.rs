//! "Whose packet is it": what the programs on the veths let through, point by point. The names carry the point's number.
//!
//! The controls are in `ground.rs`: without the mesh, every one of these packets arrives.

use vm_tests::mesh::{dial, dial_until, worked};
use vm_tests::{Capture, Mesh, Pod, Process, manifests, node, process};

const TEXT: &str = "THE-KNOWN-TEXT-in-a-raw-packet";

/// Sends a hand-made packet and expects the socket call itself to work.
fn raw(from: &Pod, words: &str) {
    // Three times, so that half a packet has it whole.
    let result = process::load(&from.place, &format!("raw {words} --text {TEXT}{TEXT}{TEXT}"));
    assert_eq!(result["errors"], serde_json::json!([]), "{words}: {result}");
}

fn assert_unseen(capture: Capture, what: &str) {
    let wire = capture.finish();
    assert_eq!(wire.count(TEXT.as_bytes()), 0, "{what} passed");
}

#[test]
fn point_1_only_the_agent_speaks_on_the_tunnel_port() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    // A tunnel between the two exists, so only the packet's socket tells the agent from a forger.
    assert!(worked(&dial(&a, &b.at4(8080))));
    let capture = Capture::start(&mesh.nodes[0].place("capture"), node::LINK);
    for (me, to) in [(a.at4(4000), b.at4(15008)), (a.at6(4000), b.at6(15008))] {
        raw(&a, &format!("data {me} {to}"));
        raw(&a, &format!("syn {me} {to}"));
    }
    for (me, to) in [(a.at4(15008), b.at4(4000)), (a.at6(15008), b.at6(4000))] {
        raw(&a, &format!("data {me} {to}"));
        raw(&a, &format!("syn {me} {to}"));
    }
    assert_unseen(capture, "a forged packet of the tunnel port");
    assert!(mesh.drops("tunnel_port") > 0.0);
}

#[test]
fn point_2_a_source_address_belongs_to_its_interface() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    mesh.start();
    let capture = Capture::start(&b.place, "eth0");
    for kind in ["syn", "data", "udp", "ping"] {
        raw(&c, &format!("{kind} {} {}", a.at4(4000), b.at4(8080)));
        raw(&c, &format!("{kind} {} {}", a.at6(4000), b.at6(8080)));
    }
    assert_unseen(capture, "a packet with a neighbour's address");
    assert!(mesh.drops("source_address") > 0.0);
}

#[test]
fn point_2_an_address_lends_no_identity() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    let stranger = mesh.stranger(0, "stranger");
    mesh.allow(&b, &[&a], &[]);
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    assert!(worked(&dial(&a, &b.at4(8080))));
    // The stranger's veth is not enrolled, so nothing checks its addresses; but it is not a's veth.
    let capture = Capture::start(&b.place, "eth0");
    for kind in ["syn", "data", "udp"] {
        raw(&stranger, &format!("{kind} {} {}", a.at4(4000), b.at4(8080)));
        raw(&stranger, &format!("{kind} {} {}", a.at6(4000), b.at6(8080)));
    }
    assert_unseen(capture, "a stranger with a's address");
}

#[test]
fn point_5_an_unknown_address_inside_is_refused() {
    let mut mesh = Mesh::one();
    let a = mesh.pod(0, "a");
    let unknown = mesh.stranger(0, "unknown");
    mesh.start_with(&["--mesh-cidr", "10.77.0.0/16", "--mesh-cidr", "fd77::/16"]);
    let _server = Process::serve(&unknown.place, "whoami=[::]:8080");
    let capture = Capture::start(&unknown.place, "eth0");
    for target in [unknown.at4(8080), unknown.at6(8080)] {
        let result = dial(&a, &format!("{target} --timeout-ms 500"));
        assert!(!worked(&result), "{target}: {result}");
    }
    raw(&a, &format!("udp {} {}", a.at4(4000), unknown.at4(53)));
    raw(&a, &format!("data {} {}", a.at6(4000), unknown.at6(53)));
    assert_unseen(capture, "a packet to an unknown address inside");
}

#[test]
fn point_9_the_node_reaches_probe_ports_only() {
    let mut mesh = Mesh::one();
    let b = mesh.pod(0, "b");
    let probed = manifests::pod(&b, "default").replace(
        "    image: none\n",
        "    image: none\n    livenessProbe:\n      httpGet:\n        path: /\n        port: 8081\n",
    );
    mesh.manifests.put("pod-b", &probed);
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080 whoami=[::]:8081");
    let kubelet = mesh.nodes[0].place("kubelet");
    for target in [b.at4(8081), b.at6(8081)] {
        let result = process::load(&kubelet, &format!("connect {target} --timeout-ms 1000"));
        assert!(worked(&result), "{target}: {result}");
    }
    for target in [b.at4(8080), b.at6(8080)] {
        let result = process::load(&kubelet, &format!("connect {target} --timeout-ms 1000"));
        assert!(!worked(&result), "{target}: {result}");
    }
}

#[test]
fn point_10_datagrams_between_nodes_need_an_open_port() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.manifests.put("mode-b", &manifests::port_mode("b", "STRICT", 5353, "DISABLE"));
    mesh.start();
    let _server = Process::serve(&b.place, "udp=[::]:5353 udp=[::]:5354");
    for (open, closed) in [(b.at4(5353), b.at4(5354)), (b.at6(5353), b.at6(5354))] {
        let result = process::load(&a.place, &format!("udp {open}"));
        assert_eq!(result["answer"], "ok", "{open}: {result}");
        for connected in ["", "--connected"] {
            let result = process::load(&a.place, &format!("udp {closed} {connected} --timeout-ms 300"));
            assert_ne!(result["answer"], "ok", "{closed}: {result}");
        }
    }
}

#[test]
fn point_11_what_ip_needs_passes() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080 udp=[::]:5353");
    // ARP and neighbour discovery from both sides, from nothing.
    for pod in [&a, &b] {
        pod.netns().ip("neigh flush all");
        mesh.nodes[0].netns().ip(&format!("neigh flush dev {}", pod.veth));
    }
    for target in [b.at4(8080), b.at6(8080)] {
        assert!(worked(&dial(&a, &target)), "{target}");
    }
    // Fragments of datagrams, in both directions.
    for target in [b.at4(5353), b.at6(5353)] {
        let result = process::load(&a.place, &format!("udp {target} --pad 5000"));
        assert!(result["answer"] == "ok" && result["same"] == true, "{target}: {result}");
    }
    // The error about a datagram comes back to who sent it.
    for target in [b.at4(5999), b.at6(5999)] {
        let result = process::load(&a.place, &format!("udp {target} --connected --timeout-ms 1000"));
        assert_eq!(result["answer"], "ECONNREFUSED", "{target}: {result}");
    }
}

#[test]
fn point_11_what_cannot_be_followed_is_dropped() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let capture = Capture::start(&b.place, "eth0");
    for (me, to) in [(a.at4(4000), b.at4(8080)), (a.at6(4000), b.at6(8080))] {
        let v6 = me.starts_with('[');
        for kind in ["syn", "data"] {
            for dress in ["options", "destination", "fragments", "late-fragment"] {
                if v6 || dress != "destination" {
                    raw(&a, &format!("{kind} {me} {to} --dress {dress}"));
                }
            }
        }
        for dress in ["options", "late-fragment"] {
            raw(&a, &format!("udp {me} {to} --dress {dress}"));
        }
        raw(&a, &format!("other {me} {to}"));
    }
    assert_unseen(capture, "something that cannot be followed");
    for reason in ["ip_options", "fragment", "protocol"] {
        assert!(mesh.drops(reason) > 0.0, "no drop was counted as {reason}");
    }
}

#[test]
fn point_13_one_decision_per_connection() {
    let mut mesh = Mesh::two();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(1, "c"));
    for pod in [&b, &c] {
        let text = manifests::pod(pod, "default").replace(&format!("app: {}", pod.name), "app: both");
        mesh.manifests.put(&format!("pod-{}", pod.name), &text);
    }
    mesh.manifests.put("svc", &manifests::service("both", "both", "10.96.0.20", 80, 8080, "TCP"));
    mesh.start();
    let (_b, _c) =
        (Process::serve(&b.place, "whoami=[::]:8080"), Process::serve(&c.place, "whoami=[::]:8080"));
    let mut seen = [0, 0];
    for _ in 0..20 {
        let result = dial(&a, "10.96.0.20:80");
        assert!(worked(&result), "{result}");
        let answer = result["answer"].as_str().unwrap_or_default();
        for (count, pod) in seen.iter_mut().zip([&b, &c]) {
            *count += u32::from(answer.contains(&format!("{}]:8080", pod.v4)));
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0 && seen[0] + seen[1] == 20, "{seen:?}");
}

#[test]
fn promise_1_a_pod_is_nobody_until_it_is_enrolled() {
    let mut mesh = Mesh::one();
    let b = mesh.pod(0, "b");
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let late = mesh.stranger(0, "late");
    assert!(!worked(&dial(&late, &format!("{} --timeout-ms 500", b.at4(8080)))));
    mesh.manifests.pod(&late);
    let enrolled = dial_until(&late, &format!("{} --timeout-ms 500", b.at4(8080)), worked);
    assert!(worked(&enrolled), "{enrolled}");
}
