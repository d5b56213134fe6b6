//! Manifests that are right and that their author hardly meant: warnings for `weft policy check`, never for an agent.

mod http;
mod shadow;

use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::eval::{Flow, Peer, Verdict};
use crate::model::{Model, Named, Workload};
use crate::source::rule::Test;
use crate::source::{Action, Spec};
use crate::store::ObjectStore;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Everything there is to say, sorted.
pub fn lint(store: &ObjectStore, model: &Model) -> Vec<Problem> {
    let mut problems = Vec::new();
    selectors(model, &mut problems);
    shadow::shadowed(model, &mut problems);
    shadow::unreachable_baseline(model, &mut problems);
    http::undeclared(store, model, &mut problems);
    http::unverified(model, &mut problems);
    locked_out(model, &mut problems);
    services(store, model, &mut problems);
    problems.sort();
    problems
}

fn warn(origin: &Origin, line: u32, object: &ObjectRef, field: &str, message: String) -> Problem {
    let (field, object) = (field.to_owned(), Some(object.clone()));
    Problem { origin: Origin { line, ..origin.clone() }, severity: Severity::Warning, object, field, message }
}

/// A policy that selects nobody is often a label misspelt.
fn selectors(model: &Model, problems: &mut Vec<Problem>) {
    let identities = model.identities();
    let mut idle = |origin: &Origin, object: &ObjectRef, field: &str| {
        let message = "selects no workload of these manifests; compare its labels and namespace".to_owned();
        problems.push(warn(origin, origin.line, object, field, message));
    };
    for Named { object, origin, policy, .. } in model.authorization_policies() {
        if !identities.iter().any(|own| model.selects(Some(&object.namespace), &policy.selector, own)) {
            idle(origin, object, "spec.selector");
        }
    }
    for Named { object, origin, policy, .. } in model.peer_authentications() {
        if !identities.iter().any(|own| model.selects(Some(&object.namespace), &policy.selector, own)) {
            idle(origin, object, "spec.selector");
        }
    }
    // An object with several specs is warned of only if none of them selects anybody.
    let selects = |named: &&Named<_>| {
        let policy: &crate::model::NetworkPolicy = &named.policy;
        identities.iter().any(|own| policy.subject.selects(model.namespaces(), own))
    };
    let busy: BTreeSet<_> = model.network_policies().filter(selects).map(|named| &named.object).collect();
    let mut told = BTreeSet::new();
    for Named { object, origin, .. } in model.network_policies() {
        if !busy.contains(object) && told.insert(object) {
            idle(origin, object, "spec");
        }
    }
}

/// Nobody at all may reach a workload, and it declares no port on which the node may probe it (those stay open whatever
/// policy says): if something checks its health over the network all the same, it finds it dead.
fn locked_out(model: &Model, problems: &mut Vec<Problem>) {
    for Named { object, origin, policy, .. } in model.authorization_policies() {
        let nobody = match policy.action {
            Action::Allow => policy.rules.is_empty(),
            Action::Audit => false,
            Action::Deny => policy.rules.iter().any(|rule| rule.groups.is_empty()),
        };
        if !nobody || policy.dry_run {
            continue;
        }
        let denied = |workload: &&Arc<Workload>| {
            let (own, addr) = (&workload.identity, workload.addresses.first());
            let selected = model.selects(Some(&object.namespace), &policy.selector, own);
            let Some(addr) = addr.filter(|_| selected && workload.probe_ports.is_empty()) else {
                return false;
            };
            let (source, destination) = (Peer::Node, Peer::Workload(own));
            let (source_addr, destination_addr) = (*addr, *addr);
            let at = |port: u16| {
                model.eval_ingress(&Flow {
                    source,
                    source_addr,
                    destination,
                    destination_addr,
                    protocol: 6,
                    port,
                    request: None,
                })
            };
            // Port 1 stands for all that no rule names.
            let rules = model.authorizations(own).flat_map(|named| &named.policy.rules);
            let named = rules.flat_map(|rule| rule.tests()).filter_map(|test| match test {
                Test::Port(port) => Some(*port),
                _ => None,
            });
            let open = named.chain([1]).any(|port| at(port).verdict == Verdict::Allow);
            !open && at(1).rule.is_some_and(|rule| rule.object == *object)
        };
        if let Some(workload) = model.workloads().iter().find(denied) {
            let message = format!(
                "denies everything, health checks of the node too, and Pod {}/{} declares no probe by HTTP, TCP or gRPC; \
                 declare it, and its port stays open to the node",
                workload.namespace, workload.name
            );
            problems.push(warn(origin, origin.line, object, "spec", message));
        }
    }
}

fn services(store: &ObjectStore, model: &Model, problems: &mut Vec<Problem>) {
    for object in store.objects() {
        let (meta, Spec::Service(spec)) = (&object.meta, &object.spec) else { continue };
        let name = (&*meta.object.namespace, &*meta.object.name);
        let found = model.services().binary_search_by(|own| (&*own.namespace, &*own.name).cmp(&name));
        let Ok(index) = found else { continue };
        // Without addresses or selector it is headless, or of endpoints that somebody else writes.
        for port in model.services()[index].ports.iter().filter(|port| port.backends.is_empty()) {
            if !spec.selector.is_empty() && !spec.addresses.is_empty() {
                let message = format!(
                    "port {} has no endpoints: no ready pod has these labels and this port; connections to it fail",
                    port.port
                );
                problems.push(warn(&meta.origin, meta.origin.line, &meta.object, "spec.selector", message));
            }
        }
    }
}
