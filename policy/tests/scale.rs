//! Large meshes compile in time. Run with `--release -- --ignored --nocapture` for figures.

use std::fmt::Write;
use std::time::Instant;
use weft_policy::{ObjectStore, Settings, compile};

#[test]
#[ignore = "takes its time without --release"]
fn ten_thousand_workloads_and_policies() {
    let (namespaces, each) = (100, 100);
    let mut store = ObjectStore::new();
    let start = Instant::now();
    for ns in 0..namespaces {
        let mut text = String::new();
        for n in 0..each {
            let _ = write!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, namespace: n{ns}, labels: {{app: a{n}}}}}\nspec: \
                 {{serviceAccountName: s{n}}}\nstatus: {{podIP: 10.{ns}.0.{n}}}\n---\napiVersion: \
                 security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{n}, namespace: n{ns}}}\nspec: \
                 {{selector: {{matchLabels: {{app: a{n}}}}}, rules: [{{from: [{{source: {{principals: \
                 [\"cluster.local/ns/n{ns}/sa/s{}\"]}}}}], to: [{{operation: {{ports: [\"80\"]}}}}]}}]}}\n",
                (n + 1) % each
            );
        }
        store.apply(&format!("n{ns}.yaml"), &text.replace(".0.0\n", ".0.200\n"));
    }
    println!("read: {:?}", start.elapsed());
    let start = Instant::now();
    let model = store.model(Settings::default());
    println!("model: {:?}, {} problems", start.elapsed(), model.problems().len());
    let numbers = model.identities().into_iter().zip(16..).collect();
    let start = Instant::now();
    let tables = compile(&model, &numbers);
    println!("compile: {:?}, {} entries", start.elapsed(), tables.policies.len());
    // For each destination: one row for all, and one for the caller that may (any other port, and the port).
    assert_eq!(tables.policies.len(), namespaces * each * 3);
}

/// All in one namespace, which is the worst case for choosing the policies of a workload.
#[test]
#[ignore = "takes its time without --release"]
fn ten_thousand_network_policies_of_one_namespace() {
    let mut store = ObjectStore::new();
    let mut text = String::new();
    for n in 0..10_000 {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, labels: {{app: a{n}}}}}\nspec: {{serviceAccountName: \
             s{n}}}\nstatus: {{podIP: 10.0.{}.{}}}\n---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: \
             {{name: p{n}}}\nspec:\n  podSelector: {{matchLabels: {{app: a{n}}}}}\n  policyTypes: [Ingress, Egress]\n  ingress: \
             [{{from: [{{podSelector: {{matchLabels: {{app: a{}}}}}}}], ports: [{{port: 80}}]}}]\n  egress: [{{to: [{{podSelector: \
             {{matchLabels: {{app: a{}}}}}}}], ports: [{{port: 80}}]}}, {{to: [{{ipBlock: {{cidr: 192.168.{}.0/24}}}}]}}]\n",
            n / 250,
            n % 250 + 1,
            (n + 1) % 10_000,
            (n + 9_999) % 10_000,
            n % 200
        );
    }
    store.apply("all.yaml", &text);
    let start = Instant::now();
    let model = store.model(Settings::default());
    println!("model: {:?}, {} problems", start.elapsed(), model.problems().len());
    let numbers = model.identities().into_iter().zip(16..).collect();
    let start = Instant::now();
    let tables = compile(&model, &numbers);
    println!("compile: {:?}, {} entries", start.elapsed(), tables.policies.len());
    // Both ways: any peer, the node, and one peer with its port. Egress once more in the class, where all are allowed, and
    // the peer by another rule.
    assert_eq!(tables.policies.len(), 10_000 * (4 + 4 + 1 + 2));
}
