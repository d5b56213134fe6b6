//! The objects of all files, as they stand after each change of a file.
//!
//! INVARIANT: an object is whole or keeps its former version. One that cannot be read and had none is kept as
//! [`Broken`], and if it is a policy, the model refuses what it would have selected.

use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::model::{Model, Settings};
use crate::source::{self, Broken, Object, Outcome, Reach, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// All objects, by file and by name.
#[derive(Clone, Debug, Default)]
pub struct ObjectStore {
    files: BTreeMap<String, File>,
    /// Those of one name, if several files give it; in no order.
    named: BTreeMap<ObjectRef, Vec<Arc<Object>>>,
    changed: Changed,
}

/// What became different since somebody last asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changed {
    pub objects: BTreeSet<ObjectRef>,
    /// Documents that cannot be read came, went or changed, or what they refuse.
    pub broken: bool,
    /// Of several documents with one name one came or went.
    pub ambiguous: bool,
}

#[derive(Clone, Debug, Default)]
struct File {
    objects: Vec<Arc<Object>>,
    broken: Vec<Broken>,
    problems: Vec<Problem>,
}

impl ObjectStore {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the new text of a file and says what is wrong with it. Objects that are gone from it are dropped, unless a
    /// document in it cannot even be told apart: then they stay, because it may be one of them.
    pub fn apply(&mut self, file: &str, text: &str) -> &[Problem] {
        let before = self.files.remove(file).unwrap_or_default();
        let objects = before.objects.iter().map(|object| (object.meta.object.clone(), object.clone()));
        let mut former: BTreeMap<ObjectRef, Arc<Object>> = objects.collect();
        let parsed = source::parse(file, text);
        let mut next = File { problems: parsed.problems, ..File::default() };
        let mut unnamed = Vec::new();
        for outcome in parsed.outcomes {
            match outcome {
                Outcome::Object(object) => {
                    let same = former.remove(&object.meta.object).filter(|former| *former == object);
                    next.objects.push(same.unwrap_or(object));
                }
                Outcome::Broken(broken) => match &broken.object {
                    None => unnamed.push(broken),
                    Some(name) => match former.remove(name) {
                        Some(object) => next.keep(object, broken.origin),
                        None => next.broken.push(broken),
                    },
                },
            }
        }
        // One that cannot be told apart may be any that is left, so all of them stay. What is none of them is new, and
        // refuses what it would have selected.
        let mut left: Vec<&Arc<Object>> = former.values().collect();
        for broken in &unnamed {
            match left.iter().position(|object| may_be(broken, object)) {
                Some(at) if broken.refuses() => drop(left.swap_remove(at)),
                Some(_) => {}
                None => next.broken.push(broken.clone()),
            }
        }
        if let Some(broken) = unnamed.first() {
            former.values().for_each(|object| next.keep(object.clone(), broken.origin.clone()));
        }
        self.note(&before, &next);
        &self.files.entry(file.to_owned()).insert_entry(next).into_mut().problems
    }

    /// Drops a file and all its objects.
    pub fn remove(&mut self, file: &str) {
        let before = self.files.remove(file).unwrap_or_default();
        self.note(&before, &File::default());
    }

    /// What became different since the last call.
    pub fn take_changed(&mut self) -> Changed {
        let mut changed = std::mem::take(&mut self.changed);
        // What a broken namespace refuses depends on which policies there are.
        let network = changed.objects.iter().any(|name| name.kind.ends_with("NetworkPolicy"));
        changed.broken |= network && self.broken().any(|broken| broken.labels.is_some());
        changed
    }

    fn note(&mut self, before: &File, after: &File) {
        let unchanged: BTreeSet<_> = after.objects.iter().map(Arc::as_ptr).collect();
        let gone = before.objects.iter().filter(|object| !unchanged.contains(&Arc::as_ptr(object)));
        for object in gone {
            let name = &object.meta.object;
            self.changed.objects.insert(name.clone());
            if let Some(all) = self.named.get_mut(name) {
                self.changed.ambiguous |= all.len() > 1;
                all.retain(|own| !Arc::ptr_eq(own, object));
                if all.is_empty() {
                    self.named.remove(name);
                }
            }
        }
        let kept: BTreeSet<_> = before.objects.iter().map(Arc::as_ptr).collect();
        for object in after.objects.iter().filter(|object| !kept.contains(&Arc::as_ptr(object))) {
            self.changed.objects.insert(object.meta.object.clone());
            let all = self.named.entry(object.meta.object.clone()).or_default();
            self.changed.ambiguous |= !all.is_empty();
            all.push(object.clone());
        }
        self.changed.broken |= before.broken != after.broken;
    }

    /// All objects of one name: more than one if several documents give it.
    pub fn named(&self, name: &ObjectRef) -> &[Arc<Object>] {
        self.named.get(name).map_or(&[], Vec::as_slice)
    }

    /// Objects of one kind in one namespace, sorted by name.
    pub(crate) fn of_kind(&self, kind: &str, namespace: &str) -> impl Iterator<Item = &Arc<Object>> {
        let first = ObjectRef { kind: kind.into(), namespace: namespace.into(), name: "".into() };
        let from = self.named.range(first.clone()..);
        let own =
            from.take_while(move |(name, _)| name.kind == first.kind && name.namespace == first.namespace);
        own.flat_map(|(_, all)| all)
    }

    /// Names of all files, in order.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// All objects, in order of file and document.
    pub fn objects(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.files.values().flat_map(|file| &file.objects)
    }

    /// All documents that could not be read and have no former version.
    pub fn broken(&self) -> impl Iterator<Item = &Broken> {
        self.files.values().flat_map(|file| &file.broken)
    }

    /// What is wrong with single documents; what is wrong between them is [`Model::problems`].
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.files.values().flat_map(|file| &file.problems)
    }

    /// Resolves all objects.
    pub fn model(&self, settings: Settings) -> Model {
        Model::new(settings, self)
    }

    /// Resolves all objects and returns all problems of files and model, sorted.
    pub fn check(&self, settings: Settings) -> Vec<Problem> {
        let model = self.model(settings);
        Problem::in_order(self.problems().chain(model.problems()))
    }
}

/// Can a document without a readable name be a later version of this object? Only what would be refused is asked.
fn may_be(broken: &Broken, object: &Object) -> bool {
    let Object { meta, spec } = object;
    if let Some(Reach { namespace, .. }) = &broken.policy {
        let clusterwide = meta.object.namespace.is_empty();
        let here =
            namespace.as_ref().is_none_or(|namespace| clusterwide || *namespace == meta.object.namespace);
        return here && spec.is_policy();
    }
    match &broken.labels {
        Some(_) => matches!(spec, Spec::Namespace),
        None => broken.addresses.is_empty() || matches!(spec, Spec::Pod(_) | Spec::Service(_)),
    }
}

impl File {
    fn keep(&mut self, object: Arc<Object>, origin: Origin) {
        let message = "stays in its former version until the document can be read".to_owned();
        let (name, field) = (Some(object.meta.object.clone()), String::new());
        self.problems.push(Problem { origin, severity: Severity::Warning, object: name, field, message });
        self.objects.push(object);
    }
}
