//! The objects of all files, as they stand after each change of a file.
//!
//! INVARIANT: an object is whole or keeps its former version. One that cannot be read and had none is kept as
//! [`Broken`], and if it is a policy, the model refuses what it would have selected.

use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::model::{Model, Settings};
use crate::source::{self, Broken, Object, Outcome};
use std::collections::BTreeMap;
use std::sync::Arc;

/// All objects, by file.
#[derive(Clone, Debug, Default)]
pub struct ObjectStore {
    files: BTreeMap<String, File>,
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
        let former = self.files.remove(file).unwrap_or_default();
        let mut former: BTreeMap<ObjectRef, Arc<Object>> =
            former.objects.into_iter().map(|object| (object.meta.object.clone(), object)).collect();
        let parsed = source::parse(file, text);
        let mut next = File { problems: parsed.problems, ..File::default() };
        let mut unnamed = Vec::new();
        for outcome in parsed.outcomes {
            match outcome {
                Outcome::Object(object) => {
                    former.remove(&object.meta.object);
                    next.objects.push(object);
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
        for broken in unnamed {
            if former.is_empty() {
                next.broken.push(broken);
                continue;
            }
            for (_, object) in std::mem::take(&mut former) {
                next.keep(object, broken.origin.clone());
            }
        }
        &self.files.entry(file.to_owned()).insert_entry(next).into_mut().problems
    }

    /// Drops a file and all its objects.
    pub fn remove(&mut self, file: &str) {
        self.files.remove(file);
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
        let mut problems: Vec<Problem> = self.problems().chain(model.problems()).cloned().collect();
        problems.sort();
        problems
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
