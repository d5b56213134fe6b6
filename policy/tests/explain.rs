//! What `explain` says of a flow: the line that decided, and changes that allow it.

use weft_policy::{Explanation, Flow, Model, ObjectStore, Peer, Settings, Verdict};

/// Two pods of the mesh and one outside of it, in 18 lines.
const PODS: &str = "apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web, pod-template-hash: a1}}
spec: {serviceAccountName: web}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {serviceAccountName: db}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: old, namespace: shop, labels: {app: old, istio.io/dataplane-mode: none}}
spec: {serviceAccountName: old}
status: {podIP: 10.0.0.3}
---
";

fn model(policy: &str) -> Model {
    let mut store = ObjectStore::new();
    let problems = store.apply("f.yaml", &format!("{PODS}{policy}"));
    assert_eq!(problems, [], "the manifests are good");
    store.model(Settings::default())
}

fn explain(policy: &str, from: &str, port: u16) -> Explanation {
    let model = model(policy);
    let (from, to) = (model.workload("shop", from).unwrap(), model.workload("shop", "db").unwrap());
    model.explain(&Flow {
        source: if from.enrolled { Peer::Workload(&from.identity) } else { Peer::Anonymous },
        source_addr: from.addresses[0],
        destination: Peer::Workload(&to.identity),
        destination_addr: to.addresses[0],
        protocol: 6,
        port,
        request: None,
    })
}

/// A refusal by the rule in `line`, and the changes that allow the flow.
#[track_caller]
fn refused(explanation: &Explanation, line: u32, changes: &[&str]) {
    assert_eq!(explanation.decision.verdict, Verdict::Deny, "{explanation:?}");
    assert_eq!(explanation.place.as_ref().map(|place| place.line), Some(line), "{explanation:?}");
    let found: Vec<_> = explanation.changes.iter().map(|change| change.what.as_str()).collect();
    assert_eq!(found, changes);
}

const ALLOW: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]
    to: [{operation: {ports: ['5432']}}]
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
    to: [{operation: {ports: ['80']}}]
";

#[test]
fn an_allowed_flow_names_the_line_of_its_rule() {
    let explanation = explain(ALLOW, "web", 80);
    assert_eq!(explanation.decision.verdict, Verdict::Allow);
    assert_eq!(explanation.place.map(|place| (place.document, place.line)), Some((4, 27)));
    assert_eq!(explanation.changes, []);
}

#[test]
fn the_smallest_change_of_an_allow_policy() {
    let principal =
        "add \"cluster.local/ns/shop/sa/web\" to the principals of AuthorizationPolicy shop/db rules[0]";
    refused(&explain(ALLOW, "web", 5432), 19, &[principal]);
    let port = "add \"5433\" to the ports of AuthorizationPolicy shop/db rules[1]";
    refused(&explain(ALLOW, "web", 5433), 19, &[port]);
    let rule = "add a rule `{from: [{source: {ipBlocks: [\"10.0.0.3\"]}}], to: [{operation: {ports: [\"9\"]}}]}` to \
                AuthorizationPolicy shop/db";
    refused(&explain(ALLOW, "old", 9), 19, &[rule]);
}

#[test]
fn a_deny_spares_the_source_before_it_goes() {
    let deny = ALLOW.replace("spec:\n", "spec:\n  action: DENY\n");
    let spare = "add `{key: source.principal, notValues: [\"cluster.local/ns/shop/sa/web\"]}` to `when` of \
                 AuthorizationPolicy shop/db rules[1]";
    refused(&explain(&deny, "web", 80), 28, &[spare]);
    let every = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: all, namespace: shop}
spec: {action: DENY, rules: [{}]}
";
    refused(&explain(every, "old", 80), 22, &["remove AuthorizationPolicy shop/all rules[0]"]);
}

#[test]
fn strict_asks_for_an_identity_and_every_layer_for_its_own_change() {
    let strict = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
";
    let enrol = "enrol Pod shop/old: remove its label istio.io/dataplane-mode: none";
    refused(&explain(strict, "old", 80), 19, &[enrol]);
    let both = format!("{strict}---\n{ALLOW}");
    let principal =
        "add \"cluster.local/ns/shop/sa/old\" to the principals of AuthorizationPolicy shop/db rules[0]";
    refused(&explain(&both, "old", 5432), 19, &[enrol, principal]);
}

#[test]
fn network_policies_ask_for_a_rule_in_their_own_direction() {
    let isolated = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet, namespace: shop}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: other}}}]
    ports: [{port: 80}]
";
    let peer =
        "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}, podSelector: {matchLabels: ";
    let out = format!(
        "add a rule that allows `{peer}{{app: \"db\"}}}}` and TCP port 80 to egress of NetworkPolicy shop/quiet"
    );
    let inward =
        format!("add `{peer}{{app: \"web\"}}}}` to the peers of NetworkPolicy shop/quiet ingress[0]");
    refused(&explain(isolated, "web", 80), 19, &[&out, &inward]);
}

#[test]
fn a_deny_of_cilium_can_only_go() {
    let deny = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: no-web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{}]
  ingressDeny:
  - fromEndpoints: [{matchLabels: {app: web}}]
";
    refused(&explain(deny, "web", 80), 27, &["remove CiliumNetworkPolicy shop/no-web ingressDeny[0]"]);
}
