//! What the kernel's maps shall hold, sorted, and the difference between two states of them.

use crate::error::ObjectRef;
use crate::model::cidr;
use crate::model::layer::{NetworkRule, RuleList, RuleVerdict};
use crate::source::Action;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use weft_datapath::abi::{
    Addr, Backend, Endpoint, ModeKey, Netns, PolicyKey, PolicyValue, ServiceKey, Subject, SubjectKey,
};
use weft_datapath::policy::PORTS;

/// What a rule number stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef {
    /// The policy object.
    pub object: ObjectRef,
    pub action: RuleAction,
    /// The list that the rule stands in.
    pub list: RuleList,
    /// Position in that list; absent where the object decides as a whole.
    pub index: Option<u32>,
}

/// How an object came to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    Allow,
    Deny,
    /// It is the first of the policies that ask for a rule that allows, and none matched.
    NoneAllowed,
    /// `PeerAuthentication` asks for a proven identity.
    Strict,
    /// `RequestAuthentication` asks for tokens to be verified.
    Token,
    /// It records, and decides nothing.
    Audit,
    /// It cannot be enforced.
    Blocked,
}

impl RuleRef {
    /// A rule of an Istio policy.
    pub fn rule(object: &ObjectRef, action: RuleAction, index: usize) -> RuleRef {
        RuleRef { object: object.clone(), action, list: RuleList::Rules, index: Some(index as u32) }
    }

    /// A rule of a network policy.
    pub fn network(object: &ObjectRef, rule: &NetworkRule) -> RuleRef {
        let action = match rule.action {
            RuleVerdict::Deny => RuleAction::Deny,
            RuleVerdict::Allow | RuleVerdict::Pass => RuleAction::Allow,
        };
        RuleRef { object: object.clone(), action, list: rule.list, index: Some(rule.index) }
    }

    /// An object as a whole.
    pub fn whole(object: &ObjectRef, action: RuleAction) -> RuleRef {
        RuleRef { object: object.clone(), action, list: RuleList::Rules, index: None }
    }
}

impl RuleAction {
    pub fn name(self) -> &'static str {
        match self {
            RuleAction::Allow => "ALLOW",
            RuleAction::Deny => "DENY",
            RuleAction::NoneAllowed => "no ALLOW rule matched",
            RuleAction::Strict => "STRICT",
            RuleAction::Token => "tokens must be verified",
            RuleAction::Audit => "AUDIT",
            RuleAction::Blocked => "cannot be enforced",
        }
    }
}

impl From<Action> for RuleAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => RuleAction::Allow,
            Action::Audit => RuleAction::Audit,
            Action::Deny => RuleAction::Deny,
        }
    }
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.object)?;
        if let Some(index) = self.index {
            write!(f, " {}[{index}]", self.list.name())?;
        }
        write!(f, " ({})", self.action.name())
    }
}

/// A service address in the tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceEntry {
    /// Namespace and name of the service.
    pub service: (String, String),
    /// [`weft_datapath::service`] constant.
    pub balance: u32,
    pub backends: Vec<Backend>,
}

/// Desired contents of the maps. Keys carry bank 0; who writes them to the kernel sets the bank. Identity numbers are
/// those that the caller of [`crate::compile()`] gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    pub subjects: BTreeMap<SubjectKey, Subject>,
    pub modes: BTreeMap<ModeKey, u32>,
    pub policies: BTreeMap<PolicyKey, PolicyValue>,
    /// Address and prefix length (0 to 128, IPv4 within `::ffff:0:0/96`) to class.
    pub cidrs: BTreeMap<(Addr, u8), u32>,
    /// First port and prefix length of a range of ports (0 to 16), to the number of the range.
    pub ranges: BTreeMap<(u16, u8), u32>,
    /// Rules by number. A number is made from the rule itself, so that other rules do not move it; 0 is a default.
    pub rules: BTreeMap<u32, RuleRef>,
    /// Address to workload. `ifindex` is 0: only the agent knows which are local.
    pub endpoints: BTreeMap<Addr, Endpoint>,
    pub services: BTreeMap<ServiceKey, ServiceEntry>,
    /// Addresses that belong to the mesh and must not be reached (contested ones), and whatever the agent adds.
    pub inside: Vec<cidr::Cidr>,
    /// Filled by the agent, for decisions on the host.
    pub node_addrs: BTreeSet<Addr>,
    /// Filled by the agent.
    pub netns: BTreeMap<u64, Netns>,
    /// Filled by the agent.
    pub revision: u32,
}

impl Tables {
    /// The rule behind a number of the tables.
    pub fn rule(&self, number: u32) -> Option<&RuleRef> {
        self.rules.get(&number)
    }
}

impl weft_datapath::tables::Tables for Tables {
    fn revision(&self) -> u32 {
        self.revision
    }

    fn subject(&self, _bank: u32, identity: u32) -> Option<Subject> {
        self.subjects.get(&SubjectKey { bank: 0, identity }).copied()
    }

    fn port_mode(&self, _bank: u32, identity: u32, port: u16) -> Option<u32> {
        self.modes.get(&ModeKey { bank: 0, identity, port, pad: 0 }).copied()
    }

    fn class(&self, bank: u32, addr: &Addr) -> u32 {
        if bank & PORTS != 0 {
            let port = u16::from_be_bytes([addr[0], addr[1]]);
            let first = |prefix: u8| port & u16::MAX.checked_shl(16 - u32::from(prefix)).unwrap_or(0);
            return (0..=16u8).rev().find_map(|p| self.ranges.get(&(first(p), p))).copied().unwrap_or(0);
        }
        if self.cidrs.is_empty() {
            return 0;
        }
        let bits = u128::from_be_bytes(*addr);
        let longest = (0..=128u8).rev().find_map(|prefix| {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            self.cidrs.get(&((bits & mask).to_be_bytes(), prefix))
        });
        longest.copied().unwrap_or(0)
    }

    fn policy(&self, key: &PolicyKey) -> Option<PolicyValue> {
        self.policies.get(&PolicyKey { bank: 0, ..*key }).copied()
    }

    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        self.endpoints.get(addr).copied()
    }

    fn netns(&self, cookie: u64) -> Option<Netns> {
        self.netns.get(&cookie).copied()
    }

    fn inside(&self, addr: &Addr) -> bool {
        let ip = cidr::ip(addr);
        self.inside.iter().any(|range| range.contains(ip))
    }

    fn is_node_addr(&self, addr: &Addr) -> bool {
        self.node_addrs.contains(addr)
    }

    fn service(&self, key: &ServiceKey) -> Option<weft_datapath::abi::Service> {
        let entry = self.services.get(key)?;
        let id = self.services.range(..key).count() as u32 + 1;
        Some(weft_datapath::abi::Service {
            id,
            epoch: 0,
            count: entry.backends.len() as u32,
            balance: entry.balance,
        })
    }

    fn backend(&self, service: &weft_datapath::abi::Service, slot: u32) -> Option<Backend> {
        let entry = self.services.values().nth(service.id.checked_sub(1)? as usize)?;
        entry.backends.get(slot as usize).copied()
    }
}

/// What turns one map into another, both lists in order of keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Diff<K, V> {
    /// Missing or different: to write.
    pub set: Vec<(K, V)>,
    /// To remove.
    pub remove: Vec<K>,
}

impl<K, V> Default for Diff<K, V> {
    fn default() -> Self {
        Diff { set: Vec::new(), remove: Vec::new() }
    }
}

impl<K: Ord + Clone, V: PartialEq + Clone> Diff<K, V> {
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }

    /// Carries it out.
    pub fn apply(&self, map: &mut BTreeMap<K, V>) {
        map.extend(self.set.iter().cloned());
        self.remove.iter().for_each(|key| drop(map.remove(key)));
    }
}

/// The difference from `current` to `desired`.
pub fn diff<K: Ord + Clone, V: PartialEq + Clone>(
    current: &BTreeMap<K, V>,
    desired: &BTreeMap<K, V>,
) -> Diff<K, V> {
    let changed = desired.iter().filter(|(key, value)| current.get(key) != Some(value));
    Diff {
        set: changed.map(|(key, value)| (key.clone(), value.clone())).collect(),
        remove: current.keys().filter(|key| !desired.contains_key(key)).cloned().collect(),
    }
}

/// What turns one state of the tables into another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TablesDiff {
    pub subjects: Diff<SubjectKey, Subject>,
    pub modes: Diff<ModeKey, u32>,
    pub policies: Diff<PolicyKey, PolicyValue>,
    pub cidrs: Diff<(Addr, u8), u32>,
    pub ranges: Diff<(u16, u8), u32>,
    pub rules: Diff<u32, RuleRef>,
    pub endpoints: Diff<Addr, Endpoint>,
    pub services: Diff<ServiceKey, ServiceEntry>,
    /// Where it became different: all of it.
    pub inside: Option<Vec<cidr::Cidr>>,
}

impl TablesDiff {
    /// The difference from `current` to `desired`, without what the agent fills.
    pub fn new(current: &Tables, desired: &Tables) -> TablesDiff {
        TablesDiff {
            subjects: diff(&current.subjects, &desired.subjects),
            modes: diff(&current.modes, &desired.modes),
            policies: diff(&current.policies, &desired.policies),
            cidrs: diff(&current.cidrs, &desired.cidrs),
            ranges: diff(&current.ranges, &desired.ranges),
            rules: diff(&current.rules, &desired.rules),
            endpoints: diff(&current.endpoints, &desired.endpoints),
            services: diff(&current.services, &desired.services),
            inside: (current.inside != desired.inside).then(|| desired.inside.clone()),
        }
    }

    /// Carries it out.
    pub fn apply(&self, tables: &mut Tables) {
        self.subjects.apply(&mut tables.subjects);
        self.modes.apply(&mut tables.modes);
        self.policies.apply(&mut tables.policies);
        self.cidrs.apply(&mut tables.cidrs);
        self.ranges.apply(&mut tables.ranges);
        self.rules.apply(&mut tables.rules);
        self.endpoints.apply(&mut tables.endpoints);
        self.services.apply(&mut tables.services);
        if let Some(inside) = &self.inside {
            tables.inside.clone_from(inside);
        }
    }
}
