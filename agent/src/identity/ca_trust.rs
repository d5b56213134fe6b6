//! Which server is the CA, and what a node shows to it.

use super::refusal::Refusal;
use super::spiffe::TrustDomain;
use super::tls::{only_uri, other, supported_schemes, verify_signature};
use super::{Credentials, Roots};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, Error, PeerMisbehaved, SignatureScheme};
use std::sync::Arc;

/// Accepts the trust domain's own CA, or a server whose certificate names the host that was dialled (istiod).
///
/// A workload's certificate is under the same root; it names neither.
#[derive(Debug)]
pub(super) struct CaVerifier {
    roots: Roots,
    ca_uri: String,
}

impl CaVerifier {
    pub(super) fn new(roots: Roots, trust_domain: &TrustDomain) -> CaVerifier {
        CaVerifier { roots, ca_uri: trust_domain.ca_uri() }
    }
}

impl ServerCertVerifier for CaVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.roots.verify_server_chain(end_entity, intermediates, now)?;
        let uri = only_uri(end_entity).ok();
        let is_ca = uri.as_ref() == Some(&self.ca_uri);
        if is_ca || verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name).is_ok() {
            return Ok(ServerCertVerified::assertion());
        }
        Err(other(Refusal::NotTheCa {
            found: uri.unwrap_or_else(|| "a server of another name".to_owned()),
            expected: format!("{} or the host {}", self.ca_uri, server_name.to_str()),
        }))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        supported_schemes()
    }
}

/// The node's certificate, or none when a token proves the caller.
pub(super) struct Shown(Option<Arc<CertifiedKey>>);

impl Shown {
    pub(super) fn new(credentials: Option<&Credentials>) -> Shown {
        Shown(credentials.map(Credentials::certified))
    }
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shown")
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}
