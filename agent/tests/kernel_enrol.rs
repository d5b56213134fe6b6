//! Enrolling workloads on the running kernel, and what TC then lets through. Needs root and ip(8).

mod common;

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Bpffs, Namespace, ip};
use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::timeout;
use weft_agent::kernel::Kernel;
use weft_agent::kernel::destroy::cut_revoked;
use weft_agent::kernel::enrol::{Places, Workload};
use weft_agent::kernel::error::Error;
use weft_agent::kernel::events::{self, Events};
use weft_agent::kernel::state::{Desired, State};
use weft_agent::kernel::sync::PolicySet;
use weft_agent::netns::{Netns, own_cookie};
use weft_agent::proxy::Datapath;
use weft_datapath::abi::{Addr, LocalEnd, OrigDst, PolicyKey, PolicyValue, Subject, SubjectKey};
use weft_datapath::identity::ANY;
use weft_datapath::names::TUNNEL_PORT;
use weft_datapath::policy::{ALLOW, DENY, Mode};
use weft_datapath::reason::Reason;
use weft_policy::model::cidr::addr;

/// A node with two pods on a veth each. The calling thread lives in the node's namespace.
struct Node {
    pods: [Namespace; 2],
    _node: Namespace,
}

/// For what happens at once, on a machine that is slow and busy.
const LONG: Duration = Duration::from_secs(20);

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
        receiver.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        sender.send_to(b"hello", receiver.local_addr().unwrap()).unwrap();
        receiver.recv(&mut [0; 8]).is_ok()
    }
}

fn address(pod: usize) -> Addr {
    addr(ADDRESSES[pod].parse().unwrap())
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
        let key = PolicyKey { subject: destination, peer: source, ..PolicyKey::default() };
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

    // One that hides from the agent is told of, and stays where it is.
    ip(&["-n", node.pods[1].name(), "addr", "del", ADDRESSES[1], "dev", "eth0"]);
    let applied = state.apply(&kernel, &desired);
    assert!(matches!(&applied.problems[..], [(name, Error::NoInterface { .. })] if name == "test/1"));
    assert!(!applied.renewed);
    assert_eq!(kernel.links().unwrap().len(), 4);
    ip(&["-n", node.pods[1].name(), "addr", "add", ADDRESSES[1], "dev", "eth0"]);
    ip(&["-n", node.pods[1].name(), "route", "replace", "169.254.1.1", "dev", "eth0"]);
    ip(&["-n", node.pods[1].name(), "route", "replace", "default", "via", "169.254.1.1", "dev", "eth0"]);
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
    desired.policy.policies.retain(|key, _| (key.subject, key.peer) != (17, 16));
    std::thread::sleep(Duration::from_millis(1_100));
    let start = Instant::now();
    let applied = state.apply(&kernel, &desired);
    let (published, cuts) = (start.elapsed(), cut_revoked(&kernel.maps, &applied.enrolled).unwrap());
    let elapsed = start.elapsed();
    println!("{COUNT} connections: published after {published:?}, all cut after {elapsed:?}");
    // A tenth of a second on an idle machine.
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    assert_eq!(cuts.len(), COUNT);
    assert!(cuts.iter().all(|cut| cut.server == listener.local_addr().unwrap()));
    assert!(cuts.iter().all(|cut| (cut.source, cut.destination, cut.rule) == (16, 17, 7)));
    for (mut client, mut server) in pairs {
        for end in [&mut client, &mut server] {
            end.set_read_timeout(Some(LONG)).unwrap();
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

/// A TCP socket in a pod, marked or not.
fn tcp(pod: &Netns, kernel: Option<&Kernel>) -> TcpSocket {
    let socket = pod.run(|| TcpSocket::new_v4().unwrap()).unwrap();
    if let Some(kernel) = kernel {
        kernel.mark(socket.as_fd()).unwrap();
    }
    socket
}

#[tokio::test]
async fn only_marked_sockets_use_the_tunnel_port() {
    let bpffs = Bpffs::new("mark");
    let node = Node::new("mark");
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let mut state = State::read(&kernel).unwrap();
    let places = Places { local: vec![node.workload(0), node.workload(1)], ..Places::default() };
    let applied = state.apply(&kernel, &Desired { policy: policy(), places, ..Desired::default() });
    assert!(applied.problems.is_empty(), "{:?}", applied.problems);
    let [client, server] = [0, 1].map(|index| applied.enrolled[index].netns.clone());
    let target: SocketAddr = format!("{}:{TUNNEL_PORT}", ADDRESSES[1]).parse().unwrap();

    let listener = tcp(&server, Some(&kernel));
    listener.bind(target).unwrap();
    let listener = listener.listen(8).unwrap();
    // The SYN of a stranger is dropped, so the connect hangs.
    assert!(timeout(Duration::from_millis(500), tcp(&client, None).connect(target)).await.is_err());
    assert!(events::drops(&kernel.maps).unwrap()[&Reason::TunnelPort] > 0);
    let mut agent = timeout(LONG, tcp(&client, Some(&kernel)).connect(target)).await.unwrap().unwrap();
    // The accepted socket inherits the mark: what it sends passes, too.
    let (mut accepted, _) = listener.accept().await.unwrap();
    accepted.write_all(b"hello").await.unwrap();
    assert_eq!(timeout(LONG, agent.read(&mut [0; 8])).await.unwrap().unwrap(), 5);
}

#[tokio::test]
async fn refusals_are_told_as_they_happen() {
    let bpffs = Bpffs::new("events");
    let node = Node::new("events");
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let mut state = State::read(&kernel).unwrap();
    let places = Places { local: vec![node.workload(0), node.workload(1)], ..Places::default() };
    state.apply(&kernel, &Desired { policy: policy(), places, ..Desired::default() });
    let mut stream = Events::open(&kernel).unwrap();
    assert!(!node.reaches(1, 0));
    let told = async {
        loop {
            let event = stream.next().await.unwrap();
            if event.reason == Reason::Policy as u8 {
                return event;
            }
        }
    };
    let event = timeout(LONG, told).await.unwrap();
    assert_eq!((event.source, event.destination, event.rule), (17, 16, 7));
    assert_eq!((event.src, event.dst), (address(1), address(0)));
    // Quiet again: the stream waits.
    assert!(timeout(Duration::from_millis(100), stream.next()).await.is_err());
}

#[test]
fn notes_of_the_proxy_are_taken_once() {
    let bpffs = Bpffs::new("notes");
    let kernel = Kernel::load_sized(&bpffs.root(), &[("weft_leg", 2)]).unwrap();
    let app: SocketAddr = "127.0.0.1:40000".parse().unwrap();
    let key = LocalEnd { netns_cookie: 7, addr: addr(app.ip()), port: 40000, ..LocalEnd::default() };
    kernel.maps.orig_dst.insert(&key, &OrigDst { dst_port: 80, ..OrigDst::default() }).unwrap();
    assert_eq!(kernel.take_orig_dst(8, app).unwrap(), None);
    assert_eq!(kernel.take_orig_dst(7, app).unwrap().unwrap().dst_port, 80);
    assert_eq!(kernel.take_orig_dst(7, app).unwrap(), None);

    for cookie in 1..=2 {
        kernel.put_leg(cookie, app, "[fd00::1]:5".parse().unwrap()).unwrap();
    }
    assert_eq!(kernel.put_leg(3, app, app).unwrap_err().kind(), ErrorKind::StorageFull);
    kernel.del_leg(2, app);
    kernel.del_leg(2, app);
    kernel.put_leg(3, app, app).unwrap();
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
    let endpoint = kernel.maps.endpoint.lookup(&addr(stranger)).unwrap().unwrap();
    assert_eq!((endpoint.identity, endpoint.ifindex), (17, 0));
    let own = address(0);
    assert_eq!(kernel.maps.endpoint.lookup(&own).unwrap().unwrap().identity, 16);
}
