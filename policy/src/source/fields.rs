//! Reading the fields of an object: every field is either taken or reported, with its path and line.

use super::yaml::{Node, Value};
use crate::error::Severity;
use std::collections::{BTreeMap, BTreeSet};

/// One finding about a field.
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    pub(crate) line: u32,
    pub(crate) field: String,
    pub(crate) message: String,
}

/// Gathers what is wrong, so that one reading of a file shows all of it.
#[derive(Default)]
pub(crate) struct Findings(pub(crate) Vec<Finding>);

impl Findings {
    pub(crate) fn add(&mut self, severity: Severity, line: u32, field: &str, message: impl Into<String>) {
        self.0.push(Finding { severity, line, field: field.to_owned(), message: message.into() });
    }

    pub(crate) fn error(&mut self, at: &At<'_>, message: impl Into<String>) {
        self.add(Severity::Error, at.node.line, &at.path, message);
    }

    pub(crate) fn refused(&self) -> bool {
        self.0.iter().any(|finding| finding.severity == Severity::Error)
    }
}

/// A node and how one comes to it.
#[derive(Clone)]
pub(crate) struct At<'a> {
    pub(crate) node: &'a Node,
    pub(crate) path: String,
}

impl<'a> At<'a> {
    pub(crate) fn new(node: &'a Node, path: impl Into<String>) -> Self {
        At { node, path: path.into() }
    }

    /// The text of a scalar.
    pub(crate) fn text(&self, out: &mut Findings) -> Option<String> {
        let text = self.node.text();
        if text.is_none() {
            out.error(self, format!("expected a text, found {}", shape(self.node)));
        }
        text.map(str::to_owned)
    }

    /// A number between `least` and `most`; also taken in quotes, as Istio writes ports.
    pub(crate) fn number(&self, least: u64, most: u64, out: &mut Findings) -> Option<u64> {
        let number =
            self.node.text().and_then(|text| text.parse().ok()).filter(|n| (least..=most).contains(n));
        if number.is_none() {
            let found =
                self.node.text().map_or_else(|| shape(self.node).to_owned(), |text| format!("{text:?}"));
            out.error(self, format!("expected a number from {least} to {most}, found {found}"));
        }
        number
    }

    pub(crate) fn port(&self, out: &mut Findings) -> Option<u16> {
        self.number(1, 65535, out).map(|port| port as u16)
    }

    pub(crate) fn boolean(&self, out: &mut Findings) -> Option<bool> {
        match &self.node.value {
            Value::Scalar { text, plain: true } if text == "true" => Some(true),
            Value::Scalar { text, plain: true } if text == "false" => Some(false),
            _ => {
                out.error(self, "expected true or false");
                None
            }
        }
    }

    /// The items of a list; `null` is an empty one.
    pub(crate) fn items(&self, out: &mut Findings) -> Vec<At<'a>> {
        match &self.node.value {
            Value::Sequence(items) => {
                let at = |(index, node)| At { node, path: format!("{}[{index}]", self.path) };
                items.iter().enumerate().map(at).collect()
            }
            Value::Null => Vec::new(),
            _ => {
                out.error(self, format!("expected a list, found {}", shape(self.node)));
                Vec::new()
            }
        }
    }

    /// A list of texts.
    pub(crate) fn texts(&self, out: &mut Findings) -> Vec<String> {
        self.items(out).iter().filter_map(|item| item.text(out)).collect()
    }

    /// A mapping of free names, such as labels.
    pub(crate) fn entries(&self, out: &mut Findings) -> Vec<(&'a str, At<'a>)> {
        match &self.node.value {
            Value::Mapping(entries) => {
                let at = |(key, node): &'a (String, Node)| {
                    (key.as_str(), At { node, path: format!("{}.{key}", self.path) })
                };
                entries.iter().map(at).collect()
            }
            Value::Null => Vec::new(),
            _ => {
                out.error(self, format!("expected a mapping, found {}", shape(self.node)));
                Vec::new()
            }
        }
    }

    /// A mapping from text to text.
    pub(crate) fn labels(&self, out: &mut Findings) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        for (key, at) in self.entries(out) {
            // `key:` without a value is an empty text to Kubernetes.
            let value = if at.node.value == Value::Null { Some(String::new()) } else { at.text(out) };
            let free =
                |text: &str| text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b',' | b';' | b'='));
            match value {
                Some(value) if free(key) && free(&value) => drop(labels.insert(key.to_owned(), value)),
                Some(_) => out.error(&at, "a label has letters, digits, '-', '_', '.' and '/' only"),
                None => {}
            }
        }
        labels
    }

    /// A mapping whose field names are known.
    pub(crate) fn fields(&self, out: &mut Findings) -> Fields<'a> {
        self.entries(out); // Reports another shape.
        Fields { at: self.clone(), seen: BTreeSet::new() }
    }
}

/// The fields of one mapping. Those that nobody asked for are reported by [`Fields::finish`].
pub(crate) struct Fields<'a> {
    pub(crate) at: At<'a>,
    seen: BTreeSet<&'static str>,
}

impl<'a> Fields<'a> {
    /// A field, unless absent or null.
    pub(crate) fn take(&mut self, name: &'static str) -> Option<At<'a>> {
        self.seen.insert(name);
        let node = self.at.node.get(name).filter(|node| node.value != Value::Null)?;
        let dot = if self.at.path.is_empty() { "" } else { "." };
        Some(At { node, path: format!("{}{dot}{name}", self.at.path) })
    }

    pub(crate) fn text(&mut self, name: &'static str, out: &mut Findings) -> Option<String> {
        self.take(name)?.text(out)
    }

    pub(crate) fn texts(&mut self, name: &'static str, out: &mut Findings) -> Vec<String> {
        self.take(name).map(|at| at.texts(out)).unwrap_or_default()
    }

    pub(crate) fn items(&mut self, name: &'static str, out: &mut Findings) -> Vec<At<'a>> {
        self.take(name).map(|at| at.items(out)).unwrap_or_default()
    }

    pub(crate) fn labels(&mut self, name: &'static str, out: &mut Findings) -> BTreeMap<String, String> {
        self.take(name).map(|at| at.labels(out)).unwrap_or_default()
    }

    pub(crate) fn boolean(&mut self, name: &'static str, out: &mut Findings) -> bool {
        self.take(name).and_then(|at| at.boolean(out)).unwrap_or_default()
    }

    /// Fields that belong to the kind and do not concern the mesh.
    pub(crate) fn ignore(&mut self, names: &[&'static str]) {
        self.seen.extend(names);
    }

    /// Reports every field that was neither taken nor ignored.
    pub(crate) fn finish(self, out: &mut Findings) {
        let Value::Mapping(entries) = &self.at.node.value else { return };
        for (name, node) in entries.iter().filter(|(name, _)| !self.seen.contains(name.as_str())) {
            let dot = if self.at.path.is_empty() { "" } else { "." };
            let close = self.seen.iter().find(|known| known.eq_ignore_ascii_case(name));
            let hint = close.map(|known| format!("; is {known:?} meant?")).unwrap_or_default();
            let path = format!("{}{dot}{name}", self.at.path);
            out.add(Severity::Error, node.line, &path, format!("no such field{hint}"));
        }
    }
}

fn shape(node: &Node) -> &'static str {
    match node.value {
        Value::Null => "nothing",
        Value::Scalar { .. } => "a text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "a mapping",
    }
}
