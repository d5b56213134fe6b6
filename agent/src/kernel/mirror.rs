//! A map's content as the agent knows it, and how it follows a desired content by difference.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use weft_datapath::abi::Shared;

use super::error::Result;
use super::maps::Table;

/// What is in a map, or in one bank of it. Read from the kernel once, then kept in step with every write, so that a
/// sync costs system calls only for what changed.
#[derive(Debug)]
pub(crate) struct Mirror<K, V> {
    have: BTreeMap<K, V>,
    /// From a key here to the one in the map, which may bear the number of a bank.
    stored: fn(K) -> K,
}

impl<K: Shared + Ord, V: Shared + Eq> Mirror<K, V> {
    /// Reads a map that belongs to this mirror alone.
    pub(crate) fn read(table: &Table<K, V>) -> Result<Mirror<K, V>> {
        Mirror::read_part(table, |key| key, Some)
    }

    /// Reads the entries for whose keys `known` has a name.
    pub(crate) fn read_part(
        table: &Table<K, V>,
        stored: fn(K) -> K,
        known: impl Fn(K) -> Option<K>,
    ) -> Result<Mirror<K, V>> {
        let entries = table.entries()?.into_iter();
        Ok(Mirror { have: entries.filter_map(|(key, value)| Some((known(key)?, value))).collect(), stored })
    }

    pub(crate) fn have(&self) -> &BTreeMap<K, V> {
        &self.have
    }

    /// Writes one entry if it is new or differs; `true` when it did.
    pub(crate) fn write(&mut self, table: &Table<K, V>, key: K, value: V) -> Result<bool> {
        if self.have.get(&key) == Some(&value) {
            return Ok(false);
        }
        table.insert(&(self.stored)(key), &value)?;
        self.have.insert(key, value);
        Ok(true)
    }

    /// Removes one entry if it is there.
    pub(crate) fn remove(&mut self, table: &Table<K, V>, key: &K) -> Result<bool> {
        if !self.have.contains_key(key) {
            return Ok(false);
        }
        table.remove(&(self.stored)(*key))?;
        self.have.remove(key);
        Ok(true)
    }

    /// Makes the map hold `want` and nothing else, and returns how many entries changed. Removes first, to make room;
    /// stops at the first error.
    pub(crate) fn follow(&mut self, table: &Table<K, V>, want: &BTreeMap<K, V>) -> Result<usize> {
        let Difference { remove, write } = difference(&self.have, want);
        for key in &remove {
            self.remove(table, key)?;
        }
        for (key, value) in &write {
            self.write(table, *key, *value)?;
        }
        Ok(remove.len() + write.len())
    }

    /// Removes what `want` lacks.
    pub(crate) fn remove_extra(&mut self, table: &Table<K, V>, want: &BTreeMap<K, V>) -> Result<usize> {
        let Difference { remove, .. } = difference(&self.have, want);
        for key in &remove {
            self.remove(table, key)?;
        }
        Ok(remove.len())
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Difference<K, V> {
    /// Keys that are too many.
    remove: Vec<K>,
    /// Entries that are missing or have another value.
    write: Vec<(K, V)>,
}

/// One walk along both maps: with a hundred thousand rows, looking each up would take most of a revocation's time.
fn difference<K: Ord + Copy, V: Eq + Copy>(have: &BTreeMap<K, V>, want: &BTreeMap<K, V>) -> Difference<K, V> {
    let mut difference = Difference { remove: Vec::new(), write: Vec::new() };
    let (mut have, mut want) = (have.iter().peekable(), want.iter().peekable());
    loop {
        let order = match (have.peek(), want.peek()) {
            (Some((old, _)), Some((new, _))) => old.cmp(new),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return difference,
        };
        let old = if order.is_le() { have.next() } else { None };
        let new = if order.is_ge() { want.next() } else { None };
        match (old, new) {
            (Some((key, _)), None) => difference.remove.push(*key),
            (old, Some((key, value))) if old.map(|(_, value)| value) != Some(value) => {
                difference.write.push((*key, *value));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn difference_is_what_changed() {
        let have = BTreeMap::from([(1, 'a'), (2, 'b'), (3, 'c')]);
        let want = BTreeMap::from([(2, 'b'), (3, 'x'), (4, 'd')]);
        assert_eq!(difference(&have, &want), Difference { remove: vec![1], write: vec![(3, 'x'), (4, 'd')] });
        assert_eq!(difference(&want, &want), Difference { remove: vec![], write: vec![] });
    }

    proptest! {
        #[test]
        fn difference_leads_from_one_to_the_other(
            have in prop::collection::btree_map(0_u8..20, 0_u8..3, 0..20),
            want in prop::collection::btree_map(0_u8..20, 0_u8..3, 0..20),
        ) {
            let Difference { remove, write } = difference(&have, &want);
            let mut result = have.clone();
            for key in remove {
                prop_assert!(result.remove(&key).is_some());
            }
            for (key, value) in write {
                prop_assert_ne!(result.insert(key, value), Some(value));
            }
            prop_assert_eq!(result, want);
        }
    }
}
