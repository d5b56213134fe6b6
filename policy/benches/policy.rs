//! How long and how large: 10,000 policies over 10,000 workloads, and one verdict. `cargo bench -p weft-policy` prints the
//! table of README.md; each world is measured in a process of its own, whose peak of memory is counted.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::hint::black_box;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_datapath::abi::{
    Addr, Backend, Endpoint, Netns, PolicyKey, PolicyValue, Service, ServiceKey, Subject, SubjectKey,
};
use weft_datapath::policy::{self, ALLOW, Access};
use weft_datapath::tables::Tables as Lookup;
use weft_policy::compile::Numbers;
use weft_policy::model::cidr::addr;
use weft_policy::{Engine, Identity, Model, ObjectStore, Settings, Tables, compile};

const COUNT: usize = 10_000;
const ROUNDS: usize = 9;
/// Questions that are asked for one figure of `decide`.
const QUESTIONS: usize = 1_000_000;

/// A world: what it is called, its manifests, and the entries that its policies need.
struct World {
    name: &'static str,
    manifests: fn() -> Vec<String>,
    entries: usize,
    /// A pod, and a policy, in a version of this number.
    changed: [fn(usize) -> String; 2],
}

const WORLDS: [World; 2] = [
    // For each destination: a row for all, and one for the caller that may (any other port, and the port).
    World {
        name: "AuthorizationPolicy, 100 namespaces",
        manifests: authorization,
        entries: COUNT * 3,
        changed: [
            |version| {
                format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: one, namespace: n7, labels: {{app: a7, v: v{version}}}}}\nspec: {{serviceAccountName: s8}}\nstatus: {{podIP: 10.200.0.1}}\n"
                )
            },
            |version| {
                format!(
                    "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: one, namespace: n7}}\nspec: {{selector: {{matchLabels: {{app: a7}}}}, rules: [{{from: [{{source: {{ipBlocks: [10.201.{}.0/24]}}}}]}}]}}\n",
                    version % 250
                )
            },
        ],
    },
    // Both ways: any peer, the node, and one peer with its port. Egress once more in the class, where all are allowed, and
    // the peer by another rule.
    World {
        name: "NetworkPolicy both ways, one namespace",
        manifests: network,
        entries: COUNT * (4 + 4 + 1 + 2),
        changed: [
            |version| {
                format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: one, labels: {{app: a7, v: v{version}}}}}\nspec: {{serviceAccountName: s8}}\nstatus: {{podIP: 10.200.0.1}}\n"
                )
            },
            |version| {
                format!(
                    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: one}}\nspec: {{podSelector: {{matchLabels: {{app: a7}}}}, ingress: [{{from: [{{ipBlock: {{cidr: 10.201.{}.0/24}}}}]}}]}}\n",
                    version % 250
                )
            },
        ],
    },
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let chosen =
        args.iter().position(|arg| arg == "--world").and_then(|at| args.get(at + 1)?.parse::<usize>().ok());
    if let Some(number) = chosen {
        println!("{}", measure(&WORLDS[number]));
        return;
    }
    println!(
        "| 10,000 policies, 10,000 workloads | model | compile | entries | peak memory | one pod | one policy | one verdict |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for number in 0..WORLDS.len() {
        let own = std::env::current_exe().expect("a program knows itself");
        let output = Command::new(own).args(["--world", &number.to_string()]).output().expect("start itself");
        print!("{}", String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn measure(world: &World) -> String {
    let mut store = ObjectStore::new();
    for (number, text) in (world.manifests)().iter().enumerate() {
        store.apply(&format!("{number}.yaml"), text);
    }
    let mut model = Model::default();
    let modelled = median(|| model = store.model(Settings::default()));
    assert_eq!(model.problems(), [], "the world is sound");
    let numbers: Numbers = model.identities().into_iter().zip(16..).collect();
    let mut tables = Tables::default();
    let compiled = median(|| tables = compile(&model, &numbers));
    let entries = tables.policies.len();
    assert_eq!(entries, world.entries);
    let memory = peak_of_memory();
    let verdict = verdict(&tables, &model, &numbers);
    drop((store, model, tables));
    let [pod, policy] = changes(world);
    format!(
        "| {} | {:.2} s | {:.2} s | {} | {memory} MB | {:.1} ms | {:.1} ms | {} ns |",
        world.name,
        modelled.as_secs_f64(),
        compiled.as_secs_f64(),
        entries,
        pod.as_secs_f64() * 1e3,
        policy.as_secs_f64() * 1e3,
        verdict.as_nanos()
    )
}

/// From the text of one changed file to the difference of the tables: for a pod that comes, changes and goes, and for a
/// policy that does.
fn changes(world: &World) -> [Duration; 2] {
    let mut engine = Engine::new(Settings::default());
    for (number, text) in (world.manifests)().iter().enumerate() {
        engine.apply(&format!("{number}.yaml"), text);
    }
    let mut numbers = BTreeMap::new();
    let mut number = |identity: &Arc<Identity>| {
        let next = 16 + numbers.len() as u32;
        Some(*numbers.entry(identity.clone()).or_insert(next))
    };
    engine.update(&mut number);
    let restarts = engine.restarts();
    let mut version = 0;
    let times = world.changed.map(|text| {
        median(|| {
            version += 1;
            match version % 3 {
                0 => engine.remove("one.yaml"),
                _ => drop(engine.apply("one.yaml", &text(version)).len()),
            }
            let diff = engine.update(&mut number);
            assert!(!diff.policies.is_empty(), "it matters");
        })
    });
    assert_eq!(engine.restarts(), restarts, "no change begins from nothing");
    times
}

fn median(mut work: impl FnMut()) -> Duration {
    let mut rounds: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed()
        })
        .collect();
    rounds.sort();
    rounds[ROUNDS / 2]
}

/// In MB, of this process.
fn peak_of_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

/// Time of one `decide` that finds a row which allows, over hash tables as the kernel has them.
fn verdict(tables: &Tables, model: &Model, numbers: &Numbers) -> Duration {
    let hashed = Hashed {
        subjects: tables.subjects.iter().map(|(key, value)| (*key, *value)).collect(),
        policies: tables.policies.iter().map(|(key, value)| (*key, *value)).collect(),
    };
    let number = |workload: &weft_policy::Workload| numbers[&workload.identity];
    let workloads = model.workloads();
    let access = |from: usize, to: usize| Access {
        source: number(&workloads[from]),
        source_addr: addr(workloads[from].addresses[0]),
        destination: number(&workloads[to]),
        destination_addr: addr(workloads[to].addresses[0]),
        protocol: 6,
        port: 80,
    };
    let allowed = |access: &Access| policy::decide(&hashed, access).verdict == ALLOW;
    // The callers that the policies name are near in number; a few hundred pairs stay in the cache as a node's do.
    let near = |from: usize| (0..200).map(move |step| (from, step)).filter(move |(from, to)| from != to);
    let hits: Vec<Access> =
        (0..200).flat_map(near).map(|(from, to)| access(from, to)).filter(|access| allowed(access)).collect();
    assert!(!hits.is_empty(), "nobody may reach anybody");
    let time = median(|| {
        let mut questions = hits.iter().cycle();
        for _ in 0..QUESTIONS {
            black_box(policy::decide(&hashed, black_box(questions.next().expect("a cycle has no end"))));
        }
    });
    time / QUESTIONS as u32
}

struct Hashed {
    subjects: HashMap<SubjectKey, Subject>,
    policies: HashMap<PolicyKey, PolicyValue>,
}

impl Lookup for Hashed {
    fn revision(&self) -> u32 {
        0
    }
    fn subject(&self, bank: u32, identity: u32) -> Option<Subject> {
        self.subjects.get(&SubjectKey { bank, identity }).copied()
    }
    fn policy(&self, key: &PolicyKey) -> Option<PolicyValue> {
        self.policies.get(key).copied()
    }
    // A verdict on two workloads asks for nothing else here: no rule of these worlds names their addresses.
    fn class(&self, _bank: u32, _addr: &Addr) -> u32 {
        0
    }
    fn port_mode(&self, _bank: u32, _identity: u32, _port: u16) -> Option<u32> {
        None
    }
    fn endpoint(&self, _addr: &Addr) -> Option<Endpoint> {
        None
    }
    fn netns(&self, _cookie: u64) -> Option<Netns> {
        None
    }
    fn inside(&self, _addr: &Addr) -> bool {
        false
    }
    fn is_node_addr(&self, _addr: &Addr) -> bool {
        false
    }
    fn service(&self, _key: &ServiceKey) -> Option<Service> {
        None
    }
    fn backend(&self, _service: &Service, _slot: u32) -> Option<Backend> {
        None
    }
}

/// Each workload may be reached by its neighbour of the same namespace.
fn authorization() -> Vec<String> {
    const EACH: usize = 100;
    let namespace = |ns: usize| {
        let mut text = String::new();
        for n in 0..EACH {
            let _ = write!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, namespace: n{ns}, labels: {{app: a{n}}}}}\nspec: \
                 {{serviceAccountName: s{n}}}\nstatus: {{podIP: 10.{ns}.0.{}}}\n---\napiVersion: \
                 security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{n}, namespace: n{ns}}}\nspec: \
                 {{selector: {{matchLabels: {{app: a{n}}}}}, rules: [{{from: [{{source: {{principals: \
                 [\"cluster.local/ns/n{ns}/sa/s{}\"]}}}}], to: [{{operation: {{ports: [\"80\"]}}}}]}}]}}\n",
                n + 1,
                (n + 1) % EACH
            );
        }
        text
    };
    (0..COUNT / EACH).map(namespace).collect()
}

/// All in one namespace, which is the worst case for choosing the policies of a workload: each may be reached by its
/// neighbour, may reach its other neighbour, and a range outside.
fn network() -> Vec<String> {
    let mut text = String::new();
    for n in 0..COUNT {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, labels: {{app: a{n}}}}}\nspec: {{serviceAccountName: \
             s{n}}}\nstatus: {{podIP: 10.0.{}.{}}}\n---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: \
             {{name: p{n}}}\nspec:\n  podSelector: {{matchLabels: {{app: a{n}}}}}\n  policyTypes: [Ingress, Egress]\n  ingress: \
             [{{from: [{{podSelector: {{matchLabels: {{app: a{}}}}}}}], ports: [{{port: 80}}]}}]\n  egress: [{{to: [{{podSelector: \
             {{matchLabels: {{app: a{}}}}}}}], ports: [{{port: 80}}]}}, {{to: [{{ipBlock: {{cidr: 192.168.{}.0/24}}}}]}}]\n",
            n / 250,
            n % 250 + 1,
            (n + 1) % COUNT,
            (n + COUNT - 1) % COUNT,
            n % 200
        );
    }
    vec![text]
}
