//! The tables while they change, and what became different in the end.

use super::rules::RuleNumbers;
use super::subjects::{self, Subjects};
use crate::tables::{Diff, RuleRef, ServiceEntry, Tables, TablesDiff, diff};
use std::collections::BTreeMap;
use weft_datapath::abi::{Addr, Endpoint, ModeKey, PolicyKey, PolicyValue, ServiceKey, Subject, SubjectKey};

/// What stood at each key before it was first touched.
pub(super) struct Log<K, V>(BTreeMap<K, Option<V>>);

impl<K, V> Default for Log<K, V> {
    fn default() -> Self {
        Log(BTreeMap::new())
    }
}

impl<K: Ord + Clone, V: PartialEq + Clone> Log<K, V> {
    /// Puts a value at a key, or nothing.
    pub(super) fn put(&mut self, map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
        let former = match value {
            Some(value) => map.insert(key.clone(), value),
            None => map.remove(&key),
        };
        self.0.entry(key).or_insert(former);
    }

    /// Brings a whole map to another state.
    pub(super) fn turn(&mut self, map: &mut BTreeMap<K, V>, desired: &BTreeMap<K, V>) {
        let Diff { set, remove } = diff(map, desired);
        set.into_iter().for_each(|(key, value)| self.put(map, key, Some(value)));
        remove.into_iter().for_each(|key| self.put(map, key, None));
    }

    fn end(self, map: &BTreeMap<K, V>) -> Diff<K, V> {
        let mut diff = Diff::default();
        for (key, former) in self.0 {
            match map.get(&key) {
                now if now == former.as_ref() => {}
                Some(now) => diff.set.push((key, now.clone())),
                None => diff.remove.push(key),
            }
        }
        diff
    }
}

/// A log for each table.
#[derive(Default)]
pub(super) struct Changing {
    pub(super) subjects: Log<SubjectKey, Subject>,
    pub(super) modes: Log<ModeKey, u32>,
    pub(super) policies: Log<PolicyKey, PolicyValue>,
    pub(super) cidrs: Log<(Addr, u8), u32>,
    pub(super) ranges: Log<(u16, u8), u32>,
    pub(super) rules: Log<u32, RuleRef>,
    pub(super) endpoints: Log<Addr, Endpoint>,
    pub(super) services: Log<ServiceKey, ServiceEntry>,
}

impl Changing {
    /// Writes what the tables hold of a subject, or takes it away.
    pub(super) fn subject(
        &mut self,
        tables: &mut Tables,
        subjects: &Subjects,
        rules: &RuleNumbers,
        subject: u32,
        present: bool,
    ) {
        let Some((value, modes)) = subjects.subject(subject) else { return };
        self.subjects.put(&mut tables.subjects, subjects::key(subject), present.then_some(value));
        for (key, mode) in modes {
            self.modes.put(&mut tables.modes, key, present.then_some(mode));
        }
        for (key, value) in subjects.entries(subject, rules) {
            self.policies.put(&mut tables.policies, key, present.then_some(value));
        }
    }

    pub(super) fn end(self, tables: &Tables) -> TablesDiff {
        TablesDiff {
            subjects: self.subjects.end(&tables.subjects),
            modes: self.modes.end(&tables.modes),
            policies: self.policies.end(&tables.policies),
            cidrs: self.cidrs.end(&tables.cidrs),
            ranges: self.ranges.end(&tables.ranges),
            rules: self.rules.end(&tables.rules),
            endpoints: self.endpoints.end(&tables.endpoints),
            services: self.services.end(&tables.services),
            inside: None,
        }
    }
}
