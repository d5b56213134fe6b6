//! The usual scene: one or two nodes with their agents, one CA, one directory of manifests.

use std::time::Duration;

use serde_json::Value;

use crate::agent::{Agent, Ca, wait_until};
use crate::manifests::{self, Manifests};
use crate::node::{Node, Pod};
use crate::process::{Process, load};

/// Nodes with agents. Fields are dropped in this order: agents before the ground that they stand on.
#[derive(Debug)]
pub struct Mesh {
    /// One agent per node, once started.
    pub agents: Vec<Agent>,
    ca: Option<Ca>,
    /// What the agents and the CA watch.
    pub manifests: Manifests,
    /// The nodes.
    pub nodes: Vec<Node>,
}

impl Mesh {
    /// One node; nothing runs yet.
    pub fn one() -> Mesh {
        Mesh::on(vec![Node::create(1)])
    }

    /// Two nodes with a link; nothing runs yet.
    pub fn two() -> Mesh {
        let (one, two) = Node::pair();
        Mesh::on(vec![one, two])
    }

    fn on(nodes: Vec<Node>) -> Mesh {
        let manifests = Manifests::create();
        manifests.mode("STRICT");
        Mesh { agents: Vec::new(), ca: None, manifests, nodes }
    }

    /// A pod on a node (counted from 0) that the manifests know.
    pub fn pod(&self, node: usize, name: &str) -> Pod {
        let pod = self.stranger(node, name);
        self.manifests.pod(&pod);
        pod
    }

    /// A pod that no manifest knows.
    pub fn stranger(&self, node: usize, name: &str) -> Pod {
        self.nodes[node].pod(name)
    }

    /// Starts the CA and the agents, and waits until each has enrolled what is in the manifests.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// As [`Mesh::start`], with more arguments for the agents.
    pub fn start_with(&mut self, more: &[&str]) {
        let ca = Ca::start(&self.nodes[0], &self.manifests);
        self.agents = self.nodes.iter().map(|node| Agent::launch(node, &self.manifests, &ca, more)).collect();
        for (agent, node) in self.agents.iter_mut().zip(&self.nodes) {
            agent.wait_ready(node.netns());
        }
        self.ca = Some(ca);
    }

    /// The CA, once started.
    pub fn ca(&self) -> &Ca {
        self.ca.as_ref().expect("the mesh was started")
    }

    /// Starts the agent of a node anew, after it was killed or ended.
    pub fn restart(&mut self, node: usize) {
        self.agents[node] = Agent::start(&self.nodes[node], &self.manifests, self.ca());
    }

    /// The sum of a metric over all agents.
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        self.agents
            .iter()
            .zip(&self.nodes)
            .map(|(agent, node)| agent.metric(node.netns(), name, labels))
            .sum()
    }

    /// Packets and calls that the datapath refused for `reason`, on all nodes.
    pub fn drops(&self, reason: &str) -> f64 {
        self.metric("weft_drops_total", &[&format!("reason=\"{reason}\"")])
    }

    /// Allows exactly these pods to reach `to`, on these ports (none: every port).
    pub fn allow(&self, to: &Pod, from: &[&Pod], ports: &[u16]) {
        let rule = manifests::from_pods(from, ports);
        let rules: &[&str] = if from.is_empty() { &[] } else { &[&rule] };
        let policy = manifests::authorization(&format!("allow-{}", to.name), &to.name, "ALLOW", rules);
        self.manifests.put(&format!("allow-{}", to.name), &policy);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // A failed scenario is explained by its agents.
        if std::thread::panicking() {
            for (agent, node) in self.agents.iter().zip(&self.nodes) {
                eprintln!("--- agent of {}:\n{}", node.name(), tail(&agent.log(), 40));
            }
        }
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Dials once; see `wt-load connect`.
pub fn dial(from: &Pod, words: &str) -> Value {
    load(&from.place, &format!("connect {words}"))
}

/// Dials until the answer is `expected`: for the time between a manifest's change and its effect.
pub fn dial_until(from: &Pod, words: &str, expected: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    wait_until(Duration::from_secs(5), || {
        last = dial(from, words);
        expected(&last)
    });
    last
}

/// Did the connection work to its end?
pub fn worked(result: &Value) -> bool {
    result["connect"] == "ok" && result["end"] == "eof" && result["answer"] != ""
}

/// The six patterns of `wt-load`.
pub const PATTERNS: [&str; 6] =
    ["half-close", "server-first", "close-at-once", "chunked", "full-duplex", "late-reader"];
const PATTERN_PORT: u16 = 9000;

/// Serves all patterns in a pod, from port 9000 on.
pub fn serve_patterns(pod: &Pod) -> Process {
    let listeners = PATTERNS.iter().zip(PATTERN_PORT..).map(|(name, port)| format!("{name}=[::]:{port}"));
    Process::serve(&pod.place, &listeners.collect::<Vec<_>>().join(" "))
}

/// Runs `count` connections of each pattern in each family, and checks that both ends saw every byte.
pub fn check_patterns(from: &Pod, to: &Pod, server: &mut Process, count: u64, parallel: u64) {
    let before = server.totals()["good"].as_u64().expect("a count");
    for (name, port) in PATTERNS.iter().zip(PATTERN_PORT..) {
        for addr in [to.at4(port), to.at6(port)] {
            let words = format!("pattern {name} {addr} --count {count} --parallel {parallel}");
            let result = load(&from.place, &words);
            assert_eq!(result["errors"], 0, "{name} to {addr}: {result}");
        }
    }
    let expected = before + count * 2 * PATTERNS.len() as u64;
    // Who closes at once does not wait for the server to have read.
    let mut totals = Value::Null;
    let settled = wait_until(Duration::from_secs(20), || {
        totals = server.totals();
        totals["good"] == expected && totals["bad"] == 0
    });
    assert!(settled, "{expected} connections, but the server says {totals}");
}
