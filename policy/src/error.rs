//! What is wrong with a manifest, and where: one sentence each.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// Where a document stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// As the caller named it.
    pub file: Arc<str>,
    /// Number of the document in the file, from 1.
    pub document: u32,
    /// Line of the document's first content, from 1.
    pub line: u32,
}

/// Names one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    pub kind: Arc<str>,
    /// Empty for objects without a namespace, such as `Namespace` itself.
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return write!(f, "{} {}", self.kind, self.name);
        }
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// How much a problem matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is refused.
    Error,
    /// The object is used, but not as its author may think.
    Warning,
    /// Worth knowing, nothing to repair.
    Note,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        }
    }
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where the document stands; its `line` is that of the field.
    pub origin: Origin,
    pub severity: Severity,
    /// The object, when the document says which it is.
    pub object: Option<ObjectRef>,
    /// Path of the field inside the object, as `spec.rules[0].from[1].source.ipBlocks[0]`; empty for the whole.
    pub field: String,
    /// What is wrong and what would be right, without a full stop.
    pub message: String,
}

impl Problem {
    /// Sorts, and keeps one of those that say the same.
    pub(crate) fn in_order<'a>(problems: impl Iterator<Item = &'a Self>) -> Vec<Self> {
        problems.collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Origin { file, document, line } = &self.origin;
        write!(f, "{file}:{line}: {}: document {document}", self.severity.name())?;
        if let Some(object) = &self.object {
            write!(f, ", {object}")?;
        }
        if !self.field.is_empty() {
            write!(f, ", {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}
