//! Conformance cases of network policies (tests/cases/{network,cilium,admin,grids}.txt), each asked of the evaluator and
//! of the tables that the kernel reads.

use weft_datapath::identity::{ANONYMOUS, FIRST_WORKLOAD, NODE};
use weft_datapath::policy::{self, Access};
use weft_policy::model::{cidr, layer::icmp_port};
use weft_policy::{Decision, Flow, Model, ObjectStore, Peer, Settings, Tables, Verdict, compile};

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 3] = ["a", "b", "c"];

/// As the testers of network policies build it: nine pods, each serving 80 and 81 over three protocols.
fn world() -> String {
    let mut text = String::new();
    for (i, namespace) in NAMESPACES.iter().enumerate() {
        let team = if *namespace == "z" { "" } else { ", team: green" };
        text += &format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{ns: {namespace}{team}}}}}\n---\n"
        );
        for (j, pod) in PODS.iter().enumerate() {
            let web = if (*namespace, *pod) == ("z", "c") { 8080 } else { 80 };
            let mut ports = format!("{{name: web, containerPort: {web}}}");
            for port in [80, 81] {
                for protocol in ["TCP", "UDP", "SCTP"] {
                    let name = format!("serve-{port}-{}", protocol.to_lowercase());
                    ports += &format!(", {{name: {name}, containerPort: {port}, protocol: {protocol}}}");
                }
            }
            text += &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: {namespace}, labels: {{pod: {pod}}}}}\n\
                 spec: {{serviceAccountName: sa-{pod}, containers: [{{name: c, ports: [{ports}]}}]}}\n\
                 status: {{podIP: 10.{}.0.{}}}\n---\n",
                i + 1,
                j + 1
            );
        }
    }
    text
}

fn version(object: &str) -> &'static str {
    let kind = object.trim().strip_prefix("kind: ").and_then(|rest| rest.lines().next()).unwrap();
    match kind {
        "NetworkPolicy" => "networking.k8s.io/v1",
        "ClusterNetworkPolicy" => "policy.networking.k8s.io/v1alpha2",
        "AuthorizationPolicy" => "security.istio.io/v1",
        _ if kind.starts_with("Cilium") => "cilium.io/v2",
        _ => "policy.networking.k8s.io/v1alpha1",
    }
}

/// One case: what is asked of it after the policies are known.
struct Case<'c> {
    title: &'c str,
    model: Model,
    numbers: compile::Numbers,
    tables: Tables,
    lines: &'c str,
}

fn cases(text: &str) -> impl Iterator<Item = Case<'_>> {
    let world = world();
    text.split("\n== ").skip(1).map(move |case| {
        let (title, body) = case.split_once('\n').unwrap();
        let (policies, lines) = match body.strip_prefix("--\n") {
            Some(lines) => ("", lines),
            None => body.rsplit_once("\n--\n").unwrap(),
        };
        let mut store = ObjectStore::new();
        store.apply("world.yaml", &world);
        let objects = policies.split("\n---\n").filter(|object| !object.trim().is_empty());
        let objects: Vec<String> =
            objects.map(|object| format!("apiVersion: {}\n{}\n", version(object), object.trim())).collect();
        store.apply("case.yaml", &objects.join("---\n"));
        let model = store.model(Settings::default());
        let identities = model.identities().into_iter().enumerate();
        let numbers: compile::Numbers =
            identities.map(|(index, identity)| (identity, FIRST_WORKLOAD + index as u32)).collect();
        let tables = compile(&model, &numbers);
        Case { title, model, numbers, tables, lines }
    })
}

/// `x/a`, `node`, `outside@192.0.2.1` or `outside@[2001:db8::1]`.
fn end<'m>(model: &'m Model, text: &str) -> (Peer<'m>, std::net::IpAddr) {
    match text.split_once('@') {
        Some(("outside", addr)) => (Peer::Anonymous, addr.trim_matches(['[', ']']).parse().unwrap()),
        None if text == "node" => (Peer::Node, "10.0.0.254".parse().unwrap()),
        _ => {
            let (namespace, name) = text.split_once('/').unwrap();
            let workload = model.workload(namespace, name).unwrap();
            (Peer::Workload(&workload.identity), workload.addresses[0])
        }
    }
}

/// Protocol and port of `80/TCP` or `8/ICMP`.
fn service(text: &str) -> (u8, u16) {
    let (port, protocol) = text.split_once('/').unwrap();
    match protocol {
        "TCP" => (6, port.parse().unwrap()),
        "UDP" => (17, port.parse().unwrap()),
        "SCTP" => (132, port.parse().unwrap()),
        "ICMP" => (1, icmp_port(port.parse().unwrap())),
        "ICMPv6" => (58, icmp_port(port.parse().unwrap())),
        other => panic!("{other}"),
    }
}

impl Case<'_> {
    fn flow(&self, from: &str, to: &str, service: &str) -> Flow<'_> {
        let (source, source_addr) = end(&self.model, from);
        let (destination, destination_addr) = end(&self.model, to);
        let (protocol, port) = self::service(service);
        Flow { source, source_addr, destination, destination_addr, protocol, port, request: None }
    }

    /// Verdict and rules of the evaluator, which must also be those of the whole flow.
    fn eval(&self, flow: &Flow<'_>) -> String {
        let [out, inn] = [self.model.eval_egress(flow), self.model.eval_ingress(flow)];
        let answer = answer([told(&out), told(&inn)]);
        let whole = self.model.eval(flow);
        assert!(answer.starts_with(verdict(whole.verdict)), "{}: {answer}, {whole:?}", self.title);
        assert_eq!(whole.remedy.is_some(), whole.verdict != Verdict::Allow, "{}: {whole:?}", self.title);
        answer
    }

    /// The same of the tables.
    fn decide(&self, flow: &Flow<'_>) -> String {
        let number = |peer| match peer {
            Peer::Workload(identity) => self.numbers[identity],
            Peer::Node => NODE,
            Peer::Anonymous | Peer::Certified(_) => ANONYMOUS,
        };
        let access = Access {
            source: number(flow.source),
            source_addr: cidr::addr(flow.source_addr),
            destination: number(flow.destination),
            destination_addr: cidr::addr(flow.destination_addr),
            protocol: flow.protocol,
            port: flow.port,
        };
        let told = |value: weft_datapath::abi::PolicyValue| {
            let word = match value.verdict {
                policy::ALLOW => "allow",
                policy::HTTP => "http",
                _ => "deny",
            };
            (word, self.tables.rule(value.rule).map(ToString::to_string))
        };
        answer([
            told(policy::egress(&self.tables, 0, &access)),
            told(policy::ingress(&self.tables, 0, &access)),
        ])
    }

    fn check(&self, from: &str, to: &str, service: &str, expected: &str) {
        let flow = self.flow(from, to, service);
        let asked = format!("{}: {from} -> {to}:{service}", self.title);
        assert_eq!(self.eval(&flow), expected, "{asked}");
        assert_eq!(self.decide(&flow), expected, "tables: {asked}");
    }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
        Verdict::Http => "http",
    }
}

fn told(decision: &Decision) -> (&'static str, Option<String>) {
    (verdict(decision.verdict), decision.rule.as_ref().map(ToString::to_string))
}

/// Both directions as one answer: the first that denies, else the first that needs HTTP, else both.
fn answer(both: [(&'static str, Option<String>); 2]) -> String {
    let one = |word| both.iter().find(|(verdict, _)| *verdict == word);
    let (word, rules) = match one("deny").or(one("http")) {
        Some((word, rule)) => (*word, rule.clone().into_iter().collect()),
        None => ("allow", both.iter().filter_map(|(_, rule)| rule.clone()).collect::<Vec<_>>()),
    };
    if rules.is_empty() { word.to_owned() } else { format!("{word}, {}", rules.join(" + ")) }
}

fn run(text: &str) -> usize {
    let mut flows = 0;
    for case in cases(text) {
        for line in case.lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (from, rest) = line.split_once(" -> ").unwrap();
            let (to, expected) = rest.split_once(" = ").unwrap();
            let (to, service) = to.rsplit_once(':').unwrap();
            case.check(from, to, service, expected);
            flows += 1;
        }
    }
    flows
}

#[test]
fn network() {
    assert!(run(include_str!("cases/network.txt")) > 170);
}

#[test]
fn cilium() {
    assert!(run(include_str!("cases/cilium.txt")) > 140);
}

#[test]
fn admin() {
    assert!(run(include_str!("cases/admin.txt")) > 70);
}

/// A grid has the destinations in its first row and the sources in its first column.
#[test]
fn grids() {
    let mut pairs = 0;
    for case in cases(include_str!("cases/grids.txt")) {
        for grid in case.lines.split("\n\n").map(str::trim).filter(|grid| !grid.is_empty()) {
            let mut lines = grid.lines().filter(|line| !line.starts_with('#'));
            let mut head = lines.next().unwrap().split_whitespace();
            let services: Vec<&str> = head.next().unwrap().split(',').collect();
            let destinations: Vec<&str> = head.collect();
            for line in lines {
                let mut row = line.split_whitespace();
                let source = row.next().unwrap();
                let cells: Vec<&str> = row.collect();
                assert_eq!(cells.len(), destinations.len(), "{}: {line}", case.title);
                for (destination, cell) in destinations.iter().zip(cells) {
                    for service in &services {
                        let expected = match cell {
                            "." => "allow",
                            "X" => "deny",
                            "-" => continue, // A pod to itself: its packets never leave it.
                            other => panic!("{other}"),
                        };
                        let flow = case.flow(source, destination, service);
                        let asked = format!("{}: {source} -> {destination}:{service}", case.title);
                        assert!(case.eval(&flow).starts_with(expected), "{asked}");
                        assert!(case.decide(&flow).starts_with(expected), "tables: {asked}");
                        pairs += 1;
                    }
                }
            }
        }
    }
    assert!(pairs > 1000, "{pairs}");
}
