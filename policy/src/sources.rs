//! Sources as the compiler sees them: in groups that a set of policies cannot tell apart.
//!
//! Most policies name a few principals, so most workloads are alike to them; only those that a test may match are looked
//! at one by one. That keeps the work for a destination in the size of its policies, not of the mesh.

use crate::model::{Identity, SpiffeId};
use crate::source::rule::{Pattern, Test};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use weft_datapath::identity::{ANONYMOUS, NODE};

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source<'a> {
    Anonymous,
    Node,
    Workload(&'a SpiffeId),
}

/// Sources with one verdict, named by one of them.
pub(crate) struct Group<'s> {
    pub(crate) source: Source<'s>,
    pub(crate) numbers: Numbers<'s>,
}

/// The identity numbers of a group.
pub(crate) enum Numbers<'s> {
    These(&'s [u32]),
    /// All workloads but those at these positions.
    AllBut {
        all: &'s [(&'s SpiffeId, Vec<u32>)],
        except: BTreeSet<usize>,
        count: usize,
    },
}

impl Numbers<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Numbers::These(numbers) => numbers.len(),
            Numbers::AllBut { count, .. } => *count,
        }
    }

    pub(crate) fn iter(&self) -> Box<dyn Iterator<Item = u32> + '_> {
        match self {
            Numbers::These(numbers) => Box::new(numbers.iter().copied()),
            Numbers::AllBut { all, except, .. } => {
                let rest = all.iter().enumerate().filter(|(index, _)| !except.contains(index));
                Box::new(rest.flat_map(|(_, (_, numbers))| numbers.iter().copied()))
            }
        }
    }
}

/// All workloads with their numbers, sorted by SPIFFE ID.
pub(crate) struct Sources<'a> {
    workloads: Vec<(&'a SpiffeId, Vec<u32>)>,
    /// Positions by namespace and service account.
    accounts: BTreeMap<(&'a str, &'a str), Vec<usize>>,
    /// How many numbers all workloads have.
    count: usize,
}

impl<'a> Sources<'a> {
    pub(crate) fn new(numbered: &[(&'a Arc<Identity>, u32)]) -> Self {
        let mut by_id: BTreeMap<&SpiffeId, Vec<u32>> = BTreeMap::new();
        for (identity, number) in numbered {
            by_id.entry(&identity.spiffe).or_default().push(*number);
        }
        let workloads: Vec<_> = by_id.into_iter().collect();
        let mut accounts: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
        for (index, (id, _)) in workloads.iter().enumerate() {
            accounts.entry((&id.namespace, &id.service_account)).or_default().push(index);
        }
        Sources { workloads, accounts, count: numbered.len() }
    }

    /// The groups that these tests tell apart, or finer: the anonymous, the node, each workload that a test may match,
    /// and all others.
    pub(crate) fn groups<'s, 't>(
        &'s self,
        tests: impl Iterator<Item = &'t Test>,
        trust_domain: &str,
    ) -> Vec<Group<'s>> {
        let mut special = BTreeSet::new();
        for test in tests {
            match test {
                Test::ServiceAccount { namespace, name } => special.extend(self.account(namespace, name)),
                Test::Principal(Pattern::Exact(text)) => {
                    // The trust domain is left to the test itself.
                    if let [_, "ns", namespace, "sa", name] = text.split('/').collect::<Vec<_>>()[..] {
                        special.extend(self.account(namespace, name));
                    }
                }
                Test::Namespace(Pattern::Exact(namespace)) => {
                    let from = self.accounts.range((namespace.as_str(), "")..);
                    let inside = from.take_while(|((ns, _), _)| ns == namespace);
                    special.extend(inside.flat_map(|(_, indexes)| indexes));
                }
                // Every workload has both, so presence tells none from another.
                Test::Principal(Pattern::Present) | Test::Namespace(Pattern::Present) => {}
                Test::Principal(_) | Test::Namespace(_) => {
                    let matched =
                        self.workloads.iter().enumerate().filter(|(_, (id, _))| test.names(id, trust_domain));
                    special.extend(matched.map(|(index, _)| index));
                }
                Test::SourceIp(_) | Test::DestinationIp(_) | Test::Port(_) => {}
            }
        }
        let mut groups = vec![
            Group { source: Source::Anonymous, numbers: Numbers::These(&[ANONYMOUS]) },
            Group { source: Source::Node, numbers: Numbers::These(&[NODE]) },
        ];
        let mut count = self.count;
        for index in &special {
            let (id, numbers) = &self.workloads[*index];
            count -= numbers.len();
            groups.push(Group { source: Source::Workload(id), numbers: Numbers::These(numbers) });
        }
        if let Some(first) = (0..self.workloads.len()).find(|index| !special.contains(index)) {
            let numbers = Numbers::AllBut { all: &self.workloads, except: special, count };
            groups.push(Group { source: Source::Workload(self.workloads[first].0), numbers });
        }
        groups
    }

    fn account(&self, namespace: &str, name: &str) -> Vec<usize> {
        self.accounts.get(&(namespace, name)).cloned().unwrap_or_default()
    }
}
