//! Peers as the compiler sees them: in groups that a set of policies cannot tell apart.
//!
//! Most policies name a few peers, so most workloads are alike to them; only those that a test or a selector may match
//! are looked at one by one. That keeps the work for a subject in the size of its policies, not of the mesh. What a
//! selector finds is kept, because many policies select alike, and follows workloads that come and go.

use super::index::{Anchor, Index};
use crate::model::layer::{Peer, PodSet};
use crate::model::selector::{NAMESPACE_NAME, SERVICE_ACCOUNT};
use crate::model::{Identity, Model};
use crate::source::rule::{Pattern, Test};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use weft_datapath::identity::{ANONYMOUS, NODE};

/// Something that may tell one workload from another.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Trait {
    Test(Test),
    Pods(PodSet),
    /// It is asked which port its pods call so.
    Named(String, u8),
}

/// Workloads that are alike in one trait: nothing for tests and selectors; ports, and whether all pods have it, for names.
type Kind = Vec<(u16, bool)>;

/// A trait and who has it.
struct Known {
    what: Arc<Trait>,
    /// All who may have it stand there; absent: they may stand anywhere.
    anchor: Option<Anchor>,
    /// Few kinds, each with somebody in it, in order.
    members: Vec<(Kind, BTreeSet<u32>)>,
    /// Profiles that ask for it.
    users: BTreeSet<u32>,
}

/// Peers with one verdict, named by one of them.
pub(super) struct Group<'a> {
    pub(super) peer: Peer<'a>,
    pub(super) members: Members,
}

/// The identity numbers of a group.
pub(super) enum Members {
    These(Vec<u32>),
    /// All workloads but these.
    AllBut(HashSet<u32>),
}

/// All identities with a number.
pub(super) struct Peers {
    pub(super) all: BTreeMap<u32, Arc<Identity>>,
    pub(super) numbers: BTreeMap<Arc<Identity>, u32>,
    index: Index<u32>,
    known: BTreeMap<u32, Known>,
    ids: HashMap<Arc<Trait>, u32>,
    next: u32,
    /// Traits by anchor.
    about: Index<u32>,
    anywhere: BTreeSet<u32>,
}

impl Peers {
    pub(super) fn new() -> Self {
        Peers {
            all: BTreeMap::new(),
            numbers: BTreeMap::new(),
            index: Index::new(),
            known: BTreeMap::new(),
            ids: HashMap::new(),
            next: 0,
            about: Index::new(),
            anywhere: BTreeSet::new(),
        }
    }

    pub(super) fn number(&self, identity: &Identity) -> Option<u32> {
        self.numbers.get(identity).copied()
    }

    /// Who may stand under an anchor.
    pub(super) fn at(&self, anchor: Anchor) -> impl Iterator<Item = u32> {
        self.index.get(anchor).copied()
    }

    /// An identity comes.
    pub(super) fn insert(&mut self, number: u32, identity: &Arc<Identity>) {
        Anchor::of(identity).for_each(|anchor| self.index.insert(anchor, number));
        self.all.insert(number, identity.clone());
        self.numbers.insert(identity.clone(), number);
    }

    /// An identity goes.
    pub(super) fn remove(&mut self, number: u32) {
        let Some(identity) = self.all.remove(&number) else { return };
        Anchor::of(&identity).for_each(|anchor| self.index.remove(anchor, &number));
        self.numbers.remove(&identity);
    }

    /// Looks anew at what one identity has; returns the profiles that ask for a trait in which it became different.
    pub(super) fn look(&mut self, model: &Model, number: u32, identity: &Identity) -> BTreeSet<u32> {
        let present = self.all.contains_key(&number);
        let traits: BTreeSet<u32> = self.about.about(identity).chain(&self.anywhere).copied().collect();
        let mut concerned = BTreeSet::new();
        for id in traits {
            let Some(known) = self.known.get_mut(&id) else { continue };
            let now = if present { known.what.kind(model, identity) } else { None };
            let former = known.members.iter().find(|(_, members)| members.contains(&number));
            if former.map(|(kind, _)| kind) == now.as_ref() {
                continue;
            }
            known.members.retain_mut(|(_, members)| {
                members.remove(&number);
                !members.is_empty()
            });
            if let Some(kind) = now {
                join(&mut known.members, kind, number);
            }
            concerned.extend(&known.users);
        }
        concerned
    }

    /// A profile asks for a trait. Absent where it tells nobody from another.
    pub(super) fn ask(&mut self, model: &Model, what: Trait, user: u32) -> Option<u32> {
        if let Some(id) = self.ids.get(&what) {
            self.known.get_mut(id)?.users.insert(user);
            return Some(*id);
        }
        let anchor = match what.place() {
            Place::Nowhere => return None,
            Place::Anywhere => None,
            Place::Under(anchors) => anchors.into_iter().min_by_key(|anchor| self.index.count(*anchor)),
        };
        let mut members = Vec::new();
        let mut look = |number: u32, identity: &Identity| {
            if let Some(kind) = what.kind(model, identity) {
                join(&mut members, kind, number);
            }
        };
        match anchor {
            None => self.all.iter().for_each(|(number, identity)| look(*number, identity)),
            Some(anchor) => self.index.get(anchor).for_each(|number| look(*number, &self.all[number])),
        }
        let id = self.next;
        self.next += 1;
        match anchor {
            None => drop(self.anywhere.insert(id)),
            Some(anchor) => self.about.insert(anchor, id),
        }
        let what = Arc::new(what);
        self.ids.insert(what.clone(), id);
        self.known.insert(id, Known { what, anchor, members, users: BTreeSet::from([user]) });
        Some(id)
    }

    /// A profile is gone.
    pub(super) fn leave(&mut self, id: u32, user: u32) {
        let Some(known) = self.known.get_mut(&id) else { return };
        known.users.remove(&user);
        if !known.users.is_empty() {
            return;
        }
        match known.anchor {
            None => drop(self.anywhere.remove(&id)),
            Some(anchor) => self.about.remove(anchor, &id),
        }
        self.ids.remove(&known.what);
        self.known.remove(&id);
    }

    /// How many numbers a group has.
    pub(super) fn size(&self, members: &Members) -> usize {
        match members {
            Members::These(numbers) => numbers.len(),
            Members::AllBut(except) => self.all.len() - except.len(),
        }
    }

    pub(super) fn numbers<'n>(&'n self, members: &'n Members) -> Box<dyn Iterator<Item = u32> + 'n> {
        match members {
            Members::These(numbers) => Box::new(numbers.iter().copied()),
            Members::AllBut(except) => {
                Box::new(self.all.keys().copied().filter(|number| !except.contains(number)))
            }
        }
    }

    /// The groups that these traits tell apart: the anonymous, the node, workloads of equal traits, and last those that have
    /// none, if there are any.
    pub(super) fn groups(&self, traits: &BTreeSet<u32>) -> Vec<Group<'_>> {
        let mut groups = vec![
            Group { peer: Peer::Anonymous, members: Members::These(vec![ANONYMOUS]) },
            Group { peer: Peer::Node, members: Members::These(vec![NODE]) },
        ];
        let mut traits_of: BTreeMap<u32, Vec<(u32, &Kind)>> = BTreeMap::new();
        for known in traits.iter().filter_map(|id| Some((*id, self.known.get(id)?))) {
            for (kind, members) in &known.1.members {
                members.iter().for_each(|number| traits_of.entry(*number).or_default().push((known.0, kind)));
            }
        }
        let special: HashSet<u32> = traits_of.keys().copied().collect();
        let mut alike: BTreeMap<Vec<(u32, &Kind)>, Vec<u32>> = BTreeMap::new();
        for (number, traits) in traits_of {
            alike.entry(traits).or_default().push(number);
        }
        let mut alike: Vec<Vec<u32>> = alike.into_values().collect();
        // By who is in them, which does not depend on what was asked for first.
        alike.sort_unstable();
        for numbers in alike {
            let peer = Peer::Workload(&self.all[&numbers[0]]);
            groups.push(Group { peer, members: Members::These(numbers) });
        }
        if let Some((_, first)) = self.all.iter().find(|(number, _)| !special.contains(number)) {
            groups.push(Group { peer: Peer::Workload(first), members: Members::AllBut(special) });
        }
        groups
    }
}

fn join(members: &mut Vec<(Kind, BTreeSet<u32>)>, kind: Kind, number: u32) {
    match members.binary_search_by(|(own, _)| own.cmp(&kind)) {
        Ok(at) => drop(members[at].1.insert(number)),
        Err(at) => members.insert(at, (kind, BTreeSet::from([number]))),
    }
}

/// Where those stand who may have a trait.
enum Place {
    /// All have it, or none: it tells nobody from another.
    Nowhere,
    Anywhere,
    /// Under each of these.
    Under(Vec<Anchor>),
}

impl Trait {
    fn place(&self) -> Place {
        let account = |namespace: &str, name: &str| {
            Place::Under(vec![Anchor::new(Some(namespace), Some((SERVICE_ACCOUNT, name)))])
        };
        match self {
            Trait::Test(Test::ServiceAccount { namespace, name }) => account(namespace, name),
            Trait::Test(Test::Principal(Pattern::Exact(text))) => {
                match text.split('/').collect::<Vec<_>>()[..] {
                    // The trust domain is left to the test itself.
                    [_, "ns", namespace, "sa", name] => account(namespace, name),
                    _ => Place::Nowhere,
                }
            }
            Trait::Test(Test::Namespace(Pattern::Exact(namespace))) => {
                Place::Under(vec![Anchor::new(Some(namespace), None)])
            }
            // Every workload has both.
            Trait::Test(Test::Principal(Pattern::Present) | Test::Namespace(Pattern::Present)) => {
                Place::Nowhere
            }
            Trait::Test(Test::Principal(_) | Test::Namespace(_)) | Trait::Named(..) => Place::Anywhere,
            Trait::Test(_) => Place::Nowhere,
            Trait::Pods(pods) if pods.is_all() => Place::Nowhere,
            Trait::Pods(pods) => {
                let namespace = pods.namespaces.equal.get(NAMESPACE_NAME).map(String::as_str);
                let labels = pods.pods.equal.iter().map(|(key, value)| Some((key.as_str(), value.as_str())));
                let all = namespace.is_some().then_some(None).into_iter().chain(labels);
                let anchors: Vec<_> = all.map(|label| Anchor::new(namespace, label)).collect();
                if anchors.is_empty() { Place::Anywhere } else { Place::Under(anchors) }
            }
        }
    }

    /// What an identity has of it, if anything.
    fn kind(&self, model: &Model, identity: &Identity) -> Option<Kind> {
        match self {
            Trait::Test(test) => test.names(&identity.spiffe, &model.settings.trust_domain).then(Kind::new),
            Trait::Pods(pods) => pods.selects(&model.namespaces, identity).then(Kind::new),
            Trait::Named(name, protocol) => {
                let pods = model.pods(identity);
                let ports = pods.named.get(&(name.clone(), *protocol))?;
                Some(ports.iter().map(|(port, count)| (*port, *count == pods.count)).collect())
            }
        }
    }
}
