//! The rows of every subject. Those with equal profiles share them.

use super::classes::Classes;
use super::peers::Peers;
use super::profile::{Profile, Selection};
use super::rows::{Rows, rows, traits};
use super::rules::RuleNumbers;
use crate::model::{Cidr, Model};
use crate::tables::RuleRef;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use weft_datapath::abi::{ModeKey, PolicyKey, PolicyValue, Subject, SubjectKey};
use weft_datapath::policy::{BY_RANGE, EGRESS, EGRESS_SHIFT, OUTWARD, PORT_MODES, RANGE};

/// Profiles of a subject: for what comes to it, and for what it begins, if anything restricts that.
pub(super) type Sides = [Option<u32>; 2];

/// A profile and what follows from it.
struct Made {
    profile: Arc<Profile>,
    /// Traits that may tell its peers apart.
    traits: BTreeSet<u32>,
    ranges: Box<[Cidr]>,
    rows: Rows,
    /// All rules in the rows, each once.
    rules: Box<[RuleRef]>,
    subjects: BTreeSet<u32>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Subjects {
    ids: HashMap<Arc<Profile>, u32>,
    made: BTreeMap<u32, Made>,
    /// The number of the next new profile.
    pub(super) next: u32,
    sides: BTreeMap<u32, Sides>,
}

impl Subjects {
    /// The profiles that a subject should have. New ones have no rows yet.
    pub(super) fn find(
        &mut self,
        model: &Model,
        selection: &Selection,
        peers: &mut Peers,
        subject: u32,
    ) -> Sides {
        let Some(identity) = peers.all.get(&subject).cloned() else { return [None; 2] };
        let inward = Some(Profile::ingress(model, selection, &identity));
        let outward = Profile::egress(model, selection, &identity);
        [inward, outward].map(|profile| profile.map(|profile| self.intern(model, peers, profile)))
    }

    fn intern(&mut self, model: &Model, peers: &mut Peers, profile: Profile) -> u32 {
        if let Some(id) = self.ids.get(&profile) {
            return *id;
        }
        let id = self.next;
        self.next += 1;
        let asked = traits(&profile).into_iter();
        let made = Made {
            traits: asked.filter_map(|what| peers.ask(model, what, id)).collect(),
            ranges: profile.ranges().into_iter().collect(),
            rows: Rows::default(),
            rules: Box::default(),
            subjects: BTreeSet::new(),
            profile: Arc::new(profile),
        };
        self.ids.insert(made.profile.clone(), id);
        self.made.insert(id, made);
        id
    }

    /// The profiles that a subject has.
    pub(super) fn sides(&self, subject: u32) -> Sides {
        self.sides.get(&subject).copied().unwrap_or_default()
    }

    /// Gives a subject its profiles, or none. Returns those that nobody has any more.
    pub(super) fn place(&mut self, subject: u32, now: Sides) -> Vec<u32> {
        let former =
            if now == [None; 2] { self.sides.remove(&subject) } else { self.sides.insert(subject, now) };
        let former: Vec<u32> = former.into_iter().flatten().flatten().collect();
        for id in &former {
            self.made.get_mut(id).map(|made| made.subjects.remove(&subject));
        }
        for id in now.iter().flatten() {
            self.made.get_mut(id).map(|made| made.subjects.insert(subject));
        }
        former
            .into_iter()
            .filter(|id| self.made.get(id).is_some_and(|made| made.subjects.is_empty()))
            .collect()
    }

    /// Forgets a profile. Returns the rules of its rows.
    pub(super) fn forget(&mut self, peers: &mut Peers, id: u32) -> Box<[RuleRef]> {
        let Some(made) = self.made.remove(&id) else { return Box::default() };
        self.ids.remove(&made.profile);
        made.traits.iter().for_each(|what| peers.leave(*what, id));
        made.rules
    }

    /// Makes the rows of a profile. Returns the rules that were in its former rows.
    pub(super) fn make(
        &mut self,
        model: &Model,
        classes: &Classes,
        peers: &Peers,
        id: u32,
    ) -> Box<[RuleRef]> {
        let Some(made) = self.made.get_mut(&id) else { return Box::default() };
        made.rows = rows(&made.profile, &made.traits, model, classes, peers);
        let cells = made.rows.list.iter().flat_map(|(_, _, row)| row.values());
        let rules: BTreeSet<&RuleRef> = cells.filter_map(|(_, rule)| rule.as_ref()).collect();
        std::mem::replace(&mut made.rules, rules.into_iter().cloned().collect())
    }

    pub(super) fn rules(&self, id: u32) -> &[RuleRef] {
        self.made.get(&id).map_or(&[], |made| &made.rules)
    }

    /// All profiles.
    pub(super) fn profiles(&self) -> impl Iterator<Item = u32> {
        self.made.keys().copied()
    }

    pub(super) fn subjects(&self, id: u32) -> impl Iterator<Item = u32> {
        self.made.get(&id).into_iter().flat_map(|made| &made.subjects).copied()
    }

    /// Profiles whose rows depend on how many peers there are, now that there are this many.
    pub(super) fn by_count(&self, peers: usize) -> impl Iterator<Item = u32> {
        self.filtered(move |made| made.rows.enough.is_none_or(|enough| peers < enough))
    }

    /// Profiles with rows for any of these ranges of addresses, or for ranges of ports if those are others now.
    pub(super) fn by_range(&self, cidrs: &[Cidr], ports: bool) -> impl Iterator<Item = u32> {
        self.filtered(move |made| {
            let covers = |cidr: &Cidr| made.ranges.iter().any(|range| range.covers(cidr));
            ports && made.rows.flags & BY_RANGE != 0 || cidrs.iter().any(covers)
        })
    }

    fn filtered(&self, wanted: impl Fn(&Made) -> bool) -> impl Iterator<Item = u32> {
        self.made.iter().filter(move |(_, made)| wanted(made)).map(|(id, _)| *id)
    }

    /// What the tables say of a subject, and the modes of its ports.
    pub(super) fn subject(&self, subject: u32) -> Option<(Subject, BTreeMap<ModeKey, u32>)> {
        let [inward, outward] = self.sides(subject).map(|id| self.made.get(&id?));
        let (made, inward) = inward.and_then(|made| Some((made, made.profile.inward.as_ref()?)))?;
        let (mode, _) = inward.mode;
        let mut flags = made.rows.flags;
        if let Some(outward) = outward {
            flags |= EGRESS | outward.rows.flags << EGRESS_SHIFT;
        }
        let others = inward.ports.iter().filter(|(_, (own, _))| *own != mode);
        let key = |port: &u16| ModeKey { bank: 0, identity: subject, port: *port, pad: 0 };
        let modes: BTreeMap<ModeKey, u32> = others.map(|(port, (own, _))| (key(port), *own)).collect();
        if !modes.is_empty() {
            flags |= PORT_MODES;
        }
        Some((Subject { mode, flags }, modes))
    }

    /// The rows of a subject, as the kernel reads them.
    pub(super) fn entries<'s>(
        &'s self,
        subject: u32,
        rules: &'s RuleNumbers,
    ) -> impl Iterator<Item = (PolicyKey, PolicyValue)> + 's {
        let [inward, outward] = self.sides(subject);
        let sides = [(inward, 0), (outward, OUTWARD)].into_iter();
        let lists = sides.filter_map(|(id, side)| Some((&self.made.get(&id?)?.rows.list, side)));
        let rows = lists.flat_map(|(list, side)| list.iter().map(move |row| (row, side)));
        rows.flat_map(move |((peer, class, row), side)| {
            row.iter().map(move |((protocol, port, range), (verdict, rule))| {
                let kind = side | if *range { RANGE } else { 0 };
                let (peer, class, protocol, port) = (*peer, *class, *protocol, *port);
                let key = PolicyKey { bank: 0, subject, peer, class, port, protocol, kind };
                let rule = rule.as_ref().and_then(|rule| rules.number(rule)).unwrap_or(0);
                (key, PolicyValue { verdict: *verdict, rule })
            })
        })
    }

    /// All subjects.
    pub(super) fn all(&self) -> impl Iterator<Item = u32> {
        self.sides.keys().copied()
    }
}

pub(super) fn key(identity: u32) -> SubjectKey {
    SubjectKey { bank: 0, identity }
}
