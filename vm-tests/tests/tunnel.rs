//! Two workloads of different nodes: mTLS between their agents, nothing else on the wire.

use vm_tests::mesh::{check_patterns, dial, serve_patterns, worked};
use vm_tests::{Capture, Mesh, Process, manifests, node, process, repeats};

#[test]
fn the_server_sees_the_client() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let v4 = dial(&a, &b.at4(8080));
    assert!(v4["answer"].as_str().is_some_and(|text| text.contains(&format!("{}]:", a.v4))), "{v4}");
    assert_eq!(v4["peer"], b.at4(8080), "{v4}");
    let v6 = dial(&a, &b.at6(8080));
    assert!(v6["answer"].as_str().is_some_and(|text| text.starts_with(&format!("[{}]:", a.v6))), "{v6}");
    let mapped = dial(&a, &format!("{} --mapped", b.at4(8080)));
    assert!(worked(&mapped), "{mapped}");
}

#[test]
fn a_service_address_crosses_nodes() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.manifests.put("svc", &manifests::service("svc", "b", "10.96.0.10", 80, 8080, "TCP"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let result = dial(&a, "10.96.0.10:80");
    assert!(worked(&result) && result["peer"] == "10.96.0.10:80", "{result}");
}

#[test]
fn six_close_patterns_lose_no_byte() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let mut server = serve_patterns(&b);
    check_patterns(&a, &b, &mut server, repeats(834), 16);
}

#[test]
fn nothing_crosses_in_clear() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let mut server = serve_patterns(&b);
    let _texts = Process::serve(&b.place, "echo=[::]:8080 greet=[::]:8081 udp=[::]:53");
    let capture = Capture::start(&mesh.nodes[0].place("capture"), node::LINK);
    check_patterns(&a, &b, &mut server, repeats(84), 16);
    for target in [b.at4(8080), b.at6(8080), b.at4(8081), b.at6(8081)] {
        let result = dial(&a, &format!("{target} --send THE-KNOWN-TEXT"));
        assert!(result["answer"].as_str().is_some_and(|text| text.ends_with("THE-KNOWN-TEXT")), "{result}");
    }
    // What goes around the sockets: raw packets to the remote workload, and datagrams, which have no tunnel.
    for (from, to) in [(format!("{}:4000", a.v4), b.at4(8080)), (format!("[{}]:4000", a.v6), b.at6(8080))] {
        for kind in ["syn", "data", "udp", "ping", "sctp", "other"] {
            for dress in ["plain", "options", "destination", "fragments", "late-fragment"] {
                process::load(
                    &a.place,
                    &format!("raw {kind} {from} {to} --dress {dress} --text THE-KNOWN-TEXT-raw"),
                );
            }
        }
        process::load(&a.place, &format!("raw data {from} {to} --text THE-KNOWN-TEXT-raw"));
    }
    for target in [b.at4(53), b.at6(53)] {
        let result = process::load(&a.place, &format!("udp {target} --send THE-KNOWN-TEXT --timeout-ms 300"));
        assert_ne!(result["answer"], "ok", "{result}");
    }
    let wire = capture.finish();
    assert!(wire.in_tunnel() as u64 > repeats(1 << 20), "only {} bytes in the tunnel", wire.in_tunnel());
    assert_eq!(wire.count(b"THE-KNOWN-TEXT"), 0);
    assert_eq!(wire.count(b"220 hello"), 0);
    // Agent and CA talk from node to node over TLS of their own.
    let mut outside = wire.outside_tunnel();
    outside.remove(&(6, 15012));
    assert!(outside.is_empty(), "{outside:?}");
}

#[test]
fn policy_is_asked_at_the_far_end() {
    let mut mesh = Mesh::two();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(1, "b"), mesh.pod(0, "c"));
    mesh.allow(&b, &[&a], &[8080]);
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080 whoami=[::]:8081");
    for port in [8080, 8081] {
        for target in [b.at4(port), b.at6(port)] {
            assert_eq!(worked(&dial(&a, &target)), port == 8080, "a to {target}");
            assert!(!worked(&dial(&c, &target)), "c to {target}");
        }
    }
}

#[test]
fn many_connections_at_once_and_in_a_row() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "echo=[::]:8080 half-close=[::]:9000");
    let (rounds, count) = (repeats(10_000), repeats(1000));
    let row = process::load(&a.place, &format!("crr {} --rounds {rounds}", b.at4(8080)));
    assert_eq!(row["errors"], 0, "{row}");
    let at_once =
        format!("pattern half-close {} --count {count} --parallel {count} --max-len 4096", b.at4(9000));
    let result = process::load(&a.place, &at_once);
    assert_eq!(result["errors"], 0, "{result}");
}

#[test]
fn a_stopped_reader_stops_its_writer() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "stall=[::]:8080");
    let flood = process::load(&a.place, &format!("flood {}", b.at4(8080)));
    assert!(flood["taken"].as_u64().is_some_and(|taken| taken < 64 << 20), "{flood}");
}

#[test]
fn a_dead_destination_is_refused_and_a_wrong_client_too() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    let stranger = mesh.stranger(0, "stranger");
    mesh.start();
    // Without parked connects the call succeeds and the connection is reset at once: so soon that a client which is slow to ask
    // how its call ended may already hear of that.
    let dead = dial(&a, &format!("{} --send x", b.at4(8080)));
    let refused = ["ECONNREFUSED", "ECONNRESET"].contains(&dead["connect"].as_str().unwrap_or_default());
    assert!(refused || dead["end"] == "ECONNRESET", "{dead}");
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let clear = dial(&stranger, &format!("{} --timeout-ms 1000", b.at4(8080)));
    assert!(!worked(&clear), "{clear}");
    // The tunnel port talks to those with a certificate only.
    let tunnel = dial(&stranger, &format!("{} --send hello --timeout-ms 3000", b.at4(15008)));
    // An alert (RFC 8446 section 6: content type 21), if anything.
    let answer = tunnel["answer"].as_str().unwrap_or_default();
    assert!(answer.is_empty() || answer.starts_with('\u{15}'), "{tunnel}");
}
