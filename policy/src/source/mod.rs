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
            policy: scan::scan(text).1,
            addresses: Vec::new(),
        }));
        return parsed;
    }
    for (index, (line, text)) in yaml::documents(text).into_iter().enumerate() {
        let origin = Origin { file: file.clone(), document: index as u32 + 1, line };
        match yaml::parse(&text, line) {
            Ok(node) => document::read(&node, Origin { line: node.line, ..origin }, &mut parsed),
            Err(error) => {
                let (object, policy) = scan::scan(&text);
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
