//! Nodes and pods, wired as a routed CNI wires them: each pod has its own addresses, a veth to its node, one default
//! route to a link-local gateway, and a host route on the node. Nothing is translated.
//!
//! | | IPv4 | IPv6 |
//! |---|---|---|
//! | node N | 10.77.N.1 | fd77:N::1 |
//! | its pods | 10.77.N.10 and on | fd77:N::10 and on |
//! | link between nodes | 10.78.0.N | fd78::N |

use std::cell::Cell;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::cgroup::Cgroup;
use crate::leftovers::{Dir, unique};
use crate::netns::Netns;
use crate::process::Place;

/// The interface of a node that leads to other nodes.
pub const LINK: &str = "link0";

/// The gateways that every pod sees, on the host side of its own veth.
const GATEWAY4: &str = "169.254.1.1";
const GATEWAY6: &str = "fe80::1";

/// A node: a namespace that forwards, a cgroup for all that runs on it, a bpffs of its own.
#[derive(Debug)]
pub struct Node {
    number: u8,
    name: String,
    next_pod: Cell<u8>,
    // Dropped in this order: processes die, pins go, then the namespace.
    cgroup: Cgroup,
    bpffs: Bpffs,
    netns: Netns,
    dir: Dir,
}

impl Node {
    /// Makes node number `number`.
    pub fn create(number: u8) -> Node {
        let name = format!("node{number}");
        let netns = Netns::create(&name);
        netns.sysctl("net/ipv4/ip_forward", "1");
        netns.sysctl("net/ipv6/conf/all/forwarding", "1");
        netns.sysctl("net/ipv4/conf/all/rp_filter", "0");
        netns.sysctl("net/ipv4/conf/default/rp_filter", "0");
        let dir = Dir::create(&name);
        let bpffs = Bpffs::mount(dir.path().join("bpf"));
        let node = Node {
            number,
            cgroup: Cgroup::create(&unique(&name)),
            bpffs,
            netns,
            dir,
            name,
            next_pod: Cell::new(10),
        };
        node.netns.ip(&format!("addr add {}/32 dev lo\naddr add {}/128 dev lo nodad", node.v4(), node.v6()));
        node
    }

    /// Two nodes with a link between them.
    pub fn pair() -> (Node, Node) {
        let (one, two) = (Node::create(1), Node::create(2));
        Node::link(&one, &two);
        (one, two)
    }

    /// Connects two nodes and routes their pods to each other.
    pub fn link(one: &Node, two: &Node) {
        one.netns.ip(&format!("link add {LINK} type veth peer name {LINK} netns {}", two.netns.name()));
        for (here, there) in [(one, two), (two, one)] {
            let (n, m) = (here.number, there.number);
            here.netns.ip(&format!(
                "addr add 10.78.0.{n}/24 dev {LINK}
                addr add fd78::{n}/64 dev {LINK} nodad
                link set {LINK} up"
            ));
            here.netns.ip(&format!(
                "route add 10.77.{m}.0/24 via 10.78.0.{m} src 10.77.{n}.1
                route add fd77:{m}::/64 via fd78::{m} src fd77:{n}::1"
            ));
        }
        one.netns.wait_reachable(two.v4().into());
        one.netns.wait_reachable(two.v6().into());
    }

    /// Adds a pod; `name` is at most 12 bytes, as it names the host side of the veth.
    pub fn pod(&self, name: &str) -> Pod {
        let host = self.next_pod.replace(self.next_pod.get() + 1);
        let v4 = Ipv4Addr::new(10, 77, self.number, host);
        // The last group reads like the IPv4 host number in decimal, as people write it.
        let v6: Ipv6Addr = format!("fd77:{}::{host}", self.number).parse().expect("a valid address");
        let netns = Netns::create(name);
        let veth = format!("v-{name}");
        self.netns.ip(&format!(
            "link add {veth} type veth peer name eth0 netns {}
            addr add {GATEWAY4}/32 dev {veth}
            addr add {GATEWAY6}/64 dev {veth} nodad
            link set {veth} up",
            netns.name()
        ));
        netns.ip(&format!(
            "addr add {v4}/32 dev eth0
            addr add {v6}/128 dev eth0 nodad
            link set eth0 up
            route add {GATEWAY4} dev eth0 scope link
            route add default via {GATEWAY4} dev eth0 src {v4}
            route add ::/0 via {GATEWAY6} dev eth0 src {v6}"
        ));
        self.netns.ip(&format!(
            "route add {v4}/32 dev {veth} scope link src {}
            route add {v6}/128 dev {veth} src {}",
            self.v4(),
            self.v6()
        ));
        netns.wait_reachable(self.v4().into());
        netns.wait_reachable(self.v6().into());
        let place = Place { netns: netns.path(), cgroup: self.cgroup.child(&format!("pod-{name}")) };
        Pod { name: name.to_owned(), node: self.name.clone(), v4, v6, veth, place, netns }
    }

    /// Its name in manifests.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 1)
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, self.number.into(), 0, 0, 0, 0, 0, 1)
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup that holds all of its pods: where connect hooks belong.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Its own bpffs.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs.0
    }

    /// A directory for files of this node.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where a process of the node itself runs, such as a kubelet; `unit` names its cgroup.
    pub fn place(&self, unit: &str) -> Place {
        Place { netns: self.netns.path(), cgroup: self.cgroup.child(unit) }
    }
}

/// A pod: a namespace with `eth0`, and a cgroup below its node's.
#[derive(Debug)]
pub struct Pod {
    /// Name in manifests.
    pub name: String,
    /// Name of its node.
    pub node: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// The host side of its veth, in the node's namespace.
    pub veth: String,
    /// Where its processes run.
    pub place: Place,
    netns: Netns,
}

impl Pod {
    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Both addresses, IPv4 first.
    pub fn addrs(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// `10.77.1.10:8080`.
    pub fn at4(&self, port: u16) -> String {
        format!("{}:{port}", self.v4)
    }

    /// `[fd77:1::10]:8080`.
    pub fn at6(&self, port: u16) -> String {
        format!("[{}]:{port}", self.v6)
    }
}

/// A bpffs mount, unmounted (and its pins gone) on drop.
#[derive(Debug)]
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount(path: PathBuf) -> Bpffs {
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("create {}: {e}", path.display()));
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|e| panic!("mount a bpffs at {}: {e}", path.display()));
        Bpffs(path)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
