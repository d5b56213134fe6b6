//! One document to the object that it is, or, where it is a list, to its items.

use super::fields::{At, Findings};
use super::kind::{self, Treatment};
use super::yaml::{Node, Value};
use super::{
    Broken, Meta, Namespace, Object, Outcome, Parsed, Reach, Selector, admin, cilium, is_name,
    resembles_namespace,
};
use crate::error::{ObjectRef, Origin, Severity};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Reads a document, or at `path` in it the item of a list. `of_list`: version and kind of an item that says neither.
pub(super) fn read(
    node: &Node,
    path: &str,
    of_list: Option<(&str, &str)>,
    origin: Origin,
    parsed: &mut Parsed,
) {
    let text = |name| node.get(name).and_then(Node::text).filter(|text| !text.is_empty());
    let (version, kind) = match (text("apiVersion"), text("kind"), of_list) {
        (None, None, Some((version, kind))) => (Some(version), Some(kind)),
        (version, kind, _) => (version, kind),
    };
    let (Some(version), Some(kind)) = (version, kind) else {
        let (version, kind) = (version.unwrap_or_default(), kind.unwrap_or_default());
        let policy = if kind::is_policy(version, kind) {
            reach(node, version, kind)
        } else {
            holds_policy(node).then(Reach::default)
        };
        parsed.refuse(origin.clone(), None, path, "not an object: a document needs apiVersion and kind");
        let labels = labels(node, version, kind);
        parsed.broken(Broken { object: None, origin, policy, labels, addresses: Vec::new() });
        return;
    };
    if kind::is_list(kind)
        && (kind == "List" || node.get("items").is_some() || kind::is_policy(version, kind))
    {
        return list(node, path, (version, kind), origin, parsed);
    }
    let object = name(node, kind);
    let mut out = Findings::default();
    let treatment = kind::treatment(version, kind);
    let read = match (&treatment, &object) {
        (Treatment::Unknown(message), _) => {
            out.add(Severity::Error, origin.line, "kind", message.clone());
            None
        }
        (_, None) => {
            nameless(node, &origin, &mut out);
            None
        }
        (_, Some(object)) => {
            let meta = meta(node, object.clone(), origin.clone(), &mut out);
            Some(Object { spec: kind::read(&treatment, &meta, node, &mut out), meta })
        }
    };
    let refused = out.refused();
    parsed.report(path, &origin, &object, out);
    match read {
        Some(object) if !refused => parsed.outcomes.push(Outcome::Object(Arc::new(object))),
        _ => {
            let policy = kind::is_policy(version, kind).then(|| reach(node, version, kind)).flatten();
            let (labels, addresses) = (labels(node, version, kind), addresses(node, kind));
            parsed.broken(Broken { object, origin, policy, labels, addresses });
        }
    }
}

/// Each item is read as if it were a document, as kubectl does. In a list of one kind an item need not repeat it.
fn list(node: &Node, path: &str, (version, kind): (&str, &str), origin: Origin, parsed: &mut Parsed) {
    let mut out = Findings::default();
    let mut top = At::new(node, "").fields(&mut out);
    top.ignore(&["apiVersion", "kind", "metadata"]);
    if node.get("items").is_none() {
        out.error(&top.at, "`items` is missing");
    }
    let items = top.items("items", &mut out);
    top.finish(&mut out);
    let refused = out.refused();
    parsed.report(path, &origin, &None, out);
    if refused {
        // What the author meant by the rest may be more of it.
        let policy = beside_items(node).any(holds_policy).then(Reach::default);
        let (object, addresses) = (None, Vec::new());
        parsed.broken(Broken { object, origin: origin.clone(), policy, labels: None, addresses });
    }
    let of_list = kind.strip_suffix("List").filter(|kind| !kind.is_empty()).map(|kind| (version, kind));
    for At { node, path: item } in items {
        let dot = if path.is_empty() { "" } else { "." };
        let origin = Origin { line: node.line, ..origin.clone() };
        read(node, &format!("{path}{dot}{item}"), of_list, origin, parsed);
    }
}

/// Everything in a list but items that are read.
fn beside_items(node: &Node) -> impl Iterator<Item = &Node> {
    let entries: &[_] = if let Value::Mapping(entries) = &node.value { entries } else { &[] };
    let read = |(key, node): &&(String, Node)| key == "items" && matches!(node.value, Value::Sequence(_));
    entries.iter().filter(move |entry| !read(entry)).map(|(_, node)| node)
}

/// Is there a policy in it, however deep? The parser bounds the depth.
fn holds_policy(node: &Node) -> bool {
    let text = |name| node.get(name).and_then(Node::text).unwrap_or_default();
    match &node.value {
        Value::Mapping(entries) => {
            !text("apiVersion").is_empty() && kind::is_policy(text("apiVersion"), text("kind"))
                || entries.iter().any(|(_, inner)| holds_policy(inner))
        }
        Value::Sequence(items) => items.iter().any(holds_policy),
        Value::Null | Value::Scalar { .. } => false,
    }
}

/// INVARIANT: what cannot be read is never taken for absent, or the object would be taken for another one, and the one that it
/// is for deleted.
fn name(node: &Node, kind: &str) -> Option<ObjectRef> {
    let name = node.get("metadata")?.get("name").and_then(Node::text).filter(|text| is_name(text))?;
    let namespace = namespace(node).of_object(kind)?;
    Some(ObjectRef { kind: kind.into(), namespace, name: name.into() })
}

fn namespace(node: &Node) -> Namespace<'_> {
    let Some(Value::Mapping(entries)) = node.get("metadata").map(|metadata| &metadata.value) else {
        return Namespace::Unreadable;
    };
    if let Value::Mapping(top) = &node.value
        && top.iter().any(|(key, _)| resembles_namespace(key))
    {
        return Namespace::Unreadable;
    }
    match entries.iter().find(|(key, _)| key == "namespace").map(|(_, node)| &node.value) {
        Some(Value::Scalar { text, .. }) if is_name(text) => Namespace::Given(text),
        Some(Value::Scalar { text, .. }) if text.is_empty() => Namespace::Absent,
        None | Some(Value::Null) if !entries.iter().any(|(key, _)| misspelt(key)) => Namespace::Absent,
        _ => Namespace::Unreadable,
    }
}

/// A key of metadata that is no field, and may have been meant to be `namespace`; `<<` would bring it from elsewhere.
fn misspelt(key: &str) -> bool {
    key == "<<" || key != "namespace" && resembles_namespace(key)
}

/// Says why an object has no name.
fn nameless(node: &Node, origin: &Origin, out: &mut Findings) {
    let mut quiet = Findings::default();
    for (key, at) in node.get("metadata").iter().flat_map(|at| At::new(at, "metadata").entries(&mut quiet)) {
        match key {
            "name" | "namespace" if at.node.value != Value::Null => plain_name(&at, out),
            key if misspelt(key) => out.error(&at, "no such field; is \"namespace\" meant?"),
            _ => {}
        }
    }
    for (key, at) in At::new(node, "").entries(&mut quiet) {
        if resembles_namespace(key) {
            out.error(&at, "no such field; `namespace` stands in `metadata`");
        }
    }
    if !out.refused() {
        out.add(Severity::Error, origin.line, "metadata.name", "the object has no name");
    }
}

fn meta(node: &Node, object: ObjectRef, origin: Origin, out: &mut Findings) -> Meta {
    let mut top = At::new(node, "").fields(out);
    top.ignore(&["apiVersion", "kind"]);
    let mut meta = Meta {
        object,
        origin,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: String::new(),
    };
    if let Some(at) = top.take("metadata") {
        let mut fields = at.fields(out);
        if let Some(at) = fields.take("name") {
            plain_name(&at, out);
        }
        if let Some(at) = fields.take("namespace") {
            plain_name(&at, out);
        }
        meta.labels = fields.labels("labels", out);
        if let Some(at) = fields.take("annotations") {
            let entries = at.entries(out);
            let entry = |(key, at): (&str, At<'_>)| Some((key.to_owned(), at.node.text()?.to_owned()));
            meta.annotations = entries.into_iter().filter_map(entry).collect();
        }
        meta.created = fields.text("creationTimestamp", out).unwrap_or_default();
        fields.ignore(&[
            "generateName",
            "generation",
            "resourceVersion",
            "uid",
            "managedFields",
            "ownerReferences",
        ]);
        fields.ignore(&["finalizers", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"]);
        fields.finish(out);
    }
    meta
}

fn plain_name(at: &At<'_>, out: &mut Findings) {
    if let Some(text) = at.text(out).filter(|text| !is_name(text)) {
        out.error(at, format!("{text:?} is no name; use 1 to 253 letters, digits, '-', '.' or '_'"));
    }
}

/// What a policy that does not read would have selected. Its namespace is believed, and a selector of equal labels
/// where the kind selects pods by them; anything else widens to the namespace. `None`: no workload, only nodes.
fn reach(node: &Node, version: &str, kind: &str) -> Option<Reach> {
    let namespace = namespace(node).of_policy(version, kind);
    let spec = node.get("spec").filter(|_| node.get("specs").is_none());
    let of = |name| equal_labels(spec.and_then(|spec| spec.get(name)));
    Some(match kind {
        "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => {
            Reach { namespace, selector: of("selector") }
        }
        "NetworkPolicy" => Reach { namespace, selector: of("podSelector") },
        "CiliumNetworkPolicy" | "CiliumClusterwideNetworkPolicy" => {
            return cilium::reach(namespace, spec, of("endpointSelector"));
        }
        "AdminNetworkPolicy" | "BaselineAdminNetworkPolicy" | "ClusterNetworkPolicy" => admin::reach(spec),
        _ => Reach { namespace, selector: Selector::new() },
    })
}

/// The workloads of a namespace that does not read.
fn labels(node: &Node, version: &str, kind: &str) -> Option<Reach> {
    let name = node.get("metadata").and_then(|metadata| metadata.get("name")).and_then(Node::text);
    let namespace = name.filter(|name| is_name(name)).map(Into::into);
    kind::gives_labels(version, kind).then(|| Reach { namespace, ..Reach::default() })
}

/// The `matchLabels` of a selector, if they can be read; all that it selects carries them.
pub(super) fn equal_labels(selector: Option<&Node>) -> Selector {
    let mut out = Findings::default();
    let labels = selector.and_then(|at| at.get("matchLabels"));
    let labels = labels.map(|labels| At::new(labels, "").labels(&mut out));
    labels.filter(|_| !out.refused()).unwrap_or_default()
}

/// The addresses that a broken pod or service shows all the same.
fn addresses(node: &Node, kind: &str) -> Vec<IpAddr> {
    let fields: &[&str] = match kind {
        "Pod" => &["status", "podIP", "podIPs"],
        "Service" => &["spec", "clusterIP", "clusterIPs"],
        _ => return Vec::new(),
    };
    let Some(block) = node.get(fields[0]) else { return Vec::new() };
    let list = match block.get(fields[2]).map(|node| &node.value) {
        Some(Value::Sequence(items)) => &items[..],
        _ => &[],
    };
    let texts = list.iter().filter_map(|item| item.get("ip").unwrap_or(item).text());
    let texts = texts.chain(block.get(fields[1]).and_then(Node::text));
    let addrs = texts.filter_map(|text| text.parse::<IpAddr>().ok()).map(|addr| addr.to_canonical());
    addrs.filter(|addr| !addr.is_unspecified() && !addr.is_loopback()).collect()
}
