//! YAML text to a tree with line numbers.
//!
//! A file is cut into its documents before any of them is parsed, so that a syntax error costs one document. That is
//! sound because a line that begins with `---` ends a document whatever precedes it (YAML 1.2.2, section 9.1.2,
//! `c-forbidden`). Depth and size are bounded; aliases are copied and count, so they cannot multiply without limit.

use saphyr_parser::{Event, Parser, ScalarStyle};
use std::collections::{HashMap, HashSet};

/// Deepest nesting of one document.
pub const MAX_DEPTH: usize = 64;
/// Most nodes of one document, aliases expanded.
pub const MAX_NODES: usize = 1_000_000;

/// A value and its line in the file, from 1.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) line: u32,
    pub(crate) value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    /// `plain`: not in quotes, so that `true` or `8` may be meant as such.
    Scalar {
        text: String,
        plain: bool,
    },
    Sequence(Vec<Node>),
    Mapping(Vec<(String, Node)>),
}

impl Node {
    /// The value behind a key of a mapping.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Mapping(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }
}

/// Why a document is no YAML that weft takes, and at which line of the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SyntaxError {
    pub(crate) line: u32,
    pub(crate) message: String,
}

/// The documents of a file: line of the first, and text. Documents without content are left out.
pub(crate) fn documents(text: &str) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let (mut start, mut current) = (1, String::new());
    // A carriage return breaks a line too, alone or before a line feed (YAML 1.2.2 section 5.4).
    let text = text.trim_start_matches('\u{feff}').replace("\r\n", "\n").replace('\r', "\n");
    for (index, line) in text.split('\n').enumerate() {
        let marker = |mark: &str| {
            line.strip_prefix(mark).filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        };
        if let Some(rest) = marker("---") {
            close(&mut found, start, &mut current);
            start = index as u32 + 1;
            current.push_str(rest); // `--- {a: b}` carries content; columns shift, lines do not.
            current.push('\n');
        } else if marker("...").is_some() {
            close(&mut found, start, &mut current);
            start = index as u32 + 2;
        } else if line.starts_with('%') && current.trim().is_empty() {
            current.push('\n'); // A directive: `%YAML` and `%TAG` change nothing that weft reads.
        } else {
            current.push_str(line);
            current.push('\n');
        }
    }
    close(&mut found, start, &mut current);
    found
}

fn close(found: &mut Vec<(u32, String)>, start: u32, current: &mut String) {
    let content = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    if current.lines().any(content) {
        found.push((start, std::mem::take(current)));
    }
    current.clear();
}

/// Parses one document that begins at `first_line`.
pub(crate) fn parse(text: &str, first_line: u32) -> Result<Node, SyntaxError> {
    let mut tree = Tree::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| SyntaxError {
            line: first_line + (error.marker().line() as u32).saturating_sub(1),
            message: format!("not YAML: {}", error.info()),
        })?;
        let line = first_line + (span.start.line() as u32).saturating_sub(1);
        tree.event(event, line).map_err(|message| SyntaxError { line, message })?;
    }
    Ok(tree.root.unwrap_or(Node { line: first_line, value: Value::Null }))
}

/// A sequence or mapping that is still open.
struct Open {
    node: Node,
    anchor: usize,
    key: Option<String>,
    /// Keys so far: looking for a second one must not cost the length of the mapping.
    seen: HashSet<String>,
}

#[derive(Default)]
struct Tree {
    root: Option<Node>,
    open: Vec<Open>,
    /// Finished nodes with an anchor, and how many nodes each holds.
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
}

impl Tree {
    fn event(&mut self, event: Event<'_>, line: u32) -> Result<(), String> {
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                let null = plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if null { Value::Null } else { Value::Scalar { text: text.into_owned(), plain } };
                self.count(1)?;
                self.finish(Node { line, value }, anchor)
            }
            Event::Alias(anchor) => {
                let Some((node, size)) = self.anchors.get(&anchor) else {
                    return Err("an alias refers to an anchor that is not complete".into());
                };
                let (node, size) = (node.clone(), *size);
                self.count(size)?;
                self.finish(node, 0)
            }
            Event::SequenceStart(anchor, _) => self.begin(Value::Sequence(Vec::new()), anchor, line),
            Event::MappingStart(anchor, _) => self.begin(Value::Mapping(Vec::new()), anchor, line),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.finish(open.node, open.anchor),
                None => Err("a list or mapping ends that never began".into()),
            },
            _ => Ok(()),
        }
    }

    fn count(&mut self, nodes: usize) -> Result<(), String> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return Err(format!(
                "more than {MAX_NODES} values in one document, aliases counted as often as used"
            ));
        }
        Ok(())
    }

    fn begin(&mut self, value: Value, anchor: usize, line: u32) -> Result<(), String> {
        if self.open.len() >= MAX_DEPTH {
            return Err(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.count(1)?;
        self.open.push(Open { node: Node { line, value }, anchor, key: None, seen: HashSet::new() });
        Ok(())
    }

    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), String> {
        if anchor != 0 {
            let size = size(&node);
            self.count(size)?; // The kept copy is memory too.
            self.anchors.insert(anchor, (node.clone(), size));
        }
        let Some(open) = self.open.last_mut() else {
            if self.root.replace(node).is_some() {
                return Err("a second document without `---` before it".into());
            }
            return Ok(());
        };
        match &mut open.node.value {
            Value::Sequence(items) => items.push(node),
            Value::Mapping(entries) => match open.key.take() {
                None => match node.value {
                    Value::Scalar { text, .. } => open.key = Some(text),
                    _ => return Err("a key must be a plain text".into()),
                },
                Some(key) if !open.seen.insert(key.clone()) => {
                    return Err(format!("{key:?} is given twice in one mapping"));
                }
                Some(key) => entries.push((key, node)),
            },
            Value::Null | Value::Scalar { .. } => {}
        }
        Ok(())
    }
}

fn size(node: &Node) -> usize {
    1 + match &node.value {
        Value::Sequence(items) => items.iter().map(size).sum(),
        Value::Mapping(entries) => entries.iter().map(|(_, node)| size(node)).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_cut_at_document_markers_with_lines_kept() {
        let cut =
            documents("# only a comment\n---\na: 1\n---\n\n---\n--- {b: 2}\n...\nc: |\n  --- not a marker\n");
        assert_eq!(cut.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 7, 9]);
        assert_eq!(parse(&cut[0].1, cut[0].0).unwrap().get("a").unwrap().line, 3);
        assert_eq!(parse(&cut[1].1, cut[1].0).unwrap().get("b").unwrap().text(), Some("2"));
        assert_eq!(parse(&cut[2].1, cut[2].0).unwrap().get("c").unwrap().text(), Some("--- not a marker\n"));
    }

    #[test]
    fn aliases_cannot_multiply_without_limit() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..12 {
            let alias = format!("*a{}", level - 1);
            bomb += &format!("a{level}: &a{level} [{}]\n", [alias.as_str(); 10].join(","));
        }
        assert!(parse(&bomb, 1).unwrap_err().message.contains("values in one document"));
    }

    #[test]
    fn depth_syntax_and_duplicates_are_refused_with_a_line() {
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert!(parse(&deep, 1).unwrap_err().message.contains("nested deeper"));
        assert_eq!(parse("a: 1\nb: 2\na: 3\n", 10).unwrap_err().line, 12);
        assert!(parse("a: [1\nb: 2", 1).is_err());
        assert!(parse("&a [*a]", 1).is_err());
    }
}
