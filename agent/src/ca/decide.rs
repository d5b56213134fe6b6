//! May this caller have this certificate? A pure function; everything it does not allow is refused by name.

use crate::identity::{NodeName, SpiffeId, TrustDomain};
use std::collections::{BTreeMap, BTreeSet};

/// Which identities the manifests place on which node.
pub type Placement = BTreeMap<NodeName, BTreeSet<SpiffeId>>;

/// Whom a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The CA's own server.
    Ca,
    Node(NodeName),
    Workload(SpiffeId),
}

impl Subject {
    pub fn uri(&self, trust_domain: &TrustDomain) -> String {
        match self {
            Subject::Ca => trust_domain.ca_uri(),
            Subject::Node(node) => node.uri(trust_domain),
            Subject::Workload(id) => id.to_string(),
        }
    }
}

/// Who asks, as proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// By a join token made for this node.
    Token(NodeName),
    /// By this node's certificate.
    Node(NodeName),
}

impl Caller {
    pub fn node(&self) -> &NodeName {
        match self {
            Caller::Token(node) | Caller::Node(node) => node,
        }
    }
}

/// What is asked for, as written.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// `ImpersonatedIdentity` of the request's metadata.
    pub impersonated: Option<&'a str>,
    /// All subject alternative names of the signing request that are URIs.
    pub csr_uris: &'a [String],
    /// Number of its other alternative names (DNS, addresses and so on).
    pub csr_other_names: usize,
}

/// Why nothing is signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the signing request must name exactly one URI and nothing else")]
    Names,
    #[error("the metadata asks for {impersonated:?}, the signing request for {csr:?}")]
    Contradiction { impersonated: String, csr: String },
    #[error("{uri:?} names no workload and no node of this mesh")]
    NoIdentity { uri: String },
    #[error("{uri:?} is outside the trust domain {trust_domain}")]
    TrustDomain { uri: String, trust_domain: TrustDomain },
    #[error("node {node} may not have the identity of node {asked}")]
    OtherNode { node: NodeName, asked: NodeName },
    #[error("a join token is good for the certificate of node {node} only, not for {asked}")]
    TokenForWorkload { node: NodeName, asked: SpiffeId },
    #[error("the manifests place no workload on node {node}, {asked} is refused")]
    UnknownNode { node: NodeName, asked: SpiffeId },
    #[error("the manifests place no workload with the identity {asked} on node {node}")]
    NotPlaced { node: NodeName, asked: SpiffeId },
}

/// The one identity that is signed, or why none is.
pub fn decide(
    trust_domain: &TrustDomain,
    caller: &Caller,
    ask: Ask<'_>,
    placement: &Placement,
) -> Result<Subject, Refused> {
    let [uri] = ask.csr_uris else { return Err(Refused::Names) };
    if ask.csr_other_names != 0 {
        return Err(Refused::Names);
    }
    if let Some(impersonated) = ask.impersonated.filter(|impersonated| impersonated != uri) {
        return Err(Refused::Contradiction { impersonated: quote(impersonated), csr: quote(uri) });
    }
    let foreign = |uri: &str| Refused::TrustDomain { uri: quote(uri), trust_domain: trust_domain.clone() };

    if let Ok((asked_domain, asked)) = NodeName::from_uri(uri) {
        return match caller.node() {
            _ if asked_domain != *trust_domain => Err(foreign(uri)),
            node if *node != asked => Err(Refused::OtherNode { node: node.clone(), asked }),
            _ => Ok(Subject::Node(asked)),
        };
    }
    let Ok(asked) = uri.parse::<SpiffeId>() else { return Err(Refused::NoIdentity { uri: quote(uri) }) };
    if asked.trust_domain() != trust_domain.as_str() {
        return Err(foreign(uri));
    }
    match caller {
        Caller::Token(node) => Err(Refused::TokenForWorkload { node: node.clone(), asked }),
        Caller::Node(node) => match placement.get(node) {
            None => Err(Refused::UnknownNode { node: node.clone(), asked }),
            Some(placed) if !placed.contains(&asked) => Err(Refused::NotPlaced { node: node.clone(), asked }),
            Some(_) => Ok(Subject::Workload(asked)),
        },
    }
}

/// What of a caller's text is repeated in answers and in the audit log.
fn quote(text: &str) -> String {
    text.chars().take(256).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    const CART: &str = "spiffe://td/ns/shop/sa/cart";
    const DB: &str = "spiffe://td/ns/shop/sa/db";

    fn ask_as(caller: &Caller, impersonated: Option<&str>, uris: &[&str]) -> Result<Subject, Refused> {
        let placement = Placement::from([(node("a"), [id(CART)].into()), (node("b"), [id(DB)].into())]);
        let uris: Vec<String> = uris.iter().map(|uri| (*uri).to_owned()).collect();
        let ask = Ask { impersonated, csr_uris: &uris, csr_other_names: 0 };
        decide(&"td".parse().unwrap(), caller, ask, &placement)
    }

    #[test]
    fn a_node_gets_itself_and_what_runs_on_it() {
        let a = Caller::Node(node("a"));
        assert_eq!(ask_as(&a, Some(CART), &[CART]), Ok(Subject::Workload(id(CART))));
        assert_eq!(ask_as(&a, None, &[CART]), Ok(Subject::Workload(id(CART))));
        assert_eq!(ask_as(&a, None, &["spiffe://td/node/a"]), Ok(Subject::Node(node("a"))));
        assert_eq!(
            ask_as(&Caller::Token(node("a")), None, &["spiffe://td/node/a"]),
            Ok(Subject::Node(node("a")))
        );
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let a = Caller::Node(node("a"));
        let token = Caller::Token(node("a"));
        assert_eq!(ask_as(&a, None, &[DB]), Err(Refused::NotPlaced { node: node("a"), asked: id(DB) }));
        assert_eq!(
            ask_as(&Caller::Node(node("c")), None, &[DB]),
            Err(Refused::UnknownNode { node: node("c"), asked: id(DB) })
        );
        assert_eq!(
            ask_as(&a, None, &["spiffe://td/node/b"]),
            Err(Refused::OtherNode { node: node("a"), asked: node("b") })
        );
        assert_eq!(
            ask_as(&token, None, &["spiffe://td/node/b"]),
            Err(Refused::OtherNode { node: node("a"), asked: node("b") })
        );
        assert_eq!(
            ask_as(&token, None, &[CART]),
            Err(Refused::TokenForWorkload { node: node("a"), asked: id(CART) })
        );
        assert!(matches!(ask_as(&a, Some(CART), &[DB]), Err(Refused::Contradiction { .. })));
        assert!(matches!(ask_as(&a, None, &["spiffe://td/ca"]), Err(Refused::NoIdentity { .. })));
        assert!(matches!(ask_as(&a, None, &["https://td/ns/shop/sa/cart"]), Err(Refused::NoIdentity { .. })));
        assert!(matches!(
            ask_as(&a, None, &["spiffe://x/ns/shop/sa/cart"]),
            Err(Refused::TrustDomain { .. })
        ));
        assert!(matches!(ask_as(&a, None, &["spiffe://x/node/a"]), Err(Refused::TrustDomain { .. })));
        assert_eq!(ask_as(&a, Some(CART), &[]), Err(Refused::Names));
        assert_eq!(ask_as(&a, Some(CART), &[CART, DB]), Err(Refused::Names));
    }

    #[test]
    fn names_beside_the_uri_are_refused() {
        let uris = [CART.to_owned()];
        let ask = Ask { impersonated: None, csr_uris: &uris, csr_other_names: 1 };
        let placement = Placement::from([(node("a"), [id(CART)].into())]);
        let refused = decide(&"td".parse().unwrap(), &Caller::Node(node("a")), ask, &placement);
        assert_eq!(refused, Err(Refused::Names));
    }
}
