//! Model to tables: for each subject the rows that [`weft_datapath::policy::decide`] reads.
//!
//! What verdicts depend on is first made finite: peers become groups that the subject's policies cannot tell apart,
//! addresses become classes, one for each CIDR that a policy names; ports become those that a policy names, pieces of long
//! ranges, and "any other". Subjects that the same policies, modes and probes concern share the work. A row that most
//! peers share is written once, for [`weft_datapath::identity::ANY`]; inside a row only what differs from a wider cell.
//!
//! In each direction a subject has at most `(1 + peers) * (1 + classes)` rows (peers: those that are not treated as most are;
//! classes: of addresses inside a range that its policies name), written only where they differ from the next wider one, and in
//! a row at most `1 + protocols * (1 + pieces)` entries and one for each protocol and port that is named, with the same reserve.
//!
//! A peer number that is not in the model gets the row of any peer; the agent publishes tables before it enrols.
//!
//! A [`Compiler`] keeps what it made and follows a [`Change`] of the model by looking at those whom it may concern: subjects
//! by the anchors of the policies that came and went, profiles by the traits that somebody gained or lost.

mod classes;
mod index;
mod log;
mod peers;
mod profile;
mod rows;
mod rules;
mod subjects;
mod verdict;

use crate::model::cidr::{Cidr, addr};
use crate::model::{Change, Identity, Model, Service, Workload};
use crate::source::core::Balance;
use crate::tables::{RuleRef, ServiceEntry, Tables, TablesDiff};
use classes::Classes;
use log::Changing;
use peers::Peers;
use profile::{Ranges, Selection};
use rules::{Renumber, RuleNumbers};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use subjects::Subjects;
use weft_datapath::abi::{Backend, Endpoint, ServiceKey};
use weft_datapath::service::{LEAST_CONNECTIONS, ROUND_ROBIN};

/// Identity numbers, as the agent hands them out.
pub type Numbers = BTreeMap<Arc<Identity>, u32>;

/// Ranges of this many ports, or fewer, are written port by port; longer ones as pieces between the edges of all long
/// ranges.
const LISTED: u16 = 16;

/// Ports that nothing in a profile tells apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PortSet {
    One(u16),
    /// From first to last: the ports in between that no policy names by themselves.
    Piece(u16, u16),
    /// Those that no policy names, and protocols without ports.
    Other,
}

/// Makes the tables. An identity without a number gets no entry, so that flows to it are refused.
pub fn compile(model: &Model, numbers: &Numbers) -> Tables {
    Compiler::new(model, &mut |identity| numbers.get(identity).copied()).tables
}

/// The tables, and what is needed to follow a change.
pub(crate) struct Compiler {
    tables: Tables,
    peers: Peers,
    selection: Selection,
    ranges: Ranges,
    classes: Classes,
    subjects: Subjects,
    rules: RuleNumbers,
}

/// A change that is not followed: the tables must be made from nothing.
#[derive(Debug)]
pub(crate) struct FromNothing;

impl From<Renumber> for FromNothing {
    fn from(Renumber: Renumber) -> Self {
        FromNothing
    }
}

impl Compiler {
    /// Compiles a model. `number` names an identity to the kernel.
    pub(crate) fn new(model: &Model, number: &mut dyn FnMut(&Arc<Identity>) -> Option<u32>) -> Compiler {
        let ranges = Ranges::new(&model.authorization, &model.network);
        let mut compiler = Compiler {
            tables: Tables::default(),
            peers: Peers::new(),
            selection: Selection::new(model),
            classes: Classes::new(ranges.cidrs.clone(), &ranges.ports),
            ranges,
            subjects: Subjects::default(),
            rules: RuleNumbers::default(),
        };
        for identity in model.identities() {
            if let Some(number) = number(&identity) {
                compiler.peers.insert(number, &identity);
            }
        }
        let Compiler { tables, peers, selection, classes, subjects, rules, .. } = &mut compiler;
        let numbers: Vec<u32> = peers.all.keys().copied().collect();
        for subject in numbers {
            let sides = subjects.find(model, selection, peers, subject);
            subjects.place(subject, sides);
        }
        let profiles: Vec<u32> = subjects.profiles().collect();
        profiles.iter().for_each(|profile| drop(subjects.make(model, classes, peers, *profile)));
        *rules = RuleNumbers::new(profiles.iter().flat_map(|profile| subjects.rules(*profile)).cloned());
        for subject in subjects.all() {
            let Some((value, modes)) = subjects.subject(subject) else { continue };
            tables.subjects.insert(subjects::key(subject), value);
            tables.modes.extend(modes);
        }
        tables.policies = subjects.all().flat_map(|subject| subjects.entries(subject, rules)).collect();
        tables.rules = rules.all();
        tables.cidrs = classes.addresses();
        tables.ranges = classes.ports();
        for workload in &model.workloads {
            for (ip, endpoint) in endpoints(workload, peers) {
                match endpoint {
                    Some(endpoint) => drop(tables.endpoints.insert(addr(ip), endpoint)),
                    None => tables.inside.push(Cidr::host(ip)),
                }
            }
        }
        tables.inside.extend(model.refused_addresses().iter().map(|ip| Cidr::host(*ip)));
        for service in &model.services {
            for (key, entry) in entries(service) {
                tables.services.entry(key).or_insert(entry);
            }
        }
        compiler
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    pub(crate) fn numbers(&self) -> &Numbers {
        &self.peers.numbers
    }

    /// Follows a change that the model has made already. On an error this compiler is of no more use.
    pub(crate) fn follow(
        &mut self,
        model: &Model,
        change: &Change,
        number: &mut dyn FnMut(&Arc<Identity>) -> Option<u32>,
    ) -> Result<TablesDiff, FromNothing> {
        let mut log = Changing::default();
        let (mut concerned, mut stale) = self.follow_identities(model, change, number)?;
        stale.extend(self.follow_ranges(model, change, &mut log)?);
        for anchor in self.selection.follow(model, change) {
            concerned.extend(self.peers.at(anchor));
        }

        let Compiler { tables, peers, selection, classes, subjects, rules, .. } = self;
        let next = subjects.next;
        let mut moved: BTreeMap<u32, subjects::Sides> = BTreeMap::new();
        for subject in concerned {
            let sides = subjects.find(model, selection, peers, subject);
            if sides != subjects.sides(subject) {
                moved.insert(subject, sides);
            }
        }
        stale.extend(next..subjects.next);
        let mut rewritten: BTreeSet<u32> =
            stale.iter().flat_map(|profile| subjects.subjects(*profile)).collect();
        rewritten.extend(moved.keys());
        for subject in &rewritten {
            log.subject(tables, subjects, rules, *subject, false);
        }
        let mut left: BTreeSet<u32> = BTreeSet::new();
        for (subject, sides) in moved {
            left.extend(subjects.place(subject, sides));
        }
        // Another subject may have come to it since.
        left.retain(|profile| subjects.subjects(*profile).next().is_none());
        let mut unused: Vec<_> = left.into_iter().map(|profile| subjects.forget(peers, profile)).collect();
        for profile in stale {
            unused.push(subjects.make(model, classes, peers, profile));
            let come = |number, rule: &RuleRef| log.rules.put(&mut tables.rules, number, Some(rule.clone()));
            rules.keep(subjects.rules(profile), come)?;
        }
        for rule_set in unused {
            rules.drop(&rule_set, |number| log.rules.put(&mut tables.rules, number, None))?;
        }
        for subject in rewritten {
            log.subject(tables, subjects, rules, subject, true);
        }
        self.follow_places(change, &mut log)?;
        Ok(log.end(&self.tables))
    }

    /// Identities that come, go or have other pods. Returns the subjects that are concerned by that, and the profiles.
    fn follow_identities(
        &mut self,
        model: &Model,
        change: &Change,
        number: &mut dyn FnMut(&Arc<Identity>) -> Option<u32>,
    ) -> Result<(BTreeSet<u32>, BTreeSet<u32>), FromNothing> {
        let (mut subjects, mut profiles) = (BTreeSet::new(), BTreeSet::new());
        let mut population = false;
        for identity in &change.identities {
            let known = self.peers.number(identity);
            let present = model.has(identity);
            let number = match known {
                Some(number) => number,
                None if !present => continue,
                None => number(identity).ok_or(FromNothing)?,
            };
            match (known.is_some(), present) {
                (true, false) => self.peers.remove(number),
                (false, true) => self.peers.insert(number, identity),
                _ => {}
            }
            population |= known.is_some() != present;
            profiles.extend(self.peers.look(model, number, identity));
            subjects.insert(number);
        }
        if population {
            profiles.extend(self.subjects.by_count(self.peers.all.len()));
        }
        Ok((subjects, profiles))
    }

    /// Ranges that come and go with the policies that name them. Returns the profiles that have rows for them.
    fn follow_ranges(
        &mut self,
        model: &Model,
        change: &Change,
        log: &mut Changing,
    ) -> Result<BTreeSet<u32>, FromNothing> {
        let named = Ranges::new(change.authorization.iter().flatten(), change.network.iter().flatten());
        if named == Ranges::default() {
            return Ok(BTreeSet::new());
        }
        let ranges = Ranges::new(&model.authorization, &model.network);
        if ranges == self.ranges {
            return Ok(BTreeSet::new());
        }
        let classes = Classes::new(ranges.cidrs.clone(), &ranges.ports);
        let cidrs = self.classes.others(&classes).ok_or(FromNothing)?;
        let profiles = self.subjects.by_range(&cidrs, ranges.ports != self.ranges.ports).collect();
        (self.classes, self.ranges) = (classes, ranges);
        log.cidrs.turn(&mut self.tables.cidrs, &self.classes.addresses());
        log.ranges.turn(&mut self.tables.ranges, &self.classes.ports());
        Ok(profiles)
    }

    /// Who has which address, and what is behind services.
    fn follow_places(&mut self, change: &Change, log: &mut Changing) -> Result<(), FromNothing> {
        let tables = &mut self.tables;
        for former in change.workloads.iter().filter_map(|[former, _]| former.as_ref()) {
            for (ip, _) in endpoints(former, &self.peers) {
                log.endpoints.put(&mut tables.endpoints, addr(ip), None);
            }
        }
        for present in change.workloads.iter().filter_map(|[_, present]| present.as_ref()) {
            for (ip, endpoint) in endpoints(present, &self.peers) {
                log.endpoints.put(&mut tables.endpoints, addr(ip), Some(endpoint.ok_or(FromNothing)?));
            }
        }
        for (key, entry) in change.services.values().flat_map(|service| entries(service)) {
            // Of an address that several services claim only the first is served.
            if tables.services.get(&key).is_some_and(|own| own.service == entry.service) {
                log.services.put(&mut tables.services, key, Some(entry));
            }
        }
        Ok(())
    }
}

/// The addresses of a workload; without an endpoint if nobody can say who it is: in the mesh, and refused.
fn endpoints(workload: &Workload, peers: &Peers) -> impl Iterator<Item = (IpAddr, Option<Endpoint>)> {
    let identity = peers.number(&workload.identity);
    let endpoint = identity.map(|identity| Endpoint { identity, ifindex: 0, flags: 0, pad: 0 });
    let addresses = workload.addresses.iter().filter(|_| workload.enrolled);
    addresses.map(move |ip| (*ip, endpoint))
}

fn entries(service: &Service) -> impl Iterator<Item = (ServiceKey, ServiceEntry)> {
    let places = service.addresses.iter().flat_map(|ip| service.ports.iter().map(move |port| (ip, port)));
    places.map(|(ip, port)| {
        let same_family = port.backends.iter().filter(|(backend, _)| backend.is_ipv4() == ip.is_ipv4());
        let entry = ServiceEntry {
            service: (service.namespace.to_string(), service.name.to_string()),
            balance: match service.balance {
                // The datapath has no third way; turns spread connections as evenly as chance does.
                Balance::RoundRobin | Balance::Random => ROUND_ROBIN,
                Balance::LeastConnections => LEAST_CONNECTIONS,
            },
            backends: same_family
                .map(|(ip, port)| Backend { addr: addr(*ip), port: *port, pad: 0 })
                .collect(),
        };
        (ServiceKey { addr: addr(*ip), port: port.port, protocol: port.protocol, pad: 0 }, entry)
    })
}
