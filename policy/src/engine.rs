//! The mesh as its manifests change: objects in, the difference of the tables out.
//!
//! A change of few pods, policies or endpoints costs work in the size of what it concerns. Anything else, and anything in
//! doubt, is resolved and compiled from nothing; the tables are the same either way.

use crate::compile::{Compiler, Numbers};
use crate::error::{ObjectRef, Problem};
use crate::model::{Identity, Model, Settings};
use crate::source::Object;
use crate::store::ObjectStore;
use crate::tables::{Tables, TablesDiff};
use std::collections::BTreeMap;
use std::sync::Arc;

/// See the module.
pub struct Engine {
    settings: Settings,
    store: ObjectStore,
    /// The objects of the model.
    objects: BTreeMap<ObjectRef, Arc<Object>>,
    model: Model,
    compiler: Compiler,
    /// How often it began from nothing.
    restarts: u64,
}

impl Engine {
    /// Without a manifest.
    pub fn new(settings: Settings) -> Engine {
        let store = ObjectStore::new();
        let model = store.model(settings.clone());
        let compiler = Compiler::new(&model, &mut |_| None);
        Engine { settings, store, objects: BTreeMap::new(), model, compiler, restarts: 0 }
    }

    /// Takes the new text of a file; see [`ObjectStore::apply`].
    pub fn apply(&mut self, file: &str, text: &str) -> &[Problem] {
        self.store.apply(file, text)
    }

    /// Drops a file and all its objects.
    pub fn remove(&mut self, file: &str) {
        self.store.remove(file);
    }

    /// Brings model and tables up to date. `number` names an identity to the kernel: the same always, a new one to one that
    /// it did not know; an identity without a number gets no entry, so that flows to it are refused.
    pub fn update(&mut self, number: &mut dyn FnMut(&Arc<Identity>) -> Option<u32>) -> TablesDiff {
        let changed = self.store.take_changed();
        let change = self.model.follow(&self.objects, &self.store, &changed);
        for name in &changed.objects {
            // Of several documents with one name the first counts.
            let object = match self.store.named(name) {
                [object] => Some(object),
                _ => self.store.objects().find(|object| object.meta.object == *name),
            };
            match object {
                Some(object) => drop(self.objects.insert(name.clone(), object.clone())),
                None => drop(self.objects.remove(name)),
            }
        }
        let followed = change.and_then(|change| self.compiler.follow(&self.model, &change, number).ok());
        followed.unwrap_or_else(|| {
            self.restarts += 1;
            let former = self.compiler.tables().clone();
            self.model = self.store.model(self.settings.clone());
            self.compiler = Compiler::new(&self.model, number);
            TablesDiff::new(&former, self.compiler.tables())
        })
    }

    /// The model as of the last update. Its problems are those of the last [`Engine::problems`].
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tables as of the last update.
    pub fn tables(&self) -> &Tables {
        self.compiler.tables()
    }

    /// The numbers of all identities in the tables.
    pub fn numbers(&self) -> &Numbers {
        self.compiler.numbers()
    }

    pub fn store(&self) -> &ObjectStore {
        &self.store
    }

    /// How often an update began from nothing.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Everything that is wrong with files and between objects, sorted. Looks at all objects.
    pub fn problems(&mut self) -> Vec<Problem> {
        self.model.check(self.objects.values());
        Problem::in_order(self.store.problems().chain(self.model.problems()))
    }
}
