//! Nodes, pods, manifests, agents: what the demo stands on.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use vm_tests::process::{Place, Process, binary};
use vm_tests::{Agent, Ca, Manifests, Node, Pod};

use super::server;
use crate::tree;

/// The examples that the demo applies, as a user would.
const EXAMPLES: &str = "deploy/examples/demo";
/// Files in it that every agent gets, beside the policies.
const MANIFESTS: &[&str] = &["mesh", "pods", "services", "policy-catalog", "policy-cache"];

/// Two nodes with two pods each. Fields are dropped in this order: agents before the ground under them.
pub(super) struct Ground {
    pub(super) agents: Vec<Agent>,
    ca: Option<Ca>,
    pub(super) manifests: Manifests,
    /// Node 1: reads from both servers.
    pub(super) frontend: Pod,
    /// Node 1: nginx.
    pub(super) catalog: Pod,
    /// Node 2: redis.
    pub(super) cache: Pod,
    /// Node 2: may read the catalog, not the cache.
    pub(super) batch: Pod,
    pub(super) nodes: [Node; 2],
}

impl Ground {
    /// The ground without weft. The order of the pods gives them the addresses that the examples say.
    pub(super) fn build() -> Ground {
        let (one, two) = Node::pair();
        let (frontend, catalog) = (one.pod("frontend"), one.pod("catalog"));
        let (cache, batch) = (two.pod("cache"), two.pod("batch"));
        let manifests = Manifests::create();
        let ground = Ground {
            agents: Vec::new(),
            ca: None,
            manifests,
            frontend,
            catalog,
            cache,
            batch,
            nodes: [one, two],
        };
        MANIFESTS.iter().for_each(|name| ground.apply(name, &ground.example(name)));
        ground
    }

    /// An example's text, with the names that this run's namespaces have.
    pub(super) fn example(&self, name: &str) -> String {
        let file = tree::root().join(EXAMPLES).join(name).with_extension("yaml");
        let mut text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("read {}: {e}", file.display()));
        for pod in self.pods() {
            let named = format!("/run/netns/{}\n", pod.name);
            text = text.replace(&named, &format!("{}\n", pod.place.netns.display()));
        }
        text
    }

    /// Puts a manifest where the agents watch.
    pub(super) fn apply(&self, name: &str, text: &str) {
        self.manifests.put(name, text);
    }

    pub(super) fn pods(&self) -> [&Pod; 4] {
        [&self.frontend, &self.catalog, &self.cache, &self.batch]
    }

    /// The agent and the node of a pod.
    pub(super) fn agent_of(&self, pod: &Pod) -> (&Agent, &Node) {
        let at = self
            .nodes
            .iter()
            .position(|node| node.name() == pod.node)
            .expect("every pod is on one of our nodes");
        (&self.agents[at], &self.nodes[at])
    }

    /// Starts the two servers.
    pub(super) fn serve(&self) -> [Process; 2] {
        [server::nginx(self), server::redis(self)]
    }

    /// Starts the authority and the agents, and waits until both are ready.
    pub(super) fn enrol(&mut self) {
        let ca = Ca::start(&self.nodes[0], &self.manifests);
        self.agents = self.nodes.iter().map(|node| Agent::start(node, &self.manifests, &ca)).collect();
        self.ca = Some(ca);
    }

    /// Where files of node 1 live.
    pub(super) fn dir(&self) -> &Path {
        self.nodes[0].dir()
    }

    /// What to type to look around.
    pub(super) fn guide(&self) -> String {
        let mut text = String::from("It is running. To look around:\n");
        for (agent, node) in self.agents.iter().zip(&self.nodes) {
            let weft = binary("weft");
            let socket = node.dir().join("agent.sock");
            text += &format!("  {} status --admin-socket {}\n", weft.display(), socket.display());
            text += &format!("  tail -f {}\n", agent.log_path().display());
        }
        let exec = binary("wt-load");
        let place = &self.frontend.place;
        text += &format!(
            "  {} exec {} {} curl -s http://10.96.0.10/    (as frontend)\n",
            exec.display(),
            place.netns.display(),
            place.cgroup.display()
        );
        text + &format!("  edit {}/policy-cache.yaml", self.manifests.path().display())
    }
}

/// Runs a program to its end where a workload would: in its namespace and cgroup.
pub(super) fn exec(place: &Place, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(binary("wt-load"));
    command.arg("exec").arg(&place.netns).arg(&place.cgroup).arg(path(program)).args(args);
    command.output().expect("start wt-load")
}

/// Starts a program that stays; its stderr goes to `log`.
pub(super) fn start(place: &Place, program: &str, args: &[&str], log: &Path) -> Process {
    let log = fs::File::create(log).unwrap_or_else(|e| panic!("create {}: {e}", log.display()));
    Process::spawn(place, &path(program), args, Some(log))
}

fn path(program: &str) -> std::path::PathBuf {
    tree::program(program).unwrap_or_else(|| panic!("{program} is not installed: run `cargo xtask setup`"))
}
