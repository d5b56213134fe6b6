//! No text makes the reader panic, hang or take much memory.

use proptest::prelude::*;
use std::time::{Duration, Instant};
use weft_policy::{ObjectStore, Settings, compile};

fn read(text: &str) {
    let mut store = ObjectStore::new();
    store.apply("f.yaml", text);
    let model = store.model(Settings::default());
    let numbers = model.identities().into_iter().zip(16..).collect();
    compile(&model, &numbers);
}

const SEEDS: &[&str] = &[
    include_str!("manifests/authz-deny-all-then-same-namespace.yaml"),
    include_str!("manifests/bookinfo-productpage.yaml"),
    include_str!("manifests/virtualservice-canary-retry-timeout.yaml"),
    "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {weft.dev/netns: /run/netns/x}}\nspec:\n  containers: [{ports: \
     [{name: a, containerPort: 1}], livenessProbe: {tcpSocket: {port: a}}}]\nstatus: {podIP: 10.0.0.1, podIPs: [{ip: \"::2\"}]}\n",
    "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIPs: [10.0.0.2, \"fd00::1\"], ports: [{port: 1, targetPort: \
     x}], selector: {a: b}}\n",
    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n}\nspec: {podSelector: {matchExpressions: [{key: a, \
     operator: In, values: [b]}]}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: 1, endPort: 9}]}]}\n",
    "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: c}\nspec: {endpointSelector: {matchLabels: {\"k8s:a\": b}}, \
     ingress: [{fromEntities: [world], toPorts: [{ports: [{port: \"80\", protocol: TCP}], rules: {http: [{path: /}]}}]}], \
     egressDeny: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}], icmps: [{fields: [{type: Echo}]}]}]}\n",
    "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: c}\nspec: {tier: Admin, priority: 1, \
     subject: {namespaces: {}}, egress: [{action: Pass, to: [{networks: [10.0.0.0/8]}], protocols: [{tcp: {destinationPort: {range: \
     {start: 1, end: 9}}}}]}]}\n",
    "a: &a [1, *b]\n? x\n: |+\n  y\n- !!str z\n%YAML 1.2\n...\n",
];

/// A manifest with some pieces cut out, doubled or replaced.
fn mutated() -> impl Strategy<Value = String> {
    let junk = prop::sample::select(vec![
        "", "*", "&a ", "- ", ": ", "{", "[", "]", "}", "\"", "'", "|", "\t", "\n", "---\n", "\u{0}", "é",
        "?", "!!", "<<", "#",
    ]);
    let edit = (any::<prop::sample::Index>(), 0usize..20, junk);
    (prop::sample::select(SEEDS), prop::collection::vec(edit, 0..6)).prop_map(|(seed, edits)| {
        let mut text: Vec<char> = seed.chars().collect();
        for (at, cut, junk) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + cut).min(text.len());
            text.splice(at..end, junk.chars());
        }
        text.into_iter().collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_manifests(text in mutated()) {
        read(&text);
    }

    #[test]
    fn any_text(text in "\\PC{0,200}") {
        read(&text);
    }
}

#[test]
fn hostile_shapes_end_soon() {
    let size = 1 << 20;
    for (name, text) in [
        ("open brackets", "[".repeat(size)),
        ("open braces", "{a: ".repeat(size / 4)),
        ("dashes", "- ".repeat(size / 2)),
        ("questions", "? ".repeat(size / 2)),
        ("open quote", format!("a: \"{}", "x".repeat(size))),
        ("long key", format!("{}: 1", "k".repeat(size))),
        ("flat list", "- a\n".repeat(size / 4)),
        ("anchors", (0..size / 16).map(|n| format!("- &a{n} x\n")).collect()),
        ("documents", "---\na: 1\n".repeat(size / 32)),
        ("many keys", (0..size / 16).map(|n| format!("k{n}: x\n")).collect()),
        ("comment", "#".repeat(size)),
        ("indents", (0..1000).map(|n| format!("{}a:\n", " ".repeat(n))).collect()),
    ] {
        let start = Instant::now();
        read(&text);
        let took = start.elapsed();
        println!("{name}: {took:?}");
        assert!(took < Duration::from_secs(20), "{name} took {took:?}");
    }
}
