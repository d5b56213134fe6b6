//! `cilium.io/v2` CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy.
//!
//! What Cilium's validation refuses is refused here too (cilium:pkg/policy/api/rule_validation.go), and by name what
//! weft cannot enforce: names of DNS, Kafka, TLS interception, nodes, groups of a cloud. weft knows one node of the
//! cluster, its own: other nodes are outside, so that `world` holds for them.

mod peers;
mod ports;

use super::fields::{At, Fields, Findings};
use super::yaml::Node;
use super::{Meta, Reach, Selector};
use crate::error::Severity;
use crate::model::layer::{
    Direction, NetworkPolicy, NetworkRule, PeerMatch, PodSet, PortMatch, RuleList, RuleVerdict, Tier,
};
use crate::model::selector::SERVICE_ACCOUNT;
use peers::About;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Reads `spec` and `specs` of an object; a clusterwide one has no namespace.
pub(super) fn policy(meta: &Meta, top: &mut Fields<'_>, out: &mut Findings) -> Vec<NetworkPolicy> {
    let namespace = Some(&*meta.object.namespace).filter(|namespace| !namespace.is_empty());
    let mut specs: Vec<At<'_>> = top.take("spec").into_iter().collect();
    specs.extend(top.items("specs", out));
    if specs.is_empty() {
        let message = "`spec` is missing; `endpointSelector` in it says whom the policy is about";
        out.add(Severity::Error, meta.origin.line, "spec", message);
    }
    let mut reader = Reader { namespace, count: BTreeMap::new() };
    (0..).zip(&specs).filter_map(|(number, at)| reader.spec(number, at, out)).collect()
}

/// What a policy that cannot be read would have selected, of equal labels of its `endpointSelector`. `None`: only nodes.
pub(super) fn reach(mut namespace: Option<Arc<str>>, spec: Option<&Node>, labels: Selector) -> Option<Reach> {
    let has = |name| spec.is_some_and(|spec| spec.get(name).is_some());
    if has("nodeSelector") && !has("endpointSelector") {
        return None;
    }
    let mut selector = Selector::new();
    for (key, value) in labels {
        match peers::about(&key) {
            // The service account is no label; to leave a requirement out only widens.
            Some(About::Pod(label)) if label != SERVICE_ACCOUNT => {
                selector.insert(label.to_owned(), value);
            }
            Some(About::Namespace) => namespace = namespace.or(Some(value.into())),
            _ => {}
        }
    }
    Some(Reach { namespace, selector })
}

struct Reader<'n> {
    /// `None`: the policy is clusterwide.
    namespace: Option<&'n str>,
    /// Rules so far in each list, through all specs.
    count: BTreeMap<RuleList, u32>,
}

impl Reader<'_> {
    fn spec(&mut self, number: u32, at: &At<'_>, out: &mut Findings) -> Option<NetworkPolicy> {
        let mut fields = at.fields(out);
        let endpoints = fields.take("endpointSelector");
        let nodes = fields.take("nodeSelector");
        if let Some(at) = &nodes {
            let message = match self.namespace {
                Some(_) => "only a CiliumClusterwideNetworkPolicy selects nodes; use endpointSelector",
                None => "the node's own traffic is not policed, only that of workloads; use endpointSelector",
            };
            out.error(at, message);
        }
        let subject = match &endpoints {
            Some(at) => peers::subject(at, self.namespace, out),
            None if nodes.is_some() => None,
            None => {
                out.error(at, "`endpointSelector` is missing; write `{}` for all");
                None
            }
        };
        let mut rules = Vec::new();
        let mut isolates = [false; 2];
        for list in [RuleList::Ingress, RuleList::IngressDeny, RuleList::Egress, RuleList::EgressDeny] {
            let items = fields.items(list.name(), out);
            isolates[direction(list) as usize] |= !items.is_empty();
            for at in &items {
                self.rule(at, list, &mut rules, out);
            }
        }
        if let Some(at) = fields.take("enableDefaultDeny") {
            let mut own = at.fields(out);
            for (direction, name) in [(Direction::Ingress, "ingress"), (Direction::Egress, "egress")] {
                let given = own.take(name).and_then(|at| at.boolean(out));
                isolates[direction as usize] = given.unwrap_or(isolates[direction as usize]);
            }
            own.finish(out);
        }
        if rules.is_empty() && isolates == [false; 2] && !out.refused() {
            out.add(Severity::Warning, at.node.line, &at.path, "without rules it decides nothing");
        }
        fields.ignore(&["description", "labels", "log"]);
        fields.finish(out);
        let [isolates_ingress, isolates_egress] = isolates;
        Some(NetworkPolicy {
            tier: Tier::Cilium,
            spec: number,
            subject: subject?,
            isolates_ingress,
            isolates_egress,
            rules,
        })
    }

    /// One rule; several in the neutral form where only some of its ports ask for HTTP.
    fn rule(&mut self, at: &At<'_>, list: RuleList, to: &mut Vec<NetworkRule>, out: &mut Findings) {
        let count = self.count.entry(list).or_default();
        let index = *count;
        *count += 1;
        let denies = matches!(list, RuleList::IngressDeny | RuleList::EgressDeny);
        let mut fields = at.fields(out);
        let given = peers::read(&mut fields, direction(list), denies, self.namespace, out);
        let ports = ports::read(&mut fields, denies, out);
        if !denies && let Some(at) = fields.take("authentication") {
            authentication(&at, out);
        }
        fields.finish(out);
        let (peers, ports) = match (given, ports) {
            (Some(peers), Some(ports)) => (peers, ports),
            (Some(peers), None) => (peers, vec![(vec![PortMatch::ALL], Vec::new())]),
            (None, Some(ports)) => (vec![PeerMatch::Any], ports),
            (None, None) if denies => {
                out.error(at, "an empty deny rule is ambiguous; name whom it denies, or which ports");
                return;
            }
            // It allows nobody, and its presence isolates: how Cilium's users write "refuse all".
            (None, None) => return,
        };
        for (ports, http) in ports {
            to.push(NetworkRule {
                direction: direction(list),
                action: if denies { RuleVerdict::Deny } else { RuleVerdict::Allow },
                peers: peers.clone(),
                ports,
                http,
                list,
                index,
                line: at.node.line,
            });
        }
    }
}

fn direction(list: RuleList) -> Direction {
    match list {
        RuleList::Egress | RuleList::EgressDeny => Direction::Egress,
        RuleList::Rules | RuleList::Ingress | RuleList::IngressDeny => Direction::Ingress,
    }
}

fn authentication(at: &At<'_>, out: &mut Findings) {
    let mut fields = at.fields(out);
    if let Some(at) = fields.take("mode") {
        match at.text(out).as_deref() {
            Some("disabled") | None => {}
            Some("required") => {
                let message = "Cilium's own handshake is not spoken here; ask for a proven identity by a \
                               PeerAuthentication with mode STRICT";
                out.error(&at, message);
            }
            Some(other) => out.error(&at, format!("mode {other:?} is not enforceable; use disabled")),
        }
    }
    fields.finish(out);
}

/// A set of pods as the namespace of a policy limits it.
fn scoped(mut pods: PodSet, namespace: Option<&str>) -> PodSet {
    if let Some(namespace) = namespace {
        let own = PodSet::in_namespace(namespace, Default::default());
        pods.namespaces.equal.extend(own.namespaces.equal);
    }
    pods
}
