//! What the verdicts on one subject depend on: subjects with equal profiles share their rows.

use crate::error::ObjectRef;
use crate::eval::blocked_object;
use crate::model::layer::{Direction, PeerMatch, Ports};
use crate::model::selector::NAMESPACE_NAME;
use crate::model::{Cidr, Identity, Model, NamedPorts, NetworkPolicy};
use crate::source::rule::Test;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

/// Mode and the policy that set it; kept as number so that profiles have an order.
pub(super) type ModeBy<'a> = (u32, Option<&'a ObjectRef>);

/// All that the ingress verdicts on a subject depend on, apart from its number.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Inward<'a> {
    /// Positions in `model.authorization`.
    pub(super) policies: Vec<usize>,
    pub(super) mode: ModeBy<'a>,
    pub(super) ports: BTreeMap<u16, ModeBy<'a>>,
    pub(super) probes: &'a BTreeSet<u16>,
    /// Empty unless a policy looks at the subject's address.
    pub(super) addresses: &'a [IpAddr],
    /// Its pods' named ports and their number, if a policy asks for one by name.
    pub(super) named: Option<(&'a NamedPorts, usize)>,
}

/// All that the verdicts on a subject in one direction depend on, apart from its number.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Profile<'a> {
    /// Absent for egress.
    pub(super) inward: Option<Inward<'a>>,
    /// Positions in `model.network` of those that speak of this direction, in order.
    pub(super) network: Vec<usize>,
    pub(super) blocked: Option<ObjectRef>,
}

impl<'a> Profile<'a> {
    pub(super) fn ingress(model: &'a Model, selection: &Selection<'a>, identity: &'a Identity) -> Self {
        let policies = selection.authorization(model, identity);
        let by_address = |index: &usize| {
            let rules = &model.authorization[*index].policy.rules;
            rules.iter().flat_map(|rule| rule.tests()).any(|test| matches!(test, Test::DestinationIp(_)))
        };
        let modes = model.modes(identity);
        let network = selection.network(model, identity, Direction::Ingress);
        let pods = model.pods(identity);
        let by_name = |index: &usize| {
            let rules = model.network[*index].policy.rules.iter();
            let mut ports =
                rules.filter(|rule| rule.direction == Direction::Ingress).flat_map(|rule| &rule.ports);
            ports.any(|port| matches!(port.ports, Ports::Named(_)))
        };
        Profile {
            blocked: blocked(model, identity, Direction::Ingress),
            inward: Some(Inward {
                mode: (modes.mode.0 as u32, modes.mode.1),
                ports: modes.ports.iter().map(|(port, (mode, by))| (*port, (*mode as u32, *by))).collect(),
                probes: model.probe_ports(identity),
                addresses: if policies.iter().any(by_address) { model.addresses(identity) } else { &[] },
                named: network.iter().any(by_name).then_some((&pods.named, pods.count)),
                policies,
            }),
            network,
        }
    }

    /// `None` where nothing restricts what the subject begins.
    pub(super) fn egress(
        model: &'a Model,
        selection: &Selection<'a>,
        identity: &'a Identity,
    ) -> Option<Self> {
        let network = selection.network(model, identity, Direction::Egress);
        let blocked = blocked(model, identity, Direction::Egress);
        let any = !network.is_empty() || blocked.is_some();
        any.then_some(Profile { inward: None, network, blocked })
    }

    pub(super) fn direction(&self) -> Direction {
        if self.inward.is_some() { Direction::Ingress } else { Direction::Egress }
    }

    /// Ranges of the peer's address that some policy names.
    pub(super) fn ranges(&self, model: &Model) -> BTreeSet<Cidr> {
        let authorization = self.inward.iter().flat_map(|inward| &inward.policies);
        let rules = authorization.flat_map(|index| &model.authorization[*index].policy.rules);
        let mut ranges: BTreeSet<Cidr> = rules.flat_map(|rule| rule.tests()).filter_map(source_ip).collect();
        let rules = self.network.iter().flat_map(|index| &model.network[*index].policy.rules);
        let rules = rules.filter(|rule| rule.direction == self.direction());
        ranges.extend(rules.flat_map(|rule| &rule.peers).flat_map(peer_ranges));
        ranges
    }
}

/// Every range of addresses and every long range of ports that a policy in force names.
pub(super) fn ranges(model: &Model) -> (BTreeSet<Cidr>, BTreeSet<(u16, u16)>) {
    let in_force = model.authorization.iter().filter(|named| !named.policy.dry_run);
    let tests = in_force.flat_map(|named| &named.policy.rules).flat_map(|rule| rule.tests());
    let mut cidrs: BTreeSet<Cidr> = tests.filter_map(source_ip).collect();
    let rules = || model.network.iter().flat_map(|named| &named.policy.rules);
    cidrs.extend(rules().flat_map(|rule| &rule.peers).flat_map(peer_ranges));
    (cidrs, rules().flat_map(|rule| &rule.ports).filter_map(|port| long(&port.ports)).collect())
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

/// Which policies may select a workload, by what they ask for: those in its namespace, or everywhere, with one of its
/// labels, and those that name no label.
pub(super) struct Selection<'a> {
    authorization: Index<'a>,
    network: Index<'a>,
}

/// Namespace (empty for all) and label (empty for none) to positions.
type Index<'a> = HashMap<(&'a str, &'a str, &'a str), Vec<usize>>;

impl<'a> Selection<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        let mut selection = Selection { authorization: Index::new(), network: Index::new() };
        let root = &*model.settings.root_namespace;
        for (at, named) in model.authorization.iter().enumerate().filter(|(_, n)| !n.policy.dry_run) {
            let namespace = Some(&*named.object.namespace).filter(|namespace| *namespace != root);
            let (key, value) = named.policy.selector.iter().next().map_or(("", ""), |(k, v)| (k, v));
            let place = (namespace.unwrap_or_default(), key, value);
            selection.authorization.entry(place).or_default().push(at);
        }
        for (at, named) in model.network.iter().enumerate() {
            let subject = &named.policy.subject;
            let namespace = subject.namespaces.equal.get(NAMESPACE_NAME).map_or("", String::as_str);
            let mut labels =
                subject.pods.equal.iter().filter(|(key, _)| *key != crate::model::selector::SERVICE_ACCOUNT);
            let (key, value) = labels.next().map_or(("", ""), |(k, v)| (k, v));
            selection.network.entry((namespace, key, value)).or_default().push(at);
        }
        selection
    }

    fn authorization(&self, model: &Model, identity: &Identity) -> Vec<usize> {
        candidates(&self.authorization, identity, |at| {
            let named = &model.authorization[at];
            model.selects(Some(&named.object.namespace), &named.policy.selector, identity)
        })
    }

    fn network(&self, model: &Model, identity: &Identity, direction: Direction) -> Vec<usize> {
        let speaks = |policy: &NetworkPolicy| {
            policy.isolates(direction) || policy.rules.iter().any(|rule| rule.direction == direction)
        };
        candidates(&self.network, identity, |at| {
            let policy = &model.network[at].policy;
            speaks(policy) && policy.subject.selects(&model.namespaces, identity)
        })
    }
}

fn candidates(index: &Index<'_>, identity: &Identity, selected: impl Fn(usize) -> bool) -> Vec<usize> {
    let mut found = Vec::new();
    for namespace in [&*identity.spiffe.namespace, ""] {
        let labels = identity.labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        for (key, value) in labels.chain([("", "")]) {
            let places = index.get(&(namespace, key, value)).into_iter().flatten().copied();
            found.extend(places.filter(|at| selected(*at)));
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}
