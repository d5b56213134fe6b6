//! Model to tables: for each destination the rows that [`weft_datapath::policy::decide`] reads.
//!
//! What verdicts depend on is first made finite: sources become the anonymous, the node and the SPIFFE IDs of the model;
//! source addresses become classes, one for each CIDR that a policy names; ports become those that a policy names and
//! "any other". Destinations that the same policies, modes and probes concern share the work. A row that most sources
//! share is written once, for [`ANY`].
//!
//! A source number that is not in the model gets the row of [`ANY`]; the agent publishes tables before it enrols.

use crate::eval::blocked_object;
use crate::model::cidr::{Cidr, addr};
use crate::model::{Identity, Model};
use crate::source::core::Balance;
use crate::source::rule::{Facts, Match, Test};
use crate::source::{Action, AuthorizationPolicy};
use crate::sources::{Group, Source, Sources};
use crate::tables::{RuleAction, RuleRef, ServiceEntry, Tables};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use weft_datapath::abi::{
    Backend, Endpoint, ModeKey, PolicyKey, PolicyValue, ServiceKey, Subject, SubjectKey,
};
use weft_datapath::identity::ANY;
use weft_datapath::policy::{ALLOW, BY_CLASS, DENY, HTTP, Mode, PORT_MODES};
use weft_datapath::service::{LEAST_CONNECTIONS, ROUND_ROBIN};

/// Identity numbers, as the agent hands them out.
pub type Numbers = BTreeMap<Arc<Identity>, u32>;

/// Makes the tables. An identity without a number gets no entry, so that flows to it are refused.
pub fn compile(model: &Model, numbers: &Numbers) -> Tables {
    let mut tables = Tables::default();
    let classes = Classes::new(model);
    tables.cidrs = classes.table();
    let numbered: Vec<(&Arc<Identity>, u32)> =
        numbers.iter().map(|(identity, number)| (identity, *number)).collect();
    let sources = Sources::new(&numbered);
    let enrolled: BTreeSet<Arc<Identity>> = model.identities().into_iter().collect();
    let mut shared: BTreeMap<Profile<'_>, Vec<ClassRows>> = BTreeMap::new();
    let mut entries = Vec::new();
    for (identity, number) in numbered.iter().filter(|(identity, _)| enrolled.contains(*identity)) {
        let profile = Profile::new(model, identity);
        tables.subjects.insert(SubjectKey { bank: 0, identity: *number }, profile.subject(&classes));
        for (port, mode) in profile.ports.iter().filter(|(_, mode)| **mode != profile.mode) {
            let key = ModeKey { bank: 0, identity: *number, port: *port, pad: 0 };
            tables.modes.insert(key, mode.0);
        }
        let rows =
            shared.entry(profile).or_insert_with_key(|profile| profile.rows(model, &classes, &sources));
        entries.extend(rows.iter().map(|class| (*number, class.clone())));
    }
    number_rules(&entries, &mut tables);
    for (destination, rows) in entries {
        write_rows(destination, &rows, &mut tables);
    }
    endpoints(model, numbers, &mut tables);
    services(model, &mut tables);
    tables
}

/// Mode and the policy that set it; kept as number so that profiles have an order.
type ModeBy<'a> = (u32, Option<&'a crate::ObjectRef>);

/// All that the verdicts on a destination depend on, apart from its number.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Profile<'a> {
    /// Positions in `model.authorization`.
    policies: Vec<usize>,
    blocked: Option<crate::ObjectRef>,
    mode: ModeBy<'a>,
    ports: BTreeMap<u16, ModeBy<'a>>,
    probes: &'a BTreeSet<u16>,
    /// Empty unless a policy looks at the destination's address.
    addresses: &'a [IpAddr],
}

/// A verdict and its rule, before rules have numbers.
type Entry = (u32, Option<RuleRef>);
/// Entries by port; port 0 is any other. Always has port 0.
type Row = BTreeMap<u16, Entry>;

/// The rows of one destination for one class of source addresses.
#[derive(Clone)]
struct ClassRows {
    class: u32,
    any: Arc<Row>,
    own: Vec<(u32, Arc<Row>)>,
}

impl<'a> Profile<'a> {
    fn new(model: &'a Model, identity: &'a Identity) -> Self {
        let policies: Vec<usize> = model.authorization_indexes(identity).collect();
        let by_address = |index: &usize| {
            let rules = &model.authorization[*index].policy.rules;
            rules.iter().flat_map(|rule| rule.tests()).any(|test| matches!(test, Test::DestinationIp(_)))
        };
        let modes = model.modes(identity);
        Profile {
            blocked: model.blocked_by(identity).map(|blocked| blocked_object(blocked.object.as_ref())),
            mode: (modes.mode.0 as u32, modes.mode.1),
            ports: modes.ports.iter().map(|(port, (mode, by))| (*port, (*mode as u32, *by))).collect(),
            probes: model.probe_ports(identity),
            addresses: if policies.iter().any(by_address) { model.addresses(identity) } else { &[] },
            policies,
        }
    }

    fn policies<'m>(
        &self,
        model: &'m Model,
    ) -> impl Iterator<Item = (&'m crate::ObjectRef, &'m AuthorizationPolicy)> {
        self.policies
            .iter()
            .map(|index| &model.authorization[*index])
            .map(|named| (&named.object, &named.policy))
    }

    fn by_class(&self, classes: &Classes) -> bool {
        self.policies.iter().any(|index| classes.used_by.contains(index))
    }

    fn subject(&self, classes: &Classes) -> Subject {
        let by_class = if self.by_class(classes) { BY_CLASS } else { 0 };
        let differs = self.ports.values().any(|mode| *mode != self.mode);
        Subject { flags: by_class | if differs { PORT_MODES } else { 0 }, mode: self.mode.0 }
    }

    fn rows(&self, model: &Model, classes: &Classes, sources: &Sources<'_>) -> Vec<ClassRows> {
        let tests =
            || self.policies(model).flat_map(|(_, policy)| &policy.rules).flat_map(|rule| rule.tests());
        let port = |test: &Test| if let Test::Port(port) = test { Some(*port) } else { None };
        let mut ports: BTreeSet<u16> = tests().filter_map(port).collect();
        ports.extend(self.ports.keys().chain(self.probes));
        let groups = sources.groups(tests(), &model.settings.trust_domain);
        let last = if self.by_class(classes) { classes.list.len() as u32 } else { 0 };
        (0..=last).map(|class| self.class_rows(model, classes, &groups, class, &ports)).collect()
    }

    fn class_rows(
        &self,
        model: &Model,
        classes: &Classes,
        groups: &[Group<'_>],
        class: u32,
        ports: &BTreeSet<u16>,
    ) -> ClassRows {
        let row = |source: &Source<'_>| {
            let other = self.verdict(model, classes, class, source, 0);
            let own = ports.iter().map(|port| (*port, self.verdict(model, classes, class, source, *port)));
            let mut row: Row = own.filter(|(_, entry)| *entry != other).collect();
            row.insert(0, other);
            Arc::new(row)
        };
        let rows: Vec<(Arc<Row>, &Group<'_>)> =
            groups.iter().map(|group| (row(&group.source), group)).collect();
        let mut weight: BTreeMap<&Row, usize> = BTreeMap::new();
        for (row, group) in &rows {
            *weight.entry(row).or_default() += group.numbers.len();
        }
        // The most common row; among equals the first in order of groups, where the anonymous source comes first.
        let heaviest = weight.values().max().copied().unwrap_or(0);
        let any = rows
            .iter()
            .find(|(row, _)| weight[&**row] == heaviest)
            .map(|(row, _)| row.clone())
            .unwrap_or_default();
        let different = rows.iter().filter(|(row, _)| *row != any);
        let own = different
            .flat_map(|(row, group)| group.numbers.iter().map(|number| (number, row.clone())))
            .collect();
        ClassRows { class, any, own }
    }

    fn verdict(&self, model: &Model, classes: &Classes, class: u32, source: &Source<'_>, port: u16) -> Entry {
        if *source == Source::Node && self.probes.contains(&port) {
            return (ALLOW, None);
        }
        let whole =
            |object: &crate::ObjectRef, action| RuleRef { object: object.clone(), action, index: None };
        if let Some(object) = &self.blocked {
            return (DENY, Some(whole(object, RuleAction::Blocked)));
        }
        let id = if let Source::Workload(id) = source { Some(*id) } else { None };
        let (mode, by) = self.ports.get(&port).unwrap_or(&self.mode);
        if id.is_none() && *mode == Mode::Strict as u32 {
            return (DENY, by.map(|object| whole(object, RuleAction::Strict)));
        }
        let facts = Facts {
            source: id,
            trust_domain: &model.settings.trust_domain,
            source_in: &|cidr| classes.within(class, cidr),
            destination: self.addresses,
            port,
        };
        let mut best = [(Match::No, None), (Match::No, None)];
        let mut first_allow = None;
        for (object, policy) in self.policies(model) {
            if policy.action == Action::Allow {
                first_allow = first_allow.or(Some(object));
            }
            let best = &mut best[usize::from(policy.action == Action::Deny)];
            for (index, rule) in policy.rules.iter().enumerate() {
                let matched = rule.matches(&facts);
                if matched > best.0 {
                    let (object, action) = (object.clone(), policy.action.into());
                    *best = (matched, Some(RuleRef { object, action, index: Some(index as u32) }));
                }
            }
        }
        let [(allowed, allow_rule), (denied, deny_rule)] = best;
        let default = if model.settings.default_deny { Match::No } else { Match::Yes };
        let allowed = if first_allow.is_some() { allowed } else { default };
        match (denied, allowed) {
            (Match::Yes, _) => (DENY, deny_rule),
            (_, Match::No) => (DENY, first_allow.map(|object| whole(object, RuleAction::NoneAllowed))),
            (Match::Undecided, _) => (HTTP, deny_rule),
            (_, Match::Undecided) => (HTTP, allow_rule),
            (_, Match::Yes) => (ALLOW, allow_rule),
        }
    }
}

/// Numbers rules in their order, so that the same model gives the same numbers.
fn number_rules(entries: &[(u32, ClassRows)], tables: &mut Tables) {
    let rows = entries.iter().flat_map(|(_, rows)| rows.own.iter().map(|(_, row)| row).chain([&rows.any]));
    let rules: BTreeSet<&RuleRef> =
        rows.flat_map(|row| row.values()).filter_map(|(_, rule)| rule.as_ref()).collect();
    tables.rules = rules.into_iter().cloned().collect();
}

fn write_rows(destination: u32, rows: &ClassRows, tables: &mut Tables) {
    let own = rows.own.iter().map(|(source, row)| (*source, row));
    for (source, row) in own.chain([(ANY, &rows.any)]) {
        for (port, (verdict, rule)) in row.iter() {
            let number = rule
                .as_ref()
                .and_then(|rule| tables.rules.binary_search(rule).ok())
                .map_or(0, |index| index as u32 + 1);
            let key = PolicyKey { bank: 0, destination, source, class: rows.class, port: *port, pad: 0 };
            tables.policies.insert(key, PolicyValue { verdict: *verdict, rule: number });
        }
    }
}

/// Classes of source addresses. CIDRs are nested or disjoint, so the longest one around an address tells all others
/// around it: each CIDR is a class, and class 0 is outside of all.
struct Classes {
    /// Class `n` is `list[n - 1]`.
    list: Vec<Cidr>,
    /// Positions of policies that look at the source address.
    used_by: BTreeSet<usize>,
}

impl Classes {
    fn new(model: &Model) -> Self {
        let mut cidrs = BTreeSet::new();
        let mut used_by = BTreeSet::new();
        for (index, named) in
            model.authorization.iter().enumerate().filter(|(_, named)| !named.policy.dry_run)
        {
            for test in named.policy.rules.iter().flat_map(|rule| rule.tests()) {
                if let Test::SourceIp(cidr) = test {
                    cidrs.insert(*cidr);
                    used_by.insert(index);
                }
            }
        }
        // In the kernel's table IPv4 lies inside IPv6: without an entry of its own it would be taken for `::/0`.
        if cidrs.iter().any(|cidr| cidr.network().is_ipv6()) {
            cidrs.insert(Cidr::ALL_V4);
        }
        Classes { list: cidrs.into_iter().collect(), used_by }
    }

    fn table(&self) -> BTreeMap<(weft_datapath::abi::Addr, u8), u32> {
        self.list.iter().enumerate().map(|(index, cidr)| (cidr.mapped(), index as u32 + 1)).collect()
    }

    /// Are the addresses of a class in this range?
    fn within(&self, class: u32, cidr: &Cidr) -> bool {
        class.checked_sub(1).is_some_and(|index| cidr.covers(&self.list[index as usize]))
    }
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
