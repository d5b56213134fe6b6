//! `policy.networking.k8s.io`: what the administrator of a cluster decides before NetworkPolicy, and where none does.
//!
//! `AdminNetworkPolicy` and `BaselineAdminNetworkPolicy` (v1alpha1) became the two tiers of `ClusterNetworkPolicy`
//! (v1alpha2, v1beta1). Rules are read from the top and the first that matches decides, so none of these isolates anybody.

use super::core::{SCTP, TCP, UDP};
use super::fields::{At, Fields, Findings};
use super::selector;
use super::yaml::Node;
use super::{Meta, Reach};
use crate::error::Severity;
use crate::model::layer::{
    Direction, NetworkPolicy, NetworkRule, PeerMatch, PodSet, PortMatch, Ports, RuleList, RuleVerdict, Tier,
};
use crate::model::selector::NAMESPACE_NAME;

/// The only `BaselineAdminNetworkPolicy` comes after every `ClusterNetworkPolicy` of the baseline tier.
const LAST: i32 = 1001;

/// What a policy that cannot be read would have selected, of equal labels of its subject.
pub(super) fn reach(spec: Option<&Node>) -> Reach {
    let subject = spec.and_then(|spec| spec.get("subject"));
    let field = |name| subject.and_then(|subject| subject.get(name));
    let (namespaces, pods) = match (field("namespaces"), field("pods")) {
        (Some(namespaces), None) => (Some(namespaces), None),
        (None, Some(pods)) => (pods.get("namespaceSelector"), pods.get("podSelector")),
        _ => (None, None),
    };
    let namespace = super::equal_labels(namespaces).remove(NAMESPACE_NAME).map(Into::into);
    Reach { namespace, selector: super::equal_labels(pods) }
}

/// What tells the three kinds apart.
struct Dialect {
    /// What an allowing rule calls its action.
    allow: &'static str,
    pass: bool,
    /// Must `pods` say of which namespaces? Else it means those of all.
    both_selectors: bool,
    /// Name and reader of the list of ports.
    ports: (&'static str, ReadPort),
}

type ReadPort = fn(&At<'_>, &mut Findings) -> Vec<PortMatch>;

pub(super) fn admin_network_policy(
    meta: &Meta,
    spec: Option<At<'_>>,
    out: &mut Findings,
) -> Vec<NetworkPolicy> {
    let dialect =
        Dialect { allow: "Allow", pass: true, both_selectors: true, ports: ("ports", port_v1alpha1) };
    policy(meta, spec, &dialect, &|spec, out| Tier::Admin { priority: priority(spec, out) }, out)
}

pub(super) fn baseline_admin_network_policy(
    meta: &Meta,
    spec: Option<At<'_>>,
    out: &mut Findings,
) -> Vec<NetworkPolicy> {
    if &*meta.object.name != "default" {
        out.add(
            Severity::Error,
            meta.origin.line,
            "metadata.name",
            "there is one baseline, and its name is \"default\"",
        );
    }
    let dialect =
        Dialect { allow: "Allow", pass: false, both_selectors: true, ports: ("ports", port_v1alpha1) };
    policy(meta, spec, &dialect, &|_, _| Tier::Baseline { priority: LAST }, out)
}

pub(super) fn cluster_network_policy(
    meta: &Meta,
    spec: Option<At<'_>>,
    out: &mut Findings,
) -> Vec<NetworkPolicy> {
    let dialect =
        Dialect { allow: "Accept", pass: true, both_selectors: false, ports: ("protocols", port_v1alpha2) };
    policy(meta, spec, &dialect, &tier, out)
}

type ReadTier<'r> = dyn Fn(&mut Fields<'_>, &mut Findings) -> Tier + 'r;

fn policy(
    meta: &Meta,
    spec: Option<At<'_>>,
    dialect: &Dialect,
    tier: &ReadTier<'_>,
    out: &mut Findings,
) -> Vec<NetworkPolicy> {
    let Some(spec) = spec else {
        let message = "`spec` is missing; `subject` in it says whom the policy is about";
        out.add(Severity::Error, meta.origin.line, "spec", message);
        return Vec::new();
    };
    let mut spec = spec.fields(out);
    let tier = tier(&mut spec, out);
    let subject = match spec.take("subject") {
        Some(at) => pods(&at, at.fields(out), dialect, out),
        None => {
            out.error(&spec.at.clone(), "`subject` is missing; it says whom the policy is about");
            None
        }
    };
    let mut rules = Vec::new();
    for list in [RuleList::Ingress, RuleList::Egress] {
        for (index, at) in spec.items(list.name(), out).iter().enumerate() {
            rules.extend(rule(at, list, index as u32, dialect, out));
        }
    }
    if rules.is_empty() {
        out.add(Severity::Warning, spec.at.node.line, "spec", "without rules it decides nothing");
    }
    spec.finish(out);
    let subject = subject.unwrap_or_default();
    vec![NetworkPolicy { tier, spec: 0, subject, isolates_ingress: false, isolates_egress: false, rules }]
}

fn tier(spec: &mut Fields<'_>, out: &mut Findings) -> Tier {
    let priority = priority(spec, out);
    let Some(at) = spec.take("tier") else {
        out.error(&spec.at.clone(), "`tier` is missing; use Admin or Baseline");
        return Tier::Admin { priority };
    };
    match at.text(out).as_deref() {
        Some("Admin") | None => Tier::Admin { priority },
        Some("Baseline") => Tier::Baseline { priority },
        Some(other) => {
            out.error(&at, format!("no tier {other:?}; use Admin or Baseline"));
            Tier::Admin { priority }
        }
    }
}

fn priority(spec: &mut Fields<'_>, out: &mut Findings) -> i32 {
    let Some(at) = spec.take("priority") else {
        out.error(&spec.at.clone(), "`priority` is missing; use a number from 0 (first) to 1000 (last)");
        return 0;
    };
    at.number(0, 1000, out).unwrap_or_default() as i32
}

fn rule(
    at: &At<'_>,
    list: RuleList,
    index: u32,
    dialect: &Dialect,
    out: &mut Findings,
) -> Option<NetworkRule> {
    let (direction, side) = match list {
        RuleList::Egress => (Direction::Egress, "to"),
        _ => (Direction::Ingress, "from"),
    };
    let mut fields = at.fields(out);
    fields.text("name", out);
    let action = action(&mut fields, dialect, out);
    let peers = fields.take(side).map(|at| at.items(out)).unwrap_or_default();
    if peers.is_empty() {
        out.error(at, format!("`{side}` is missing; name at least one peer"));
    }
    let mut chosen = Vec::new();
    for at in &peers {
        peer(at, direction, dialect, &mut chosen, out);
    }
    let (name, read) = dialect.ports;
    let given = fields.take(name);
    let items = given.as_ref().map(|at| at.items(out)).unwrap_or_default();
    if let Some(at) = given.filter(|_| items.is_empty()) {
        out.error(&at, "an empty list is ambiguous; name a port or leave the field out");
    }
    let mut ports: Vec<PortMatch> = items.iter().flat_map(|at| read(at, out)).collect();
    if items.is_empty() {
        ports.push(PortMatch::ALL);
    }
    if ports.iter().any(|port| matches!(port.ports, Ports::Named(_)))
        && chosen.iter().any(|peer| matches!(peer, PeerMatch::Addresses { .. }))
    {
        out.error(at, "a network has no names of ports; use numbers, or a rule of its own");
    }
    fields.finish(out);
    let (action, line) = (action?, at.node.line);
    Some(NetworkRule { direction, action, peers: chosen, ports, http: Vec::new(), list, index, line })
}

fn action(fields: &mut Fields<'_>, dialect: &Dialect, out: &mut Findings) -> Option<RuleVerdict> {
    let choice = if dialect.pass { ", Deny or Pass" } else { " or Deny" };
    let Some(at) = fields.take("action") else {
        out.error(&fields.at.clone(), format!("`action` is missing; use {}{choice}", dialect.allow));
        return None;
    };
    match at.text(out)?.as_str() {
        word if word == dialect.allow => Some(RuleVerdict::Allow),
        "Deny" => Some(RuleVerdict::Deny),
        "Pass" if dialect.pass => Some(RuleVerdict::Pass),
        other => {
            out.error(&at, format!("no action {other:?}; use {}{choice}", dialect.allow));
            None
        }
    }
}

/// `namespaces`, or `pods` with both selectors: of a subject, or of a peer whose other fields are taken already.
fn pods(at: &At<'_>, mut fields: Fields<'_>, dialect: &Dialect, out: &mut Findings) -> Option<PodSet> {
    let (namespaces, pods) = (fields.take("namespaces"), fields.take("pods"));
    fields.finish(out);
    match (namespaces, pods) {
        (Some(at), None) => Some(PodSet { namespaces: selector::labels(&at, out), ..PodSet::default() }),
        (None, Some(at)) => {
            let mut fields = at.fields(out);
            let mut read = |name, must| match fields.take(name) {
                Some(at) => selector::labels(&at, out),
                None => {
                    if must {
                        out.error(&at, format!("`{name}` is missing; write `{{}}` for all"));
                    }
                    Default::default()
                }
            };
            let set = PodSet {
                namespaces: read("namespaceSelector", dialect.both_selectors),
                pods: read("podSelector", true),
            };
            fields.finish(out);
            Some(set)
        }
        (Some(_), Some(_)) => {
            out.error(at, "`namespaces` and `pods` cannot be combined; give one of them");
            None
        }
        (None, None) => {
            out.error(at, "nobody is selected; give `namespaces` or `pods`");
            None
        }
    }
}

/// Only on egress is there more to name than workloads.
fn peer(at: &At<'_>, direction: Direction, dialect: &Dialect, to: &mut Vec<PeerMatch>, out: &mut Findings) {
    let mut fields = at.fields(out);
    if direction == Direction::Ingress {
        to.extend(pods(at, fields, dialect, out).map(PeerMatch::Pods));
        return;
    }
    let before = out.0.len();
    for (name, message) in [
        ("nodes", "the addresses of nodes are not known here; use `networks`"),
        ("domainNames", "names are not enforceable, only addresses are; use `networks`"),
    ] {
        if let Some(at) = fields.take(name) {
            out.error(&at, message);
        }
    }
    if let Some(list) = fields.take("networks") {
        let ranges = list.items(out);
        if ranges.is_empty() {
            out.error(&list, "an empty list is ambiguous; name a network");
        }
        for range in ranges.iter().filter_map(|at| selector::cidr(at, out)) {
            to.push(PeerMatch::Addresses { range, except: Vec::new(), inside: true });
        }
        fields.finish(out);
    } else if out.0.len() == before {
        to.extend(pods(at, fields, dialect, out).map(PeerMatch::Pods));
    }
}

/// One of `portNumber`, `portRange` and `namedPort`.
fn port_v1alpha1(at: &At<'_>, out: &mut Findings) -> Vec<PortMatch> {
    let mut fields = at.fields(out);
    let (number, range, name) =
        (fields.take("portNumber"), fields.take("portRange"), fields.take("namedPort"));
    fields.finish(out);
    match (number, range, name) {
        (Some(at), None, None) => {
            let mut fields = at.fields(out);
            let protocol = selector::protocol(&mut fields, out);
            let port = number_of(&mut fields, "port", out);
            fields.finish(out);
            protocol
                .zip(port)
                .map(|(protocol, port)| selector::range(protocol, port, port))
                .into_iter()
                .collect()
        }
        (None, Some(at), None) => {
            let mut fields = at.fields(out);
            let protocol = selector::protocol(&mut fields, out);
            let range = range_of(fields, protocol.unwrap_or_default(), out);
            protocol.and(range).into_iter().collect()
        }
        (None, None, Some(at)) => by_name(&at, out),
        _ => {
            out.error(at, "give one of `portNumber`, `portRange` and `namedPort`");
            Vec::new()
        }
    }
}

/// One of `tcp`, `udp`, `sctp` and `destinationNamedPort`.
fn port_v1alpha2(at: &At<'_>, out: &mut Findings) -> Vec<PortMatch> {
    let mut fields = at.fields(out);
    let mut given: Vec<(u8, At<'_>)> = Vec::new();
    for (name, protocol) in [("tcp", TCP), ("udp", UDP), ("sctp", SCTP)] {
        given.extend(fields.take(name).map(|at| (protocol, at)));
    }
    let name = fields.take("destinationNamedPort");
    fields.finish(out);
    match (&given[..], name) {
        ([], Some(at)) => by_name(&at, out),
        ([(protocol, at)], None) => destination_port(at, *protocol, out).into_iter().collect(),
        _ => {
            out.error(at, "give one of `tcp`, `udp`, `sctp` and `destinationNamedPort`");
            Vec::new()
        }
    }
}

fn destination_port(at: &At<'_>, protocol: u8, out: &mut Findings) -> Option<PortMatch> {
    let mut fields = at.fields(out);
    let port = fields.take("destinationPort");
    fields.finish(out);
    let Some(port) = port else {
        out.error(at, "`destinationPort` is missing");
        return None;
    };
    let mut fields = port.fields(out);
    let (number, range) = (fields.take("number"), fields.take("range"));
    fields.finish(out);
    match (number, range) {
        (Some(at), None) => at.port(out).map(|number| selector::range(protocol, number, number)),
        (None, Some(at)) => range_of(at.fields(out), protocol, out),
        _ => {
            out.error(&port, "give one of `number` and `range`");
            None
        }
    }
}

fn by_name(at: &At<'_>, out: &mut Findings) -> Vec<PortMatch> {
    let name = at.text(out).and_then(|text| selector::port_name(&text, at, out));
    name.iter().flat_map(|name| selector::named_of_any(name)).collect()
}

fn number_of(fields: &mut Fields<'_>, name: &'static str, out: &mut Findings) -> Option<u16> {
    let Some(at) = fields.take(name) else {
        out.error(&fields.at.clone(), format!("`{name}` is missing"));
        return None;
    };
    at.port(out)
}

fn range_of(mut fields: Fields<'_>, protocol: u8, out: &mut Findings) -> Option<PortMatch> {
    let first = number_of(&mut fields, "start", out);
    let end = fields.take("end");
    if end.is_none() {
        out.error(&fields.at.clone(), "`end` is missing");
    }
    fields.finish(out);
    let first = first?;
    Some(selector::range(protocol, first, selector::last(&end?, first, out)?))
}
