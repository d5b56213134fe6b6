//! `networking.k8s.io` NetworkPolicy: what may reach the pods of a namespace, and what they may reach.
//!
//! A policy isolates its pods in the directions of `policyTypes`; what no policy's rule allows there is refused. Replies
//! belong to the flow that they answer and need no rule. What Kubernetes' validation refuses is refused here too
//! (kubernetes:pkg/apis/networking/validation/validation.go).

use super::Meta;
use super::fields::{At, Fields, Findings};
use super::selector;
use crate::error::Severity;
use crate::model::layer::{
    Direction, NetworkPolicy, NetworkRule, PeerMatch, PodSet, PortMatch, RuleList, RuleVerdict, Tier,
};

pub(super) fn network_policy(meta: &Meta, spec: Option<At<'_>>, out: &mut Findings) -> Vec<NetworkPolicy> {
    let namespace = &meta.object.namespace;
    let Some(spec) = spec else {
        let message = "`spec` is missing; `podSelector` in it says whom the policy isolates";
        out.add(Severity::Error, meta.origin.line, "spec", message);
        return Vec::new();
    };
    let mut spec = spec.fields(out);
    let pods = spec.take("podSelector").map(|at| selector::labels(&at, out)).unwrap_or_default();
    let mut rules = rules(&mut spec, RuleList::Ingress, namespace, out);
    let egress = self::rules(&mut spec, RuleList::Egress, namespace, out);
    let types = types(&mut spec, !egress.is_empty(), out);
    rules.extend(egress);
    for direction in [Direction::Ingress, Direction::Egress] {
        let unused = rules.iter().find(|rule| rule.direction == direction && !types.contains(&direction));
        if let Some(rule) = unused {
            let message = "has no effect, because policyTypes does not name this direction";
            out.add(Severity::Warning, rule.line, &format!("spec.{}", rule.list.name()), message);
        }
    }
    rules.retain(|rule| types.contains(&rule.direction));
    spec.finish(out);
    vec![NetworkPolicy {
        tier: Tier::Network,
        spec: 0,
        subject: PodSet::in_namespace(namespace, pods),
        isolates_ingress: types.contains(&Direction::Ingress),
        isolates_egress: types.contains(&Direction::Egress),
        rules,
    }]
}

/// Absent, the policy is about ingress, and about egress if it has rules for it.
fn types(spec: &mut Fields<'_>, egress: bool, out: &mut Findings) -> Vec<Direction> {
    let items = spec.items("policyTypes", out);
    if items.is_empty() {
        return if egress { vec![Direction::Ingress, Direction::Egress] } else { vec![Direction::Ingress] };
    }
    let mut types = Vec::new();
    for at in items {
        match at.text(out).as_deref() {
            Some("Ingress") => types.push(Direction::Ingress),
            Some("Egress") => types.push(Direction::Egress),
            Some(other) => out.error(&at, format!("no policy type {other:?}; use Ingress or Egress")),
            None => {}
        }
    }
    types
}

fn rules(spec: &mut Fields<'_>, list: RuleList, namespace: &str, out: &mut Findings) -> Vec<NetworkRule> {
    let (direction, side) = match list {
        RuleList::Egress => (Direction::Egress, "to"),
        _ => (Direction::Ingress, "from"),
    };
    let mut rules = Vec::new();
    for (index, at) in spec.items(list.name(), out).iter().enumerate() {
        let mut fields = at.fields(out);
        let mut peers: Vec<PeerMatch> =
            fields.items(side, out).iter().filter_map(|at| peer(at, namespace, out)).collect();
        let mut ports: Vec<PortMatch> =
            fields.items("ports", out).iter().filter_map(|at| port(at, out)).collect();
        // A list that is empty or missing stands for all (NetworkPolicyIngressRule, NetworkPolicyEgressRule).
        if peers.is_empty() {
            peers.push(PeerMatch::Any);
        }
        if ports.is_empty() {
            ports.push(PortMatch::ALL);
        }
        fields.finish(out);
        rules.push(NetworkRule {
            direction,
            action: RuleVerdict::Allow,
            peers,
            ports,
            http: Vec::new(),
            list,
            index: index as u32,
            line: at.node.line,
        });
    }
    rules
}

fn peer(at: &At<'_>, namespace: &str, out: &mut Findings) -> Option<PeerMatch> {
    let mut fields = at.fields(out);
    let (pods, namespaces) = (fields.take("podSelector"), fields.take("namespaceSelector"));
    let block = fields.take("ipBlock");
    fields.finish(out);
    if let Some(block) = block {
        if pods.is_some() || namespaces.is_some() {
            out.error(at, "ipBlock cannot be combined with selectors; write two peers");
        }
        return ip_block(&block, out);
    }
    let chosen = pods.as_ref().map(|at| selector::labels(at, out)).unwrap_or_default();
    match &namespaces {
        Some(at) => {
            let namespaces = selector::labels(at, out);
            Some(PeerMatch::Pods(PodSet { namespaces, pods: chosen }))
        }
        None if pods.is_some() => Some(PeerMatch::Pods(PodSet::in_namespace(namespace, chosen))),
        None => {
            out.error(at, "an empty peer is ambiguous; give podSelector, namespaceSelector or ipBlock");
            None
        }
    }
}

fn ip_block(at: &At<'_>, out: &mut Findings) -> Option<PeerMatch> {
    let mut fields = at.fields(out);
    let range = fields.take("cidr");
    if range.is_none() {
        out.error(at, "`cidr` is missing");
    }
    let cidr = range.and_then(|at| selector::cidr(&at, out));
    let except = selector::except(&mut fields, cidr, out);
    fields.finish(out);
    // Addresses of pods count as well (kubernetes-sigs/network-policy-api and cyclonus: truth tables).
    Some(PeerMatch::Addresses { range: cidr?, except, inside: true })
}

fn port(at: &At<'_>, out: &mut Findings) -> Option<PortMatch> {
    let mut fields = at.fields(out);
    let protocol = selector::protocol(&mut fields, out);
    let (port, end) = (fields.take("port"), fields.take("endPort"));
    fields.finish(out);
    let protocol = protocol?;
    let Some(port) = port else {
        if let Some(end) = end {
            out.error(&end, "endPort needs the port at which the range begins");
        }
        return Some(selector::all_of(protocol));
    };
    let text = port.text(out)?;
    if text.parse::<u64>().is_err() {
        if let Some(end) = end {
            out.error(&end, "a range cannot begin at the name of a port; use numbers");
        }
        return selector::port_name(&text, &port, out).map(|name| selector::named(protocol, &name));
    }
    let first = port.port(out)?;
    let last = match end {
        Some(end) => selector::last(&end, first, out)?,
        None => first,
    };
    Some(selector::range(protocol, first, last))
}
