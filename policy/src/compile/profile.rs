//! What the verdicts on one subject depend on: subjects with equal profiles share their rows.

use super::index::{Anchor, Index, Version};
use crate::error::ObjectRef;
use crate::eval::blocked_object;
use crate::model::layer::{Direction, NetworkRule, PeerMatch, Ports};
use crate::model::selector::NAMESPACE_NAME;
use crate::model::{Change, Cidr, Identity, Model, Named, NamedPorts, NetworkPolicy};
use crate::source::rule::{Rule, Test};
use crate::source::{AuthorizationPolicy, Selector};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use weft_datapath::policy::Mode;

/// Mode, as a number, and the policy that set it.
pub(super) type ModeBy = (u32, Option<ObjectRef>);

/// All that the ingress verdicts on a subject depend on, apart from its number.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Inward {
    /// In order.
    pub(super) policies: Vec<Version<Named<AuthorizationPolicy>>>,
    pub(super) mode: ModeBy,
    pub(super) ports: BTreeMap<u16, ModeBy>,
    pub(super) probes: BTreeSet<u16>,
    /// The policy that wants tokens verified.
    pub(super) tokens: Option<ObjectRef>,
    /// Empty unless a policy looks at the subject's address.
    pub(super) addresses: Vec<IpAddr>,
    /// Its pods' named ports and their number, if a policy asks for one by name.
    pub(super) named: Option<(NamedPorts, usize)>,
}

/// All that the verdicts on a subject in one direction depend on, apart from its number.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Profile {
    /// Absent for egress.
    pub(super) inward: Option<Inward>,
    /// Those that speak of this direction, in order.
    pub(super) network: Vec<Version<Named<NetworkPolicy>>>,
    pub(super) blocked: Option<ObjectRef>,
}

impl Profile {
    pub(super) fn ingress(model: &Model, selection: &Selection, identity: &Identity) -> Self {
        let policies = selection.authorization(model, identity);
        let tests = policies.iter().flat_map(|named| &named.policy.rules).flat_map(|rule| rule.tests());
        let by_address = tests.into_iter().any(|test| matches!(test, Test::DestinationIp(_)));
        let modes = model.modes(identity);
        let by = |(mode, by): (Mode, Option<&ObjectRef>)| (mode as u32, by.cloned());
        let network = selection.network(model, identity, Direction::Ingress);
        let pods = model.pods(identity);
        let rules = network.iter().flat_map(|named| &named.policy.rules);
        let mut ports =
            rules.filter(|rule| rule.direction == Direction::Ingress).flat_map(|rule| &rule.ports);
        let by_name = ports.any(|port| matches!(port.ports, Ports::Named(_)));
        Profile {
            blocked: blocked(model, identity, Direction::Ingress),
            inward: Some(Inward {
                mode: by(modes.mode),
                ports: modes.ports.iter().map(|(port, mode)| (*port, by(*mode))).collect(),
                probes: model.probe_ports(identity).clone(),
                tokens: model.verifies_tokens(identity).map(|named| named.object.clone()),
                addresses: if by_address { model.addresses(identity).to_vec() } else { Vec::new() },
                named: by_name.then(|| (pods.named.clone(), pods.count)),
                policies,
            }),
            network,
        }
    }

    /// `None` where nothing restricts what the subject begins.
    pub(super) fn egress(model: &Model, selection: &Selection, identity: &Identity) -> Option<Self> {
        let network = selection.network(model, identity, Direction::Egress);
        let blocked = blocked(model, identity, Direction::Egress);
        let any = !network.is_empty() || blocked.is_some();
        any.then_some(Profile { inward: None, network, blocked })
    }

    pub(super) fn direction(&self) -> Direction {
        if self.inward.is_some() { Direction::Ingress } else { Direction::Egress }
    }

    /// Rules of Istio's policies.
    pub(super) fn authorization_rules(&self) -> impl Iterator<Item = &Rule> {
        self.inward.iter().flat_map(|inward| &inward.policies).flat_map(|named| &named.policy.rules)
    }

    /// Rules of network policies that speak of this direction.
    pub(super) fn network_rules(&self) -> impl Iterator<Item = &NetworkRule> {
        let direction = self.direction();
        let rules = self.network.iter().flat_map(|named| &named.policy.rules);
        rules.filter(move |rule| rule.direction == direction)
    }

    /// Ranges of the peer's address that some policy names.
    pub(super) fn ranges(&self) -> BTreeSet<Cidr> {
        let tests = self.authorization_rules().flat_map(|rule| rule.tests());
        let peers = self.network_rules().flat_map(|rule| &rule.peers);
        tests.filter_map(source_ip).chain(peers.flat_map(peer_ranges)).collect()
    }
}

/// Ranges of addresses and long ranges of ports that policies name.
#[derive(Clone, Default, PartialEq)]
pub(super) struct Ranges {
    pub(super) cidrs: BTreeSet<Cidr>,
    pub(super) ports: BTreeSet<(u16, u16)>,
}

impl Ranges {
    pub(super) fn new<'m>(
        authorization: impl IntoIterator<Item = &'m Arc<Named<AuthorizationPolicy>>>,
        network: impl IntoIterator<Item = &'m Arc<Named<NetworkPolicy>>>,
    ) -> Ranges {
        let mut ranges = Ranges::default();
        for named in authorization.into_iter().filter(|named| named.policy.enforced()) {
            let tests = named.policy.rules.iter().flat_map(|rule| rule.tests());
            ranges.cidrs.extend(tests.filter_map(source_ip));
        }
        for rule in network.into_iter().flat_map(|named| &named.policy.rules) {
            ranges.cidrs.extend(rule.peers.iter().flat_map(peer_ranges));
            ranges.ports.extend(rule.ports.iter().filter_map(|port| long(&port.ports)));
        }
        ranges
    }
}

/// A range that is too long to be written port by port.
pub(super) fn long(ports: &Ports) -> Option<(u16, u16)> {
    match ports {
        Ports::Range(first, last) if last.saturating_sub(*first) >= super::LISTED => Some((*first, *last)),
        _ => None,
    }
}

fn source_ip(test: &Test) -> Option<Cidr> {
    if let Test::SourceIp(cidr) = test { Some(*cidr) } else { None }
}

fn peer_ranges(peer: &PeerMatch) -> impl Iterator<Item = Cidr> {
    let (range, except) = match peer {
        PeerMatch::Addresses { range, except, .. } => (Some(*range), &except[..]),
        _ => (None, &[][..]),
    };
    range.into_iter().chain(except.iter().copied())
}

fn blocked(model: &Model, identity: &Identity, direction: Direction) -> Option<ObjectRef> {
    model.blocked_by(identity, direction).map(|blocked| blocked_object(blocked.object.as_ref()))
}

/// The policies in force, by whom they may select.
pub(super) struct Selection {
    authorization: Index<Version<Named<AuthorizationPolicy>>>,
    network: Index<Version<Named<NetworkPolicy>>>,
}

impl Selection {
    pub(super) fn new(model: &Model) -> Self {
        let mut selection = Selection { authorization: Index::new(), network: Index::new() };
        for named in model.authorization.iter().filter(|named| named.policy.enforced()) {
            selection.authorization.insert(authorization_anchor(model, named), Version(named.clone()));
        }
        for named in &model.network {
            selection.network.insert(network_anchor(named), Version(named.clone()));
        }
        selection
    }

    /// Takes over what changed; where those stand who may be concerned.
    pub(super) fn follow(&mut self, model: &Model, change: &Change) -> Vec<Anchor> {
        let mut concerned = Vec::new();
        let [gone, come] = &change.authorization;
        let in_force = |named: &&Arc<Named<AuthorizationPolicy>>| named.policy.enforced();
        for named in gone.iter().filter(in_force) {
            concerned.push(authorization_anchor(model, named));
            self.authorization.remove(authorization_anchor(model, named), &Version(named.clone()));
        }
        for named in come.iter().filter(in_force) {
            concerned.push(authorization_anchor(model, named));
            self.authorization.insert(authorization_anchor(model, named), Version(named.clone()));
        }
        let [gone, come] = &change.network;
        for named in gone {
            concerned.push(network_anchor(named));
            self.network.remove(network_anchor(named), &Version(named.clone()));
        }
        for named in come {
            concerned.push(network_anchor(named));
            self.network.insert(network_anchor(named), Version(named.clone()));
        }
        let modes = change.authentication.iter();
        concerned.extend(modes.map(|(namespace, selector)| istio_anchor(model, namespace, selector)));
        concerned
    }

    fn authorization(&self, model: &Model, identity: &Identity) -> Vec<Version<Named<AuthorizationPolicy>>> {
        let selected = self
            .authorization
            .about(identity)
            .filter(|named| model.selects(Some(&named.object.namespace), &named.policy.selector, identity));
        let mut selected: Vec<_> = selected.cloned().collect();
        selected.sort_by(|a, b| a.object.cmp(&b.object));
        selected
    }

    fn network(
        &self,
        model: &Model,
        identity: &Identity,
        direction: Direction,
    ) -> Vec<Version<Named<NetworkPolicy>>> {
        let speaks = |policy: &NetworkPolicy| {
            policy.isolates(direction) || policy.rules.iter().any(|rule| rule.direction == direction)
        };
        let selected = self.network.about(identity).filter(|named| {
            speaks(&named.policy) && named.policy.subject.selects(&model.namespaces, identity)
        });
        let mut selected: Vec<_> = selected.cloned().collect();
        let order = |named: &Named<NetworkPolicy>| (named.policy.tier, named.policy.spec);
        selected
            .sort_by(|a, b| (order(a).0, &a.object, order(a).1).cmp(&(order(b).0, &b.object, order(b).1)));
        selected
    }
}

fn authorization_anchor(model: &Model, named: &Named<AuthorizationPolicy>) -> Anchor {
    istio_anchor(model, &named.object.namespace, &named.policy.selector)
}

/// A policy in the root namespace holds for all namespaces.
fn istio_anchor(model: &Model, namespace: &Arc<str>, selector: &Selector) -> Anchor {
    let everywhere = *namespace == model.settings.root_namespace;
    let label = selector.iter().next().map(|(key, value)| (key.as_str(), value.as_str()));
    Anchor::new((!everywhere).then_some(&**namespace), label)
}

fn network_anchor(named: &Named<NetworkPolicy>) -> Anchor {
    let subject = &named.policy.subject;
    let label = subject.pods.equal.iter().next().map(|(key, value)| (key.as_str(), value.as_str()));
    Anchor::new(subject.namespaces.equal.get(NAMESPACE_NAME).map(String::as_str), label)
}
