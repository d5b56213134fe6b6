//! The model follows a change of a few objects, at a cost in the size of the change.
//!
//! Pods, endpoint slices and policies come and go often; what follows from one of them is known here. Everything else
//! (namespaces, services, names that are given twice, addresses that are contested, documents that cannot be read) is
//! resolved from nothing: rare, and too much hangs on it.

use super::build::{age, named};
use super::selector::carries;
use super::{Identity, Model, Named, NetworkPolicy, Pods, Service, Workload};
use crate::error::ObjectRef;
use crate::source::{AuthorizationPolicy, Object, Selector, Spec};
use crate::store::{Changed, ObjectStore};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;
use std::sync::Arc;

/// Changes of more objects than this are resolved from nothing, which then costs less.
const FEW: usize = 64;

/// What became different in a model.
#[derive(Debug, Default)]
pub struct Change {
    /// Pods of these came, went or became different.
    pub(crate) identities: BTreeSet<Arc<Identity>>,
    /// Former and present version.
    pub(crate) workloads: Vec<[Option<Arc<Workload>>; 2]>,
    /// Policies that went, and those that came; of a changed one both versions.
    pub(crate) authorization: [Vec<Arc<Named<AuthorizationPolicy>>>; 2],
    pub(crate) network: [Vec<Arc<Named<NetworkPolicy>>>; 2],
    /// Namespace and selector of `PeerAuthentication`s that came or went.
    pub(crate) authentication: Vec<(Arc<str>, Selector)>,
    /// Services with other backends.
    pub(crate) services: BTreeMap<(Arc<str>, Arc<str>), Arc<Service>>,
}

impl Model {
    /// Follows what changed in the store since the model was made of it. `None`: the model must be made from nothing, and
    /// this one is of no more use. Problems are not found anew: [`Model::check`] does that.
    pub(crate) fn follow(
        &mut self,
        former: &BTreeMap<ObjectRef, Arc<Object>>,
        store: &ObjectStore,
        changed: &Changed,
    ) -> Option<Change> {
        if changed.broken || changed.ambiguous || changed.objects.len() > FEW {
            return None;
        }
        let mut change = Change::default();
        let mut services: BTreeSet<(Arc<str>, Arc<str>)> = BTreeSet::new();
        let named =
            |object: &Option<ObjectRef>| object.as_ref().is_some_and(|name| changed.objects.contains(name));
        if store.broken().any(|broken| named(&broken.object)) {
            return None;
        }
        for name in &changed.objects {
            let (before, now) = (former.get(name), store.named(name).first());
            // One name may have belonged to a kind of another API group, such as one that is ignored.
            if let (Some(before), Some(now)) = (before, now)
                && discriminant(&before.spec) != discriminant(&now.spec)
            {
                return None;
            }
            match before.or(now).map(|object| &object.spec)? {
                Spec::Pod(_) => self.follow_pod(before, now, &mut change)?,
                Spec::AuthorizationPolicy(_) => {
                    let attached = |object: &&Arc<Object>| matches!(&object.spec, Spec::AuthorizationPolicy(policy) if !policy.targets.is_empty());
                    if before.iter().chain(&now).any(attached) {
                        return None;
                    }
                    self.follow_authorization(name, now, &mut change);
                }
                Spec::PeerAuthentication(_) => self.follow_authentication(before, now, &mut change)?,
                Spec::Network(_) => self.follow_network(name, now, &mut change),
                Spec::EndpointSlice(_) => {
                    for object in before.into_iter().chain(now) {
                        let Spec::EndpointSlice(slice) = &object.spec else { return None };
                        services.insert((name.namespace.clone(), slice.service.as_str().into()));
                    }
                }
                Spec::Ignored | Spec::ServiceAccount => {}
                _ => return None,
            }
        }
        for versions in &change.workloads {
            let pods: Vec<_> = versions.iter().flatten().collect();
            for object in pods.iter().take(1).flat_map(|pod| store.of_kind("Service", &pod.namespace)) {
                let Spec::Service(service) = &object.spec else { return None };
                let selects = |pod: &&Arc<Workload>| carries(&pod.identity.labels, &service.selector);
                if !service.selector.is_empty() && pods.iter().copied().any(|pod| selects(&pod)) {
                    services.insert((object.meta.object.namespace.clone(), object.meta.object.name.clone()));
                }
            }
        }
        for (namespace, name) in services {
            self.follow_service(store, &namespace, &name, &mut change)?;
        }
        Some(change)
    }

    fn follow_pod(
        &mut self,
        before: Option<&Arc<Object>>,
        now: Option<&Arc<Object>>,
        change: &mut Change,
    ) -> Option<()> {
        let name = &before.or(now)?.meta.object;
        let place = self
            .workloads
            .binary_search_by(|own| (&own.namespace, &own.name).cmp(&(&name.namespace, &name.name)));
        let former = place.ok().map(|at| self.workloads.remove(at));
        for addr in former.iter().filter(|own| !own.host_network).flat_map(|own| &own.addresses) {
            self.by_address.remove(addr);
        }
        let present = match now.map(|object| (object, &object.spec)) {
            Some((object, Spec::Pod(pod))) if !pod.finished => {
                let known = |identity: Identity| {
                    let known = self.by_identity.get_key_value(&identity);
                    known.map_or_else(|| Arc::new(identity), |(known, _)| known.clone())
                };
                Some(Arc::new(self.workload_of(object, pod, &mut { known })))
            }
            _ => None,
        };
        // Of the former version only what the objects say can tell of addresses that nobody got.
        let said = [before, now].into_iter().flatten().filter_map(|object| match &object.spec {
            Spec::Pod(pod) => Some(&pod.addresses),
            _ => None,
        });
        if said.flatten().any(|addr| self.refused.contains(addr)) {
            return None;
        }
        if let Some(present) = &present {
            for addr in present.addresses.iter().filter(|_| !present.host_network) {
                let other = self.by_address.insert(*addr, present.clone());
                if other.is_some_and(|other| !Arc::ptr_eq(&other, present)) {
                    return None;
                }
            }
            let (Ok(at) | Err(at)) = place;
            self.workloads.insert(at, present.clone());
        }
        for own in former.iter().chain(&present).filter(|own| own.enrolled) {
            self.gather(&own.identity, change);
        }
        change.workloads.push([former, present]);
        Some(())
    }

    /// Looks anew at the pods of one identity.
    fn gather(&mut self, identity: &Arc<Identity>, change: &mut Change) {
        let mut pods = Pods::default();
        for own in self.workloads_in(&identity.spiffe.namespace) {
            if own.enrolled && own.identity == *identity {
                pods.add(own);
            }
        }
        let present = (pods.count > 0).then(|| Arc::new(pods));
        let former = match &present {
            None => self.by_identity.remove(identity),
            Some(pods) => self.by_identity.insert(identity.clone(), pods.clone()),
        };
        if former == present {
            return;
        }
        change.identities.insert(identity.clone());
        let names = former.iter().chain(&present).flat_map(|pods| pods.named.keys().cloned());
        for name in names.collect::<BTreeSet<_>>() {
            let ports = |pods: &Option<Arc<Pods>>| -> BTreeSet<u16> {
                let ports = pods.as_ref().and_then(|pods| pods.named.get(&name));
                ports.into_iter().flat_map(BTreeMap::keys).copied().collect()
            };
            if ports(&former) == ports(&present) {
                continue;
            }
            let all = self.by_identity.values().filter_map(|pods| pods.named.get(&name));
            let all: BTreeSet<u16> = all.flat_map(BTreeMap::keys).copied().collect();
            if all.is_empty() {
                self.named_ports.remove(&name);
            } else {
                self.named_ports.insert(name, all);
            }
        }
    }

    fn follow_authorization(&mut self, name: &ObjectRef, now: Option<&Arc<Object>>, change: &mut Change) {
        let place = self.authorization.binary_search_by(|own| own.object.cmp(name));
        if let Ok(at) = place {
            change.authorization[0].push(self.authorization.remove(at));
        }
        if let Some((object, Spec::AuthorizationPolicy(policy))) = now.map(|object| (object, &object.spec)) {
            let (Ok(at) | Err(at)) = place;
            self.authorization.insert(at, named(object, policy.clone()));
            change.authorization[1].push(self.authorization[at].clone());
        }
    }

    fn follow_authentication(
        &mut self,
        before: Option<&Arc<Object>>,
        now: Option<&Arc<Object>>,
        change: &mut Change,
    ) -> Option<()> {
        let name = &before.or(now)?.meta.object;
        for object in [before, now].into_iter().flatten() {
            let Spec::PeerAuthentication(policy) = &object.spec else { return None };
            // One with a selector in the root namespace is refused.
            if name.namespace == self.settings.root_namespace && !policy.selector.is_empty() {
                return None;
            }
            change.authentication.push((name.namespace.clone(), policy.selector.clone()));
        }
        let own = self.authentication.entry(name.namespace.clone()).or_default();
        own.retain(|named| named.object != *name);
        if let Some((object, Spec::PeerAuthentication(policy))) = now.map(|object| (object, &object.spec)) {
            own.push(named(object, policy.clone()));
            own.sort_by(|a, b| age(a).cmp(&age(b)));
        }
        if own.is_empty() {
            self.authentication.remove(&name.namespace);
        }
        Some(())
    }

    fn follow_network(&mut self, name: &ObjectRef, now: Option<&Arc<Object>>, change: &mut Change) {
        let gone = self.network.extract_if(.., |named| named.object == *name);
        change.network[0].extend(gone);
        if let Some((object, Spec::Network(policies))) = now.map(|object| (object, &object.spec)) {
            for policy in policies {
                let new = named(object, policy.clone());
                let at = self
                    .network
                    .partition_point(|own| (own.policy.tier, &own.object) <= (new.policy.tier, &new.object));
                self.network.insert(at, new.clone());
                change.network[1].push(new);
            }
        }
    }

    fn follow_service(
        &mut self,
        store: &ObjectStore,
        namespace: &Arc<str>,
        name: &Arc<str>,
        change: &mut Change,
    ) -> Option<()> {
        let reference =
            ObjectRef { kind: "Service".into(), namespace: namespace.clone(), name: name.clone() };
        let [object] = store.named(&reference) else {
            // Slices of no service are of no use; a service of two documents is.
            return store.named(&reference).is_empty().then_some(());
        };
        let Spec::Service(service) = &object.spec else { return None };
        let at = self.service_index(name, namespace)?;
        let slices: Vec<_> = store
            .of_kind("EndpointSlice", namespace)
            .filter_map(|object| match &object.spec {
                Spec::EndpointSlice(slice) if *slice.service == **name => Some(slice),
                _ => None,
            })
            .collect();
        let ports = self.ports((namespace, name), service, (!slices.is_empty()).then_some(&slices));
        if ports != self.services[at].ports {
            Arc::make_mut(&mut self.services[at]).ports = ports;
            change.services.insert((namespace.clone(), name.clone()), self.services[at].clone());
        }
        Some(())
    }
}
