//! One document to the object that it is.

use super::fields::{At, Findings};
use super::kind::{self, Treatment};
use super::yaml::{Node, Value};
use super::{Broken, Meta, Object, Outcome, Parsed, Reach, Selector, admin, cilium};
use crate::error::{ObjectRef, Origin, Problem, Severity};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

pub(super) fn read(node: &Node, origin: Origin, parsed: &mut Parsed) {
    let text = |name| node.get(name).and_then(Node::text).filter(|text| !text.is_empty());
    let (Some(version), Some(kind)) = (text("apiVersion"), text("kind")) else {
        let message = "not an object: a document needs apiVersion and kind";
        let policy =
            text("apiVersion").filter(|v| kind::is_policy(v, "")).and_then(|_| reach(node, "", &None));
        parsed.refuse(origin.clone(), None, "", message);
        parsed.outcomes.push(Outcome::Broken(Broken { object: None, origin, policy, addresses: Vec::new() }));
        return;
    };
    let object = name(node, kind);
    let mut out = Findings::default();
    let treatment = kind::treatment(version, kind);
    let read = match (&treatment, &object) {
        (Treatment::Unknown(message), _) => {
            out.add(Severity::Error, origin.line, "kind", message.clone());
            None
        }
        (_, None) => {
            out.add(Severity::Error, origin.line, "metadata.name", "the object has no name");
            None
        }
        (_, Some(object)) => {
            let meta = meta(node, object.clone(), origin.clone(), &mut out);
            Some(Object { spec: kind::read(&treatment, &meta, node, &mut out), meta })
        }
    };
    let refused = out.refused();
    parsed.problems.extend(out.0.into_iter().map(|finding| Problem {
        origin: Origin { line: finding.line, ..origin.clone() },
        severity: finding.severity,
        object: object.clone(),
        field: finding.field,
        message: finding.message,
    }));
    parsed.outcomes.push(match read {
        Some(object) if !refused => Outcome::Object(Arc::new(object)),
        _ => {
            let policy = kind::is_policy(version, kind).then(|| reach(node, kind, &object)).flatten();
            Outcome::Broken(Broken { object, origin, policy, addresses: addresses(node, kind) })
        }
    });
}

fn name(node: &Node, kind: &str) -> Option<ObjectRef> {
    let metadata = node.get("metadata")?;
    let text = |name| metadata.get(name).and_then(Node::text).filter(|text| !text.is_empty());
    let name = text("name")?.into();
    let namespace = if kind::has_namespace(kind) { text("namespace").unwrap_or("default") } else { "" };
    Some(ObjectRef { kind: kind.into(), namespace: namespace.into(), name })
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

/// Names become part of SPIFFE IDs and of tables: the characters of a Kubernetes name, no others.
fn plain_name(at: &At<'_>, out: &mut Findings) {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':');
    let fits = |text: &String| (1..=253).contains(&text.len()) && text.bytes().all(allowed);
    if let Some(text) = at.text(out).filter(|text| !fits(text)) {
        out.error(at, format!("{text:?} is no name; use 1 to 253 letters, digits, '-', '.' or '_'"));
    }
}

/// What a policy that does not read would have selected. Its namespace is believed, and a selector of equal labels
/// where the kind selects pods by them; anything else widens to the namespace. `None`: no workload, only nodes.
fn reach(node: &Node, kind: &str, object: &Option<ObjectRef>) -> Option<Reach> {
    let namespace =
        || node.get("metadata").and_then(|m| m.get("namespace")).and_then(Node::text).unwrap_or("default");
    let namespace = match object {
        Some(object) if object.namespace.is_empty() => None,
        Some(object) => Some(object.namespace.clone()),
        None => Some(namespace().into()),
    };
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
