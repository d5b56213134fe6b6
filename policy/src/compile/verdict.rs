//! The verdict of one profile on a point: a peer, a class of addresses, a protocol and a set of ports that no policy of
//! the profile tells apart. Says what [`crate::eval`] says of every flow in it.

use super::PortSet;
use super::profile::Profile;
use crate::error::ObjectRef;
use crate::eval::TCP;
use crate::model::layer::{NetworkFacts, NetworkRule, Peer, RuleVerdict, Tier};
use crate::model::{Cidr, Direction, Model, NetworkPolicy};
use crate::source::Action;
use crate::source::rule::{Facts, Match};
use crate::tables::{RuleAction, RuleRef};
use weft_datapath::policy::{ALLOW, DENY, HTTP, Mode};

/// A verdict and its rule, before rules have numbers.
pub(super) type Entry = (u32, Option<RuleRef>);

pub(super) struct Point<'a> {
    pub(super) peer: Peer<'a>,
    /// The longest range around the peer's address, if any.
    pub(super) class: Option<&'a Cidr>,
    /// 0: one that no policy names; any, where none is named at all.
    pub(super) protocol: u8,
    pub(super) port: PortSet,
}

impl Point<'_> {
    /// The port that Istio's policies may name.
    fn service_port(&self) -> u16 {
        match (self.protocol, self.port) {
            (0 | 6 | 17 | 132, PortSet::One(port)) => port,
            _ => 0,
        }
    }

    fn within(&self, range: &Cidr) -> bool {
        self.class.is_some_and(|class| range.covers(class))
    }
}

impl Profile {
    pub(super) fn verdict(&self, model: &Model, point: &Point<'_>) -> Entry {
        if let Some(inward) = &self.inward
            && point.peer == Peer::Node
            && inward.probes.contains(&point.service_port())
        {
            return (ALLOW, None);
        }
        if let Some(object) = &self.blocked {
            return (DENY, Some(RuleRef::whole(object, RuleAction::Blocked)));
        }
        let mut decided: Entry = (ALLOW, None);
        for layer in [Self::authorization, Self::tokens, Self::kubernetes, Self::cilium] {
            let entry = layer(self, model, point);
            if entry.0 == DENY {
                return entry;
            }
            let undecided = entry.0 == HTTP && decided.0 == ALLOW;
            if undecided || (entry.0 == ALLOW && decided == (ALLOW, None)) {
                decided = entry;
            }
        }
        decided
    }

    /// STRICT, and Istio's policies.
    fn authorization(&self, model: &Model, point: &Point<'_>) -> Entry {
        let Some(inward) = &self.inward else { return (ALLOW, None) };
        let id = if let Peer::Workload(identity) = point.peer { Some(&identity.spiffe) } else { None };
        let port = point.service_port();
        let (mode, by) = inward.ports.get(&port).unwrap_or(&inward.mode);
        if id.is_none() && *mode == Mode::Strict as u32 {
            return (DENY, by.as_ref().map(|object| RuleRef::whole(object, RuleAction::Strict)));
        }
        let facts = Facts {
            source: id,
            trust_domain: &model.settings.trust_domain,
            source_in: &|range| point.within(range),
            destination: &inward.addresses,
            port,
            request: None,
        };
        let mut best = [(Match::No, None), (Match::No, None)];
        let mut first_allow: Option<&ObjectRef> = None;
        for named in &inward.policies {
            let policy = &named.policy;
            if policy.action == Action::Allow {
                first_allow = first_allow.or(Some(&named.object));
            }
            let best = &mut best[usize::from(policy.action == Action::Deny)];
            for (index, rule) in policy.rules.iter().enumerate() {
                let matched = rule.matches(&facts);
                if matched > best.0 {
                    *best = (matched, Some(RuleRef::rule(&named.object, policy.action.into(), index)));
                }
            }
        }
        let [(allowed, allow_rule), (denied, deny_rule)] = best;
        let default = if model.settings.default_deny { Match::No } else { Match::Yes };
        let allowed = if first_allow.is_some() { allowed } else { default };
        match (denied, allowed) {
            (Match::Yes, _) => (DENY, deny_rule),
            (_, Match::No) => {
                (DENY, first_allow.map(|object| RuleRef::whole(object, RuleAction::NoneAllowed)))
            }
            (Match::Undecided, _) => (HTTP, deny_rule),
            (_, Match::Undecided) => (HTTP, allow_rule),
            (_, Match::Yes) => (ALLOW, allow_rule),
        }
    }

    /// Tokens are verified by whoever reads HTTP.
    fn tokens(&self, _: &Model, point: &Point<'_>) -> Entry {
        match self.inward.as_ref().and_then(|inward| inward.tokens.as_ref()) {
            Some(object) if point.protocol == TCP => (HTTP, Some(RuleRef::whole(object, RuleAction::Token))),
            _ => (ALLOW, None),
        }
    }

    /// The administrator's tier, network policies, the baseline. Policies are in this order.
    fn kubernetes(&self, model: &Model, point: &Point<'_>) -> Entry {
        let mut isolated = None;
        let mut best = (Match::No, None);
        let mut passed = false;
        for (object, policy) in self.policies() {
            match policy.tier {
                Tier::Admin { .. } if passed => {}
                Tier::Baseline { .. } if isolated.is_some() => break,
                Tier::Admin { .. } | Tier::Baseline { .. } => {
                    for rule in self.rules(policy) {
                        let by = || Some(RuleRef::network(object, rule));
                        match (self.matches(model, rule, point), rule.action) {
                            (Match::No, _) => continue,
                            (Match::Undecided, _) => return (HTTP, by()),
                            (Match::Yes, RuleVerdict::Allow) => return (ALLOW, by()),
                            (Match::Yes, RuleVerdict::Deny) => return (DENY, by()),
                            (Match::Yes, RuleVerdict::Pass) if goes_on(policy) => passed = true,
                            (Match::Yes, RuleVerdict::Pass) => return (ALLOW, None),
                        }
                        break;
                    }
                }
                Tier::Network => {
                    if policy.isolates(self.direction()) {
                        isolated = isolated.or(Some(object));
                    }
                    self.better(model, point, object, policy, RuleVerdict::Allow, &mut best);
                }
                Tier::Cilium => break,
            }
        }
        match isolated {
            None => (ALLOW, None),
            Some(_) if point.peer == Peer::Node => (ALLOW, None),
            Some(object) => isolation(object, best),
        }
    }

    fn cilium(&self, model: &Model, point: &Point<'_>) -> Entry {
        let (mut isolated, mut asks) = (None, None);
        let (mut allowed, mut denied) = ((Match::No, None), (Match::No, None));
        let policies = self.policies().filter(|(_, policy)| policy.tier == Tier::Cilium);
        for (object, policy) in policies {
            if policy.isolates(self.direction()) {
                isolated = isolated.or(Some(object));
            }
            let mut rules = self.rules(policy);
            if rules.any(|rule| self.with_facts(model, point, |facts| rule.asks_http(facts))) {
                asks = asks.or(Some(object));
            }
            self.better(model, point, object, policy, RuleVerdict::Allow, &mut allowed);
            self.better(model, point, object, policy, RuleVerdict::Deny, &mut denied);
        }
        let isolated = isolated.or(asks);
        match (denied.0, isolated) {
            (Match::Yes, _) => (DENY, denied.1),
            (Match::Undecided, _) => (HTTP, denied.1),
            (Match::No, None) => (ALLOW, None),
            (Match::No, _) if point.peer == Peer::Node && self.inward.is_some() => (ALLOW, None),
            (Match::No, Some(object)) => isolation(object, allowed),
        }
    }

    fn policies(&self) -> impl Iterator<Item = (&ObjectRef, &NetworkPolicy)> {
        self.network.iter().map(|named| (&named.object, &named.policy))
    }

    fn rules<'m>(&self, policy: &'m NetworkPolicy) -> impl Iterator<Item = &'m NetworkRule> + use<'m> {
        let direction = self.direction();
        policy.rules.iter().filter(move |rule| rule.direction == direction)
    }

    fn better(
        &self,
        model: &Model,
        point: &Point<'_>,
        object: &ObjectRef,
        policy: &NetworkPolicy,
        action: RuleVerdict,
        best: &mut (Match, Option<RuleRef>),
    ) {
        for rule in self.rules(policy).filter(|rule| rule.action == action) {
            let matched = self.matches(model, rule, point);
            if matched > best.0 {
                *best = (matched, Some(RuleRef::network(object, rule)));
            }
        }
    }

    fn matches(&self, model: &Model, rule: &NetworkRule, point: &Point<'_>) -> Match {
        self.with_facts(model, point, |facts| rule.matches(facts))
    }

    fn with_facts<T>(&self, model: &Model, point: &Point<'_>, ask: impl FnOnce(&NetworkFacts<'_>) -> T) -> T {
        ask(&NetworkFacts {
            peer: point.peer,
            address_in: &|range| point.within(range),
            namespaces: &model.namespaces,
            protocol: point.protocol,
            port_in: &|first, last| match point.port {
                PortSet::One(port) => port != 0 && first <= port && port <= last,
                PortSet::Piece(lowest, highest) => first <= lowest && highest <= last,
                PortSet::Other => false,
            },
            port_named: &|name| self.named(model, name, point),
            request: None,
        })
    }

    /// Every port that has a name is looked at by itself.
    fn named(&self, model: &Model, name: &str, point: &Point<'_>) -> Match {
        let PortSet::One(port) = point.port else { return Match::No };
        match (&self.inward, point.peer, self.direction()) {
            (Some(inward), ..) => {
                let Some((named, count)) = &inward.named else { return Match::No };
                match named.get(&(name.to_owned(), point.protocol)).and_then(|ports| ports.get(&port)) {
                    None => Match::No,
                    Some(declared) if declared == count => Match::Yes,
                    Some(_) => Match::Undecided,
                }
            }
            (None, Peer::Workload(identity), Direction::Egress) => {
                model.port_named(identity, name, point.protocol, port)
            }
            _ => Match::No,
        }
    }
}

/// Does a tier with network policies come after this one?
fn goes_on(policy: &NetworkPolicy) -> bool {
    policy.tier < Tier::Network
}

/// What becomes of a flow of an isolated subject.
fn isolation(first: &ObjectRef, (matched, rule): (Match, Option<RuleRef>)) -> Entry {
    match matched {
        Match::Yes => (ALLOW, rule),
        Match::Undecided => (HTTP, rule),
        Match::No => (DENY, Some(RuleRef::whole(first, RuleAction::NoneAllowed))),
    }
}
