//! What can be told of a text that is not YAML.
//!
//! INVARIANT: what is there and cannot be read is never taken for absent, or the object would be taken for another one, and
//! the one that it is for deleted. Only the plainest way to write a field is read: alone on its line, or in braces that
//! end on the line.

use super::{Broken, Namespace, Reach, is_name, kind, resembles_namespace};
use crate::error::{ObjectRef, Origin};

/// Looks for version, kind, namespace and name. A policy refuses the whole of what it can be about, as its selector is not
/// looked for.
pub(super) fn scan(text: &str, origin: Origin) -> Broken {
    let lines: Vec<&str> = text.lines().collect();
    let (mut version, mut kind) = (field(&lines, "apiVersion"), field(&lines, "kind"));
    if kind.is_some_and(kind::is_list) {
        (version, kind) = (None, None); // It says nothing of the items.
    }
    let (group, of) = (version.unwrap_or_default(), kind.unwrap_or_default());
    let metadata = metadata(text);
    let namespace = metadata.as_ref().map_or(Namespace::Unreadable, Metadata::namespace);
    let name = metadata.as_ref().and_then(|metadata| field(&metadata.entries, "name"));
    let name = name.filter(|name| is_name(name));
    let object = kind.zip(name).zip(namespace.of_object(of)).map(|((kind, name), namespace)| ObjectRef {
        kind: kind.into(),
        namespace,
        name: name.into(),
    });
    let policy = if kind::is_policy(group, of) {
        Some(Reach { namespace: namespace.of_policy(group, of), ..Reach::default() })
    } else {
        let unknown = version.is_none() || kind.is_none();
        (unknown && kind::mentions_policy(text)).then(Reach::default)
    };
    let labels = match kind {
        Some(of) => {
            let namespace = name.map(Into::into);
            kind::gives_labels(group, of).then(|| Reach { namespace, ..Reach::default() })
        }
        None => kind::mentions_namespace(text).then(Reach::default),
    };
    Broken { object, origin, policy, labels, addresses: Vec::new() }
}

struct Metadata<'a> {
    /// Its fields, as far as one can see where each begins.
    entries: Vec<&'a str>,
    /// All of it.
    text: &'a str,
}

impl<'a> Metadata<'a> {
    fn namespace(&self) -> Namespace<'a> {
        match field(&self.entries, "namespace").filter(|name| is_name(name)) {
            Some(name) => Namespace::Given(name),
            None if resembles_namespace(self.text) || self.text.contains("<<") => Namespace::Unreadable,
            None => Namespace::Absent,
        }
    }
}

/// The fields of `metadata`, written below it or beside it in braces.
fn metadata(text: &str) -> Option<Metadata<'_>> {
    const KEY: &str = "metadata:";
    let mut starts = offsets(text).filter(|(_, line)| line.starts_with(KEY));
    let (Some((start, first)), None) = (starts.next(), starts.next()) else { return None };
    let next = |line: &str| ["apiVersion", "kind", "spec", "status"].iter().any(|key| line.starts_with(key));
    let end = offsets(text).find(|(at, line)| *at > start && next(line)).map_or(text.len(), |(at, _)| at);
    let text = &text[start + KEY.len()..end];
    let beside = without_comment(&first[KEY.len()..]);
    let entries = match beside.chars().next() {
        None => below(text),
        Some('{') => in_braces(beside),
        Some(_) => return None,
    };
    Some(Metadata { entries, text })
}

/// All lines, each with where it begins.
fn offsets(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    text.split_inclusive('\n').map(move |line| {
        at += line.len();
        (at - line.len(), line)
    })
}

/// The lines of a mapping, until one leaves a bracket or quote open: where its fields begin is not known from there on.
fn below(text: &str) -> Vec<&str> {
    let lines = text.lines().skip(1).filter(|line| !without_comment(line).is_empty());
    let lines = lines.take_while(|line| balanced(line));
    let depth = |line: &str| line.len() - line.trim_start_matches(' ').len();
    let mut first = None;
    let own = lines.filter(|line| *first.get_or_insert(depth(line)) == depth(line) && depth(line) > 0);
    own.map(|line| line.trim_start_matches(' ')).collect()
}

fn balanced(line: &str) -> bool {
    let count = |wanted: char| line.chars().filter(|own| *own == wanted).count();
    count('{') == count('}')
        && count('[') == count(']')
        && count('"').is_multiple_of(2)
        && count('\'').is_multiple_of(2)
}

/// The parts of `{a: b, c: {d: e}}`, those of inner braces not told apart. One that does not end on the line is left out.
fn in_braces(text: &str) -> Vec<&str> {
    let (mut depth, mut quote, mut begin) = (0, None, 1);
    let mut parts = Vec::new();
    for (at, own) in text.char_indices() {
        match own {
            '"' | '\'' if quote.is_none() => quote = Some(own),
            _ if quote == Some(own) => quote = None,
            _ if quote.is_some() => {}
            '{' | '[' => depth += 1,
            ',' | '}' | ']' => {
                if depth == 1 {
                    parts.push(text[begin..at].trim());
                    begin = at + 1;
                }
                depth -= i32::from(own != ',');
                if depth == 0 {
                    break;
                }
            }
            _ => {}
        }
    }
    parts
}

/// The value of a field that one of these entries begins with, and no other.
fn field<'a>(entries: &[&'a str], key: &str) -> Option<&'a str> {
    let mut found = entries.iter().filter_map(|entry| entry.strip_prefix(key)?.strip_prefix(':'));
    let (Some(value), None) = (found.next(), found.next()) else { return None };
    let text = without_comment(value.strip_prefix(' ')?);
    let quoted = |mark: char| text.strip_prefix(mark)?.strip_suffix(mark);
    let plain = || Some(text).filter(|text| !matches!(*text, "null" | "Null" | "NULL"));
    let text = quoted('"').or_else(|| quoted('\'')).or_else(plain)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':' | b'/');
    Some(text).filter(|text| !text.is_empty() && text.bytes().all(allowed))
}

fn without_comment(line: &str) -> &str {
    let line = line.trim();
    if line.starts_with('#') { "" } else { line.split(" #").next().unwrap_or(line).trim() }
}
