//! The real agent and the real CA, started as an operator would, on a node of the scenario.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::leftovers::Dir;
use crate::manifests::Manifests;
use crate::netns::Netns;
use crate::node::Node;
use crate::process::{Process, binary};

/// How long a start may take, in a slow VM too.
const START: Duration = Duration::from_secs(60);
const METRICS_PORT: u16 = 15020;
const CA_PORT: u16 = 15012;

/// A CA that serves on a node's own address.
#[derive(Debug)]
pub struct Ca {
    dir: Dir,
    url: String,
    _process: Process,
}

impl Ca {
    /// Makes a new root and serves it on `node`.
    pub fn start(node: &Node, manifests: &Manifests) -> Ca {
        let dir = Dir::create("ca");
        weft(&["ca", "init", "--dir", &text(dir.path())]);
        let listen = format!("{}:{CA_PORT}", node.v4());
        let args = [
            "ca",
            "serve",
            "--dir",
            &text(dir.path()),
            "--listen",
            &listen,
            "--manifests",
            &text(manifests.path()),
        ];
        let log = log_file(&dir.path().join("ca.log"));
        let process = Process::spawn(&node.place("ca"), &binary("weft"), &args, Some(log));
        let open = node.netns().inside(|| wait_until(START, || TcpStream::connect(&listen).is_ok()));
        assert!(open, "the CA does not listen on {listen}:\n{}", read(&dir.path().join("ca.log")));
        Ca { dir, url: format!("https://{listen}"), _process: process }
    }

    /// A join token for `node`, in a file that only its owner reads.
    fn token(&self, node: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{node}.token"));
        let output = weft(&["ca", "token", "--dir", &text(self.dir.path()), "--node", node]);
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .expect("token file");
        file.write_all(output.stdout.trim_ascii()).expect("write the token");
        path
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The root certificate, which agents verify the CA with.
    pub fn root(&self) -> PathBuf {
        let roots = fs::read_dir(self.dir.path().join("roots")).expect("`weft ca init` makes roots/");
        let mut roots: Vec<PathBuf> = roots.flatten().map(|entry| entry.path()).collect();
        roots.sort();
        roots.pop().expect("`weft ca init` makes a root")
    }

    /// Where the audit lines are.
    pub fn log(&self) -> String {
        read(&self.dir.path().join("ca.log"))
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    netns: PathBuf,
    log: PathBuf,
    socket: PathBuf,
    metrics: String,
}

impl Agent {
    /// Starts the agent of `node` and waits until it is ready.
    pub fn start(node: &Node, manifests: &Manifests, ca: &Ca) -> Agent {
        Agent::start_with(node, manifests, ca, &[])
    }

    /// As [`Agent::start`], with more arguments, or others for those that are given anyway.
    pub fn start_with(node: &Node, manifests: &Manifests, ca: &Ca, more: &[&str]) -> Agent {
        let mut agent = Agent::launch(node, manifests, ca, more);
        agent.wait_ready(node.netns());
        agent
    }

    /// Starts it without waiting.
    pub fn launch(node: &Node, manifests: &Manifests, ca: &Ca, more: &[&str]) -> Agent {
        let (log, socket) = (node.dir().join("agent.log"), node.dir().join("agent.sock"));
        let token = ca.token(node.name());
        let metrics = format!("{}:{METRICS_PORT}", node.v4());
        let given = [
            ("--node", node.name().to_owned()),
            ("--manifests", text(manifests.path())),
            ("--ca", ca.url.clone()),
            ("--ca-root", text(&ca.root())),
            ("--token", text(&token)),
            ("--state-dir", text(&node.dir().join("state"))),
            ("--bpffs", text(&node.bpffs().join("weft"))),
            ("--cgroup", text(node.cgroup())),
            ("--metrics", metrics.clone()),
            ("--admin-socket", text(&socket)),
            ("--log", std::env::var("WEFT_LOG").unwrap_or_else(|_| "info".to_owned())),
        ];
        let mut args = vec!["agent"];
        let given: Vec<_> = given.into_iter().filter(|(name, _)| !more.contains(name)).collect();
        args.extend(given.iter().flat_map(|(name, value)| [*name, value.as_str()]));
        args.extend(more);
        let process = Process::spawn(&node.place("agent"), &binary("weft"), &args, Some(log_file(&log)));
        Agent { process, netns: node.netns().path(), log, socket, metrics }
    }

    /// Waits for readiness, or panics with the agent's log.
    pub fn wait_ready(&mut self, netns: &Netns) {
        let end = Instant::now() + START;
        while !self.ready(netns) {
            let ended = self.process.wait(Duration::ZERO);
            if ended.is_some() || Instant::now() > end {
                panic!("the agent is not ready ({ended:?}):\n{}", self.log());
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Is it ready now?
    pub fn ready(&self, netns: &Netns) -> bool {
        let addr = self.metrics.as_str();
        netns.inside(|| http_get(addr, "/ready")).is_some_and(|(status, _)| status == 200)
    }

    /// The text of its metrics.
    pub fn metrics(&self, netns: &Netns) -> String {
        let addr = self.metrics.as_str();
        netns.inside(|| http_get(addr, "/metrics")).expect("the agent serves metrics").1
    }

    /// The sum of all samples of `name` whose labels contain each of `labels`.
    pub fn metric(&self, netns: &Netns, name: &str, labels: &[&str]) -> f64 {
        sum(&self.metrics(netns), name, labels)
    }

    /// Runs a command against its admin socket, such as `connections -o json`.
    pub fn ask(&self, words: &str) -> Output {
        let mut args: Vec<&str> = words.split_whitespace().collect();
        let socket = text(&self.socket);
        args.extend(["--admin-socket", &socket]);
        Command::new(binary("weft")).args(args).output().expect("start weft")
    }

    /// Starts `weft observe` for what is denied, from the beginning and for as long as it lives.
    pub fn observe(&self, node: &Node) -> Process {
        let socket = text(&self.socket);
        let args = ["observe", "--follow", "--verdict", "denied", "-o", "json", "--admin-socket", &socket];
        Process::spawn(&node.place("observe"), &binary("weft"), &args, None)
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// The file of its log.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Where it serves metrics: the node's own address, which other nodes reach.
    pub fn metrics_address(&self) -> &str {
        &self.metrics
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// File of the namespace that it runs in.
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.wait(Duration::ZERO)
    }

    /// kill -9.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// SIGTERM, then waits for its end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.process.signal(Signal::SIGTERM);
        self.process
            .wait(START)
            .unwrap_or_else(|| panic!("the agent did not end on SIGTERM:\n{}", self.log()))
    }

    /// User plus system time that it has used.
    pub fn cpu(&self) -> Duration {
        let stat = read(Path::new(&format!("/proc/{}/stat", self.pid())));
        // Fields after the command's closing parenthesis; user and system time are the 14th and 15th of all.
        let ticks: u64 = stat
            .rsplit(") ")
            .next()
            .map(|rest| rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
            .unwrap_or(0);
        // USER_HZ is 100 on every architecture that we run on.
        Duration::from_millis(ticks * 10)
    }
}

/// Sum of Prometheus samples.
pub fn sum(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let samples = metrics.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Runs `weft`, which must succeed.
pub fn weft(args: &[&str]) -> Output {
    let output = Command::new(binary("weft")).args(args).output().expect("start weft");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "weft {}: {}", args.join(" "), error.trim());
    output
}

/// Waits until `done`, at most `timeout`.
pub fn wait_until(timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + timeout;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        sleep(Duration::from_millis(10));
    }
}

/// Status and body, in the namespace of the calling thread.
fn http_get(addr: &str, path: &str) -> Option<(u16, String)> {
    let mut conn = TcpStream::connect(addr).ok()?;
    conn.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(conn, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    conn.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()))
}

fn log_file(path: &Path) -> File {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap_or_else(|e| panic!("open {}: {e}", path.display()))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn text(path: &Path) -> String {
    path.to_str().expect("our own paths are UTF-8").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_label() {
        let text = "# HELP a x\na{b=\"1\",c=\"2\"} 3\na{b=\"1\"} 4\naa{b=\"1\"} 5\n";
        assert_eq!(sum(text, "a", &["b=\"1\""]), 7.0);
        assert_eq!(sum(text, "a", &["c=\"2\""]), 3.0);
    }
}
