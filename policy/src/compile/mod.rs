//! Model to tables: for each subject the rows that [`weft_datapath::policy::decide`] reads.
//!
//! What verdicts depend on is first made finite: peers become groups that the subject's policies cannot tell apart,
//! addresses become classes, one for each CIDR that a policy names; ports become those that a policy names, pieces of long
//! ranges, and "any other". Subjects that the same policies, modes and probes concern share the work. A row that most
//! peers share is written once, for [`weft_datapath::identity::ANY`]; inside a row only what differs from a wider cell.
//!
//! A subject has at most `1 + P` entries (P: ports, pieces and protocols that its policies name) for each of: any peer, each
//! peer that is not treated as most are, and each class of addresses inside a range that its policies name.
//!
//! A peer number that is not in the model gets the row of any peer; the agent publishes tables before it enrols.

mod classes;
mod peers;
mod profile;
mod rows;
mod verdict;

use crate::model::cidr::{Cidr, addr};
use crate::model::{Identity, Model};
use crate::source::core::Balance;
use crate::tables::{RuleRef, ServiceEntry, Tables};
use classes::{Classes, numbered};
use peers::Peers;
use profile::{Profile, Selection};
use rows::{Rows, rows};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use weft_datapath::abi::{
    Backend, Endpoint, ModeKey, PolicyKey, PolicyValue, ServiceKey, Subject, SubjectKey,
};
use weft_datapath::policy::{EGRESS, EGRESS_SHIFT, OUTWARD, PORT_MODES, RANGE};
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
    let (cidrs, ranges) = profile::ranges(model);
    let classes = Classes::new(cidrs, &ranges);
    let mut tables = Tables { cidrs: classes.addresses(), ranges: classes.ports(), ..Tables::default() };
    let peers = Peers::new(model, numbers);
    let selection = Selection::new(model);
    let enrolled: BTreeSet<Arc<Identity>> = model.identities().into_iter().collect();
    let mut shared: BTreeMap<Profile<'_>, Rc<Rows>> = BTreeMap::new();
    let mut sides = Vec::new();
    for (identity, number) in peers.all.iter().filter(|(identity, _)| enrolled.contains(*identity)) {
        let profile = Profile::ingress(model, &selection, identity);
        let mut subject = Subject::default();
        if let Some(inward) = &profile.inward {
            subject.mode = inward.mode.0;
            for (port, mode) in inward.ports.iter().filter(|(_, mode)| mode.0 != subject.mode) {
                subject.flags |= PORT_MODES;
                tables.modes.insert(ModeKey { bank: 0, identity: *number, port: *port, pad: 0 }, mode.0);
            }
        }
        let mut of = |profile| {
            let made = shared.entry(profile);
            made.or_insert_with_key(|profile| Rc::new(rows(profile, model, &classes, &peers))).clone()
        };
        let inward = of(profile);
        subject.flags |= inward.flags;
        sides.push((*number, 0, inward));
        if let Some(profile) = Profile::egress(model, &selection, identity) {
            let outward = of(profile);
            subject.flags |= EGRESS | outward.flags << EGRESS_SHIFT;
            sides.push((*number, OUTWARD, outward));
        }
        tables.subjects.insert(SubjectKey { bank: 0, identity: *number }, subject);
    }
    write(&shared, &sides, &mut tables);
    endpoints(model, numbers, &mut tables);
    services(model, &mut tables);
    tables
}

/// Writes the rows of each subject, and numbers the rules in them.
fn write(shared: &BTreeMap<Profile<'_>, Rc<Rows>>, sides: &[(u32, u8, Rc<Rows>)], tables: &mut Tables) {
    let all = shared.values().flat_map(|rows| &rows.list).flat_map(|(_, _, row)| row.values());
    let rules: BTreeSet<&RuleRef> = all.filter_map(|(_, rule)| rule.as_ref()).collect();
    let numbers: HashMap<&RuleRef, u32> = numbered(rules.into_iter(), |rule| rule.to_string().into_bytes());
    let mut entries = Vec::new();
    for (subject, side, rows) in sides {
        for (peer, class, row) in &rows.list {
            for ((protocol, port, range), (verdict, rule)) in row.iter() {
                let kind = side | if *range { RANGE } else { 0 };
                let (subject, peer, class, protocol, port) = (*subject, *peer, *class, *protocol, *port);
                let key = PolicyKey { bank: 0, subject, peer, class, port, protocol, kind };
                let rule = rule.as_ref().and_then(|rule| numbers.get(rule)).copied().unwrap_or(0);
                entries.push((key, PolicyValue { verdict: *verdict, rule }));
            }
        }
    }
    tables.rules = numbers.into_iter().map(|(rule, number)| (number, rule.clone())).collect();
    tables.policies = entries.into_iter().collect();
}

fn endpoints(model: &Model, numbers: &Numbers, tables: &mut Tables) {
    for workload in model.workloads.iter().filter(|workload| workload.enrolled) {
        for ip in &workload.addresses {
            match numbers.get(&workload.identity) {
                Some(identity) => {
                    let endpoint = Endpoint { identity: *identity, ifindex: 0, flags: 0, pad: 0 };
                    tables.endpoints.insert(addr(*ip), endpoint);
                }
                None => tables.inside.push(Cidr::host(*ip)), // In the mesh, and nobody can say who it is: refused.
            }
        }
    }
    tables.inside.extend(model.refused_addresses().iter().map(|ip| Cidr::host(*ip)));
}

fn services(model: &Model, tables: &mut Tables) {
    for service in &model.services {
        for ip in &service.addresses {
            for port in &service.ports {
                let same_family =
                    port.backends.iter().filter(|(backend, _)| backend.is_ipv4() == ip.is_ipv4());
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
                let key = ServiceKey { addr: addr(*ip), port: port.port, protocol: port.protocol, pad: 0 };
                tables.services.entry(key).or_insert(entry);
            }
        }
    }
}
