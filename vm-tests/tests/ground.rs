//! The ground itself, without a mesh: what the other scenarios rely on works, and what they exclude is visible here.
//! These are the negative controls: a capture that never sees plaintext, or a probe that always succeeds, proves nothing.

use serde_json::Value;
use vm_tests::{Capture, Node, Process, mesh, node, process};

#[test]
fn patterns_pass_on_one_node() {
    let node = Node::create(1);
    let (a, b) = (node.pod("a"), node.pod("b"));
    let mut server = mesh::serve_patterns(&b);
    mesh::check_patterns(&a, &b, &mut server, 40, 8);
}

#[test]
fn patterns_pass_between_nodes() {
    let (one, two) = Node::pair();
    let (a, b) = (one.pod("a"), two.pod("b"));
    let mut server = mesh::serve_patterns(&b);
    mesh::check_patterns(&a, &b, &mut server, 40, 8);
}

#[test]
fn plaintext_between_nodes_is_seen() {
    let (one, two) = Node::pair();
    let (a, b) = (one.pod("a"), two.pod("b"));
    let _server = Process::serve(&b.place, "echo=[::]:8080 udp=[::]:5353");
    let capture = Capture::start(&one.place("capture"), node::LINK);
    for addr in [b.at4(8080), b.at6(8080)] {
        let result = process::load(&a.place, &format!("connect {addr} --send THE-KNOWN-TEXT"));
        assert_eq!(
            (&result["connect"], &result["answer"]),
            (&Value::from("ok"), &Value::from("THE-KNOWN-TEXT"))
        );
    }
    assert_eq!(process::load(&a.place, &format!("udp {} --send DATAGRAM", b.at4(5353)))["answer"], "ok");
    let wire = capture.finish();
    assert!(
        wire.count(b"THE-KNOWN-TEXT") >= 4 && wire.count(b"DATAGRAM") >= 2,
        "{} frames",
        wire.frames.len()
    );
    let outside = wire.outside_tunnel();
    assert!(outside.contains_key(&(6, 8080)) && outside.contains_key(&(17, 5353)), "{outside:?}");
}

#[test]
fn hostile_packets_arrive() {
    let (one, two) = Node::pair();
    let (a, b) = (one.pod("a"), two.pod("b"));
    let capture = Capture::start(&b.place, "eth0");
    let mut sent = Vec::new();
    let spoofed = ["10.77.1.99:4000", "[fd77:1::99]:4000"];
    for (from, to) in spoofed.iter().zip([b.at4(80), b.at6(80)]) {
        for kind in ["syn", "data", "udp", "ping", "other"] {
            for dress in ["plain", "options", "destination", "fragments", "late-fragment"] {
                let v6 = from.starts_with('[');
                // IPv4 has no destination options; a late fragment needs more text than this has in a ping.
                if !v6 && dress == "destination" {
                    continue;
                }
                // The second fragment carries the end of the text in every case.
                let text = format!("{}T-{kind}-{dress}-{v6}", "x".repeat(24));
                let result = process::load(
                    &a.place,
                    &format!("raw {kind} {from} {to} --dress {dress} --text {text} --count 1"),
                );
                assert_eq!(result["errors"], Value::Array(vec![]), "{text}: {result}");
                sent.push(text);
            }
        }
    }
    let wire = capture.finish();
    for text in sent {
        let told = text.trim_start_matches('x');
        assert!(wire.count(told.as_bytes()) > 0, "no frame has {told}");
    }
}

#[test]
fn sockets_say_what_happened() {
    let node = Node::create(1);
    let (a, b) = (node.pod("a"), node.pod("b"));
    let mut server = Process::serve(&b.place, "whoami=[::]:8080 echo=[::]:8081 stall=[::]:8082");
    let who = process::load(&a.place, &format!("connect {}", b.at4(8080)));
    let answer = who["answer"].as_str().expect("an answer");
    assert!(answer.starts_with(&format!("[::ffff:{}]:", a.v4)), "{who}");
    assert_eq!(who["peer"], b.at4(8080));
    let refused = process::load(&a.place, &format!("connect {}", b.at4(1)));
    assert_eq!(refused["connect"], "ECONNREFUSED");
    let mapped = process::load(&a.place, &format!("connect {} --mapped", b.at4(8080)));
    assert_eq!(mapped["connect"], "ok", "{mapped}");
    let flood = process::load(&a.place, &format!("flood {}", b.at4(8082)));
    assert!(flood["taken"].as_u64().is_some_and(|taken| taken < 64 << 20), "{flood}");
    let mut hold = Process::load(&a.place, &format!("hold {} --every-ms 5", b.at4(8081)));
    assert_eq!(hold.line()["held"], 1);
    server.kill9();
    let ended = hold.line();
    assert!(ended["ended"] == "eof" || ended["ended"] == "ECONNRESET", "{ended}");
}
