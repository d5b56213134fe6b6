//! Who signs for this node: a CA over the network, or a CA directory on this machine.

use super::ca_client::CaClient;
use super::credentials::{CredentialError, KeyRequest, Roots};
use super::spiffe::{NodeName, SpiffeId};
use super::store::CertStatus;
use crate::ca::audit::{self, Decision, Line};
use crate::ca::request::SigningRequest;
use crate::ca::{Authority, Subject};
use crate::identity::certificate::rfc3339;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Why there is no new certificate. Each is one sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// Network: retrying may help.
    #[error("the CA at {url} cannot be reached: {cause}")]
    Unreachable { url: String, cause: String },
    /// TLS: the server is not our CA, or it does not take our certificate.
    #[error("no TLS with the CA at {url}: {cause}")]
    Tls { url: String, cause: String },
    /// The CA answered no.
    #[error("the CA at {url} refused: {cause}")]
    Refused { url: String, cause: String },
    /// The CA answered with something unusable.
    #[error("the CA's answer is of no use: {0}")]
    Answer(String),
    #[error(
        "the node {0} has no certificate; give it a join token: `weft ca token --node {0}` and `--token FILE`"
    )]
    NoToken(NodeName),
    #[error("{path}: {cause}")]
    File { path: String, cause: String },
    #[error("no key could be made: {0}")]
    Key(String),
    #[error("signing failed: {0}")]
    Local(String),
}

impl From<CredentialError> for SignError {
    fn from(error: CredentialError) -> SignError {
        SignError::Answer(error.to_string())
    }
}

impl From<rcgen::Error> for SignError {
    fn from(error: rcgen::Error) -> SignError {
        SignError::Key(error.to_string())
    }
}

/// The two ways to a certificate.
pub enum Signer {
    Remote(Box<CaClient>),
    Local(LocalCa),
}

impl Signer {
    /// A chain (PEM, leaf first, roots last) for the request's key and URI.
    pub async fn sign(&self, request: &KeyRequest, ttl: Duration) -> Result<Vec<String>, SignError> {
        match self {
            Signer::Remote(client) => client.sign(request, ttl).await,
            Signer::Local(ca) => ca.sign(request, ttl).await,
        }
    }

    /// The roots to begin with; every answer brings the current ones.
    pub(super) fn roots(&self) -> Result<Arc<Roots>, SignError> {
        match self {
            Signer::Remote(client) => client.trusted_roots().map(Arc::new),
            Signer::Local(ca) => Ok(ca.authority.roots()),
        }
    }

    /// Renews the node's own certificate when it is time; says when to come back.
    pub(super) async fn maintain(&self) -> Option<SystemTime> {
        match self {
            Signer::Remote(client) => client.maintain().await,
            Signer::Local(_) => None,
        }
    }

    /// The node's own certificate, if it has one.
    pub(super) fn node_status(&self) -> Option<CertStatus> {
        match self {
            Signer::Remote(client) => client.status(),
            Signer::Local(_) => None,
        }
    }
}

/// A CA directory used in process: one node that is its own authority.
pub struct LocalCa {
    authority: Arc<Authority>,
    node: NodeName,
}

impl LocalCa {
    pub fn new(authority: Arc<Authority>, node: NodeName) -> LocalCa {
        LocalCa { authority, node }
    }

    async fn sign(&self, request: &KeyRequest, ttl: Duration) -> Result<Vec<String>, SignError> {
        let (authority, node) = (self.authority.clone(), self.node.clone());
        let (csr, uri) = (request.csr_pem()?, request.uri().to_owned());
        let local = |error: &dyn ToString| SignError::Local(error.to_string());
        let sign = move || {
            let id: SpiffeId = uri.parse().map_err(|error| local(&error))?;
            authority.refresh().map_err(|error| local(&error))?;
            let trust_domain = authority.trust_domain();
            if id.trust_domain() != trust_domain.as_str() {
                return Err(SignError::Local(format!(
                    "{id} is outside the CA's trust domain {trust_domain}"
                )));
            }
            let csr = SigningRequest::from_pem(&csr).map_err(|error| local(&error))?;
            let issued = authority
                .issue(&Subject::Workload(id), &csr.public_key, ttl)
                .map_err(|error| local(&error))?;
            let line = Line {
                decision: Decision::Issued,
                peer: "local",
                node: Some(node.as_str()),
                proof: Some("local"),
                identity: Some(&uri),
                serial: Some(&issued.serial),
                not_after: Some(rfc3339(issued.not_after)),
                reason: None,
            };
            audit::write(authority.dir(), &line).map_err(|error| local(&error))?;
            Ok(issued.chain)
        };
        tokio::task::spawn_blocking(sign).await.map_err(|error| local(&error))?
    }
}
