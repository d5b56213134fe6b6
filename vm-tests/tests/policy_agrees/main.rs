//! Real packets agree with `weft policy explain`: random policies of all languages on two nodes, and for each set many
//! flows (TCP, UDP and ping; both families; pods of one node, pods of two nodes, the node itself, strangers). What
//! happened to each is what the evaluator says, and what is denied is told by `weft observe` with the policy and the rule
//! that the evaluator names.

mod random;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use random::Random;
use serde_json::{Value, json};
use vm_tests::agent::wait_until;
use vm_tests::{Mesh, Pod, Process, manifests, on_host};
use weft_policy::model::layer::icmp_port;
use weft_policy::{Flow, Model, ObjectStore, Peer, Settings, Verdict};

/// Flows of a run: as many as the datapath's rate limit of events lets pass quickly, and on emulated machines fewer.
fn wanted() -> usize {
    if on_host() { 2100 } else { 150 }
}
/// Flows of one set of policies that are denied: below [`weft_datapath::event::RATE_LIMIT`], so that each is told.
const DENIED: usize = 90;
const FLOWS: usize = 160;
/// More sets than any run needs.
const SETS: usize = 60;
/// The rate limit's window, and some.
const PACE: Duration = Duration::from_millis(1100);

const SERVED: &[(&str, u16)] =
    &[("tcp", 8080), ("tcp", 8081), ("tcp", 8500), ("udp", 5353), ("udp", 5354), ("udp", 8500), ("icmp", 0)];

/// Who begins or takes flows.
struct End {
    /// `namespace/name` for a workload; empty for a stranger and for the node.
    workload: String,
    addrs: [IpAddr; 2],
    node: usize,
    kind: Kind,
    caller: Process,
    _server: Option<Process>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Workload,
    Stranger,
    Node,
}

/// One flow: positions of its ends, family (0 is IPv4), position in [`SERVED`].
type Asked = (usize, usize, usize, usize);

/// What the evaluator says of it.
struct Expected {
    allowed: bool,
    /// As `explain` writes it; empty for a default.
    rule: String,
}

fn end(pod: &Pod, node: usize, workload: &str) -> End {
    let listeners: Vec<String> = SERVED
        .iter()
        .filter(|(protocol, _)| *protocol != "icmp")
        .map(|(protocol, port)| format!("{}=[::]:{port}", if *protocol == "tcp" { "whoami" } else { "udp" }))
        .collect();
    End {
        workload: workload.to_owned(),
        addrs: pod.addrs(),
        node,
        kind: if workload.is_empty() { Kind::Stranger } else { Kind::Workload },
        caller: Process::load(&pod.place, "flows"),
        _server: Some(Process::serve(&pod.place, &listeners.join(" "))),
    }
}

/// Does the datapath have a way for it that policy alone decides?
fn possible(from: &End, to: &End, protocol: &str) -> bool {
    match (from.kind, to.kind) {
        // Datagrams between workloads of two nodes have no tunnel: design, not policy.
        (Kind::Workload, Kind::Workload) => from.node == to.node || protocol == "tcp",
        (Kind::Workload, Kind::Stranger) | (Kind::Stranger, Kind::Workload) => true,
        (Kind::Node, Kind::Workload) => from.node == to.node,
        _ => false,
    }
}

fn expected(model: &Model, ends: &[End], (from, to, family, served): Asked) -> Expected {
    let peer = |end: &End| match end.kind {
        Kind::Node => (Peer::Node, end.addrs[family]),
        Kind::Stranger => (Peer::Anonymous, end.addrs[family]),
        Kind::Workload => {
            let (namespace, name) = end.workload.split_once('/').expect("namespace/name");
            let workload = model.workload(namespace, name).expect("it is in the manifests");
            (Peer::Workload(&workload.identity), end.addrs[family])
        }
    };
    let ((source, source_addr), (destination, destination_addr)) = (peer(&ends[from]), peer(&ends[to]));
    let (protocol, port) = match (SERVED[served].0, family) {
        ("tcp", _) => (6, SERVED[served].1),
        ("udp", _) => (17, SERVED[served].1),
        (_, 0) => (1, icmp_port(8)),
        _ => (58, icmp_port(128)),
    };
    let flow = Flow { source, source_addr, destination, destination_addr, protocol, port, request: None };
    let mut decision = model.explain(&flow).decision;
    // Where egress waits for HTTP and ingress denies, `explain` names the denial; the packet is refused by the first.
    let outward = model.eval_egress(&flow);
    if outward.verdict == Verdict::Http {
        decision = outward;
    }
    Expected {
        allowed: decision.verdict == Verdict::Allow,
        rule: decision.rule.map_or_else(String::new, |rule| rule.to_string()),
    }
}

/// Lets the flows happen, all at once; which of them worked.
fn happen(ends: &mut [End], flows: &[Asked], timeout: Duration) -> Vec<String> {
    let mut answers = vec![String::new(); flows.len()];
    let own = |at: usize| flows.iter().enumerate().filter(move |(_, flow)| flow.0 == at);
    for at in 0..ends.len() {
        let list: Vec<Value> = own(at)
            .map(|(_, (_, to, family, served))| {
                let (protocol, port) = SERVED[*served];
                let addr = SocketAddr::new(ends[*to].addrs[*family], port);
                json!([protocol, addr.to_string(), timeout.as_millis() as u64])
            })
            .collect();
        ends[at].caller.tell(&Value::from(list).to_string());
    }
    for (at, end) in ends.iter_mut().enumerate() {
        let line = end.caller.line();
        for ((index, _), answer) in own(at).zip(line.as_array().expect("a list of answers")) {
            answers[index] = answer.as_str().expect("a text").to_owned();
        }
    }
    answers
}

/// What an event says about who, whom, how and which rule, or nothing if it is about something else.
fn told(event: &Value, ends: &[End]) -> Vec<(usize, usize, usize, usize, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (policy, rule) = (text(&event["policy"]), text(&event["rule"]));
    let rule = match (policy.is_empty(), rule.contains('[')) {
        (true, _) => String::new(),
        (_, true) => format!("{policy} {rule}"),
        _ => format!("{policy} ({rule})"),
    };
    let is = |end: &End, party: &Value| {
        let addr = text(&party["address"]);
        // A connect hook is called before the socket has an address.
        let addr = addr.parse::<IpAddr>().ok().filter(|addr| !addr.is_unspecified());
        text(&party["workload"]) == end.workload && addr.is_none_or(|addr| end.addrs.contains(&addr))
    };
    let to_addr: Option<IpAddr> = text(&event["to"]["address"]).parse().ok();
    let mut found = Vec::new();
    for (from, source) in ends.iter().enumerate() {
        for (to, destination) in ends.iter().enumerate() {
            if !is(source, &event["from"]) || !is(destination, &event["to"]) {
                continue;
            }
            for (served, (protocol, port)) in SERVED.iter().enumerate() {
                let family = destination.addrs.iter().position(|own| Some(*own) == to_addr);
                let same_port = *protocol == "icmp" || event["to"]["port"] == *port;
                if let (true, true, Some(family)) =
                    (same_port, text(&event["protocol"]).starts_with(protocol), family)
                {
                    found.push((from, to, family, served, rule.clone()));
                }
            }
        }
    }
    found
}

fn describe(ends: &[End], (from, to, family, served): Asked) -> String {
    let name = |end: &End| match end.kind {
        Kind::Workload => end.workload.clone(),
        Kind::Stranger => "stranger".to_owned(),
        Kind::Node => "node".to_owned(),
    };
    let (protocol, port) = SERVED[served];
    let addr = ends[to].addrs[family];
    format!("{} -> {} ({addr}) {protocol} {port}", name(&ends[from]), name(&ends[to]))
}

#[test]
fn real_flows_are_as_explained() {
    let (seed, mut random) = Random::new();
    println!("WEFT_SEED={seed}");
    let mut mesh = Mesh::two();
    let pods: Vec<(Pod, usize, &str, &str)> = [
        ("a", 0, "default", "red"),
        ("b", 0, "default", "blue"),
        ("c", 0, "prod", "red"),
        ("d", 1, "default", "blue"),
        ("e", 1, "prod", "red"),
    ]
    .map(|(name, node, namespace, tier)| (mesh.stranger(node, name), node, namespace, tier))
    .into();
    let stranger = mesh.stranger(0, "stranger");
    for (pod, _, namespace, tier) in &pods {
        let text = manifests::pod(pod, namespace)
            .replace(
                &format!("    app: {}\n", pod.name),
                &format!("    app: {}\n    tier: {tier}\n", pod.name),
            )
            .replace("    image: none\n", "    image: none\n    ports: [{name: web, containerPort: 8081}]\n");
        mesh.manifests.put(&format!("pod-{}", pod.name), &text);
    }
    mesh.manifests.remove("mode");
    mesh.start();
    let mut ends: Vec<End> =
        pods.iter().map(|(pod, node, ns, _)| end(pod, *node, &format!("{ns}/{}", pod.name))).collect();
    ends.push(end(&stranger, 0, ""));
    let node = &mesh.nodes[0];
    ends.push(End {
        workload: String::new(),
        addrs: [node.v4().into(), node.v6().into()],
        node: 0,
        kind: Kind::Node,
        caller: Process::load(&node.place("kubelet"), "flows"),
        _server: None,
    });
    let mut observers: Vec<Process> =
        mesh.agents.iter().zip(&mesh.nodes).map(|(agent, node)| agent.observe(node)).collect();

    let possible: Vec<Asked> = (0..ends.len())
        .flat_map(|from| (0..ends.len()).map(move |to| (from, to)))
        .flat_map(|(from, to)| (0..2).map(move |family| (from, to, family)))
        .flat_map(|(from, to, family)| (0..SERVED.len()).map(move |served| (from, to, family, served)))
        .filter(|(from, to, _, served)| from != to && possible(&ends[*from], &ends[*to], SERVED[*served].0))
        .collect();

    let timeout = Duration::from_millis(if on_host() { 300 } else { 2000 });
    let (mut count, mut denied, mut tunnelled, mut again, mut unenforceable) = (0, 0, 0, 0, 0);
    let mut last = Instant::now();
    // One set may deny nothing or all of its flows, so that a run of few sets can want another.
    let telling = |count: usize, denied: usize| denied * 10 > count && denied * 10 < count * 9;
    for round in 0.. {
        if count >= wanted() && telling(count, denied) {
            break;
        }
        assert!(round < SETS, "{denied} of {count} denied says little");
        let model = apply(&mesh, &mut random, round);
        unenforceable += model.blocked().len();
        assert!(unenforceable * 4 <= 3 + round, "the generator writes too much that cannot be enforced");
        let mut flows: Vec<(Asked, Expected)> = Vec::new();
        let (mut seen, mut refused) = (BTreeSet::new(), 0);
        for _ in 0..FLOWS * 2 {
            let flow = possible[random.below(possible.len())];
            if flows.len() < FLOWS && refused < DENIED && seen.insert(flow) {
                let expected = expected(&model, &ends, flow);
                refused += usize::from(!expected.allowed);
                flows.push((flow, expected));
            }
        }
        std::thread::sleep(PACE.saturating_sub(last.elapsed()));
        let asked: Vec<Asked> = flows.iter().map(|(flow, _)| *flow).collect();
        let mut answers = happen(&mut ends, &asked, timeout);
        last = Instant::now();
        // On a loaded machine what may pass can take long. What may not must not pass however long it takes.
        let slow: Vec<usize> =
            (0..flows.len()).filter(|at| flows[*at].1.allowed && answers[*at] != "ok").collect();
        if !slow.is_empty() {
            let asked: Vec<Asked> = slow.iter().map(|at| flows[*at].0).collect();
            for (at, answer) in slow.iter().zip(happen(&mut ends, &asked, Duration::from_secs(10))) {
                answers[*at] = answer;
            }
            again += slow.len();
        }
        let mut wrong = String::new();
        for ((flow, expected), answer) in flows.iter().zip(&answers) {
            if expected.allowed != (answer == "ok") {
                let what = if expected.allowed { "allowed" } else { "denied" };
                let _ = writeln!(
                    wrong,
                    "{}: {what} by {:?}, but {answer}",
                    describe(&ends, *flow),
                    expected.rule
                );
            }
        }
        let mut missing: Vec<&(Asked, Expected)> =
            flows.iter().filter(|(_, expected)| !expected.allowed).collect();
        let mut events: Vec<Value> = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        while !missing.is_empty() && wrong.is_empty() && Instant::now() < deadline {
            for observer in &mut observers {
                while let Some(event) = observer.line_within(Duration::from_millis(20)) {
                    for (from, to, family, served, rule) in told(&event, &ends) {
                        missing.retain(|(flow, by)| *flow != (from, to, family, served) || by.rule != rule);
                    }
                    events.push(event);
                }
            }
        }
        if !wrong.is_empty() {
            missing.clear();
        }
        for (flow, expected) in missing {
            let place = describe(&ends, *flow);
            let _ = writeln!(wrong, "{place}: no event says that {:?} denied it", expected.rule);
            let near = |event: &&Value| told(event, &ends).iter().any(|t| (t.0, t.1, t.2, t.3) == *flow);
            events.iter().filter(near).for_each(|event| _ = writeln!(wrong, "  but {event}"));
        }
        let policies = std::fs::read_to_string(mesh.manifests.path().join("random.yaml")).unwrap_or_default();
        assert!(wrong.is_empty(), "WEFT_SEED={seed}, set {round}:\n{wrong}\n{policies}");
        count += flows.len();
        denied += refused;
        tunnelled += flows
            .iter()
            .filter(|((from, to, ..), _)| {
                ends[*from].node != ends[*to].node
                    && ends[*from].kind == Kind::Workload
                    && ends[*to].kind == Kind::Workload
            })
            .count();
    }
    println!(
        "{count} flows, {denied} denied, {tunnelled} between nodes, {again} tried again, {unenforceable} policies that \
         cannot be enforced"
    );
    assert!(tunnelled * 20 > count, "only {tunnelled} of {count} between nodes");
}

/// Puts a random set of policies in force; the model of what then stands in the manifests.
fn apply(mesh: &Mesh, random: &mut Random, round: usize) -> Model {
    let mut objects = random.policies(&format!("set{round}"));
    // It selects nobody; that it is listed says that the set is in force.
    let marker = format!("in-force-{round}");
    objects.push(format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {marker}, namespace: nobody}}\n\
         spec: {{podSelector: {{}}, policyTypes: [Ingress]}}\n"
    ));
    mesh.manifests.put("random", &objects.join("---\n"));
    for agent in &mesh.agents {
        let in_force = wait_until(Duration::from_secs(30), || {
            let answer = agent.ask("policies -o json");
            String::from_utf8_lossy(&answer.stdout).contains(&format!("\"{marker}\""))
        });
        assert!(in_force, "set {round} never came into force:\n{}", agent.log());
    }
    let mut store = ObjectStore::new();
    let dir = std::fs::read_dir(mesh.manifests.path()).expect("the manifests' directory");
    let mut files: Vec<_> = dir.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "yaml"));
    files.sort();
    for path in files {
        let text = std::fs::read_to_string(&path).expect("a manifest");
        store.apply(&path.file_name().expect("a file").to_string_lossy(), &text);
    }
    store.model(Settings::default())
}
