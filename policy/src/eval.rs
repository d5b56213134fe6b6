//! The verdict on one flow, worked out slowly from the model, with its reason in words.
//!
//! This is the reference for [`crate::compile()`], the check of the tunnel's inbound side (where the source is whoever
//! its certificate names, known here or not), and the voice of `weft policy explain`.
//!
//! A flow must pass egress of its source and ingress of its destination. In each direction stand, in this order: a
//! policy that cannot be enforced; STRICT (ingress); Istio (ingress: DENY, then ALLOW, then tokens); Kubernetes' network
//! policy in its tiers; Cilium's. Every layer is asked; the first that denies is named, else the first that only HTTP can tell.

use crate::error::ObjectRef;
use crate::model::layer::{NetworkFacts, RuleVerdict, Tier};
use crate::model::{Direction, Identity, Model, Named, NetworkPolicy};
use crate::request::Request;
use crate::source::rule::{Facts, Match};
use crate::source::{Action, AuthorizationPolicy};
use crate::tables::{RuleAction, RuleRef};
use std::net::IpAddr;
use weft_datapath::policy::Mode;

pub use crate::model::layer::Peer;

/// IP protocol number.
pub(crate) const TCP: u8 = 6;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flow<'a> {
    pub source: Peer<'a>,
    pub source_addr: IpAddr,
    pub destination: Peer<'a>,
    pub destination_addr: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port. For ICMP [`crate::model::layer::icmp_port`], 0 for other protocols without ports.
    pub port: u16,
    /// What HTTP shows, where the question is about one request on a connection.
    pub request: Option<&'a Request>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Allow,
    Deny,
    /// Only HTTP can tell: refused unless the HTTP engine is in the path.
    Http,
}

/// A verdict and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub verdict: Verdict,
    /// The rule that decided; `None` for a default.
    pub rule: Option<RuleRef>,
    /// One sentence.
    pub reason: String,
    /// Where the flow is refused: one sentence on what would have allowed it.
    pub remedy: Option<String>,
}

impl Flow<'_> {
    /// The port that Istio's policies may name: they know of no other protocols than those with ports.
    pub(crate) fn service_port(&self) -> u16 {
        if matches!(self.protocol, 6 | 17 | 132) { self.port } else { 0 }
    }
}

impl Model {
    /// Decides one flow: egress of its source, then ingress of its destination.
    pub fn eval(&self, flow: &Flow<'_>) -> Decision {
        let outward = self.eval_egress(flow);
        if outward.verdict == Verdict::Deny {
            return outward;
        }
        let inward = self.eval_ingress(flow);
        if outward.verdict == Verdict::Http && inward.verdict != Verdict::Deny { outward } else { inward }
    }

    /// May the flow come to its destination?
    pub fn eval_ingress(&self, flow: &Flow<'_>) -> Decision {
        let Peer::Workload(destination) = flow.destination else {
            return allow(None, "the destination is no workload of the mesh".into());
        };
        let flow = &Flow { source: self.known(flow.source, flow.source_addr), ..*flow };
        if flow.source == Peer::Node && self.probe_ports(destination).contains(&flow.service_port()) {
            return allow(None, "the node may reach declared probe ports".into());
        }
        if let Some(refusal) = self.refused_by_blocked(destination, Direction::Ingress) {
            return refusal;
        }
        if let Some(refusal) = self.refused_by_mode(flow, destination) {
            return refusal;
        }
        let network = |cilium| self.network(flow, destination, flow.source, Direction::Ingress, cilium);
        first([
            self.authorize(flow, destination),
            self.tokens(flow, destination),
            network(false),
            network(true),
        ])
    }

    /// May the flow's source begin it?
    pub fn eval_egress(&self, flow: &Flow<'_>) -> Decision {
        let Peer::Workload(source) = self.known(flow.source, flow.source_addr) else {
            return allow(None, "egress is asked on the node of the source".into());
        };
        if let Some(refusal) = self.refused_by_blocked(source, Direction::Egress) {
            return refusal;
        }
        let network = |cilium| self.network(flow, source, flow.destination, Direction::Egress, cilium);
        first([network(false), network(true)])
    }

    /// Labels are not in certificates: they hold where certificate and address name one known workload.
    pub(crate) fn known<'a>(&'a self, peer: Peer<'a>, addr: IpAddr) -> Peer<'a> {
        let Peer::Certified(id) = peer else { return peer };
        match self.workload_at(addr) {
            Some(workload) if workload.enrolled && workload.identity.spiffe == *id => {
                Peer::Workload(&workload.identity)
            }
            _ => peer,
        }
    }

    pub(crate) fn refused_by_blocked(&self, subject: &Identity, direction: Direction) -> Option<Decision> {
        let blocked = self.blocked_by(subject, direction)?;
        let name = blocked
            .object
            .as_ref()
            .map_or_else(|| "a policy without a name".to_owned(), ObjectRef::to_string);
        let place = format!("{}:{}", blocked.origin.file, blocked.origin.line);
        let rule = RuleRef::whole(&blocked_object(blocked.object.as_ref()), RuleAction::Blocked);
        let end = if direction == Direction::Ingress { "destination" } else { "source" };
        let reason = format!("{name} selects the {end} and cannot be enforced");
        Some(deny(Some(rule), reason, format!("repair or remove {name} in {place}")))
    }

    pub(crate) fn refused_by_mode(&self, flow: &Flow<'_>, destination: &Identity) -> Option<Decision> {
        if !matches!(flow.source, Peer::Anonymous | Peer::Node) {
            return None;
        }
        let (mode, by) = self.modes(destination).at(flow.service_port());
        if mode != Mode::Strict {
            return None;
        }
        let rule = by.map(|object| RuleRef::whole(object, RuleAction::Strict));
        let by = by.map_or_else(|| "--default-deny".to_owned(), ObjectRef::to_string);
        let reason = format!("port {} is STRICT by {by}, and the source has no proven identity", flow.port);
        let remedy = "enrol the source, or make the port PERMISSIVE in a PeerAuthentication";
        Some(deny(rule, reason, remedy.into()))
    }

    /// Istio's layer.
    fn authorize(&self, flow: &Flow<'_>, destination: &Identity) -> Decision {
        let facts = Facts {
            source: flow.source.spiffe(),
            trust_domain: &self.settings.trust_domain,
            source_in: &|cidr| cidr.contains(flow.source_addr),
            destination: match flow.request {
                // Whoever sees the request sees where it went.
                Some(_) => std::slice::from_ref(&flow.destination_addr),
                None => self.addresses(destination),
            },
            port: flow.service_port(),
            request: flow.request,
        };
        let (allow, deny): (Vec<_>, Vec<_>) =
            self.authorizations(destination).partition(|named| named.policy.action == Action::Allow);
        self.combine(flow, best(&deny, &facts), allow.first().copied(), best(&allow, &facts))
    }

    /// Where tokens are to be verified, whoever cannot read a request cannot tell whether it carries a bad one. HTTP is
    /// spoken over TCP.
    fn tokens(&self, flow: &Flow<'_>, destination: &Identity) -> Decision {
        match self.verifies_tokens(destination) {
            Some(named) if flow.protocol == TCP && flow.request.is_none() => {
                http(Some(RuleRef::whole(&named.object, RuleAction::Token)))
            }
            _ => allow(None, "no token is to be verified".into()),
        }
    }

    /// DENY first, then ALLOW.
    fn combine(
        &self,
        flow: &Flow<'_>,
        denied: Best,
        first: Option<&Named<AuthorizationPolicy>>,
        allowed: Best,
    ) -> Decision {
        if let (Match::Yes, Some(rule)) = denied {
            return denied_by(rule);
        }
        let allowed = match first {
            None => ((!self.settings.default_deny).into(), None),
            Some(_) => allowed,
        };
        match (denied.0, allowed.0) {
            (_, Match::No) => {
                let wanted = format!(
                    "an ALLOW rule with {} and to.operation.ports [\"{}\"]",
                    describe(flow),
                    flow.port
                );
                match first {
                    None => deny(
                        None,
                        "no ALLOW policy selects the destination, and the default is to refuse".into(),
                        wanted,
                    ),
                    Some(named) => {
                        let object = &named.object;
                        let reason = format!(
                            "no rule of the destination's ALLOW policies matches; the first is {object}"
                        );
                        deny(Some(RuleRef::whole(object, RuleAction::NoneAllowed)), reason, wanted)
                    }
                }
            }
            (Match::Undecided, _) => http(denied.1),
            (_, Match::Undecided) => http(allowed.1),
            (_, Match::Yes) if first.is_none() => {
                allow(None, "no ALLOW policy selects the destination".into())
            }
            (_, Match::Yes) => allow(allowed.1, "an ALLOW rule matches".into()),
        }
    }

    /// The layer of Kubernetes' network policies, or that of Cilium's.
    pub(crate) fn network(
        &self,
        flow: &Flow<'_>,
        subject: &Identity,
        peer: Peer<'_>,
        direction: Direction,
        cilium: bool,
    ) -> Decision {
        self.with_facts(flow, subject, peer, direction, |facts| {
            self.network_layer(flow, subject, facts, direction, cilium)
        })
    }

    /// What rules of network policies may ask about a flow.
    pub(crate) fn with_facts<R>(
        &self,
        flow: &Flow<'_>,
        subject: &Identity,
        peer: Peer<'_>,
        direction: Direction,
        ask: impl FnOnce(&NetworkFacts<'_>) -> R,
    ) -> R {
        let (peer_addr, destination) = match direction {
            Direction::Ingress => (flow.source_addr, Peer::Workload(subject)),
            Direction::Egress => (flow.destination_addr, peer),
        };
        ask(&NetworkFacts {
            peer,
            address_in: &|cidr| cidr.contains(peer_addr),
            namespaces: &self.namespaces,
            protocol: flow.protocol,
            port_in: &|first, last| flow.port != 0 && (first..=last).contains(&flow.port),
            port_named: &|name| match destination {
                Peer::Workload(identity) => self.port_named(identity, name, flow.protocol, flow.port),
                _ => Match::No,
            },
            request: flow.request,
        })
    }

    /// The network policies of some tiers that select a workload.
    pub(crate) fn network_of(
        &self,
        subject: &Identity,
        wanted: impl Fn(&Tier) -> bool,
    ) -> Vec<&Named<NetworkPolicy>> {
        let selected = self.network_policies().filter(|named| wanted(&named.policy.tier));
        selected.filter(|named| named.policy.subject.selects(&self.namespaces, subject)).collect()
    }

    fn network_layer(
        &self,
        flow: &Flow<'_>,
        subject: &Identity,
        facts: &NetworkFacts<'_>,
        direction: Direction,
        cilium: bool,
    ) -> Decision {
        let of = |wanted: fn(&Tier) -> bool| self.network_of(subject, wanted);
        if cilium {
            let policies = of(|tier| *tier == Tier::Cilium);
            return cilium_layer(&policies, facts, flow, direction);
        }
        let admin = of(|tier| matches!(tier, Tier::Admin { .. }));
        if let Some(decision) = in_order(&admin, facts, direction) {
            return decision;
        }
        let network = of(|tier| *tier == Tier::Network);
        if let Some(first) = network.iter().find(|named| named.policy.isolates(direction)) {
            // "Traffic to and from the node where a Pod is running is always allowed" (Kubernetes, Network Policies).
            if facts.peer == Peer::Node {
                return allow(None, "network policies always allow the node".into());
            }
            return isolated(first, best_of(&network, facts, direction, RuleVerdict::Allow), flow, direction);
        }
        let baseline = of(|tier| matches!(tier, Tier::Baseline { .. }));
        in_order(&baseline, facts, direction)
            .unwrap_or_else(|| allow(None, "no network policy isolates the workload".into()))
    }
}

/// The verdict of several layers is that of the least rank.
pub(crate) fn rank(verdict: Verdict, rule: Option<&RuleRef>) -> u32 {
    match (verdict, rule) {
        (Verdict::Deny, _) => 0,
        (Verdict::Http, _) => 1,
        (Verdict::Allow, Some(_)) => 2,
        (Verdict::Allow, None) => 3,
    }
}

/// The first decision that denies, else the first that needs HTTP, else the first that a rule allows.
fn first<const N: usize>(layers: [Decision; N]) -> Decision {
    // Of equals the first (Iterator::min_by_key).
    let rank = |decision: &Decision| rank(decision.verdict, decision.rule.as_ref());
    layers.into_iter().min_by_key(rank).unwrap_or_else(|| allow(None, "nothing refuses it".into()))
}

/// Tiers in which the first rule that matches decides; `None` goes on to the next tier.
fn in_order(
    policies: &[&Named<NetworkPolicy>],
    facts: &NetworkFacts<'_>,
    direction: Direction,
) -> Option<Decision> {
    for named in policies {
        for rule in named.policy.rules.iter().filter(|rule| rule.direction == direction) {
            let by = RuleRef::network(&named.object, rule);
            match (rule.matches(facts), rule.action) {
                (Match::No, _) => {}
                (Match::Undecided, _) => return Some(http(Some(by))),
                (Match::Yes, RuleVerdict::Allow) => {
                    return Some(allow(Some(by), "an administrator's rule allows it".into()));
                }
                (Match::Yes, RuleVerdict::Deny) => return Some(denied_by(by)),
                (Match::Yes, RuleVerdict::Pass) => return None,
            }
        }
    }
    None
}

fn cilium_layer(
    policies: &[&Named<NetworkPolicy>],
    facts: &NetworkFacts<'_>,
    flow: &Flow<'_>,
    direction: Direction,
) -> Decision {
    let denied = best_of(policies, facts, direction, RuleVerdict::Deny);
    match denied {
        (Match::Yes, Some(rule)) => return denied_by(rule),
        (Match::Undecided, rule) => return http(rule),
        _ => {}
    }
    let asks = |named: &&&Named<NetworkPolicy>| {
        named.policy.rules.iter().any(|rule| rule.direction == direction && rule.asks_http(facts))
    };
    let isolating = policies.iter().find(|named| named.policy.isolates(direction));
    let Some(first) = isolating.or_else(|| policies.iter().find(asks)) else {
        return allow(None, "no Cilium policy isolates the workload".into());
    };
    // Cilium's agent lets the local host reach its endpoints (option allow-localhost).
    if facts.peer == Peer::Node && direction == Direction::Ingress {
        return allow(None, "Cilium's policies allow the node what they do not deny".into());
    }
    isolated(first, best_of(policies, facts, direction, RuleVerdict::Allow), flow, direction)
}

/// What becomes of a flow of an isolated workload.
fn isolated(first: &Named<NetworkPolicy>, allowed: Best, flow: &Flow<'_>, direction: Direction) -> Decision {
    match allowed {
        (Match::Yes, rule) => allow(rule, "a network policy allows it".into()),
        (Match::Undecided, rule) => http(rule),
        (Match::No, _) => {
            let object = &first.object;
            let (end, list) = match direction {
                Direction::Ingress => ("destination", "an ingress rule"),
                Direction::Egress => ("source", "an egress rule"),
            };
            let reason =
                format!("network policies isolate the {end} and none allows it; the first is {object}");
            let remedy = format!("{list} that selects the peer and port {}", flow.port);
            deny(Some(RuleRef::whole(object, RuleAction::NoneAllowed)), reason, remedy)
        }
    }
}

/// The best match of any rule with this action, and the first rule that has it.
fn best_of(
    policies: &[&Named<NetworkPolicy>],
    facts: &NetworkFacts<'_>,
    direction: Direction,
    action: RuleVerdict,
) -> Best {
    let mut best = (Match::No, None);
    for named in policies {
        let rules = named.policy.rules.iter();
        for rule in rules.filter(|rule| rule.direction == direction && rule.action == action) {
            let matched = rule.matches(facts);
            if matched > best.0 {
                best = (matched, Some(RuleRef::network(&named.object, rule)));
            }
        }
    }
    best
}

/// Stands for a policy whose name could not be read.
pub(crate) fn blocked_object(object: Option<&ObjectRef>) -> ObjectRef {
    let unknown = || ObjectRef { kind: "policy".into(), namespace: "".into(), name: "unreadable".into() };
    object.cloned().unwrap_or_else(unknown)
}

/// How well a set of rules matched, and the rule that did.
type Best = (Match, Option<RuleRef>);

/// The best match of any rule, and the first rule that has it.
fn best(policies: &[&Named<AuthorizationPolicy>], facts: &Facts<'_>) -> Best {
    let mut best = (Match::No, None);
    for named in policies {
        for (index, rule) in named.policy.rules.iter().enumerate() {
            let matched = rule.matches(facts);
            if matched > best.0 {
                best = (matched, Some(RuleRef::rule(&named.object, named.policy.action.into(), index)));
            }
        }
    }
    best
}

fn describe(flow: &Flow<'_>) -> String {
    let principal = |id: &crate::SpiffeId| format!("from.source.principals [{:?}]", id.principal());
    match flow.source {
        Peer::Workload(identity) => principal(&identity.spiffe),
        Peer::Certified(id) => principal(id),
        Peer::Anonymous | Peer::Node => {
            format!("from.source.ipBlocks [\"{}\"] (the source has no proven identity)", flow.source_addr)
        }
    }
}

fn allow(rule: Option<RuleRef>, reason: String) -> Decision {
    Decision { verdict: Verdict::Allow, rule, reason, remedy: None }
}

fn deny(rule: Option<RuleRef>, reason: String, remedy: String) -> Decision {
    Decision { verdict: Verdict::Deny, rule, reason, remedy: Some(remedy) }
}

fn denied_by(rule: RuleRef) -> Decision {
    let place = format!("{} {}[{}]", rule.object, rule.list.name(), rule.index.unwrap_or(0));
    deny(Some(rule), "a DENY rule matches".into(), format!("change {place} so that it does not match"))
}

fn http(rule: Option<RuleRef>) -> Decision {
    let remedy = "an ALLOW rule without HTTP attributes that matches, or the HTTP engine".to_owned();
    let reason =
        "the verdict depends on HTTP (or on which of its addresses the destination was reached by), and \
                  nothing in the path can tell"
            .to_owned();
    Decision { verdict: Verdict::Http, rule, reason, remedy: Some(remedy) }
}
