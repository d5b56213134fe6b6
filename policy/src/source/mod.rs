//! Objects as their authors wrote them: one file in, its documents out, each read whole or refused.
//!
//! Nothing is resolved here; a field that weft does not know is an error, because it may be the one that mattered.

mod admin;
mod cilium;
pub mod core;
mod document;
mod fields;
pub mod jwt;
pub mod kind;
mod network;
pub mod rule;
mod scan;
pub mod security;
mod selector;
mod yaml;

pub use self::core::{EndpointSlice, Pod, Service};
pub use jwt::RequestAuthentication;
pub use security::{Action, AuthorizationPolicy, MtlsMode, PeerAuthentication, Selector, Target};
pub use yaml::{MAX_DEPTH, MAX_NODES};

use crate::error::{ObjectRef, Origin, Problem, Severity};
use crate::model::layer::NetworkPolicy;
use document::equal_labels;
use fields::Findings;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

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

impl Spec {
    pub(crate) fn is_policy(&self) -> bool {
        matches!(
            self,
            Spec::AuthorizationPolicy(_)
                | Spec::PeerAuthentication(_)
                | Spec::RequestAuthentication(_)
                | Spec::Network(_)
        )
    }
}

/// A document that could not be read, and what could still be told of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Broken {
    /// Which object it is, if kind, namespace and name could be found.
    pub object: Option<ObjectRef>,
    pub origin: Origin,
    /// Would it have restricted traffic? Then what it selects is refused until it is repaired.
    pub policy: Option<Reach>,
    /// Would it have given labels to a namespace? Then these workloads are refused until it is repaired, if a policy asks for
    /// labels of namespaces.
    pub labels: Option<Reach>,
    /// Addresses of a pod or service, which are refused until it is repaired.
    pub addresses: Vec<IpAddr>,
}

impl Broken {
    /// Is anybody refused because of it?
    pub(crate) fn refuses(&self) -> bool {
        self.policy.is_some() || self.labels.is_some() || !self.addresses.is_empty()
    }
}

/// Which workloads an object that cannot be read would have been about, or more.
#[derive(Clone, Debug, Default, PartialEq)]
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
    let too_large = text.len() > MAX_FILE;
    if too_large {
        let origin = Origin { file: file.clone(), document: 1, line: 1 };
        let message = format!("the file is larger than {MAX_FILE} bytes; split it");
        parsed.refuse(origin.clone(), None, "", &message);
        // Nobody knows what else is in it, so that nothing is gone from it.
        let [policy, labels] = [None, None];
        parsed.broken(Broken { object: None, origin, policy, labels, addresses: Vec::new() });
    }
    for (index, (line, text)) in yaml::documents(text).into_iter().enumerate() {
        let origin = Origin { file: file.clone(), document: index as u32 + 1, line };
        if too_large {
            let broken = scan::scan(&text, origin);
            if broken.refuses() {
                parsed.broken(broken);
            }
            continue;
        }
        match yaml::parse(&text, line) {
            Ok(node) => document::read(&node, "", None, Origin { line: node.line, ..origin }, &mut parsed),
            Err(error) => {
                let at = Origin { line: error.line, ..origin.clone() };
                let broken = scan::scan(&text, origin);
                parsed.refuse(at, broken.object.clone(), "", &error.message);
                parsed.broken(broken);
            }
        }
    }
    parsed
}

impl Parsed {
    fn broken(&mut self, broken: Broken) {
        self.outcomes.push(Outcome::Broken(broken));
    }

    fn refuse(&mut self, origin: Origin, object: Option<ObjectRef>, field: &str, message: &str) {
        let (field, message) = (field.to_owned(), message.to_owned());
        self.problems.push(Problem { origin, severity: Severity::Error, object, field, message });
    }

    /// `path`: where in the document the object of these findings stands.
    fn report(&mut self, path: &str, origin: &Origin, object: &Option<ObjectRef>, findings: Findings) {
        self.problems.extend(findings.0.into_iter().map(|finding| {
            let dot = if path.is_empty() || finding.field.is_empty() { "" } else { "." };
            Problem {
                origin: Origin { line: finding.line, ..origin.clone() },
                severity: finding.severity,
                object: object.clone(),
                field: format!("{path}{dot}{}", finding.field),
                message: finding.message,
            }
        }));
    }
}

/// The namespace that the metadata of an object says.
enum Namespace<'a> {
    Given(&'a str),
    Absent,
    /// It says something, but not plainly what.
    Unreadable,
}

impl Namespace<'_> {
    /// Where an object of this kind is; empty for one without a namespace.
    fn of_object(&self, kind: &str) -> Option<Arc<str>> {
        match self {
            _ if !kind::has_namespace(kind) => Some("".into()),
            Namespace::Given(name) => Some((*name).into()),
            Namespace::Absent => Some("default".into()),
            Namespace::Unreadable => None,
        }
    }

    /// Which one a policy can be about, as far as this tells; `None`: any.
    fn of_policy(&self, version: &str, kind: &str) -> Option<Arc<str>> {
        match self {
            _ if !kind::has_namespace(kind) => None,
            Namespace::Given(name) => Some((*name).into()),
            Namespace::Absent => kind::is_never_clusterwide(version, kind).then(|| "default".into()),
            Namespace::Unreadable => None,
        }
    }
}

/// Names become part of SPIFFE IDs and of tables: the characters of a Kubernetes name, no others.
fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':');
    (1..=253).contains(&text.len()) && text.bytes().all(allowed)
}

/// May this have been meant to say `namespace`?
fn resembles_namespace(text: &str) -> bool {
    const WORD: &str = "namespace";
    let text = text.to_ascii_lowercase();
    // A word that begins so and has most of its letters, in whatever order.
    let slip = |word: &str| {
        let mut left: Vec<char> = word.chars().collect();
        let common = |letter: char| left.iter().position(|own| *own == letter).map(|at| left.swap_remove(at));
        word.starts_with('n') && word.len() <= WORD.len() + 2 && WORD.chars().filter_map(common).count() >= 7
    };
    ["names", "pace"].iter().any(|part| text.contains(part))
        || text.split(|own: char| !own.is_ascii_alphanumeric()).any(slip)
}
