//! From objects to the model: references, duplicates, contested addresses, backends.

use super::selector::carries;
use super::{Identity, Model, Named, Pods, Service, ServicePort, Settings, SpiffeId, Workload};
use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::source::core::{self, Balance, TargetPort};
use crate::source::{AuthorizationPolicy, Broken, Meta, Object, Reach, RequestAuthentication, Spec};
use crate::store::ObjectStore;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

impl Model {
    /// Resolves the objects of a store.
    pub fn new(settings: Settings, store: &ObjectStore) -> Model {
        let mut model = Model { settings, ..Model::default() };
        let objects = unique(store, &mut model.problems);
        // A version of it in another file counts as its former one.
        let former = |broken: &Broken| broken.object.as_ref().is_some_and(|name| objects.contains_key(name));
        let broken: Vec<&Broken> = store.broken().filter(|broken| !former(broken)).collect();
        broken.iter().for_each(|broken| model.refuse(broken));
        let mut interned: HashMap<Identity, Arc<Identity>> = HashMap::new();
        let mut rules = Vec::new();
        let mut workloads = Vec::new();
        let mut slices: BTreeMap<(&str, &str), Vec<&core::EndpointSlice>> = BTreeMap::new();
        for object in objects.values() {
            let meta = &object.meta;
            match &object.spec {
                Spec::Pod(pod) if !pod.finished => {
                    let interned = &mut |identity: Identity| {
                        let known = interned.entry(identity);
                        known.or_insert_with_key(|identity| Arc::new(identity.clone())).clone()
                    };
                    workloads.push(model.workload_of(object, pod, interned));
                }
                Spec::AuthorizationPolicy(policy) => {
                    for selector in
                        model.selectors(object, &policy.selector, &policy.targets, &objects, store)
                    {
                        let policy = AuthorizationPolicy { selector, ..policy.clone() };
                        model.authorization.push(named(object, policy));
                    }
                }
                Spec::RequestAuthentication(policy) => {
                    for selector in
                        model.selectors(object, &policy.selector, &policy.targets, &objects, store)
                    {
                        let policy = RequestAuthentication { selector, ..policy.clone() };
                        model.tokens.push(named(object, policy));
                    }
                }
                Spec::PeerAuthentication(policy) => {
                    if meta.object.namespace == model.settings.root_namespace && !policy.selector.is_empty() {
                        model.problem(object, Severity::Error, "spec.selector", SELECTOR_IN_ROOT.into());
                        let reach = Reach { namespace: None, selector: policy.selector.clone() };
                        model.block(Some(meta.object.clone()), meta.origin.clone(), reach);
                    } else {
                        let own = model.authentication.entry(meta.object.namespace.clone()).or_default();
                        own.push(named(object, policy.clone()));
                    }
                }
                Spec::Namespace => {
                    model.namespaces.insert(meta.object.name.clone(), meta.labels.clone());
                }
                Spec::Network(policies) => {
                    model.network.extend(policies.iter().map(|policy| named(object, policy.clone())));
                }
                Spec::DestinationRule(rule) => rules.push((*object, rule)),
                Spec::EndpointSlice(slice) => {
                    slices.entry((&meta.object.namespace, &slice.service)).or_default().push(slice);
                }
                _ => {}
            }
        }
        model.network.sort_by(|a, b| (a.policy.tier, &a.object).cmp(&(b.policy.tier, &b.object)));
        broken.iter().for_each(|broken| model.refuse_unlabelled(broken));
        model.blocked.sort_by(|a, b| (&a.object, &a.origin).cmp(&(&b.object, &b.origin)));
        model.authentication.values_mut().for_each(|own| own.sort_by(|a, b| age(a).cmp(&age(b))));
        model.index_addresses(workloads);
        for object in objects.values() {
            if let Spec::Service(service) = &object.spec {
                let key = (&*object.meta.object.namespace, &*object.meta.object.name);
                let ports = model.ports(key, service, slices.get(&key).map(Vec::as_slice));
                let (namespace, name) =
                    (object.meta.object.namespace.clone(), object.meta.object.name.clone());
                let (addresses, balance) = (service.addresses.clone(), Balance::default());
                model.services.push(Arc::new(Service { namespace, name, addresses, ports, balance }));
            }
        }
        model.apply_rules(&rules);
        model.structural = model.problems.len();
        model.check(objects.values().copied());
        model
    }

    pub(super) fn problem(&mut self, object: &Object, severity: Severity, field: &str, message: String) {
        let (origin, name) = (object.meta.origin.clone(), Some(object.meta.object.clone()));
        self.problems.push(Problem { origin, severity, object: name, field: field.into(), message });
    }

    pub(super) fn workload_of(
        &self,
        object: &Object,
        pod: &core::Pod,
        interned: &mut dyn FnMut(Identity) -> Arc<Identity>,
    ) -> Workload {
        let meta = &object.meta;
        let spiffe = SpiffeId::new(&self.settings.trust_domain, &meta.object.namespace, &pod.service_account);
        let identity = interned(Identity { spiffe, labels: Arc::new(meta.labels.clone()) });
        Workload {
            namespace: meta.object.namespace.clone(),
            name: meta.object.name.clone(),
            identity,
            addresses: pod.addresses.clone(),
            node: pod.node.clone(),
            netns: pod.netns.clone(),
            cgroup: pod.cgroup.clone(),
            host_network: pod.host_network,
            enrolled: !pod.left_out && !pod.host_network,
            ready: pod.ready,
            ports: pod.ports.clone(),
            probe_ports: pod.probe_ports.clone(),
            origin: meta.origin.clone(),
        }
    }

    /// An address that two workloads claim belongs to neither: nobody can say whose policy holds there.
    fn index_addresses(&mut self, mut workloads: Vec<Workload>) {
        let mut owner: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for (index, workload) in workloads.iter().enumerate().filter(|(_, w)| !w.host_network) {
            for addr in workload.addresses.iter().copied().collect::<BTreeSet<_>>() {
                match owner.entry(addr) {
                    Entry::Vacant(free) => drop(free.insert(index)),
                    Entry::Occupied(taken) => {
                        let first = &workloads[*taken.get()];
                        let message = format!(
                            "{addr} is also the address of Pod {}/{}; the address is refused until one gives it up",
                            first.namespace, first.name
                        );
                        let object = ObjectRef {
                            kind: "Pod".into(),
                            namespace: workload.namespace.clone(),
                            name: workload.name.clone(),
                        };
                        self.problems.push(Problem {
                            origin: workload.origin.clone(),
                            severity: Severity::Error,
                            object: Some(object),
                            field: "status.podIP".into(),
                            message,
                        });
                        self.refused.insert(addr);
                    }
                }
            }
        }
        owner.retain(|addr, _| !self.refused.contains(addr));
        for workload in &mut workloads {
            workload.addresses.retain(|addr| workload.host_network || !self.refused.contains(addr));
        }
        self.workloads = workloads.into_iter().map(Arc::new).collect();
        self.by_address =
            owner.into_iter().map(|(addr, index)| (addr, self.workloads[index].clone())).collect();
        let mut by_identity: BTreeMap<Arc<Identity>, Pods> = BTreeMap::new();
        for workload in self.workloads.iter().filter(|workload| workload.enrolled) {
            by_identity.entry(workload.identity.clone()).or_default().add(workload);
        }
        for (name, ports) in by_identity.values().flat_map(|pods| &pods.named) {
            self.named_ports.entry(name.clone()).or_default().extend(ports.keys());
        }
        self.by_identity = by_identity.into_iter().map(|(id, pods)| (id, Arc::new(pods))).collect();
    }

    /// Backends of each port: from endpoint slices where the service has any, else from the pods that it selects.
    pub(super) fn ports(
        &self,
        key: (&str, &str),
        service: &core::Service,
        slices: Option<&[&core::EndpointSlice]>,
    ) -> Vec<ServicePort> {
        let port = |port: &core::ServicePort| {
            let mut backends = BTreeSet::new();
            for slice in slices.into_iter().flatten() {
                let named = slice
                    .ports
                    .iter()
                    .filter(|(name, _, protocol)| *name == port.name && *protocol == port.protocol);
                for (_, number, _) in named {
                    backends.extend(slice.addresses.iter().map(|addr| (*addr, *number)));
                }
            }
            if slices.is_none() && !service.selector.is_empty() {
                for pod in self.workloads_in(key.0).iter().filter(|pod| pod.ready) {
                    let selected = carries(&pod.identity.labels, &service.selector);
                    if let Some(number) = target(port, pod).filter(|_| selected) {
                        backends.extend(pod.addresses.iter().map(|addr| (*addr, number)));
                    }
                }
            }
            let backends = backends.into_iter().collect();
            ServicePort { name: port.name.clone(), port: port.port, protocol: port.protocol, backends }
        };
        service.ports.iter().map(port).collect()
    }

    pub(super) fn workloads_in(&self, namespace: &str) -> &[Arc<Workload>] {
        let first = self.workloads.partition_point(|workload| *workload.namespace < *namespace);
        let rest = &self.workloads[first..];
        &rest[..rest.partition_point(|workload| *workload.namespace == *namespace)]
    }

    fn apply_rules(&mut self, rules: &[(&Arc<Object>, &core::DestinationRule)]) {
        for (object, rule) in rules {
            match self.service_index(&rule.host, &object.meta.object.namespace) {
                Some(index) => {
                    Arc::make_mut(&mut self.services[index]).balance = rule.balance.unwrap_or_default();
                }
                None => self.problem(
                    object,
                    Severity::Warning,
                    "spec.host",
                    format!("no Service is called {:?}", rule.host),
                ),
            }
        }
    }

    /// `name`, `name.namespace`, `name.namespace.svc` or `name.namespace.svc.<cluster domain>`.
    pub(super) fn service_index(&self, host: &str, namespace: &str) -> Option<usize> {
        let mut parts = host.splitn(3, '.');
        let name = parts.next()?;
        let namespace = parts.next().unwrap_or(namespace);
        if parts.next().is_some_and(|rest| rest != "svc" && !rest.starts_with("svc.")) {
            return None;
        }
        let key = |service: &Arc<Service>| (&*service.namespace, &*service.name).cmp(&(namespace, name));
        self.services.binary_search_by(key).ok()
    }
}

const SELECTOR_IN_ROOT: &str = "a PeerAuthentication of the root namespace holds for the whole mesh and takes no selector; \
     move it to the namespace of the workloads";

impl Pods {
    pub(super) fn add(&mut self, workload: &Workload) {
        self.probe_ports.extend(&workload.probe_ports);
        self.addresses.extend(&workload.addresses);
        self.count += 1;
        let named = workload.ports.iter().filter_map(|p| Some(((p.name.clone()?, p.protocol), p.port)));
        for (name, port) in named.collect::<BTreeSet<_>>() {
            *self.named.entry(name).or_default().entry(port).or_default() += 1;
        }
    }
}

pub(super) fn named<T>(object: &Object, policy: T) -> Arc<Named<T>> {
    let Meta { object, origin, created, .. } = object.meta.clone();
    Arc::new(Named { object, origin, created, policy })
}

/// Oldest first; an object without a time is the youngest; equal times go by name.
pub(super) fn age<T>(named: &Named<T>) -> (bool, &str, &ObjectRef) {
    (named.created.is_empty(), &named.created, &named.object)
}

/// The objects by name; of several with one name the first counts.
fn unique<'a>(store: &'a ObjectStore, problems: &mut Vec<Problem>) -> BTreeMap<ObjectRef, &'a Arc<Object>> {
    let mut objects: BTreeMap<ObjectRef, &Arc<Object>> = BTreeMap::new();
    for object in store.objects() {
        match objects.entry(object.meta.object.clone()) {
            Entry::Vacant(free) => drop(free.insert(object)),
            Entry::Occupied(taken) => {
                let Origin { file, document, line } = &taken.get().meta.origin;
                let harmless = matches!(object.spec, Spec::Routing { .. } | Spec::Ignored);
                problems.push(Problem {
                    origin: object.meta.origin.clone(),
                    severity: if harmless { Severity::Warning } else { Severity::Error },
                    object: Some(object.meta.object.clone()),
                    field: "metadata.name".into(),
                    message: format!(
                        "given before, in {file} line {line} (document {document}), which counts; remove one"
                    ),
                });
            }
        }
    }
    objects
}

fn target(port: &core::ServicePort, pod: &Workload) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            let fits =
                |p: &&core::ContainerPort| p.name.as_ref() == Some(name) && p.protocol == port.protocol;
            pod.ports.iter().find(fits).map(|p| p.port)
        }
    }
}
