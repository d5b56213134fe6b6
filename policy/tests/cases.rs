//! Conformance cases that a person can read (tests/cases/*.txt), each asked of the evaluator and of the tables.

use weft_datapath::identity::{ANONYMOUS, FIRST_WORKLOAD, NODE};
use weft_datapath::policy::{self, Access};
use weft_policy::model::cidr;
use weft_policy::{Flow, Identity, ObjectStore, Peer, Settings, SpiffeId, Verdict, compile};

/// The workloads of every case. Callers are named in the flows.
const WORLD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {containers: [{name: c, readinessProbe: {httpGet: {port: 8086}}}]}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: db, labels: {app: db}}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: prod, labels: {app: api}}
status: {podIP: 10.0.1.1}
";

fn version(object: &str) -> &'static str {
    match object.trim_start() {
        object if object.starts_with("kind: NetworkPolicy") => "networking.k8s.io/v1",
        object if object.starts_with("kind: Service") => "v1",
        _ => "security.istio.io/v1",
    }
}

fn run(cases: &str) -> usize {
    let mut flows = 0;
    for case in cases.split("\n== ").skip(1) {
        let (title, body) = case.split_once('\n').unwrap();
        let (policies, lines) = match body.strip_prefix("--\n") {
            Some(lines) => ("", lines),
            None => body.rsplit_once("\n--\n").unwrap(),
        };
        let default_deny = policies.starts_with("default-deny");
        let policies = policies.trim_start_matches("default-deny");
        let mut text = WORLD.to_owned();
        for object in policies.split("\n---\n").filter(|object| !object.trim().is_empty()) {
            text += &format!("---\napiVersion: {}\n{}\n", version(object), object.trim());
        }
        for line in lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            flow(title, &text, default_deny, line);
            flows += 1;
        }
    }
    flows
}

fn flow(title: &str, world: &str, default_deny: bool, line: &str) {
    let (from, rest) = line.split_once(" -> ").unwrap();
    let (to, expected) = rest.split_once(" = ").unwrap();
    let (from, addr) = from.split_once(" @ ").unwrap_or((from, "10.0.0.9"));
    let (to, port) = to.split_once(':').unwrap();
    let ((namespace, name), port) = (to.split_once('/').unwrap(), port.parse().unwrap());
    let caller = from.split_once('/').map(|(namespace, account)| Identity {
        spiffe: SpiffeId::new("cluster.local", namespace, account),
        labels: Default::default(),
    });

    let mut store = ObjectStore::new();
    store.apply("case.yaml", world);
    let model = store.model(Settings { default_deny, ..Settings::default() });
    let destination = &*model.workload(namespace, name).unwrap().identity;
    let source = match (from, &caller) {
        ("node", _) => Peer::Node,
        (_, Some(caller)) => Peer::Workload(caller),
        _ => Peer::Anonymous,
    };
    let source_addr = addr.parse().unwrap();
    let destination_addr = model.workload(namespace, name).unwrap().addresses[0];
    let decision = model.eval_ingress(&Flow {
        source,
        source_addr,
        destination: Peer::Workload(destination),
        destination_addr,
        protocol: 6,
        port,
        request: None,
    });
    let rule = decision.rule.as_ref().map(|rule| format!(", {rule}")).unwrap_or_default();
    let verdict = match decision.verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
        Verdict::Http => "http",
    };
    assert_eq!(format!("{verdict}{rule}"), expected, "{title}: {line}");
    assert_eq!(decision.remedy.is_some(), decision.verdict != Verdict::Allow, "{title}: {line}");

    // The same of the tables, with the caller as a workload that nothing selects.
    if let Some(SpiffeId { namespace, service_account, .. }) = caller.as_ref().map(|caller| &caller.spiffe) {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: the-caller, namespace: {namespace}}}\n\
             spec: {{serviceAccountName: {service_account}}}\n"
        );
        store.apply("caller.yaml", &pod);
    }
    let model = store.model(Settings { default_deny, ..Settings::default() });
    let numbers: compile::Numbers = model.identities().into_iter().zip(FIRST_WORKLOAD..).collect();
    let source_number = match (source, &caller) {
        (Peer::Node, _) => NODE,
        (_, Some(caller)) => numbers[caller],
        _ => ANONYMOUS,
    };
    let tables = compile(&model, &numbers);
    let destination = numbers[destination];
    let access = Access {
        source: source_number,
        source_addr: cidr::addr(source_addr),
        destination,
        destination_addr: cidr::addr(destination_addr),
        protocol: 6,
        port,
    };
    let value = policy::ingress(&tables, 0, &access);
    let got = match value.verdict {
        policy::ALLOW => "allow",
        policy::HTTP => "http",
        _ => "deny",
    };
    let rule = tables.rule(value.rule).map(|rule| format!(", {rule}")).unwrap_or_default();
    assert_eq!(format!("{got}{rule}"), expected, "tables: {title}: {line}");
}

#[test]
fn authorization() {
    assert!(run(include_str!("cases/authorization.txt")) > 80);
}

#[test]
fn authentication() {
    assert!(run(include_str!("cases/authentication.txt")) > 25);
}
