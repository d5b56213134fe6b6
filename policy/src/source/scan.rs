//! What can be told of a text that is not YAML.

use super::{Reach, Selector, kind};
use crate::error::ObjectRef;
use std::sync::Arc;

/// Looks for kind and name in a text that is not YAML. A text whose kind is a policy's, or whose kind is unreadable
/// below a policy's apiVersion, refuses its whole namespace; without a readable one, the namespace `default`.
pub(super) fn scan(text: &str) -> (Option<ObjectRef>, Option<Reach>) {
    let top = |key: &str| text.lines().find_map(|line| value(line, key));
    let (version, kind) = (top("apiVersion").unwrap_or_default(), top("kind").unwrap_or_default());
    let spaced = kind::has_namespace(kind);
    let namespace: Arc<str> =
        if spaced { metadata(text, "namespace").unwrap_or("default") } else { "" }.into();
    let policy = kind::is_policy(version, kind)
        .then(|| Reach { namespace: spaced.then(|| namespace.clone()), selector: Selector::new() });
    let name = metadata(text, "name").filter(|_| !kind.is_empty());
    (name.map(|name| ObjectRef { kind: kind.into(), namespace, name: name.into() }), policy)
}

/// A field of `metadata`, written below it or beside it in braces.
fn metadata<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = text.lines().skip_while(|line| !line.starts_with("metadata:"));
    let inline = lines.next()?.trim_start_matches("metadata:").trim();
    if let Some(inner) = inline.strip_prefix('{') {
        return inner.split([',', '{', '}']).find_map(|part| value(part.trim(), key));
    }
    let block = lines.take_while(|line| line.trim().is_empty() || line.starts_with([' ', '#']));
    let mut indent = None;
    block.filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')).find_map(|line| {
        let depth = line.len() - line.trim_start().len();
        (*indent.get_or_insert(depth) == depth).then(|| value(line.trim_start(), key))?
    })
}

/// The value of `key: value` at the begin of a line.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let value = line.strip_prefix(key)?.strip_prefix(':')?;
    let value = value.split(" #").next().unwrap_or(value).trim().trim_matches(['"', '\'']);
    Some(value).filter(|value| !value.is_empty())
}
