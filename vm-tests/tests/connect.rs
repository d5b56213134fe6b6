//! What connect(), sendmsg() and bind() do for an enrolled workload on one node.

use vm_tests::manifests::service;
use vm_tests::mesh::{dial, worked};
use vm_tests::{Mesh, Process, process};

#[test]
fn neighbours_talk_directly_and_see_each_other() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let v4 = dial(&a, &b.at4(8080));
    assert!(
        v4["answer"].as_str().is_some_and(|text| text.starts_with(&format!("[::ffff:{}]:", a.v4))),
        "{v4}"
    );
    assert_eq!(v4["peer"], b.at4(8080), "{v4}");
    let v6 = dial(&a, &b.at6(8080));
    assert!(v6["answer"].as_str().is_some_and(|text| text.starts_with(&format!("[{}]:", a.v6))), "{v6}");
    let mapped = dial(&a, &format!("{} --mapped", b.at4(8080)));
    assert!(worked(&mapped), "{mapped}");
    // What nobody listens on is refused by the destination itself.
    assert_eq!(dial(&a, &b.at4(81))["connect"], "ECONNREFUSED");
}

#[test]
fn a_service_address_reaches_its_backends() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    mesh.manifests.put("svc4", &service("four", "b", "10.96.0.10", 80, 8080, "TCP"));
    mesh.manifests.put("svc6", &service("six", "b", "fd96::10", 80, 8080, "TCP"));
    mesh.manifests.put("none", &service("none", "nobody", "10.96.0.11", 80, 8080, "TCP"));
    mesh.start();
    let _b = Process::serve(&b.place, "whoami=[::]:8080");
    let _c = Process::serve(&c.place, "whoami=[::]:8080");
    let v4 = dial(&a, "10.96.0.10:80");
    assert!(worked(&v4), "{v4}");
    // The application sees whom it dialled, the server who dialled it.
    assert_eq!(v4["peer"], "10.96.0.10:80", "{v4}");
    assert!(v4["answer"].as_str().is_some_and(|text| text.contains(&a.v4.to_string())), "{v4}");
    let mapped = dial(&a, "10.96.0.10:80 --mapped");
    assert!(worked(&mapped) && mapped["peer"] == "[::ffff:10.96.0.10]:80", "{mapped}");
    let v6 = dial(&a, "[fd96::10]:80");
    assert!(worked(&v6) && v6["peer"] == "[fd96::10]:80", "{v6}");
    let none = dial(&a, "10.96.0.11:80");
    assert!(none["connect"] == "ECONNREFUSED" || none["connect"] == "EPERM", "{none}");
}

#[test]
fn datagrams_to_a_service_come_back_from_it() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.manifests.put("dns", &service("dns", "b", "10.96.0.53", 53, 5353, "UDP"));
    mesh.start();
    let _server = Process::serve(&b.place, "udp=[::]:5353");
    for words in ["10.96.0.53:53", "10.96.0.53:53 --connected"] {
        let result = process::load(&a.place, &format!("udp {words}"));
        assert_eq!(result["answer"], "ok", "{result}");
        assert_eq!(result["from"], "10.96.0.53:53", "{result}");
    }
}

#[test]
fn the_agents_ports_are_not_for_workloads() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    for port in [15001, 15006, 15008] {
        let bound = dial(&a, &format!("{} --bind 127.0.0.1:{port}", b.at4(8080)));
        assert!(bound["connect"] == "EPERM" || bound["connect"] == "EACCES", "bind {port}: {bound}");
    }
    for target in ["127.0.0.1:15001".to_owned(), "[::1]:15001".to_owned(), b.at4(15008), b.at6(15008)] {
        let result = dial(&a, &target);
        assert_ne!(result["connect"], "ok", "{target}: {result}");
    }
}

#[test]
fn the_world_outside_is_left_alone() {
    let mut mesh = Mesh::one();
    let a = mesh.pod(0, "a");
    let outside = mesh.stranger(0, "world");
    mesh.start();
    let _server = Process::serve(&outside.place, "whoami=[::]:443 udp=[::]:53");
    for target in [outside.at4(443), outside.at6(443)] {
        let result = dial(&a, &target);
        assert!(worked(&result), "{target}: {result}");
    }
    let dns = process::load(&a.place, &format!("udp {}", outside.at4(53)));
    assert_eq!(dns["answer"], "ok", "{dns}");
}
