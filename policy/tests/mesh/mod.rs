//! A mesh of three pods, and who of them is refused.

use weft_policy::{Flow, Model, ObjectStore, Peer, Settings, Verdict};

pub(crate) fn pod(namespace: &str, app: &str, addr: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {app}, namespace: {namespace}, labels: {{app: {app}}}}}\n\
         status: {{podIP: {addr}}}\n---\n"
    )
}

pub(crate) fn store() -> ObjectStore {
    let mut store = ObjectStore::new();
    store.apply(
        "pods.yaml",
        &(pod("default", "web", "10.0.0.1")
            + &pod("default", "db", "10.0.0.2")
            + &pod("prod", "api", "10.0.1.1")),
    );
    store
}

pub(crate) fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

pub(crate) fn verdict(model: &Model, namespace: &str, name: &str, port: u16) -> Verdict {
    let workload = model.workload(namespace, name).unwrap();
    let (destination, destination_addr) = (Peer::Workload(&workload.identity), workload.addresses[0]);
    let (source, source_addr) = (Peer::Anonymous, "10.9.9.9".parse().unwrap());
    model
        .eval(&Flow { source, source_addr, destination, destination_addr, protocol: 6, port, request: None })
        .verdict
}

/// Verdicts for default/web, default/db and prod/api at port 80.
pub(crate) fn verdicts(store: &ObjectStore) -> [Verdict; 3] {
    let model = store.model(Settings::default());
    [("default", "web"), ("default", "db"), ("prod", "api")].map(|(ns, name)| verdict(&model, ns, name, 80))
}
