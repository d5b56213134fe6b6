//! Enrolling workloads on the running kernel, and what TC then lets through. Needs root and ip(8).

mod common;

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use common::{Bpffs, Namespace, ip};
use nix::sched::{CloneFlags, setns};
use weft_agent::kernel::Kernel;
use weft_agent::kernel::destroy::cut_revoked;
use weft_agent::kernel::enrol::{Places, Workload};
use weft_agent::kernel::error::Error;
use weft_agent::kernel::events;
use weft_agent::kernel::state::{Desired, State};
use weft_agent::kernel::sync::PolicySet;
use weft_agent::netns::{Netns, own_cookie};
use weft_datapath::abi::{PolicyKey, PolicyValue, Subject, SubjectKey};
use weft_datapath::identity::ANY;
use weft_datapath::policy::{ALLOW, DENY, Mode};
use weft_datapath::reason::Reason;

/// A node with two pods on a veth each. The calling thread lives in the node's namespace.
struct Node {
    pods: [Namespace; 2],
    _node: Namespace,
}

const ADDRESSES: [&str; 2] = ["10.9.0.1", "10.9.0.2"];

impl Node {
    fn new(test: &str) -> Node {
        let node = Namespace::new(&format!("{test}-n"));
        let pods = [Namespace::new(&format!("{test}-a")), Namespace::new(&format!("{test}-b"))];
        setns(fs::File::open(node.path()).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        for index in 0..2 {
            connect(&pods[index], index, ADDRESSES[index]);
        }
        Node { pods, _node: node }
    }

    fn workload(&self, index: usize) -> Workload {
        Workload {
            name: format!("test/{index}"),
            identity: 16 + index as u32,
            netns: self.pods[index].path(),
            addresses: vec![ADDRESSES[index].parse().unwrap()],
        }
    }

    /// Does a datagram from one pod arrive at the other?
    fn reaches(&self, from: usize, to: usize) -> bool {
        let bind = |pod: usize| {
            let socket =
                Netns::open(&self.pods[pod].path()).unwrap().run(|| UdpSocket::bind((ADDRESSES[pod], 0)));
            socket.unwrap().unwrap()
        };
        let (sender, receiver) = (bind(from), bind(to));
        receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        sender.send_to(b"hello", receiver.local_addr().unwrap()).unwrap();
        receiver.recv(&mut [0; 8]).is_ok()
    }
}

/// Point-to-point, as most CNIs do it.
fn connect(pod: &Namespace, index: usize, address: &str) {
    let host = format!("w{index}");
    ip(&["link", "add", &host, "type", "veth", "peer", "name", "eth0", "netns", pod.name()]);
    ip(&["link", "set", &host, "up"]);
    ip(&["addr", "add", "169.254.1.1/32", "dev", &host]);
    ip(&["route", "replace", address, "dev", &host]);
    ip(&["-n", pod.name(), "addr", "add", address, "dev", "eth0"]);
    ip(&["-n", pod.name(), "link", "set", "eth0", "up"]);
    ip(&["-n", pod.name(), "route", "add", "169.254.1.1", "dev", "eth0"]);
    ip(&["-n", pod.name(), "route", "add", "default", "via", "169.254.1.1"]);
}

/// Workload 0 may reach workload 1 and not the other way.
fn policy() -> PolicySet {
    let row = |destination, source, verdict| {
        let key = PolicyKey { bank: 0, destination, source, class: 0, port: 0, pad: 0 };
        (key, PolicyValue { verdict, rule: 7 })
    };
    let subject =
        |identity| (SubjectKey { bank: 0, identity }, Subject { flags: 0, mode: Mode::Strict as u32 });
    PolicySet {
        subjects: [subject(16), subject(17)].into(),
        policies: [row(17, 16, ALLOW), row(17, ANY, DENY), row(16, ANY, DENY)].into(),
        ..PolicySet::default()
    }
}

#[test]
fn enrolled_workloads_are_policed() {
    let bpffs = Bpffs::new("enrol");
    let node = Node::new("enrol");
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let mut state = State::read(&kernel).unwrap();
    let mut desired = Desired { policy: policy(), ..Desired::default() };
    assert!(node.reaches(0, 1) && node.reaches(1, 0), "before enrolment nothing is refused");

    desired.places = Places { local: vec![node.workload(0), node.workload(1)], ..Places::default() };
    let applied = state.apply(&kernel, &desired);
    assert!(applied.problems.is_empty(), "{:?}", applied.problems);
    assert_eq!(applied.enrolled.len(), 2);
    assert_ne!(applied.enrolled[0].netns.cookie(), own_cookie().unwrap());
    assert_eq!(kernel.links().unwrap().len(), 4);
    assert!(node.reaches(0, 1));
    assert!(!node.reaches(1, 0));
    assert!(events::drops(&kernel.maps).unwrap()[&Reason::Policy] > 0);
    assert!(
        events::meters(&kernel.maps).unwrap().keys().any(|key| (key.source, key.destination) == (16, 17))
    );

    // Applying the same again writes nothing and renews nothing, here and in an agent that comes after.
    assert!(!state.apply(&kernel, &desired).renewed);
    drop(kernel);
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let mut state = State::read(&kernel).unwrap();
    assert!(!state.apply(&kernel, &desired).renewed);
    assert!(kernel.links().unwrap().iter().all(|(_, current)| *current));
    assert!(node.reaches(0, 1) && !node.reaches(1, 0));

    // A replaced veth is enrolled again, under its new number.
    let before = applied.enrolled[0].ifindex;
    ip(&["link", "del", "w0"]);
    connect(&node.pods[0], 0, ADDRESSES[0]);
    let applied = state.apply(&kernel, &desired);
    assert!(applied.problems.is_empty(), "{:?}", applied.problems);
    assert!(applied.renewed);
    assert_ne!(applied.enrolled[0].ifindex, before);
    assert_eq!(kernel.maps.iface.lookup(&before).unwrap(), None);
    assert_eq!(kernel.links().unwrap().len(), 4);
    assert!(node.reaches(0, 1) && !node.reaches(1, 0));

    // A workload that leaves is left alone; the other one does not know it any more.
    desired.places.local.remove(0);
    let applied = state.apply(&kernel, &desired);
    assert_eq!(applied.enrolled.len(), 1);
    assert_eq!(kernel.links().unwrap().len(), 2);
    assert!(!node.reaches(0, 1));
    desired.places.local.clear();
    state.apply(&kernel, &desired);
    assert!(kernel.links().unwrap().is_empty());
    assert!(kernel.maps.iface_addr.entries().unwrap().is_empty());
    assert!(kernel.maps.endpoint.entries().unwrap().is_empty());
    assert!(node.reaches(0, 1) && node.reaches(1, 0));
}

/// Idle connections over IPv4 and from IPv6 sockets with mapped addresses, held on both ends.
fn connections(node: &Node, count: usize) -> (TcpListener, Vec<(TcpStream, TcpStream)>) {
    let inside = |pod: usize| Netns::open(&node.pods[pod].path()).unwrap();
    let listener = inside(1).run(|| TcpListener::bind((ADDRESSES[1], 0)).unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = inside(0);
    let pairs = (0..count)
        .map(|index| {
            let host = if index % 2 == 0 { ADDRESSES[1].into() } else { format!("::ffff:{}", ADDRESSES[1]) };
            let end = client.run(|| TcpStream::connect((host, port)).unwrap()).unwrap();
            (end, listener.accept().unwrap().0)
        })
        .collect();
    (listener, pairs)
}

#[test]
fn a_revoked_rule_cuts_idle_connections_at_both_ends() {
    const COUNT: usize = 2_000;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 8_192, 8_192).unwrap();
    let bpffs = Bpffs::new("cut");
    let node = Node::new("cut");
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let mut state = State::read(&kernel).unwrap();
    let places = Places { local: vec![node.workload(0), node.workload(1)], ..Places::default() };
    let mut desired = Desired { policy: policy(), places, ..Desired::default() };
    let applied = state.apply(&kernel, &desired);
    assert!(applied.problems.is_empty(), "{:?}", applied.problems);
    let (listener, pairs) = connections(&node, COUNT);
    assert!(cut_revoked(&kernel.maps, &applied.enrolled).unwrap().is_empty());

    // Only the rule for this source goes; the default of the destination denies.
    desired.policy.policies.retain(|key, _| (key.destination, key.source) != (17, 16));
    std::thread::sleep(Duration::from_millis(1_100));
    let start = Instant::now();
    let applied = state.apply(&kernel, &desired);
    let (published, cuts) = (start.elapsed(), cut_revoked(&kernel.maps, &applied.enrolled).unwrap());
    let elapsed = start.elapsed();
    println!("{COUNT} connections: published after {published:?}, all cut after {elapsed:?}");
    assert!(elapsed < Duration::from_millis(500), "{elapsed:?}");
    assert_eq!(cuts.len(), COUNT);
    assert!(cuts.iter().all(|cut| cut.server == listener.local_addr().unwrap()));
    assert!(cuts.iter().all(|cut| (cut.source, cut.destination, cut.rule) == (16, 17, 7)));
    for (mut client, mut server) in pairs {
        for end in [&mut client, &mut server] {
            end.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let error = end.read(&mut [0; 1]).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset),
                "{error:?}"
            );
        }
    }

    // The entries are still there and their connections are not: the listener on the same port must survive.
    assert!(cut_revoked(&kernel.maps, &applied.enrolled).unwrap().is_empty());
    desired.policy = policy();
    state.apply(&kernel, &desired);
    let client = Netns::open(&node.pods[0].path()).unwrap();
    client.run(|| TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
    listener.accept().unwrap();
}

#[test]
fn what_cannot_be_enrolled_is_named_and_not_outside() {
    let bpffs = Bpffs::new("enrol-bad");
    let node = Node::new("bad");
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let mut state = State::read(&kernel).unwrap();
    let good = node.workload(0);
    let missing = Workload { netns: "/run/netns/weft-none".into(), ..node.workload(1) };
    let stranger: IpAddr = "10.9.0.77".parse().unwrap();
    let foreign = Workload { name: "test/foreign".into(), addresses: vec![stranger], ..node.workload(1) };
    let double = Workload { name: "test/double".into(), identity: 99, ..node.workload(0) };
    let loopback = Workload {
        name: "test/loopback".into(),
        addresses: vec!["127.0.0.1".parse().unwrap()],
        ..node.workload(1)
    };
    let local = vec![good, missing, foreign, double, loopback];
    let desired = Desired { places: Places { local, ..Places::default() }, ..Desired::default() };
    let applied = state.apply(&kernel, &desired);
    assert_eq!(applied.enrolled.iter().map(|workload| &*workload.name).collect::<Vec<_>>(), ["test/0"]);
    let problem = |name: &str| &applied.problems.iter().find(|(subject, _)| subject == name).unwrap().1;
    assert!(matches!(problem("test/1"), Error::Netns { .. }));
    assert!(matches!(problem("test/foreign"), Error::NoInterface { addr, .. } if *addr == stranger));
    assert!(matches!(problem("test/double"), Error::Twice { .. }));
    assert!(matches!(problem("test/loopback"), Error::NotOurVeth { .. }));
    let endpoint =
        kernel.maps.endpoint.lookup(&weft_agent::kernel::address::addr(stranger)).unwrap().unwrap();
    assert_eq!((endpoint.identity, endpoint.ifindex), (17, 0));
    let own = weft_agent::kernel::address::addr(ADDRESSES[0].parse().unwrap());
    assert_eq!(kernel.maps.endpoint.lookup(&own).unwrap().unwrap().identity, 16);
}
