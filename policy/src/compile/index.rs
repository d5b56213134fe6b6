//! Who may be meant, without asking everybody: workloads by what policies ask for, and policies by whom they may mean.
//!
//! What is asked for is reduced to an [`Anchor`]: one namespace, or any, and one label, or none. A workload stands under
//! all of its anchors, a policy or a selector under one that all whom it means must have. Whoever is found so is still
//! asked: an anchor narrows down and decides nothing, so that two with one hash cost time only.

use crate::model::Identity;
use crate::model::selector::SERVICE_ACCOUNT;
use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Anchor(u64);

impl Anchor {
    /// No namespace: any. No label: none is asked for. A service account is a label by the name of [`SERVICE_ACCOUNT`].
    pub(super) fn new(namespace: Option<&str>, label: Option<(&str, &str)>) -> Anchor {
        let mut hasher = DefaultHasher::new();
        (namespace, label).hash(&mut hasher);
        Anchor(hasher.finish())
    }

    /// All under which a workload stands.
    pub(super) fn of(identity: &Identity) -> impl Iterator<Item = Anchor> {
        let account = (SERVICE_ACCOUNT, &*identity.spiffe.service_account);
        let labels = identity.labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let labels = labels.chain([account]).map(Some).chain([None]);
        let namespace = &*identity.spiffe.namespace;
        labels.flat_map(move |label| [Some(namespace), None].map(|namespace| Anchor::new(namespace, label)))
    }
}

/// Things by anchor.
pub(super) struct Index<T>(HashMap<Anchor, BTreeSet<T>>);

impl<T: Ord + Clone> Index<T> {
    pub(super) fn new() -> Self {
        Index(HashMap::new())
    }

    pub(super) fn insert(&mut self, anchor: Anchor, thing: T) {
        self.0.entry(anchor).or_default().insert(thing);
    }

    pub(super) fn remove(&mut self, anchor: Anchor, thing: &T) {
        if let Some(things) = self.0.get_mut(&anchor) {
            things.remove(thing);
            if things.is_empty() {
                self.0.remove(&anchor);
            }
        }
    }

    pub(super) fn get(&self, anchor: Anchor) -> impl Iterator<Item = &T> {
        self.0.get(&anchor).into_iter().flatten()
    }

    pub(super) fn count(&self, anchor: Anchor) -> usize {
        self.0.get(&anchor).map_or(0, BTreeSet::len)
    }

    /// Everything that may mean this workload.
    pub(super) fn about(&self, identity: &Identity) -> impl Iterator<Item = &T> {
        Anchor::of(identity).flat_map(|anchor| self.get(anchor))
    }
}

/// Equal only to itself: one version of an object, told from others by where it is, which it keeps.
pub(super) struct Version<T>(pub(super) Arc<T>);

impl<T> Version<T> {
    fn place(&self) -> *const T {
        Arc::as_ptr(&self.0)
    }
}

impl<T> Clone for Version<T> {
    fn clone(&self) -> Self {
        Version(self.0.clone())
    }
}

impl<T> Deref for Version<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> PartialEq for Version<T> {
    fn eq(&self, other: &Self) -> bool {
        self.place() == other.place()
    }
}

impl<T> Eq for Version<T> {}

impl<T> Hash for Version<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.place().hash(state);
    }
}

impl<T> Ord for Version<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.place().cmp(&other.place())
    }
}

impl<T> PartialOrd for Version<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
