//! Peers as the compiler sees them: in groups that a set of policies cannot tell apart.
//!
//! Most policies name a few peers, so most workloads are alike to them; only those that a test or a selector may match
//! are looked at one by one. That keeps the work for a subject in the size of its policies, not of the mesh. What a
//! selector finds is remembered, because many policies select alike.

use crate::model::layer::{Peer, PodSet};
use crate::model::selector::{NAMESPACE_NAME, SERVICE_ACCOUNT};
use crate::model::{Identity, Model};
use crate::source::rule::{Pattern, Test};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use weft_datapath::identity::{ANONYMOUS, NODE};

/// Something that may tell one workload from another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Trait<'m> {
    Test(&'m Test),
    Pods(&'m PodSet),
    /// It is asked which port its pods call so.
    Named(&'m str, u8),
}

/// Peers with one verdict, named by one of them.
pub(super) struct Group<'a> {
    pub(super) peer: Peer<'a>,
    pub(super) numbers: Numbers,
}

/// The identity numbers of a group.
pub(super) enum Numbers {
    These(Vec<u32>),
    /// All workloads but those at these positions.
    AllBut(HashSet<u32>),
}

/// Workloads by position that have something in common.
enum Selected {
    All,
    /// Each list by itself: its members are alike.
    Lists(Vec<Vec<u32>>),
}

/// All identities with a number, sorted.
pub(super) struct Peers<'a> {
    model: &'a Model,
    pub(super) all: Vec<(&'a Arc<Identity>, u32)>,
    accounts: BTreeMap<(&'a str, &'a str), Vec<u32>>,
    labels: HashMap<(&'a str, &'a str), Vec<u32>>,
    known: RefCell<HashMap<Trait<'a>, Rc<Selected>>>,
}

impl<'a> Peers<'a> {
    pub(super) fn new(model: &'a Model, numbers: &'a super::Numbers) -> Self {
        let all: Vec<_> = numbers.iter().map(|(identity, number)| (identity, *number)).collect();
        let mut accounts: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        let mut labels: HashMap<_, Vec<u32>> = HashMap::new();
        for (at, (identity, _)) in all.iter().enumerate() {
            let id = &identity.spiffe;
            accounts.entry((&*id.namespace, &*id.service_account)).or_default().push(at as u32);
            for (key, value) in identity.labels.iter() {
                labels.entry((key.as_str(), value.as_str())).or_default().push(at as u32);
            }
        }
        Peers { model, all, accounts, labels, known: RefCell::default() }
    }

    /// How many numbers a group has.
    pub(super) fn size(&self, numbers: &Numbers) -> usize {
        match numbers {
            Numbers::These(numbers) => numbers.len(),
            Numbers::AllBut(except) => self.all.len() - except.len(),
        }
    }

    pub(super) fn numbers<'n>(&'n self, numbers: &'n Numbers) -> Box<dyn Iterator<Item = u32> + 'n> {
        match numbers {
            Numbers::These(numbers) => Box::new(numbers.iter().copied()),
            Numbers::AllBut(except) => {
                let rest = self.all.iter().enumerate().filter(|(at, _)| !except.contains(&(*at as u32)));
                Box::new(rest.map(|(_, (_, number))| *number))
            }
        }
    }

    /// The groups that these traits tell apart: the anonymous, the node, and workloads of equal traits.
    pub(super) fn groups(&self, traits: impl Iterator<Item = Trait<'a>>) -> Vec<Group<'a>> {
        let mut groups = vec![
            Group { peer: Peer::Anonymous, numbers: Numbers::These(vec![ANONYMOUS]) },
            Group { peer: Peer::Node, numbers: Numbers::These(vec![NODE]) },
        ];
        let mut seen = HashSet::new();
        let mut count = 0u32;
        let mut traits_of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for one in traits.filter(|one| seen.insert(*one)) {
            let Selected::Lists(lists) = &*self.selected(one) else { continue };
            for list in lists {
                count += 1;
                list.iter().for_each(|at| traits_of.entry(*at).or_default().push(count));
            }
        }
        let special: HashSet<u32> = traits_of.keys().copied().collect();
        let mut alike: BTreeMap<Vec<u32>, Vec<u32>> = BTreeMap::new();
        for (at, traits) in traits_of {
            alike.entry(traits).or_default().push(at);
        }
        for positions in alike.into_values() {
            let peer = Peer::Workload(self.all[positions[0] as usize].0);
            let numbers = positions.iter().map(|at| self.all[*at as usize].1).collect();
            groups.push(Group { peer, numbers: Numbers::These(numbers) });
        }
        if let Some(first) = (0..self.all.len()).find(|at| !special.contains(&(*at as u32))) {
            groups.push(Group { peer: Peer::Workload(self.all[first].0), numbers: Numbers::AllBut(special) });
        }
        groups
    }

    fn selected(&self, one: Trait<'a>) -> Rc<Selected> {
        if let Some(known) = self.known.borrow().get(&one) {
            return known.clone();
        }
        let selected = Rc::new(match one {
            Trait::Test(test) => self.tested(test),
            Trait::Pods(pods) => self.pods(pods),
            Trait::Named(name, protocol) => self.named(name, protocol),
        });
        self.known.borrow_mut().insert(one, selected.clone());
        selected
    }

    fn tested(&self, test: &Test) -> Selected {
        let list = match test {
            Test::ServiceAccount { namespace, name } => self.account(namespace, name),
            Test::Principal(Pattern::Exact(text)) => match text.split('/').collect::<Vec<_>>()[..] {
                // The trust domain is left to the test itself.
                [_, "ns", namespace, "sa", name] => self.account(namespace, name),
                _ => Vec::new(),
            },
            Test::Namespace(Pattern::Exact(namespace)) => self.namespace(namespace),
            // Every workload has both, so presence tells none from another.
            Test::Principal(Pattern::Present) | Test::Namespace(Pattern::Present) => return Selected::All,
            Test::Principal(_) | Test::Namespace(_) => {
                let domain = &*self.model.settings().trust_domain;
                self.filtered(None, |identity| test.names(&identity.spiffe, domain))
            }
            _ => return Selected::All,
        };
        // Accounts of other trust domains are among them, whom an exact principal may tell apart.
        let domain = &*self.model.settings().trust_domain;
        let exact = matches!(test, Test::Principal(Pattern::Exact(_)));
        let hit = |at: &u32| !exact || test.names(&self.all[*at as usize].0.spiffe, domain);
        Selected::Lists(vec![list.into_iter().filter(hit).collect()])
    }

    fn account(&self, namespace: &str, name: &str) -> Vec<u32> {
        self.accounts.get(&(namespace, name)).cloned().unwrap_or_default()
    }

    fn namespace(&self, namespace: &str) -> Vec<u32> {
        let from = self.accounts.range((namespace, "")..);
        let inside = from.take_while(|((ns, _), _)| *ns == namespace);
        inside.flat_map(|(_, positions)| positions).copied().collect()
    }

    fn pods(&self, pods: &PodSet) -> Selected {
        if pods.is_all() {
            return Selected::All;
        }
        let labelled = pods.pods.equal.iter().filter(|(key, _)| *key != SERVICE_ACCOUNT);
        let fewest = labelled
            .map(|(key, value)| {
                self.labels.get(&(key.as_str(), value.as_str())).map_or(&[][..], Vec::as_slice)
            })
            .min_by_key(|positions| positions.len());
        // By label, else by namespace; to collect a namespace costs its size.
        let inside = match (fewest, pods.namespaces.equal.get(NAMESPACE_NAME)) {
            (None, Some(namespace)) => Some(self.namespace(namespace)),
            _ => None,
        };
        let candidates = fewest.or(inside.as_deref());
        Selected::Lists(vec![
            self.filtered(candidates, |identity| pods.selects(self.model.namespaces(), identity)),
        ])
    }

    fn named(&self, name: &str, protocol: u8) -> Selected {
        let key = (name.to_owned(), protocol);
        let mut lists: BTreeMap<Vec<(u16, bool)>, Vec<u32>> = BTreeMap::new();
        for (at, (identity, _)) in self.all.iter().enumerate() {
            let pods = self.model.pods(identity);
            if let Some(ports) = pods.named.get(&key) {
                let ports = ports.iter().map(|(port, count)| (*port, *count == pods.count)).collect();
                lists.entry(ports).or_default().push(at as u32);
            }
        }
        Selected::Lists(lists.into_values().collect())
    }

    /// The positions, of some candidates or of all, for which this holds.
    fn filtered(&self, candidates: Option<&[u32]>, holds: impl Fn(&Identity) -> bool) -> Vec<u32> {
        let holds = |at: &u32| holds(self.all[*at as usize].0);
        match candidates {
            Some(list) => list.iter().copied().filter(holds).collect(),
            None => (0..self.all.len() as u32).filter(holds).collect(),
        }
    }
}
