//! Named network namespaces, configured through iproute2 as an operator would.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::leftovers::unique;

/// Where iproute2 keeps named namespaces.
pub const DIR: &str = "/run/netns";

/// What every namespace gets. Addresses are usable at once (no duplicate address detection), congestion control is one
/// that does not throttle local links, and one connection's metrics do not colour the next.
const SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv4/tcp_congestion_control", "reno"),
    ("net/ipv4/tcp_no_metrics_save", "1"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/ip_local_port_range", "15100 65535"),
    ("net/ipv4/ping_group_range", "0 0"),
];

/// A network namespace, deleted on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates it with `lo` up.
    pub fn create(what: &str) -> Netns {
        let netns = Netns { name: unique(what) };
        run("ip", &["netns", "add", &netns.name]);
        for (key, value) in SYSCTLS {
            netns.sysctl(key, value);
        }
        netns.ip("link set lo up");
        netns
    }

    /// The name below [`DIR`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that opens it.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// Runs iproute2 commands in it, one per line.
    pub fn ip(&self, commands: &str) {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("start ip: install iproute2");
        child.stdin.take().expect("piped above").write_all(commands.as_bytes()).expect("write to ip");
        let status = child.wait().expect("wait for ip");
        assert!(status.success(), "in {}, ip refused:\n{commands}", self.name);
    }

    /// Sets a sysctl in it; `key` with slashes, as below /proc/sys.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = Path::new("/proc/sys").join(key);
        self.inside(|| {
            fs::write(&path, value).unwrap_or_else(|e| panic!("write {value} to {}: {e}", path.display()));
        });
    }

    /// Waits until packets reach `addr` and come back. A new link is up a moment after `ip` said so, and a neighbour
    /// solicitation that is lost in that moment costs a second.
    pub fn wait_reachable(&self, addr: IpAddr) {
        // Nobody listens on the discard port; a refusal is an answer.
        let target = SocketAddr::new(addr, 9);
        let probe = || TcpStream::connect_timeout(&target, Duration::from_secs(5));
        let error = self.inside(probe).expect_err("nobody listens on port 9");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{addr} is not reachable from {}", self.name);
    }

    /// Runs a closure on a thread that is in this namespace; its sockets stay there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).unwrap_or_else(|e| panic!("open {}: {e}", self.path().display()));
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET).expect("enter the network namespace: are you root?");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
    }
}

/// Runs a command that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("start {program}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {}", args.join(" "), error.trim());
}
