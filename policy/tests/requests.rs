//! Conformance cases about single requests that a person can read (tests/cases/requests.txt).

use weft_policy::request::{Claim, Claims};
use weft_policy::{Flow, Identity, ObjectStore, Peer, Request, Settings, SpiffeId, Verdict};

const WORLD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: web2, labels: {app: web}}
status: {podIP: 10.0.0.2}
";

/// `method host path | header name: value | claim name=value`.
fn request(text: &str) -> Request {
    let mut parts = text.split(" | ");
    let words: Vec<&str> = parts.next().unwrap().split(' ').collect();
    let [method, host, path] = words[..] else { panic!("{text}") };
    let mut request =
        Request { method: method.into(), host: host.into(), path: path.into(), ..Request::default() };
    for part in parts {
        if let Some(header) = part.strip_prefix("header ") {
            let (name, value) = header.split_once(": ").unwrap();
            request.headers.push((name.into(), value.into()));
        } else {
            let (name, value) = part.strip_prefix("claim ").unwrap().split_once('=').unwrap();
            claim(request.claims.get_or_insert_with(Claims::new), name, value);
        }
    }
    request
}

fn claim(claims: &mut Claims, name: &str, value: &str) {
    if let Some((outer, inner)) = name.split_once('[') {
        let nested = Claims::from([(inner.trim_end_matches(']').into(), Claim::Text(value.into()))]);
        claims.insert(outer.into(), Claim::Nested(nested));
        return;
    }
    let next = match claims.remove(name) {
        Some(Claim::Text(first)) => Claim::Texts(vec![first, value.into()]),
        _ => Claim::Text(value.into()),
    };
    claims.insert(name.into(), next);
}

/// `p[0]`, `p ingress[0]`, `p none` for a rule, as the cases name it.
fn short(rule: &str) -> String {
    let rest = rule.split_once("default/").unwrap().1;
    let (name, rest) = rest.split_once(' ').unwrap();
    if rest.starts_with('(') {
        return format!("{name} none");
    }
    let place = rest.split(' ').next().unwrap();
    match place.strip_prefix("rules") {
        Some(index) => format!("{name}{index}"),
        None => format!("{name} {place}"),
    }
}

#[test]
fn requests() {
    let mut asked = 0;
    for case in include_str!("cases/requests.txt").split("\n== ").skip(1) {
        let (title, body) = case.split_once('\n').unwrap();
        let (policies, lines) = body.rsplit_once("\n--\n").unwrap();
        let mut text = WORLD.to_owned();
        for object in policies.split("\n---\n") {
            let version =
                if object.contains("kind: Cilium") { "cilium.io/v2" } else { "security.istio.io/v1" };
            text += &format!("---\napiVersion: {version}\n{object}\n");
        }
        let mut store = ObjectStore::new();
        store.apply("case.yaml", &text);
        let model = store.model(Settings::default());
        let errors: Vec<_> =
            model.problems().iter().filter(|p| p.severity == weft_policy::Severity::Error).collect();
        assert!(
            errors.is_empty() && store.problems().all(|p| p.severity != weft_policy::Severity::Error),
            "{title}: {errors:?}"
        );
        let destination = model.workload("default", "web").unwrap();
        for line in lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (from, rest) = line.split_once(" -> ").unwrap();
            let (words, expected) = rest.rsplit_once(" = ").unwrap();
            let caller = from.split_once('/').map(|(namespace, account)| Identity {
                spiffe: SpiffeId::new("cluster.local", namespace, account),
                labels: Default::default(),
            });
            let request = request(words);
            let flow = Flow {
                source: caller.as_ref().map_or(Peer::Anonymous, Peer::Workload),
                source_addr: "10.0.0.9".parse().unwrap(),
                destination: Peer::Workload(&destination.identity),
                destination_addr: destination.addresses[0],
                protocol: 6,
                port: 80,
                request: Some(&request),
            };
            let decision = model.eval_ingress(&flow);
            let verdict = match decision.verdict {
                Verdict::Allow => "allow",
                Verdict::Deny => "deny",
                Verdict::Http => "http",
            };
            let rule =
                decision.rule.map(|rule| format!(", {}", short(&rule.to_string()))).unwrap_or_default();
            assert_eq!(format!("{verdict}{rule}"), expected, "{title}: {line}");
            // Who sees no request may know the verdict only where every request has it.
            let unseen = model.eval_ingress(&Flow { request: None, ..flow }).verdict;
            assert!(unseen == Verdict::Http || unseen == decision.verdict, "{title}: {line}: {unseen:?}");
            asked += 1;
        }
    }
    assert!(asked > 90, "{asked}");
}
