//! Numbers of rules. A number is made from the rule itself, so that other rules do not move it.

use super::classes::{free, hash};
use crate::tables::RuleRef;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The rules in the tables.
#[derive(Default)]
pub(super) struct RuleNumbers {
    /// Number, and how many lists of rows have the rule.
    numbers: HashMap<RuleRef, (u32, usize)>,
    taken: HashSet<u32>,
    /// Wanted and given number of those that clashed with an earlier one.
    moved: BTreeMap<u32, u32>,
}

/// The numbers would be others if all rules were numbered anew.
#[derive(Debug)]
pub(super) struct Renumber;

impl RuleNumbers {
    /// Of all rules, in their order: on a clash the later one moves, whatever was asked for first.
    pub(super) fn new(used: impl Iterator<Item = RuleRef>) -> RuleNumbers {
        let mut count: BTreeMap<RuleRef, usize> = BTreeMap::new();
        used.for_each(|rule| *count.entry(rule).or_default() += 1);
        let mut all = RuleNumbers::default();
        for (rule, count) in count {
            let wanted = wanted(&rule);
            let number = free(wanted, |number| all.taken.contains(&number));
            if number != wanted {
                all.moved.insert(wanted, number);
            }
            all.taken.insert(number);
            all.numbers.insert(rule, (number, count));
        }
        all
    }

    pub(super) fn number(&self, rule: &RuleRef) -> Option<u32> {
        self.numbers.get(rule).map(|(number, _)| *number)
    }

    /// By number.
    pub(super) fn all(&self) -> BTreeMap<u32, RuleRef> {
        self.numbers.iter().map(|(rule, (number, _))| (*number, rule.clone())).collect()
    }

    /// One more list of rows has these; calls `come` for those that are new.
    pub(super) fn keep(
        &mut self,
        rules: &[RuleRef],
        mut come: impl FnMut(u32, &RuleRef),
    ) -> Result<(), Renumber> {
        for rule in rules {
            if let Some((_, count)) = self.numbers.get_mut(rule) {
                *count += 1;
                continue;
            }
            let number = wanted(rule);
            if !self.taken.insert(number) {
                return Err(Renumber);
            }
            self.numbers.insert(rule.clone(), (number, 1));
            come(number, rule);
        }
        Ok(())
    }

    /// One list of rows less has these; calls `gone` for those that nobody has any more.
    pub(super) fn drop(&mut self, rules: &[RuleRef], mut gone: impl FnMut(u32)) -> Result<(), Renumber> {
        for rule in rules {
            let Some((number, count)) = self.numbers.get_mut(rule) else { return Err(Renumber) };
            *count -= 1;
            if *count > 0 {
                continue;
            }
            let number = *number;
            // One that had to make way for it could come back.
            if self.moved.iter().any(|(wanted, given)| given < wanted || (*wanted..=*given).contains(&number))
            {
                return Err(Renumber);
            }
            self.numbers.remove(rule);
            self.taken.remove(&number);
            gone(number);
        }
        Ok(())
    }
}

fn wanted(rule: &RuleRef) -> u32 {
    hash(rule.to_string().into_bytes().into_iter())
}
