//! Objects as their authors wrote them: one file in, its documents out, each read whole or refused.
//!
//! Nothing is resolved here; a field that weft does not know is an error, because it may be the one that mattered.

mod admin;
mod cilium;
pub mod core;
mod fields;
pub mod jwt;
pub mod kind;
mod network;
pub mod rule;
pub mod security;
mod selector;
mod yaml;

pub use self::core::{EndpointSlice, Pod, Service};
pub use jwt::RequestAuthentication;
pub use security::{Action, AuthorizationPolicy, MtlsMode, PeerAuthentication, Selector, Target};
pub use yaml::{MAX_DEPTH, MAX_NODES};

use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::model::layer::NetworkPolicy;
use fields::{At, Findings};
use kind::Treatment;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use yaml::Node;

/// Longest file in bytes.
pub const MAX_FILE: usize = 8 << 20;

/// What every object carries.
#[derive(Clone, Debug, PartialEq)]
pub struct Meta {
    pub object: ObjectRef,
    pub origin: Origin,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// `metadata.creationTimestamp`, RFC 3339 in UTC, so that order of texts is order of time; empty if absent.
    pub created: String,
}

/// An object that was read whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    pub meta: Meta,
    pub spec: Spec,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Spec {
    Namespace,
    ServiceAccount,
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    AuthorizationPolicy(AuthorizationPolicy),
    PeerAuthentication(PeerAuthentication),
    RequestAuthentication(RequestAuthentication),
    DestinationRule(core::DestinationRule),
    /// Any network policy of Kubernetes or Cilium, lowered: one for each `spec`.
    Network(Vec<NetworkPolicy>),
    /// Recognised and not carried out; hosts that it routes to, for checking.
    Routing {
        hosts: Vec<String>,
    },
    /// Recognised, and none of the mesh's business.
    Ignored,
}

/// A document that could not be read, and what could still be told of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Broken {
    /// Which object it is, if kind and name could be found.
    pub object: Option<ObjectRef>,
    pub origin: Origin,
    /// Would it have restricted traffic? Then what it selects is refused until it is repaired.
    pub policy: Option<Reach>,
    /// Addresses of a pod or service, which are refused until it is repaired.
    pub addresses: Vec<IpAddr>,
}

/// Which workloads a policy that cannot be read would have selected, or more.
#[derive(Clone, Debug, PartialEq)]
pub struct Reach {
    /// `None`: every namespace.
    pub namespace: Option<Arc<str>>,
    /// Empty also when it could not be read.
    pub selector: Selector,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Object(Arc<Object>),
    Broken(Broken),
}

/// The result of reading one file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    pub outcomes: Vec<Outcome>,
    pub problems: Vec<Problem>,
}

/// Reads all documents of a file. `file` is used in messages only.
pub fn parse(file: &str, text: &str) -> Parsed {
    let file: Arc<str> = file.into();
    let mut parsed = Parsed::default();
    if text.len() > MAX_FILE {
        let origin = Origin { file, document: 1, line: 1 };
        let message = format!("the file is larger than {MAX_FILE} bytes; split it");
        parsed.refuse(origin.clone(), None, "", &message);
        parsed.outcomes.push(Outcome::Broken(Broken {
            object: None,
            origin,
            policy: scan(text).1,
            addresses: Vec::new(),
        }));
        return parsed;
    }
    for (index, (line, text)) in yaml::documents(text).into_iter().enumerate() {
        let origin = Origin { file: file.clone(), document: index as u32 + 1, line };
        match yaml::parse(&text, line) {
            Ok(node) => document(&node, Origin { line: node.line, ..origin }, &mut parsed),
            Err(error) => {
                let (object, policy) = scan(&text);
                let at = Origin { line: error.line, ..origin.clone() };
                parsed.refuse(at, object.clone(), "", &error.message);
                let addresses = Vec::new();
                parsed.outcomes.push(Outcome::Broken(Broken { object, origin, policy, addresses }));
            }
        }
    }
    parsed
}

impl Parsed {
    fn refuse(&mut self, origin: Origin, object: Option<ObjectRef>, field: &str, message: &str) {
        let (field, message) = (field.to_owned(), message.to_owned());
        self.problems.push(Problem { origin, severity: Severity::Error, object, field, message });
    }
}

fn document(node: &Node, origin: Origin, parsed: &mut Parsed) {
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
fn equal_labels(selector: Option<&Node>) -> Selector {
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
        Some(yaml::Value::Sequence(items)) => &items[..],
        _ => &[],
    };
    let texts = list.iter().filter_map(|item| item.get("ip").unwrap_or(item).text());
    let texts = texts.chain(block.get(fields[1]).and_then(Node::text));
    let addrs = texts.filter_map(|text| text.parse::<IpAddr>().ok()).map(|addr| addr.to_canonical());
    addrs.filter(|addr| !addr.is_unspecified() && !addr.is_loopback()).collect()
}

/// Looks for kind and name in a text that is not YAML. A text whose kind is a policy's, or whose kind is unreadable
/// below a policy's apiVersion, refuses its whole namespace; without a readable one, the namespace `default`.
fn scan(text: &str) -> (Option<ObjectRef>, Option<Reach>) {
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
