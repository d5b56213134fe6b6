//! A map's content as the agent knows it, and how it follows a desired content by difference.

use std::collections::BTreeMap;

use weft_datapath::abi::Shared;
use weft_policy::tables::diff;

use super::error::Result;
use super::maps::Table;

/// What is in a map (or in one bank of it). Read from the kernel once, then kept in step with every write, so that a
/// sync costs system calls only for what changed.
#[derive(Debug)]
pub(crate) struct Mirror<K, V> {
    have: BTreeMap<K, V>,
}

impl<K: Shared + Ord, V: Shared + Eq> Mirror<K, V> {
    /// Reads the entries that `ours` accepts.
    pub(crate) fn read(table: &Table<K, V>, ours: impl Fn(&K) -> bool) -> Result<Mirror<K, V>> {
        Ok(Mirror { have: table.entries()?.into_iter().filter(|(key, _)| ours(key)).collect() })
    }

    pub(crate) fn have(&self) -> &BTreeMap<K, V> {
        &self.have
    }

    /// Writes one entry if it is new or differs; `true` when it did.
    pub(crate) fn write(&mut self, table: &Table<K, V>, key: K, value: V) -> Result<bool> {
        if self.have.get(&key) == Some(&value) {
            return Ok(false);
        }
        table.insert(&key, &value)?;
        self.have.insert(key, value);
        Ok(true)
    }

    /// Removes one entry if it is there.
    pub(crate) fn remove(&mut self, table: &Table<K, V>, key: &K) -> Result<bool> {
        if !self.have.contains_key(key) {
            return Ok(false);
        }
        table.remove(key)?;
        self.have.remove(key);
        Ok(true)
    }

    /// Writes what `want` has and the map lacks or has otherwise. Stops at the first error.
    pub(crate) fn write_missing(&mut self, table: &Table<K, V>, want: &BTreeMap<K, V>) -> Result<usize> {
        let missing = diff(&self.have, want).set;
        for (key, value) in &missing {
            self.write(table, *key, *value)?;
        }
        Ok(missing.len())
    }

    /// Removes what the map has and `want` lacks. Stops at the first error.
    pub(crate) fn remove_extra(&mut self, table: &Table<K, V>, want: &BTreeMap<K, V>) -> Result<usize> {
        let extra = diff(&self.have, want).remove;
        for key in &extra {
            self.remove(table, key)?;
        }
        Ok(extra.len())
    }
}
