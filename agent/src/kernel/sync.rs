//! Policy into the kernel: the inactive bank is brought to the desired state, then one write makes it the active one.
//!
//! INVARIANT: the active bank is never written. So programs see the former policy set or the new one, never a mixture,
//! and when a map is full or the agent dies half-way, the former set stays in force.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use weft_datapath::abi::{Addr, CidrKey, ModeKey, PolicyKey, PolicyValue, Shared, Subject, SubjectKey};
use weft_datapath::names::config;
use weft_datapath::policy::{PORTS, port_addr};
use weft_policy::tables::Tables;

use super::error::Result;
use super::maps::{Maps, Prefix, Table};
use super::mirror::Mirror;
use super::sys;

/// A key that carries its bank.
trait Banked: Shared + Ord {
    fn bank(&self) -> u32;
    fn in_bank(self, bank: u32) -> Self;
}

macro_rules! banked {
    ($($key:ty),+) => {$(
        impl Banked for $key {
            fn bank(&self) -> u32 {
                self.bank
            }

            fn in_bank(self, bank: u32) -> Self {
                Self { bank, ..self }
            }
        }
    )+};
}

banked!(SubjectKey, ModeKey, PolicyKey);

impl Banked for Prefix<CidrKey> {
    fn bank(&self) -> u32 {
        u32::from_be_bytes(self.data.bank_be) & !PORTS
    }

    fn in_bank(self, bank: u32) -> Self {
        let kind = u32::from_be_bytes(self.data.bank_be) & PORTS;
        Prefix { data: CidrKey { bank_be: (kind | bank).to_be_bytes(), ..self.data }, ..self }
    }
}

/// A policy set as the kernel reads it, with bank 0 in all keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    pub subjects: BTreeMap<SubjectKey, Subject>,
    pub modes: BTreeMap<ModeKey, u32>,
    pub policies: BTreeMap<PolicyKey, PolicyValue>,
    /// The prefix covers the bank and then the address or port.
    pub classes: BTreeMap<Prefix<CidrKey>, u32>,
}

/// The bank is part of the prefix.
pub(crate) const BANK_BITS: u32 = 32;

/// What a publication did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// The revision in force.
    pub revision: u32,
    /// Entries written and removed; 0 when the kernel already had this policy set.
    pub changes: usize,
}

/// Both banks, as they are in the kernel.
#[derive(Debug)]
pub struct PolicySync {
    banks: [Bank; 2],
    revision: u32,
    flipped: Option<Instant>,
}

#[derive(Debug)]
struct Bank {
    subjects: Mirror<SubjectKey, Subject>,
    modes: Mirror<ModeKey, u32>,
    policies: Mirror<PolicyKey, PolicyValue>,
    classes: Mirror<Prefix<CidrKey>, u32>,
}

/// A program that read the revision before a flip has left its bank for certain after this time, unless the kernel
/// says otherwise through the grace period that is waited for when less has passed.
const SETTLED: Duration = Duration::from_secs(1);

impl PolicySync {
    /// Reads what a former agent left.
    pub fn read(maps: &Maps) -> Result<PolicySync> {
        let revision = maps.config.lookup(&config::REVISION)?.unwrap_or(0);
        let flipped = Some(Instant::now());
        Ok(PolicySync { banks: [Bank::read(maps, 0)?, Bank::read(maps, 1)?], revision, flipped })
    }

    /// The revision in force; 0 before the first publication.
    pub fn revision(&self) -> u32 {
        self.revision
    }

    /// Makes `want` the policy set in force. On an error the former one stays in force, whole. With `renew` the
    /// revision moves even without a change, so that living flows are decided again.
    pub fn publish(&mut self, maps: &Maps, want: &PolicySet, renew: bool) -> Result<Published> {
        let active = self.revision & 1;
        if !renew && self.revision != 0 && self.banks[active as usize].is(want) {
            return Ok(Published { revision: self.revision, changes: 0 });
        }
        // 0 means "never published", so the number goes round without it, and without losing the alternation of banks.
        let revision = self.revision.checked_add(1).unwrap_or(2);
        if self.flipped.is_some_and(|flipped| flipped.elapsed() < SETTLED) {
            sys::wait_for_programs();
        }
        let bank = revision & 1;
        let changes = self.banks[bank as usize].follow(maps, want)?;
        maps.config.insert(&config::REVISION, &revision)?;
        self.revision = revision;
        self.flipped = Some(Instant::now());
        Ok(Published { revision, changes })
    }
}

impl From<&Tables> for PolicySet {
    fn from(tables: &Tables) -> PolicySet {
        let class = |(addr, bits): &(Addr, u8)| Prefix {
            bits: BANK_BITS + u32::from(*bits),
            data: CidrKey { bank_be: [0; 4], addr: *addr },
        };
        let range = |(port, bits): &(u16, u8)| Prefix {
            bits: BANK_BITS + u32::from(*bits),
            data: CidrKey { bank_be: PORTS.to_be_bytes(), addr: port_addr(*port) },
        };
        let classes = tables.cidrs.iter().map(|(key, number)| (class(key), *number));
        PolicySet {
            subjects: tables.subjects.clone(),
            modes: tables.modes.clone(),
            policies: tables.policies.clone(),
            classes: classes.chain(tables.ranges.iter().map(|(key, number)| (range(key), *number))).collect(),
        }
    }
}

impl Bank {
    fn read(maps: &Maps, bank: u32) -> Result<Bank> {
        fn of<K: Banked, V: Shared + Eq>(table: &Table<K, V>, bank: u32) -> Result<Mirror<K, V>> {
            let stored: fn(K) -> K = if bank == 0 { |key| key.in_bank(0) } else { |key| key.in_bank(1) };
            Mirror::read_part(table, stored, |key| (key.bank() == bank).then(|| key.in_bank(0)))
        }
        Ok(Bank {
            subjects: of(&maps.subject, bank)?,
            modes: of(&maps.mode, bank)?,
            policies: of(&maps.policy, bank)?,
            classes: of(&maps.cidr, bank)?,
        })
    }

    fn is(&self, want: &PolicySet) -> bool {
        *self.subjects.have() == want.subjects
            && *self.modes.have() == want.modes
            && *self.policies.have() == want.policies
            && *self.classes.have() == want.classes
    }

    /// To be called on the inactive bank only.
    fn follow(&mut self, maps: &Maps, want: &PolicySet) -> Result<usize> {
        Ok(self.subjects.follow(&maps.subject, &want.subjects)?
            + self.modes.follow(&maps.mode, &want.modes)?
            + self.policies.follow(&maps.policy, &want.policies)?
            + self.classes.follow(&maps.cidr, &want.classes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_move_between_banks() {
        let key = PolicyKey { subject: 7, peer: 8, port: 80, ..PolicyKey::default() };
        assert_eq!(key.in_bank(1).bank(), 1);
        assert_eq!(key.in_bank(1).in_bank(0), key);
        let class = Prefix { bits: 32 + 104, data: CidrKey { bank_be: [0; 4], addr: [9; 16] } };
        assert_eq!(class.in_bank(1).bank(), 1);
        assert_eq!(class.in_bank(1).data.bank_be, [0, 0, 0, 1]);
        let range =
            Prefix { bits: 32 + 4, data: CidrKey { bank_be: PORTS.to_be_bytes(), addr: port_addr(0x8000) } };
        assert_eq!((range.bank(), range.in_bank(1).bank()), (0, 1));
        assert_eq!(range.in_bank(1).data.bank_be, [0x80, 0, 0, 1]);
    }
}
