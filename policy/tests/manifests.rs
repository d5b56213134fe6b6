//! A user's manifests are taken verbatim and treated as tests/manifests/README.md says.

use std::path::Path;
use weft_policy::{Flow, Model, ObjectStore, Peer, Problem, Settings, Severity, SpiffeId, Verdict};

fn load(name: &str, more: &str) -> (ObjectStore, Vec<Problem>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests").join(name);
    let mut store = ObjectStore::new();
    store.apply(name, &std::fs::read_to_string(path).unwrap());
    store.apply("more.yaml", more);
    let problems = store.check(Settings::default());
    (store, problems)
}

fn errors(problems: &[Problem]) -> Vec<String> {
    problems.iter().filter(|p| p.severity == Severity::Error).map(|p| p.to_string()).collect()
}

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: APP}}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: production}
status: {podIP: 10.0.0.2}
";

fn verdict(model: &Model, namespace: &str, source: Option<(&str, &str)>, port: u16) -> Verdict {
    let destination = &model.workload(namespace, "server").unwrap().identity;
    let id = source.map(|(namespace, account)| SpiffeId::new("cluster.local", namespace, account));
    let source = id.as_ref().map_or(Peer::Anonymous, Peer::Certified);
    let source_addr = "10.0.0.9".parse().unwrap();
    let (destination, destination_addr) = (Peer::Workload(destination), "10.0.0.1".parse().unwrap());
    model
        .eval(&Flow { source, source_addr, destination, destination_addr, protocol: 6, port, request: None })
        .verdict
}

#[test]
fn authorization_policies_are_enforced_and_http_is_never_skipped() {
    for (file, app, caller) in [
        ("authz-allow-service-a-get-post-api.yaml", "service-b", "service-a"),
        ("authz-payment-service.yaml", "payment-service", "order-service"),
        ("authz-productpage-viewer.yaml", "productpage", "gateway"),
    ] {
        let (store, problems) = load(file, &PODS.replace("APP", app));
        assert_eq!(errors(&problems), [] as [String; 0], "{file}");
        assert!(problems.iter().any(|p| p.message.contains("need the HTTP engine")), "{file}");
        let model = store.model(Settings::default());
        assert_eq!(verdict(&model, "default", Some(("default", caller)), 80), Verdict::Http, "{file}");
        assert_eq!(verdict(&model, "default", Some(("default", "other")), 80), Verdict::Deny, "{file}");
        assert_eq!(verdict(&model, "default", None, 80), Verdict::Deny, "{file}");
        assert_eq!(verdict(&model, "production", None, 80), Verdict::Allow, "{file}");
    }
    let (store, problems) = load("authz-jwt-claims.yaml", &PODS.replace("APP", "admin-service"));
    assert_eq!(errors(&problems), [] as [String; 0]);
    assert_eq!(verdict(&store.model(Settings::default()), "default", None, 80), Verdict::Http);
}

#[test]
fn deny_all_then_same_namespace() {
    let (store, problems) = load("authz-deny-all-then-same-namespace.yaml", PODS);
    assert_eq!(problems, []);
    let model = store.model(Settings::default());
    assert_eq!(verdict(&model, "production", Some(("production", "x")), 80), Verdict::Allow);
    assert_eq!(verdict(&model, "production", Some(("default", "x")), 80), Verdict::Deny);
    assert_eq!(verdict(&model, "production", None, 80), Verdict::Deny);
    assert_eq!(verdict(&model, "default", None, 80), Verdict::Allow);
}

#[test]
fn strict_mode_of_a_namespace() {
    let (store, problems) = load("peerauthentication-strict.yaml", PODS);
    assert_eq!(problems, []);
    let model = store.model(Settings::default());
    assert_eq!(verdict(&model, "default", None, 80), Verdict::Deny);
    assert_eq!(verdict(&model, "default", Some(("x", "y")), 80), Verdict::Allow);
    assert_eq!(verdict(&model, "production", None, 80), Verdict::Allow);
}

#[test]
fn routing_is_recognised_and_checked_for_references() {
    let services = |names: &[&str]| {
        let service = |name| {
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n"
            )
        };
        names.iter().map(service).collect::<String>()
    };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !["virtualservice-", "destinationrule-", "gateway-"].iter().any(|prefix| name.starts_with(prefix))
        {
            continue;
        }
        seen += 1;
        let known = services(&["reviews", "ratings", "service-a", "checkout", "productpage"]);
        let (_, with) = load(&name, &known);
        assert_eq!(errors(&with), [] as [String; 0], "{name}");
        assert!(with.iter().any(|p| p.message.contains("not carried out yet")), "{name}");
        assert!(!with.iter().any(|p| p.message.contains("no Service is called")), "{name}");
        let (_, without) = load(&name, "");
        assert!(without.iter().any(|p| p.message.contains("no Service is called")), "{name}");
    }
    assert_eq!(seen, 10);
}

#[test]
fn a_weight_inside_the_destination_is_taken_with_a_warning() {
    let (_, problems) = load("virtualservice-canary-retry-timeout.yaml", "");
    let warnings: Vec<_> =
        problems.iter().filter(|p| p.message.contains("belongs beside `destination`")).collect();
    assert_eq!(warnings.len(), 2);
    assert_eq!(warnings[0].field, "spec.http[0].route[0].destination.weight");
    assert_eq!((warnings[0].severity, warnings[0].origin.line), (Severity::Warning, 9));
}

#[test]
fn a_deployment_is_ignored_with_a_note_and_its_service_used() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: productpage}}\nstatus: {podIP: 10.0.0.1}\n";
    let (store, problems) = load("bookinfo-productpage.yaml", pod);
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].severity, Severity::Note);
    assert_eq!(&*problems[0].object.as_ref().unwrap().kind, "Deployment");
    let model = store.model(Settings::default());
    assert_eq!(model.services()[0].ports[0].backends, [("10.0.0.1".parse().unwrap(), 9080)]);
}

#[test]
fn what_is_no_object_is_refused_and_blocks_nobody() {
    for file in ["http-timeout-fragment.yaml", "prometheus-alert-rules.yaml", "trace-headers.yaml"] {
        let (store, problems) = load(file, PODS);
        let errors = errors(&problems);
        assert_eq!(errors.len(), 1, "{file}: {errors:?}");
        assert!(errors[0].contains("a document needs apiVersion and kind"), "{file}: {errors:?}");
        assert_eq!(verdict(&store.model(Settings::default()), "default", None, 80), Verdict::Allow, "{file}");
    }
}
