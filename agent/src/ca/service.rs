//! The RPC: who asks, may they, sign, write it down.

use super::audit::{self, Decision, Line};
use super::authority::{Authority, DEFAULT_TTL, Issued};
use super::decide::{Ask, Caller, Placement, decide};
use super::limit::Limit;
use super::proto::istio_certificate_service_server::IstioCertificateService;
use super::proto::{IstioCertificateRequest, IstioCertificateResponse};
use super::request::SigningRequest;
use super::token::{self, TokenError};
use crate::identity::certificate::{Facts, rfc3339};
use crate::identity::{NodeName, TrustDomain};
use prost_types::value::Kind;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Request, Response, Status};
use tracing::warn;

/// Metadata key of the identity that is asked for (Istio's name).
const IMPERSONATED: &str = "ImpersonatedIdentity";

pub(super) struct Service {
    authority: Arc<Authority>,
    placement: watch::Receiver<Arc<Placement>>,
    limit: Arc<Limit>,
}

/// What a caller brought to prove who it is.
enum Proof {
    Token(String),
    Certificate(Facts),
}

impl Service {
    pub(super) fn new(authority: Arc<Authority>, placement: watch::Receiver<Arc<Placement>>) -> Service {
        Service { authority, placement, limit: Arc::default() }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        let address =
            peer.and_then(|peer| peer.get_ref().remote_addr()).map(|address| address.ip().to_string());
        let leaf =
            peer.and_then(TlsConnectInfo::peer_certs).and_then(|certificates| certificates.first().cloned());
        let proof = match leaf {
            Some(leaf) => Facts::read(&leaf).map(Proof::Certificate).map_err(|error| error.to_string()),
            None => bearer(&request).map(Proof::Token),
        };
        let call = Call {
            authority: self.authority.clone(),
            placement: self.placement.borrow().clone(),
            limit: self.limit.clone(),
            peer: address.unwrap_or_default(),
        };
        let message = request.into_inner();
        // Files are read and written, so not on the runtime's own threads.
        tokio::task::spawn_blocking(move || call.answer(proof, &message))
            .await
            .map_err(|_| Status::internal("the certificate authority failed to answer"))?
            .map(|issued| Response::new(IstioCertificateResponse { cert_chain: issued.chain }))
    }
}

fn bearer(request: &Request<IstioCertificateRequest>) -> Result<String, String> {
    let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
    header
        .and_then(|header| header.strip_prefix("Bearer "))
        .map(str::to_owned)
        .ok_or_else(|| "show a node certificate, or a join token as `authorization: Bearer TOKEN`".to_owned())
}

/// One request and what is needed to answer it.
struct Call {
    authority: Arc<Authority>,
    placement: Arc<Placement>,
    limit: Arc<Limit>,
    peer: String,
}

impl Call {
    fn answer(
        &self,
        proof: Result<Proof, String>,
        message: &IstioCertificateRequest,
    ) -> Result<Issued, Status> {
        let asked = impersonated(message);
        let refuse = |caller: Option<&Caller>, identity: Option<&str>, status: Status| {
            let line = Line {
                decision: Decision::Refused,
                peer: &self.peer,
                node: caller.map(|caller| caller.node().as_str()),
                proof: caller.map(proof_name),
                identity: identity.and_then(|identity| identity.get(..identity.len().min(256))),
                serial: None,
                not_after: None,
                reason: Some(status.message()),
            };
            // A refusal stands even when it cannot be written down.
            if let Err(error) = audit::write(self.authority.dir(), &line) {
                warn!("{error}");
            }
            Err(status)
        };

        if let Err(error) = self.authority.refresh() {
            warn!("{error}; going on with what was read before");
        }
        let caller = match proof
            .map_err(Status::unauthenticated)
            .and_then(|proof| self.caller(&proof).map(|c| (c, proof)))
        {
            Ok((caller, proof)) => {
                if !self.limit.take(caller.node().as_str(), Instant::now()) {
                    return Err(too_often());
                }
                (caller, proof)
            }
            Err(status) => {
                // Unproved callers are counted by address: nobody uses up a node's allowance in its name.
                if !self.limit.take(&format!("address {}", self.peer), Instant::now()) {
                    return Err(too_often());
                }
                return refuse(None, asked, status);
            }
        };
        let (caller, proof) = caller;

        let csr = match SigningRequest::from_pem(&message.csr) {
            Ok(csr) => csr,
            Err(error) => return refuse(Some(&caller), asked, Status::invalid_argument(error.to_string())),
        };
        let identity = asked.or(csr.uris.first().map(String::as_str));
        let ask = Ask { impersonated: asked, csr_uris: &csr.uris, csr_other_names: csr.other_names };
        let subject = match decide(&self.authority.trust_domain(), &caller, ask, &self.placement) {
            Ok(subject) => subject,
            Err(refused) => {
                return refuse(Some(&caller), identity, Status::permission_denied(refused.to_string()));
            }
        };
        if let Proof::Token(token) = &proof
            && let Err(error) = token::redeem(self.authority.dir(), token, caller.node(), &csr.public_key)
        {
            return refuse(Some(&caller), identity, token_status(&error));
        }
        let ttl = match u64::try_from(message.validity_duration) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => DEFAULT_TTL,
        };
        let issued = match self.authority.issue(&subject, &csr.public_key, ttl) {
            Ok(issued) => issued,
            Err(error) => return refuse(Some(&caller), identity, Status::internal(error.to_string())),
        };
        let line = Line {
            decision: Decision::Issued,
            peer: &self.peer,
            node: Some(caller.node().as_str()),
            proof: Some(proof_name(&caller)),
            identity,
            serial: Some(&issued.serial),
            not_after: Some(rfc3339(issued.not_after)),
            reason: None,
        };
        audit::write(self.authority.dir(), &line).map_err(|error| {
            Status::internal(format!("the audit log cannot be written, so nothing is signed: {error}"))
        })?;
        Ok(issued)
    }

    fn caller(&self, proof: &Proof) -> Result<Caller, Status> {
        match proof {
            Proof::Token(token) => token::check(self.authority.dir(), token)
                .map(Caller::Token)
                .map_err(|error| token_status(&error)),
            // TLS has verified its chain, but a connection may outlive the certificate.
            Proof::Certificate(facts) if facts.not_after < SystemTime::now() => {
                Err(Status::unauthenticated("the node certificate of this connection expired, connect again"))
            }
            Proof::Certificate(facts) => node_of(facts, &self.authority.trust_domain())
                .map(Caller::Node)
                .map_err(Status::unauthenticated),
        }
    }
}

fn node_of(facts: &Facts, trust_domain: &TrustDomain) -> Result<NodeName, String> {
    let [uri] = facts.uris.as_slice() else {
        return Err("a node certificate has exactly one URI".to_owned());
    };
    match NodeName::from_uri(uri) {
        Ok((domain, node)) if domain == *trust_domain => Ok(node),
        Ok((domain, _)) => {
            Err(format!("the certificate is of the trust domain {domain}, not {trust_domain}"))
        }
        Err(_) => Err(format!("{uri} is no node; only nodes may ask for certificates")),
    }
}

fn impersonated(message: &IstioCertificateRequest) -> Option<&str> {
    let value = message.metadata.as_ref()?.fields.get(IMPERSONATED)?;
    match value.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        // Something else than a text is no identity; decide() refuses it.
        _ => Some(""),
    }
}

fn proof_name(caller: &Caller) -> &'static str {
    match caller {
        Caller::Token(_) => "token",
        Caller::Node(_) => "certificate",
    }
}

fn token_status(error: &TokenError) -> Status {
    match error {
        TokenError::Internal(_) => Status::internal(error.to_string()),
        _ => Status::unauthenticated(error.to_string()),
    }
}

fn too_often() -> Status {
    Status::resource_exhausted("too many requests; ask again in a second")
}
