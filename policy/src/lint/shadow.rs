//! Rules that decide nothing, because another one matches all that they match and is asked first, or says the same.
//!
//! Only what is certain is said: one rule covers another where each part of the other is found in a wider part of it, and
//! the one's policy selects every workload that the other's does.

use super::warn;
use crate::error::{ObjectRef, Origin, Problem};
use crate::model::layer::{NetworkRule, PeerMatch, PortMatch, Ports, RuleList, RuleVerdict, Tier};
use crate::model::{Direction, Identity, Model};
use crate::source::Action;
use crate::source::rule::Rule;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Policies that one is compared with: those after are asked for nothing, so that a large mesh is checked in time.
const MAX_COMPARED: usize = 64;

/// One rule, wherever it stands.
struct Standing<'a> {
    object: &'a ObjectRef,
    origin: &'a Origin,
    list: RuleList,
    index: u32,
    line: u32,
    layer: Layer,
    verdict: RuleVerdict,
    body: Body<'a>,
}

enum Body<'a> {
    Istio(&'a Rule),
    Network(&'a NetworkRule),
}

/// Which rules are asked together, and in which order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layer {
    Istio,
    Network(Tier),
}

/// What one policy has: whom it selects (positions in the list of identities) and its rules.
struct Policy<'a> {
    selects: BTreeSet<usize>,
    rules: Vec<Standing<'a>>,
}

pub(super) fn shadowed(model: &Model, problems: &mut Vec<Problem>) {
    let identities = model.identities();
    let mut policies = policies(model, &identities);
    policies.retain(|policy| !policy.selects.is_empty());
    let mut by_identity: Vec<Vec<usize>> = vec![Vec::new(); identities.len()];
    for (at, policy) in policies.iter().enumerate() {
        policy.selects.iter().for_each(|identity| by_identity[*identity].push(at));
    }
    for policy in &policies {
        // Whoever covers it selects its first workload too.
        let Some(first) = policy.selects.first() else { continue };
        let near = by_identity[*first].iter().take(MAX_COMPARED).map(|at| &policies[*at]);
        let wider: Vec<_> = near.filter(|other| other.selects.is_superset(&policy.selects)).collect();
        for rule in &policy.rules {
            let others = wider.iter().flat_map(|other| {
                let same = other.selects.len() == policy.selects.len();
                other.rules.iter().map(move |rule| (rule, same))
            });
            let found: Vec<_> =
                others.filter_map(|(other, same)| Some((other, why(rule, other, same)?))).collect();
            let first = found.iter().find(|(_, how)| matches!(how, How::First));
            let by = first.or(found.first());
            if let Some((other, how)) = by {
                let list = |rule: &Standing<'_>| format!("{}[{}]", rule.list.name(), rule.index);
                let other = match other.object == rule.object {
                    true => list(other),
                    false => format!("{} {}", other.object, list(other)),
                };
                let message = match how {
                    How::Same => format!("is the same as {other}; remove one of them"),
                    How::Wider => {
                        format!("is shadowed by {other}, which matches all that it does; remove one of them")
                    }
                    How::First => {
                        format!("is never reached: {other} is asked first, and matches all that it does")
                    }
                };
                let field = format!("spec.{}", list(rule));
                problems.push(warn(rule.origin, rule.line, rule.object, &field, message));
            }
        }
    }
}

enum How {
    Same,
    Wider,
    First,
}

/// Does `other` take all from `rule`? `alike`: their policies select the same workloads.
fn why(rule: &Standing<'_>, other: &Standing<'_>, alike: bool) -> Option<How> {
    let place = |rule: &Standing<'_>| (rule.object.clone(), rule.list, rule.index);
    if place(rule) == place(other) || !covers(&other.body, &rule.body) {
        return None;
    }
    let first = match (other.layer, rule.layer) {
        (Layer::Istio, Layer::Istio) | (Layer::Network(Tier::Cilium), Layer::Network(Tier::Cilium)) => {
            match (other.verdict, rule.verdict) {
                (RuleVerdict::Deny, RuleVerdict::Allow) => true,
                (other, rule) if other == rule => false,
                _ => return None,
            }
        }
        (Layer::Network(Tier::Network), Layer::Network(Tier::Network)) => false,
        // The order of equal priorities is that of names, and in an object that of its lists.
        (Layer::Network(one), Layer::Network(two)) if one == two => {
            return (place(other) < place(rule)).then_some(How::First);
        }
        (Layer::Network(one @ Tier::Admin { .. }), Layer::Network(two)) if two != Tier::Cilium => {
            let decides = matches!(two, Tier::Admin { .. }) || other.verdict != RuleVerdict::Pass;
            return (one < two && decides).then_some(How::First);
        }
        (Layer::Network(one @ Tier::Baseline { .. }), Layer::Network(two @ Tier::Baseline { .. })) => {
            return (one < two).then_some(How::First);
        }
        _ => return None,
    };
    match (first, alike && covers(&rule.body, &other.body)) {
        (true, _) => Some(How::First),
        // Of two that are the same, the later is told.
        (false, true) => (place(other) < place(rule)).then_some(How::Same),
        (false, false) => Some(How::Wider),
    }
}

fn covers(wide: &Body<'_>, narrow: &Body<'_>) -> bool {
    match (wide, narrow) {
        // A rule is an AND of groups: with fewer of them it matches more.
        (Body::Istio(wide), Body::Istio(narrow)) => {
            wide.groups.iter().all(|group| narrow.groups.contains(group))
        }
        (Body::Network(wide), Body::Network(narrow)) => {
            wide.direction == narrow.direction
                && (wide.http.is_empty() || wide.http == narrow.http)
                && narrow.peers.iter().all(|peer| wide.peers.iter().any(|wide| covers_peer(wide, peer)))
                && narrow.ports.iter().all(|port| wide.ports.iter().any(|wide| covers_port(wide, port)))
                // A rule that matches nothing is another matter.
                && !narrow.peers.is_empty()
                && !narrow.ports.is_empty()
        }
        _ => false,
    }
}

fn covers_peer(wide: &PeerMatch, narrow: &PeerMatch) -> bool {
    match (wide, narrow) {
        (PeerMatch::Any, _) => true,
        (PeerMatch::Cluster, PeerMatch::Pods(_) | PeerMatch::Node) => true,
        (PeerMatch::Pods(wide), PeerMatch::Pods(narrow)) => {
            wide.is_all() || wide == narrow || wide.pods.is_empty() && wide.namespaces == narrow.namespaces
        }
        (
            PeerMatch::Addresses { range: wide, except, inside },
            PeerMatch::Addresses { range: narrow, inside: narrow_inside, .. },
        ) => wide.covers(narrow) && except.is_empty() && (*inside || !narrow_inside),
        (wide, narrow) => wide == narrow,
    }
}

fn covers_port(wide: &PortMatch, narrow: &PortMatch) -> bool {
    if wide.protocol.is_some() && wide.protocol != narrow.protocol {
        return false;
    }
    match (&wide.ports, &narrow.ports) {
        (Ports::All, _) => true,
        (Ports::Range(first, last), Ports::Range(from, to)) => first <= from && to <= last,
        (wide, narrow) => wide == narrow,
    }
}

fn policies<'a>(model: &'a Model, identities: &[Arc<Identity>]) -> Vec<Policy<'a>> {
    let mut policies = Vec::new();
    for named in model.authorization_policies().filter(|named| named.policy.enforced()) {
        let verdict = match named.policy.action {
            Action::Allow => RuleVerdict::Allow,
            Action::Audit => continue,
            Action::Deny => RuleVerdict::Deny,
        };
        let rules = named.policy.rules.iter().enumerate().map(|(index, rule)| Standing {
            object: &named.object,
            origin: &named.origin,
            list: RuleList::Rules,
            index: index as u32,
            line: named.policy.lines.get(index).copied().unwrap_or(named.origin.line),
            layer: Layer::Istio,
            verdict,
            body: Body::Istio(rule),
        });
        let selects =
            |own: &Arc<Identity>| model.selects(Some(&named.object.namespace), &named.policy.selector, own);
        policies.push(Policy { selects: positions(identities, selects), rules: rules.collect() });
    }
    for named in model.network_policies() {
        let rules = named.policy.rules.iter().map(|rule| Standing {
            object: &named.object,
            origin: &named.origin,
            list: rule.list,
            index: rule.index,
            line: rule.line,
            layer: Layer::Network(named.policy.tier),
            verdict: rule.action,
            body: Body::Network(rule),
        });
        let selects = |own: &Arc<Identity>| named.policy.subject.selects(model.namespaces(), own);
        policies.push(Policy { selects: positions(identities, selects), rules: rules.collect() });
    }
    policies
}

fn positions(identities: &[Arc<Identity>], selects: impl Fn(&Arc<Identity>) -> bool) -> BTreeSet<usize> {
    (0..identities.len()).filter(|at| selects(&identities[*at])).collect()
}

/// Baseline rules are asked only where no network policy isolates: where each of their workloads is isolated, never.
pub(super) fn unreachable_baseline(model: &Model, problems: &mut Vec<Problem>) {
    let identities = model.identities();
    let isolated = |own: &Identity, direction: Direction| {
        model.network_policies().any(|named| {
            named.policy.tier == Tier::Network
                && named.policy.isolates(direction)
                && named.policy.subject.selects(model.namespaces(), own)
        })
    };
    for named in model.network_policies() {
        if !matches!(named.policy.tier, Tier::Baseline { .. }) {
            continue;
        }
        let selected: Vec<_> =
            identities.iter().filter(|own| named.policy.subject.selects(model.namespaces(), own)).collect();
        for direction in [Direction::Ingress, Direction::Egress] {
            let first = named.policy.rules.iter().find(|rule| rule.direction == direction);
            let Some(rule) = first.filter(|_| !selected.is_empty()) else { continue };
            if selected.iter().all(|own| isolated(own, direction)) {
                let field = format!("spec.{}", rule.list.name());
                let message =
                    "is never reached: a NetworkPolicy isolates every workload that it selects".to_owned();
                problems.push(warn(&named.origin, rule.line, &named.object, &field, message));
            }
        }
    }
}
