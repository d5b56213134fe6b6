//! Names for what the datapath knows by number and address, as events and Istio's labels want them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use weft_datapath::abi::ServiceKey;
use weft_policy::model::cidr;
use weft_policy::{Identity, Model, Tables};

use super::Numbers;
use crate::observe::metrics::{End, Service};

/// See the module.
#[derive(Debug)]
pub struct Names {
    identities: HashMap<u32, Named>,
    ends: HashMap<String, Arc<End>>,
    services: HashMap<ServiceKey, Arc<Service>>,
    behind: HashMap<(IpAddr, u16), Arc<Service>>,
    unknown_end: Arc<End>,
    unknown_service: Arc<Service>,
}

#[derive(Debug)]
struct Named {
    identity: Arc<Identity>,
    end: Arc<End>,
    /// The service that its workloads are behind, where connections were made without one.
    service: Option<Arc<Service>>,
}

impl Names {
    pub(super) fn new(model: &Model, numbers: &Numbers, tables: &Tables) -> Names {
        let mut services = HashMap::new();
        let mut behind = HashMap::new();
        for (key, entry) in &tables.services {
            let (namespace, name) = &entry.service;
            let service = Arc::new(Service {
                host: format!("{name}.{namespace}.svc.cluster.local"),
                name: name.clone(),
                namespace: namespace.clone(),
            });
            services.insert(*key, service.clone());
            for backend in &entry.backends {
                behind.entry((cidr::ip(&backend.addr), backend.port)).or_insert_with(|| service.clone());
            }
        }
        let mut sorted: Vec<_> = behind.iter().collect();
        sorted.sort_unstable_by_key(|(key, _)| **key);
        let mut by_address: HashMap<IpAddr, Arc<Service>> = HashMap::new();
        for ((ip, _), service) in sorted {
            by_address.entry(*ip).or_insert_with(|| Arc::clone(service));
        }

        let mut pods: BTreeMap<&Identity, Vec<&weft_policy::Workload>> = BTreeMap::new();
        for workload in model.workloads() {
            pods.entry(&workload.identity).or_default().push(workload);
        }
        let mut identities = HashMap::new();
        let mut ends = HashMap::new();
        for (identity, number) in numbers {
            let pods = pods.get(&**identity).map_or(&[][..], Vec::as_slice);
            let end = Arc::new(end_of_identity(identity, pods.iter().map(|pod| &*pod.name)));
            for pod in pods {
                ends.insert(format!("{}/{}", pod.namespace, pod.name), end.clone());
            }
            let service =
                pods.iter().flat_map(|pod| &pod.addresses).find_map(|ip| by_address.get(ip)).cloned();
            identities.insert(*number, Named { identity: identity.clone(), end, service });
        }
        Names {
            identities,
            ends,
            services,
            behind,
            unknown_end: Arc::new(End::all("unknown")),
            unknown_service: Arc::new(Service::all("unknown")),
        }
    }

    /// The identity behind a number.
    pub fn identity(&self, number: u32) -> Option<&Arc<Identity>> {
        self.identities.get(&number).map(|named| &named.identity)
    }

    /// Labels of one end, by its identity number.
    pub fn end(&self, number: u32) -> Arc<End> {
        self.identities.get(&number).map_or_else(|| self.unknown_end.clone(), |named| named.end.clone())
    }

    /// Labels of one end, by the workload's `namespace/name`.
    pub fn end_of(&self, workload: &str) -> Option<Arc<End>> {
        self.ends.get(workload).cloned()
    }

    /// Labels of the service behind a service address.
    pub fn service(&self, key: &ServiceKey) -> Option<Arc<Service>> {
        self.services.get(key).cloned()
    }

    /// Labels of a service that has this backend.
    pub fn service_behind(&self, ip: IpAddr, port: u16) -> Arc<Service> {
        let found = self.behind.get(&(ip.to_canonical(), port)).cloned();
        found.unwrap_or_else(|| self.unknown_service.clone())
    }

    /// Labels of a service that this identity's workloads serve.
    pub fn service_of(&self, number: u32) -> Arc<Service> {
        let service = self.identities.get(&number).and_then(|named| named.service.clone());
        service.unwrap_or_else(|| self.unknown_service.clone())
    }
}

/// What Istio calls the service of a workload: the first label that says so, else its name.
pub(super) fn canonical_service<'a>(name: &'a str, labels: &'a BTreeMap<String, String>) -> &'a str {
    ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]
        .iter()
        .find_map(|key| labels.get(*key))
        .map_or(name, String::as_str)
}

/// Labels of one identity. Several pods of one identity share them, on both paths, so their name is that of what they
/// have in common.
fn end_of_identity<'a>(identity: &Identity, mut pods: impl Iterator<Item = &'a str>) -> End {
    let labels = &*identity.labels;
    let label = |keys: &[&str], default: &str| {
        keys.iter().find_map(|key| labels.get(*key)).map_or(default, String::as_str).to_owned()
    };
    let first = pods.next().unwrap_or("unknown");
    let service = canonical_service(first, labels).to_owned();
    End {
        workload: if pods.next().is_some() { service.clone() } else { first.to_owned() },
        namespace: identity.spiffe.namespace.to_string(),
        principal: identity.spiffe.to_string(),
        app: label(&["app", "app.kubernetes.io/name"], "unknown"),
        version: label(&["version", "app.kubernetes.io/version"], "unknown"),
        canonical_revision: label(
            &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"],
            "latest",
        ),
        canonical_service: service,
    }
}

/// Labels of a peer of which only the certificate is known.
pub fn end_of_peer(identity: &crate::identity::SpiffeId) -> End {
    End { namespace: identity.namespace().to_owned(), principal: identity.to_string(), ..End::all("unknown") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::{MESH, snapshot};

    #[test]
    fn labels_as_istio_names_things() {
        let snapshot = snapshot(MESH);
        let names = &snapshot.names;
        let web = names.end_of("shop/web").expect("known");
        assert_eq!((web.workload.as_str(), web.version.as_str(), web.app.as_str()), ("web", "v1", "web"));
        assert_eq!(web.canonical_revision, "v1");
        let db = names.service_behind("10.0.1.1".parse().expect("an address"), 5433);
        assert_eq!(db.host, "db.shop.svc.cluster.local");
        let number = snapshot.tables.endpoints[&cidr::addr("10.0.1.1".parse().expect("an address"))].identity;
        assert_eq!(names.service_of(number), db);
        assert_eq!(names.end(number).principal, "spiffe://cluster.local/ns/shop/sa/db");
        assert_eq!(names.end(0).workload, "unknown");
    }
}
