//! Manifests that are right and that their author hardly meant: warnings for `weft policy check`, never for an agent.

use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::model::{Model, Named};
use crate::source::{AuthorizationPolicy, Spec};
use crate::store::ObjectStore;
use std::collections::BTreeSet;

/// Everything there is to say, sorted.
pub fn lint(store: &ObjectStore, model: &Model) -> Vec<Problem> {
    let mut problems = Vec::new();
    selectors(model, &mut problems);
    for named in model.authorization_policies() {
        repeated(named, &mut problems);
    }
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
    let busy: BTreeSet<_> =
        model.network_policies().iter().filter(selects).map(|named| &named.object).collect();
    let mut told = BTreeSet::new();
    for Named { object, origin, .. } in model.network_policies() {
        if !busy.contains(object) && told.insert(object) {
            idle(origin, object, "spec");
        }
    }
}

/// A rule that equals one before it, or stands beside one that matches everything, changes nothing.
fn repeated(named: &Named<AuthorizationPolicy>, problems: &mut Vec<Problem>) {
    let rules = &named.policy.rules;
    let all = rules.iter().position(|rule| rule.groups.is_empty());
    for (index, rule) in rules.iter().enumerate() {
        let first = rules.iter().position(|other| other == rule).filter(|first| *first < index);
        let by = match (first, all) {
            (Some(first), _) => format!("is the same as rules[{first}]"),
            (None, Some(all)) if all != index => {
                format!("is shadowed by rules[{all}], which matches everything")
            }
            _ => continue,
        };
        let line = named.policy.lines.get(index).copied().unwrap_or(named.origin.line);
        let message = format!("{by}; remove one of them");
        problems.push(warn(&named.origin, line, &named.object, &format!("spec.rules[{index}]"), message));
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
