//! What is refused because somebody wanted something of it that cannot be read or enforced.

use super::layer::{NetworkPolicy, PeerMatch, PodSet};
use super::selector::NAMESPACE_NAME;
use super::{Blocked, Model};
use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::source::{Broken, Object, Reach, Selector, Spec, Target};
use crate::store::ObjectStore;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

impl Model {
    /// Whom a policy of Istio selects: by its own selector, or whom the services select that it is attached to. One that is
    /// attached to a service without a selector, or to one that cannot be read, cannot be enforced; a service that does not
    /// exist has no workloads.
    pub(super) fn selectors(
        &mut self,
        object: &Object,
        own: &Selector,
        targets: &[Target],
        objects: &BTreeMap<ObjectRef, &Arc<Object>>,
        store: &ObjectStore,
    ) -> Vec<Selector> {
        if targets.is_empty() {
            return vec![own.clone()];
        }
        let namespace = &object.meta.object.namespace;
        let own_namespace = Reach { namespace: Some(namespace.clone()), selector: Selector::new() };
        if *namespace == self.settings.root_namespace {
            self.problem(object, Severity::Error, &targets[0].field, TARGET_IN_ROOT.into());
            self.block_exactly(Some(object.meta.object.clone()), object.meta.origin.clone(), own_namespace);
            return Vec::new();
        }
        let mut selectors = Vec::new();
        for Target { service, field } in targets {
            let name = ObjectRef {
                kind: "Service".into(),
                namespace: namespace.clone(),
                name: service.as_str().into(),
            };
            match objects.get(&name).map(|object| &object.spec) {
                Some(Spec::Service(service)) if !service.selector.is_empty() => {
                    selectors.push(service.selector.clone());
                }
                None if !store.broken().any(|broken| broken.object.as_ref() == Some(&name)) => {
                    let message = format!("there is no {name}: nothing is selected by it");
                    self.problem(object, Severity::Warning, field, message);
                }
                found => {
                    let why = if found.is_some() { "has no selector" } else { "cannot be read" };
                    let message = format!("{name} {why}, so its workloads are not known; use spec.selector");
                    self.problem(object, Severity::Error, field, message);
                    let (name, origin) = (object.meta.object.clone(), object.meta.origin.clone());
                    self.block_exactly(Some(name), origin, own_namespace.clone());
                }
            }
        }
        selectors
    }

    /// Something that cannot be read refuses what it may have been about.
    pub(super) fn refuse(&mut self, broken: &Broken) {
        if let Some(reach) = broken.policy.clone() {
            self.block(broken.object.clone(), broken.origin.clone(), reach);
        }
        if !broken.addresses.is_empty() {
            self.refused.extend(&broken.addresses);
            let list: Vec<_> = broken.addresses.iter().map(IpAddr::to_string).collect();
            let message = format!("connections to {} are refused until it can be read", list.join(", "));
            let (origin, object) = (broken.origin.clone(), broken.object.clone());
            let (severity, field) = (Severity::Warning, String::new());
            self.problems.push(Problem { origin, severity, object, field, message });
        }
    }

    pub(super) fn block(&mut self, object: Option<ObjectRef>, origin: Origin, mut reach: Reach) {
        // Only Istio's policies reach out of the root namespace; of what kind an unnamed one is nobody knows.
        let stays = object.as_ref().is_some_and(|object| object.kind.ends_with("NetworkPolicy"));
        reach.namespace =
            reach.namespace.filter(|namespace| stays || *namespace != self.settings.root_namespace);
        self.block_exactly(object, origin, reach);
    }

    /// Who is in a namespace whose labels cannot be read may be one whom a policy is about, as its subject or as a peer.
    pub(super) fn refuse_unlabelled(&mut self, broken: &Broken) {
        let Some(reach) = broken.labels.clone() else { return };
        let Some(asking) = self.network.iter().find(|named| asks_for_labels(&named.policy)) else { return };
        let until = format!(
            "until the object can be read: {} asks for labels of namespaces, and these are not known",
            asking.object
        );
        self.block_until(broken.object.clone(), broken.origin.clone(), reach, &until);
    }

    fn block_exactly(&mut self, object: Option<ObjectRef>, origin: Origin, reach: Reach) {
        self.block_until(object, origin, reach, "until this policy can be enforced");
    }

    fn block_until(&mut self, object: Option<ObjectRef>, origin: Origin, reach: Reach, until: &str) {
        let whom = match &reach.namespace {
            None => "the whole mesh".to_owned(),
            Some(namespace) => format!("namespace {namespace}"),
        };
        let only = if reach.selector.is_empty() { "all workloads" } else { "the selected workloads" };
        let message = format!("{only} of {whom} refuse all traffic {until}");
        let problem = Problem {
            origin: origin.clone(),
            severity: Severity::Error,
            object: object.clone(),
            field: String::new(),
            message,
        };
        self.problems.push(problem);
        self.blocked.push(Blocked { object, origin, reach });
    }
}

/// Does it select anybody by labels of namespaces? The name of a namespace is one that needs no object.
fn asks_for_labels(policy: &NetworkPolicy) -> bool {
    let asks = |pods: &PodSet| {
        let selector = &pods.namespaces;
        selector.equal.keys().any(|key| key != NAMESPACE_NAME)
            || selector.expressions.iter().any(|requirement| requirement.key != NAMESPACE_NAME)
    };
    let mut peers = policy.rules.iter().flat_map(|rule| &rule.peers);
    asks(&policy.subject) || peers.any(|peer| matches!(peer, PeerMatch::Pods(pods) if asks(pods)))
}

/// Its selector would hold in every namespace, where the service is another or none.
const TARGET_IN_ROOT: &str = "policies of the root namespace hold for the whole mesh, and a Service belongs to one namespace; use \
     spec.selector, or attach a policy of another namespace to a Service there";
