//! The rows of one profile: which verdict for which peers, classes of addresses, protocols and ports.

use super::classes::Classes;
use super::peers::{Group, Members, Peers, Trait};
use super::profile::{Profile, long};
use super::verdict::{Entry, Point};
use super::{LISTED, PortSet};
use crate::eval::TCP;
use crate::model::layer::{PeerMatch, Ports};
use crate::model::{Cidr, Model};
use crate::source::rule::Test;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use weft_datapath::identity::ANY;
use weft_datapath::policy::{BY_CLASS, BY_PROTOCOL, BY_RANGE};

const PROTOCOLS_WITH_PORTS: [u8; 3] = [6, 17, 132];

/// Part of a key: protocol, port (or number of a range), and whether it is a range.
pub(super) type Cell = (u8, u16, bool);
/// The cells that differ from wider ones. Always has the widest, for everything.
pub(super) type Row = BTreeMap<Cell, Entry>;

/// The rows of all subjects of one profile.
#[derive(Default)]
pub(super) struct Rows {
    /// Without [`weft_datapath::policy::EGRESS_SHIFT`].
    pub(super) flags: u32,
    /// Peer, class, row.
    pub(super) list: Vec<(u32, u32, Arc<Row>)>,
    /// As long as there are this many peers, it does not matter how many there are. Absent where it always does.
    pub(super) enough: Option<usize>,
}

/// The ports of a profile.
struct PortAxis {
    by_protocol: bool,
    protocols: BTreeSet<u8>,
    exact: BTreeSet<(u8, u16)>,
    pieces: BTreeSet<(u16, u16)>,
    ranges: bool,
}

pub(super) fn rows(
    profile: &Profile,
    traits: &BTreeSet<u32>,
    model: &Model,
    classes: &Classes,
    peers: &Peers,
) -> Rows {
    let ports = ports(profile, model, classes);
    let ranges = profile.ranges();
    let mut flags = if ranges.is_empty() { 0 } else { BY_CLASS };
    flags |= if ports.by_protocol { BY_PROTOCOL } else { 0 };
    flags |= if ports.ranges { BY_RANGE } else { 0 };
    let groups = peers.groups(traits);
    let row = |group: &Group<'_>, class: Option<&Cidr>| {
        Arc::new(row(profile, model, classes, &ports, group, class))
    };
    let mut list = Vec::new();
    let base: Vec<Arc<Row>> = groups.iter().map(|group| row(group, None)).collect();
    let rest = groups.iter().position(|group| matches!(group.members, Members::AllBut(_)));
    let (any, mut lead) = heaviest(groups.iter().zip(&base), peers);
    let mut rest_follows = rest.is_some_and(|rest| base[rest] == any);
    for (group, row) in groups.iter().zip(&base).filter(|(_, row)| **row != any) {
        list.extend(peers.numbers(&group.members).map(|number| (number, 0, row.clone())));
    }
    list.push((ANY, 0, any.clone()));
    for (cidr, class) in classes.inside(&ranges) {
        let inside: Vec<Arc<Row>> = groups.iter().map(|group| row(group, Some(&cidr))).collect();
        // A peer with a row of its own is found there before the row for all peers of the class is looked at.
        let follows = |at: &usize| base[*at] == any;
        let (any_here, lead_here) =
            heaviest((0..groups.len()).filter(follows).map(|at| (&groups[at], &inside[at])), peers);
        lead = lead.min(lead_here);
        rest_follows &= rest.is_some_and(|rest| inside[rest] == any_here);
        if any_here != any {
            list.push((ANY, class, any_here.clone()));
        }
        for (at, group) in groups.iter().enumerate() {
            let fallback = if follows(&at) { &any_here } else { &base[at] };
            if inside[at] != *fallback {
                list.extend(peers.numbers(&group.members).map(|number| (number, class, inside[at].clone())));
            }
        }
    }
    // Whoever has no trait that is asked for comes and goes with the row of any peer, while that keeps its lead.
    let rest = rest.map_or(0, |rest| peers.size(&groups[rest].members));
    let spare = lead.min(rest);
    let enough = (rest_follows && spare > 0).then(|| peers.all.len() - (spare - 1));
    Rows { flags, list, enough }
}

/// The row of most identities, and how many more they are than those of any other; among equals the first in order of
/// groups, where the anonymous peer comes first.
fn heaviest<'g, 'a: 'g>(
    rows: impl Iterator<Item = (&'g Group<'a>, &'g Arc<Row>)> + Clone,
    peers: &Peers,
) -> (Arc<Row>, usize) {
    let mut weight: BTreeMap<&Row, usize> = BTreeMap::new();
    for (group, row) in rows.clone() {
        *weight.entry(row).or_default() += peers.size(&group.members);
    }
    let most = weight.values().max().copied().unwrap_or(0);
    let mut rows = rows.map(|(_, row)| row);
    let best = rows.find(|row| weight[&***row] == most).cloned().unwrap_or_default();
    let second = weight.iter().filter(|(row, _)| **row != &*best).map(|(_, weight)| *weight).max();
    (best, most - second.unwrap_or(0))
}

/// What may tell peers apart.
pub(super) fn traits(profile: &Profile) -> HashSet<Trait> {
    let tests = profile.authorization_rules().flat_map(|rule| rule.tests());
    let mut traits: HashSet<Trait> = tests.map(|test| Trait::Test(test.clone())).collect();
    for rule in profile.network_rules() {
        traits.extend(rule.peers.iter().filter_map(|peer| match peer {
            PeerMatch::Pods(pods) => Some(Trait::Pods(pods.clone())),
            _ => None,
        }));
        if profile.inward.is_none() {
            traits.extend(rule.ports.iter().filter_map(|port| match (&port.ports, port.protocol) {
                (Ports::Named(name), Some(protocol)) => Some(Trait::Named(name.clone(), protocol)),
                _ => None,
            }));
        }
    }
    traits
}

fn ports(profile: &Profile, model: &Model, classes: &Classes) -> PortAxis {
    let mut any: BTreeSet<u16> = BTreeSet::new();
    if let Some(inward) = &profile.inward {
        let port = |test: &Test| if let Test::Port(port) = test { Some(*port) } else { None };
        any.extend(profile.authorization_rules().flat_map(|rule| rule.tests()).filter_map(port));
        any.extend(inward.ports.keys().chain(&inward.probes));
    }
    let tokens = profile.inward.as_ref().is_some_and(|inward| inward.tokens.is_some());
    let mut ports = PortAxis {
        by_protocol: !profile.network.is_empty() || tokens,
        protocols: BTreeSet::new(),
        exact: BTreeSet::new(),
        pieces: BTreeSet::new(),
        ranges: false,
    };
    if !ports.by_protocol {
        ports.exact.extend(any.into_iter().map(|port| (0, port)));
        return ports;
    }
    for protocol in PROTOCOLS_WITH_PORTS.iter().filter(|_| !any.is_empty()) {
        ports.protocols.insert(*protocol);
        ports.exact.extend(any.iter().map(|port| (*protocol, *port)));
    }
    ports.protocols.extend(tokens.then_some(TCP));
    let mut ranges = BTreeSet::new();
    for port in profile.network_rules().flat_map(|rule| &rule.ports) {
        let Some(protocol) = port.protocol else { continue };
        ports.protocols.insert(protocol);
        match &port.ports {
            Ports::All => {}
            Ports::Range(first, last) if last.saturating_sub(*first) < LISTED => {
                ports.exact.extend((*first..=*last).map(|port| (protocol, port)));
            }
            long_range @ Ports::Range(..) => ranges.extend(long(long_range)),
            Ports::Named(name) => {
                ports.exact.extend(model.ports_named(name, protocol).map(|port| (protocol, port)));
            }
        }
    }
    ports.ranges = !ranges.is_empty();
    ports.pieces = classes.pieces_inside(&ranges);
    ports
}

fn row(
    profile: &Profile,
    model: &Model,
    classes: &Classes,
    ports: &PortAxis,
    group: &Group<'_>,
    class: Option<&Cidr>,
) -> Row {
    let at = |protocol: u8, port: PortSet| {
        profile.verdict(model, &Point { peer: group.peer, class, protocol, port })
    };
    let base = at(0, PortSet::Other);
    let mut row = Row::new();
    let widest = |protocol: u8| at(protocol, PortSet::Other);
    for protocol in &ports.protocols {
        let all = widest(*protocol);
        for (first, last) in &ports.pieces {
            let piece = at(*protocol, PortSet::Piece(*first, *last));
            if piece != all {
                row.insert((*protocol, *first, true), piece);
            }
        }
        if all != base {
            row.insert((*protocol, 0, false), all);
        }
    }
    for (protocol, port) in &ports.exact {
        let own = at(*protocol, PortSet::One(*port));
        let around = if ports.ranges { classes.around(*port) } else { PortSet::Other };
        if own != at(*protocol, around) {
            row.insert((*protocol, *port, false), own);
        }
    }
    row.insert((0, 0, false), base);
    row
}
