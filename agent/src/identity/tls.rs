//! TLS between agents: configurations and verifiers.
//!
//! TLS 1.3 only, ALPN `h2`, no SNI, no resumption (a resumed session would outlive a certificate and skip the checks),
//! X25519MLKEM768 offered first, certificates of both sides required. A peer is accepted if its chain ends at a trusted
//! root and its certificate has exactly one URI, a workload's SPIFFE ID of our trust domain; a client accepts only the
//! identities it expects. DNS names and addresses in certificates prove nothing here.

use super::certificate::Facts;
use super::credentials::Live;
use super::refusal::Refusal;
use super::spiffe::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerMisbehaved, ServerConfig, SignatureScheme, version,
};
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

/// The ALPN protocol of the tunnel.
pub const ALPN: &[u8] = b"h2";

/// For the server's side of a tunnel: shows `live`'s certificate, accepts workloads of its trust domain.
pub fn server_config(live: Arc<Live>) -> Arc<ServerConfig> {
    let verifier = Arc::new(PeerVerifier { live: live.clone(), expected: None });
    Arc::new(server_config_with(verifier, Arc::new(Shown(live))))
}

/// For the client's side of a tunnel: shows `live`'s certificate, accepts only a server that is one of `expected`.
pub fn client_config(live: Arc<Live>, expected: BTreeSet<SpiffeId>) -> Arc<ClientConfig> {
    let verifier = Arc::new(PeerVerifier { live: live.clone(), expected: Some(expected) });
    Arc::new(client_config_with(verifier, Arc::new(Shown(live))))
}

/// The identity that the peer of a finished handshake has proved.
pub fn peer_spiffe(session: &CommonState) -> Result<SpiffeId, Refusal> {
    let leaf = session.peer_certificates().and_then(<[_]>::first).ok_or(Refusal::NoCertificate)?;
    workload_of(leaf)
}

/// The one provider of all TLS in weft: aws-lc-rs, TLS 1.3 suites, post-quantum key exchange first.
pub(crate) fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    })
}

pub(super) fn client_config_with(
    verifier: Arc<dyn ServerCertVerifier>,
    shown: Arc<dyn ResolvesClientCert>,
) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(shown);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    config
}

pub(crate) fn server_config_with(
    verifier: Arc<dyn ClientCertVerifier>,
    shown: Arc<dyn ResolvesServerCert>,
) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(shown);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

/// Shows what [`Live`] holds at the moment of the handshake.
#[derive(Debug)]
struct Shown(Arc<Live>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.credentials().map(|credentials| credentials.certified())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.credentials().map(|credentials| credentials.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Judges the peer of a tunnel, on either side.
#[derive(Debug)]
struct PeerVerifier {
    live: Arc<Live>,
    /// `None` accepts every workload of the trust domain.
    expected: Option<BTreeSet<SpiffeId>>,
}

impl PeerVerifier {
    /// After the chain: the certificate's only URI is an acceptable workload.
    fn check_identity(&self, leaf: &CertificateDer<'_>) -> Result<(), Refusal> {
        let peer = workload_of(leaf)?;
        let trust_domain = self.live.identity().trust_domain();
        if peer.trust_domain() != trust_domain {
            return Err(Refusal::ForeignTrustDomain { peer, trust_domain: trust_domain.to_owned() });
        }
        match &self.expected {
            Some(expected) if !expected.contains(&peer) => {
                Err(Refusal::UnexpectedIdentity { peer, expected: expected.iter().cloned().collect() })
            }
            _ => Ok(()),
        }
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.live.roots().verify_server_chain(end_entity, intermediates, now)?;
        self.check_identity(end_entity).map_err(other)?;
        Ok(ServerCertVerified::assertion())
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

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.live.roots().verify_client_chain(end_entity, intermediates, now)?;
        self.check_identity(end_entity).map_err(other)?;
        Ok(ClientCertVerified::assertion())
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

/// The certificate's only URI, as a workload.
fn workload_of(leaf: &CertificateDer<'_>) -> Result<SpiffeId, Refusal> {
    only_uri(leaf)?.parse().map_err(Refusal::NotAWorkload)
}

/// SPIFFE X.509-SVID, section 2: exactly one URI name.
pub(crate) fn only_uri(leaf: &CertificateDer<'_>) -> Result<String, Refusal> {
    let mut uris = Facts::read(leaf).map_err(|error| Refusal::Unreadable(error.to_string()))?.uris;
    match (uris.pop(), uris.len()) {
        (Some(uri), 0) => Ok(uri),
        (last, more) => Err(Refusal::UriCount(more + usize::from(last.is_some()))),
    }
}

/// A refusal in the form that rustls carries to whoever drives the handshake.
pub(super) fn other(refusal: Refusal) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
}

pub(crate) fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = provider().signature_verification_algorithms;
    rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
}

pub(crate) fn supported_schemes() -> Vec<SignatureScheme> {
    provider().signature_verification_algorithms.supported_schemes()
}
