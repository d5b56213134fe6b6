//! Names of workloads, nodes and the CA, as SPIFFE IDs.
//!
//! | who | SPIFFE ID |
//! |---|---|
//! | workload | `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` |
//! | node (its agent) | `spiffe://<trust domain>/node/<name>` |
//! | certificate authority | `spiffe://<trust domain>/ca` |
//!
//! The three forms never overlap: a node's certificate is no workload's, whatever a manifest calls its namespace.
//! Characters are those of the SPIFFE ID standard (sections 2.1 and 2.2): comparing IDs is comparing bytes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest SPIFFE ID in bytes (SPIFFE-ID, section 2.3).
pub const MAX_LEN: usize = 2048;

const SCHEME: &str = "spiffe://";

/// Why a text is no name of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not `spiffe://...`.
    #[error("{0:?} is not a SPIFFE ID: it does not begin with spiffe://")]
    Scheme(String),
    /// Longer than [`MAX_LEN`].
    #[error("a SPIFFE ID has at most {MAX_LEN} bytes, this one has {0}")]
    TooLong(usize),
    /// The trust domain is empty, too long or has other characters than `a-z0-9.-_`.
    #[error("{0:?} is not a trust domain: use 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} names no workload: expected spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    NotAWorkload(String),
    /// The path is not `/node/<name>`.
    #[error("{0:?} names no node: expected spiffe://<trust domain>/node/<name>")]
    NotANode(String),
    /// A namespace, service account or node name is empty, too long or has other characters than `a-zA-Z0-9.-_`.
    #[error("{0:?} cannot be part of a SPIFFE ID: use 1 to 253 of a-z, A-Z, 0-9, '.', '-' and '_'")]
    Segment(String),
}

/// The trust domain: all that one set of roots vouches for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of this trust domain's certificate authority.
    pub fn ca_uri(&self) -> String {
        format!("{SCHEME}{self}/ca")
    }
}

impl Default for TrustDomain {
    /// `cluster.local`, as Istio's.
    fn default() -> Self {
        TrustDomain("cluster.local".into())
    }
}

impl FromStr for TrustDomain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(NameError::TrustDomain(shorten(text)));
        }
        Ok(TrustDomain(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a node, as in `spec.nodeName`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

impl NodeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of this node's agent.
    pub fn uri(&self, trust_domain: &TrustDomain) -> String {
        format!("{SCHEME}{trust_domain}/node/{self}")
    }

    /// The trust domain and node behind `spiffe://<trust domain>/node/<name>`.
    pub fn from_uri(uri: &str) -> Result<(TrustDomain, NodeName), NameError> {
        let (trust_domain, path) = split(uri)?;
        let name = path.strip_prefix("node/").ok_or_else(|| NameError::NotANode(shorten(uri)))?;
        Ok((trust_domain.parse()?, name.parse()?))
    }
}

impl FromStr for NodeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Ok(NodeName(segment(text)?.into()))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of a workload. Cheap to clone; ordered and compared by its text.
#[derive(Clone)]
pub struct SpiffeId {
    uri: Arc<str>,
    trust_domain_end: u16,
    namespace_end: u16,
}

impl SpiffeId {
    /// `spiffe://<trust_domain>/ns/<namespace>/sa/<service_account>`.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, NameError> {
        segment(namespace)?;
        segment(service_account)?;
        let trust_domain_end = SCHEME.len() + trust_domain.as_str().len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        let uri: Arc<str> = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").into();
        // Both ends are below 255 + 253 + 20 bytes.
        Ok(SpiffeId { uri, trust_domain_end: trust_domain_end as u16, namespace_end: namespace_end as u16 })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..self.trust_domain_end.into()]
    }

    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.trust_domain_end) + "/ns/".len()..self.namespace_end.into()]
    }

    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + "/sa/".len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = NameError;

    fn from_str(uri: &str) -> Result<Self, NameError> {
        let (trust_domain, path) = split(uri)?;
        let mut parts = path.split('/');
        let (Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(NameError::NotAWorkload(shorten(uri)));
        };
        SpiffeId::new(&trust_domain.parse()?, namespace, service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.uri == other.uri
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uri.cmp(&other.uri)
    }
}

impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

/// Trust domain and path (without its first slash) of a SPIFFE ID.
fn split(uri: &str) -> Result<(&str, &str), NameError> {
    if uri.len() > MAX_LEN {
        return Err(NameError::TooLong(uri.len()));
    }
    let rest = uri.strip_prefix(SCHEME).ok_or_else(|| NameError::Scheme(shorten(uri)))?;
    Ok(rest.split_once('/').unwrap_or((rest, "")))
}

fn segment(text: &str) -> Result<&str, NameError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > 253 || text == "." || text == ".." || !text.bytes().all(allowed) {
        return Err(NameError::Segment(shorten(text)));
    }
    Ok(text)
}

/// What of a peer's text is quoted in an error: enough to recognise it, never a page.
fn shorten(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_id_is_taken_apart() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "shop", "cart")
        );
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(id, SpiffeId::new(&TrustDomain::default(), "shop", "cart").unwrap());
    }

    #[test]
    fn what_is_no_workload_id_is_refused() {
        for text in [
            "",
            "cluster.local/ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td:80/ns/a/sa/b",
            "spiffe://user@td/ns/a/sa/b",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a/sa/b#x",
            "spiffe://td/ns/a/sa/%62",
            "spiffe://td/ns/ä/sa/b",
            "spiffe://td/node/n1",
            "spiffe://td/ca",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?}");
        }
        let long = format!("spiffe://td/ns/{}/sa/b", "a".repeat(254));
        assert!(long.parse::<SpiffeId>().is_err());
        assert_eq!("x".repeat(3000).parse::<SpiffeId>(), Err(NameError::TooLong(3000)));
    }

    #[test]
    fn a_node_id_is_no_workload_id() {
        let (trust_domain, node) = NodeName::from_uri("spiffe://td/node/worker-1").unwrap();
        assert_eq!((trust_domain.as_str(), node.as_str()), ("td", "worker-1"));
        assert_eq!(node.uri(&trust_domain), "spiffe://td/node/worker-1");
        assert!(NodeName::from_uri("spiffe://td/ns/node/sa/worker-1").is_err());
        assert!(NodeName::from_uri("spiffe://td/node/a/b").is_err());
    }
}
