//! What `weft policy check` says of manifests that are right and hardly meant.

use weft_policy::lint::lint;
use weft_policy::{ObjectStore, Settings};

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
status: {podIP: 10.0.0.2}
---
";

#[track_caller]
fn says(text: &str, wanted: &[&str]) {
    let mut store = ObjectStore::new();
    assert_eq!(store.apply("f.yaml", &format!("{POD}{text}")), []);
    let found = lint(&store, &store.model(Settings::default()));
    assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), wanted);
}

#[test]
fn a_selector_that_matches_nobody() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: db}}}
";
    says(policy, &[]);
    let wrong = "f.yaml:6: warning: document 2, AuthorizationPolicy shop/p, spec.selector: selects no workload of these \
                 manifests; compare its labels and namespace";
    says(&policy.replace("app: db", "app: bd"), &[wrong]);
    let network = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
";
    says(network, &[]);
    let wrong = "f.yaml:6: warning: document 2, NetworkPolicy shop/p, spec: selects no workload of these manifests; \
                 compare its labels and namespace";
    says(&network.replace("namespace: shop", "namespace: shp"), &[&wrong.replace("shop/p", "shp/p")]);
}

#[test]
fn rules_that_change_nothing() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  rules:
  - to: [{operation: {ports: ['1']}}]
  - to: [{operation: {ports: ['2']}}]
  - to: [{operation: {ports: ['1']}}]
";
    let place = "document 2, AuthorizationPolicy shop/p, spec.rules";
    says(policy, &[&format!("f.yaml:13: warning: {place}[2]: is the same as rules[0]; remove one of them")]);
    let shadowed = |line, index| {
        format!(
            "f.yaml:{line}: warning: {place}[{index}]: is shadowed by rules[1], which matches everything; remove \
             one of them"
        )
    };
    let text = policy
        .replace("- to: [{operation: {ports: ['2']}}]", "- {}")
        .replace("  - to: [{operation: {ports: ['1']}}]\n", "");
    says(&text, &[]);
    let text = policy.replace("- to: [{operation: {ports: ['2']}}]", "- {}").replacen("['1']", "['3']", 1);
    says(&text, &[&shadowed(11, 0), &shadowed(13, 2)]);
}

#[test]
fn a_service_without_endpoints() {
    let service = "apiVersion: v1
kind: Service
metadata: {name: s, namespace: shop}
spec: {clusterIP: 10.9.0.1, selector: {app: db}, ports: [{port: 80}]}
";
    says(service, &[]);
    let wrong = "f.yaml:6: warning: document 2, Service shop/s, spec.selector: port 80 has no endpoints: no ready pod has \
                 these labels and this port; connections to it fail";
    says(&service.replace("app: db", "app: web"), &[wrong]);
}
