//! What the agent knows at one moment: the model, its tables, and the indexes that readers need. Immutable.
//!
//! Built off the path of connections, published through a `watch` channel, read without a lock. INVARIANT: everything
//! in one snapshot comes from the same manifests.

mod names;
mod view;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use weft_policy::{Cidr, Identity, Model, Problem, Severity, Tables};

pub use names::{Names, end_of_peer};

use crate::identity::SpiffeId;
use crate::kernel::enrol::Workload as LocalWorkload;
use crate::kernel::state::Desired;
use crate::proxy;

/// Identity numbers of all identities of a model.
pub type Numbers = BTreeMap<Arc<Identity>, u32>;

/// See the module.
#[derive(Debug)]
pub struct Snapshot {
    pub model: Model,
    pub tables: Tables,
    pub numbers: Numbers,
    /// Everything that is wrong with the manifests.
    pub problems: Vec<Problem>,
    /// Workloads of this node that are to be enrolled.
    pub local: Vec<Local>,
    /// Workloads of this node that cannot be enrolled as they are written, and why.
    pub unenrollable: Vec<(String, String)>,
    /// Names for numbers and addresses, for events and metrics.
    pub names: Names,
    by_address: HashMap<IpAddr, Arc<proxy::Workload>>,
}

/// A workload of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// `namespace/name`.
    pub name: String,
    pub workload: Arc<proxy::Workload>,
    pub netns: PathBuf,
    pub number: u32,
}

impl Snapshot {
    /// Of no manifests: nobody is known, everything asked is denied.
    pub fn empty() -> Snapshot {
        Snapshot::new("", Model::default(), Tables::default(), Numbers::new())
    }

    /// A model and its tables, for this node; without problems.
    pub fn new(node: &str, model: Model, tables: Tables, numbers: Numbers) -> Snapshot {
        let mut by_address = HashMap::new();
        let mut local = Vec::new();
        let mut unenrollable = Vec::new();
        for workload in model.workloads().iter().filter(|workload| workload.enrolled) {
            let name = format!("{}/{}", workload.namespace, workload.name);
            let identity: SpiffeId = match workload.identity.spiffe.to_string().parse() {
                Ok(identity) => identity,
                Err(error) => {
                    unenrollable.push((name, format!("it can have no certificate: {error}")));
                    continue;
                }
            };
            let known = Arc::new(proxy::Workload {
                namespace: workload.namespace.to_string(),
                name: workload.name.to_string(),
                service: names::canonical_service(&workload.name, &workload.identity.labels).to_owned(),
                identity,
                addresses: workload.addresses.clone(),
            });
            for address in &workload.addresses {
                by_address.insert(*address, known.clone());
            }
            if workload.node.as_deref() != Some(node) {
                continue;
            }
            match (&workload.netns, numbers.get(&workload.identity)) {
                (_, None) => unenrollable.push((name, "it has no identity number".into())),
                (None, _) => unenrollable.push((
                    name,
                    "it runs on this node and says not where; add the annotation weft.dev/netns".into(),
                )),
                (Some(netns), Some(number)) => {
                    let netns = PathBuf::from(netns);
                    local.push(Local { name, workload: known, netns, number: *number });
                }
            }
        }
        let names = Names::new(&model, &numbers, &tables);
        let problems = Vec::new();
        Snapshot { model, tables, numbers, problems, local, unenrollable, names, by_address }
    }

    /// SPIFFE IDs that this node needs certificates for.
    pub fn local_identities(&self) -> BTreeSet<SpiffeId> {
        self.local.iter().map(|local| local.workload.identity.clone()).collect()
    }

    /// What the kernel's maps shall hold; `mesh_cidrs` are inside of the mesh too.
    pub fn desired(&self, mesh_cidrs: &[Cidr]) -> Desired {
        let mut desired = Desired::new(&self.tables, self.local.iter().map(kernel_workload).collect());
        desired.places.inside.extend_from_slice(mesh_cidrs);
        desired
    }

    /// Problems with manifests of one severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.problems.iter().filter(|problem| problem.severity == severity).count()
    }
}

fn kernel_workload(local: &Local) -> LocalWorkload {
    LocalWorkload {
        name: local.name.clone(),
        identity: local.number,
        netns: local.netns.clone(),
        addresses: local.workload.addresses.clone(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use weft_policy::model::cidr::addr;
    use weft_policy::{ObjectStore, Settings};

    use super::*;

    /// A snapshot of node `n1` with numbers counted from 16.
    pub(crate) fn snapshot(text: &str) -> Snapshot {
        let mut store = ObjectStore::new();
        store.apply("test.yaml", text);
        let model = store.model(Settings::default());
        let numbers = model.identities().into_iter().zip(16..).collect();
        let tables = weft_policy::compile(&model, &numbers);
        let problems = store.check(Settings::default());
        Snapshot { problems, ..Snapshot::new("n1", model, tables, numbers) }
    }

    /// Two pods on `n1`, one on `n2`, a service and a policy.
    pub(crate) const MESH: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web, version: v1}, annotations: {weft.dev/netns: /run/netns/web}}
spec: {nodeName: n1, serviceAccountName: web}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: lost, namespace: shop}
spec: {nodeName: n1, serviceAccountName: lost}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}, annotations: {weft.dev/netns: /run/netns/db}}
spec: {nodeName: n2, serviceAccountName: db}
status: {podIP: 10.0.1.1}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: db}, ports: [{port: 5432, targetPort: 5433}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: ALLOW
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]
    to: [{operation: {ports: ["5433"]}}]
"#;

    #[test]
    fn local_and_remote_are_told_apart() {
        let snapshot = snapshot(MESH);
        assert_eq!(snapshot.count(Severity::Error), 0, "{:?}", snapshot.problems);
        assert_eq!(snapshot.local.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["shop/web"]);
        assert_eq!(snapshot.unenrollable.len(), 1);
        assert!(snapshot.unenrollable[0].1.contains("weft.dev/netns"));
        let desired = snapshot.desired(&["10.0.0.0/8".parse().expect("a range")]);
        assert_eq!(desired.places.local.len(), 1);
        // What cannot be enrolled is still inside of the mesh: known, and reached through the tunnel only.
        assert!(desired.places.endpoints.contains_key(&addr("10.0.0.2".parse().expect("an address"))));
        assert_eq!(desired.places.endpoints.len(), 3);
        assert_eq!(desired.places.inside.len(), 1);
        assert_eq!(desired.services.len(), 1);
        assert!(!desired.policy.policies.is_empty());
    }
}
