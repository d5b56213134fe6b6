//! One identity's certificate and key, the roots it trusts, and the handle that follows renewals.

use super::certificate::{Facts, ReadError, read_pem, rfc3339};
use super::spiffe::SpiffeId;
use super::tls::provider;
use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// Why a certificate chain is not taken as credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    #[error("the certificate chain cannot be read: {0}")]
    Read(#[from] ReadError),
    #[error("the certificate chain ends without a root")]
    NoRoot,
    #[error("the certificate is for {found:?}, not for {expected}")]
    WrongIdentity { expected: String, found: Vec<String> },
    #[error("the certificate is for another key than the one that was requested for")]
    WrongKey,
    #[error("the certificate expired at {not_after}, this node's clock says {now}: check the clocks of both")]
    Expired { not_after: String, now: String },
    #[error(
        "the certificate is valid only from {not_before}, this node's clock says {now}: check the clocks of both"
    )]
    NotYetValid { not_before: String, now: String },
    #[error("the certificate does not chain to a trusted root: {0}")]
    Chain(rustls::Error),
    #[error("the private key cannot be used: {0}")]
    Key(String),
}

/// A new ECDSA P-256 key and its certificate signing request for one URI.
///
/// The key stays in memory; [`Credentials::new`] turns it into a TLS key.
pub struct KeyRequest {
    key: rcgen::KeyPair,
    uri: String,
}

impl KeyRequest {
    pub fn new(uri: &str) -> Result<KeyRequest, rcgen::Error> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        Ok(KeyRequest { key, uri: uri.to_owned() })
    }

    /// As [`KeyRequest::new`] with a key that exists, in PEM.
    pub fn with_key(uri: &str, key_pem: &str) -> Result<KeyRequest, rcgen::Error> {
        Ok(KeyRequest { key: rcgen::KeyPair::from_pem(key_pem)?, uri: uri.to_owned() })
    }

    /// The PEM of a request that names the URI and nothing else.
    pub fn csr_pem(&self) -> Result<String, rcgen::Error> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![rcgen::SanType::URI(self.uri.as_str().try_into()?)];
        params.serialize_request(&self.key)?.pem()
    }

    /// The key in PEM; only a node's own key is ever written down.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }
}

/// A certificate with its key: what one side shows in a handshake.
pub struct Credentials {
    facts: Facts,
    certified: Arc<CertifiedKey>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Credentials {
    /// Checks what a CA answered: it must be for the requested URI and key, valid now, and chain to one of `roots`.
    ///
    /// `chain` is the leaf and its intermediates, without the root.
    pub fn new(
        request: &KeyRequest,
        chain: Vec<CertificateDer<'static>>,
        roots: &Roots,
        now: SystemTime,
    ) -> Result<Credentials, CredentialError> {
        let leaf = chain.first().ok_or(ReadError::Empty)?;
        let facts = Facts::read(leaf)?;
        if facts.uris != [request.uri.as_str()] {
            return Err(CredentialError::WrongIdentity { expected: request.uri.clone(), found: facts.uris });
        }
        use rcgen::PublicKeyData;
        if facts.public_key != request.key.subject_public_key_info() {
            return Err(CredentialError::WrongKey);
        }
        // A chain is valid as long as its shortest-lived certificate.
        let (mut not_before, mut not_after) = (facts.not_before, facts.not_after);
        for certificate in &chain[1..] {
            let facts = Facts::read(certificate)?;
            not_before = not_before.max(facts.not_before);
            not_after = not_after.min(facts.not_after);
        }
        if now > not_after {
            return Err(CredentialError::Expired { not_after: rfc3339(not_after), now: rfc3339(now) });
        }
        if now < not_before {
            return Err(CredentialError::NotYetValid { not_before: rfc3339(not_before), now: rfc3339(now) });
        }
        roots.verify_server_chain(leaf, &chain[1..], unix_time(now)).map_err(CredentialError::Chain)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(request.key.serialize_der()));
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der)
            .map_err(|error| CredentialError::Key(error.to_string()))?;
        Ok(Credentials { facts, certified: Arc::new(CertifiedKey::new(chain, key)), not_before, not_after })
    }

    /// The SPIFFE ID in the certificate.
    pub fn uri(&self) -> &str {
        &self.facts.uris[0]
    }

    /// Lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.facts.serial
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When the first certificate of the chain expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// Leaf and intermediates, as sent in a handshake.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The names from the leaf's issuer up to the root.
    pub fn issuers(&self) -> Vec<String> {
        self.chain()
            .iter()
            .filter_map(|certificate| Facts::read(certificate).ok())
            .map(|facts| facts.issuer)
            .collect()
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} serial {} until {}", self.uri(), self.serial(), rfc3339(self.not_after))
    }
}

/// The trusted roots. Several while one replaces another.
#[derive(Debug)]
pub struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
    client_chain: Arc<dyn ClientCertVerifier>,
}

impl Roots {
    /// At least one certificate, each usable as a trust anchor; duplicates are dropped.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Roots, CredentialError> {
        let mut store = RootCertStore::empty();
        let mut kept: Vec<CertificateDer<'static>> = Vec::new();
        for certificate in certificates {
            if !kept.contains(&certificate) {
                store.add(certificate.clone()).map_err(CredentialError::Chain)?;
                kept.push(certificate);
            }
        }
        if kept.is_empty() {
            return Err(CredentialError::NoRoot);
        }
        let store = Arc::new(store);
        let client_chain =
            rustls::server::WebPkiClientVerifier::builder_with_provider(store.clone(), provider().clone())
                .build()
                .map_err(|error| CredentialError::Key(error.to_string()))?;
        Ok(Roots { certificates: kept, store, client_chain })
    }

    /// The roots of a PEM file.
    pub fn from_pem(pem: &[u8]) -> Result<Roots, CredentialError> {
        Roots::new(read_pem(pem)?)
    }

    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// These roots and those of `other`.
    pub fn union(&self, other: &Roots) -> Result<Roots, CredentialError> {
        Roots::new(self.certificates.iter().chain(&other.certificates).cloned().collect())
    }

    pub(super) fn verify_server_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        let leaf = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.store, intermediates, now, algorithms.all)
    }

    pub(crate) fn verify_client_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.client_chain.verify_client_cert(leaf, intermediates, now).map(|_| ())
    }
}

/// Splits a CA's answer (leaf first, root last; several roots while they overlap) into the chain to show and the roots.
pub fn split_chain(
    pems: &[String],
) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), CredentialError> {
    let (mut chain, mut roots) = (Vec::new(), Vec::new());
    for pem in pems {
        for certificate in read_pem(pem.as_bytes())? {
            if !chain.is_empty() && Facts::read(&certificate)?.self_issued {
                roots.push(certificate);
            } else {
                chain.push(certificate);
            }
        }
    }
    if roots.is_empty() { Err(CredentialError::NoRoot) } else { Ok((chain, roots)) }
}

/// The credentials of one identity as they are now, and the roots as they are now.
///
/// TLS configurations read both during each handshake. Empty before the first certificate and after the identity was
/// forgotten; then handshakes fail.
#[derive(Debug)]
pub struct Live {
    identity: SpiffeId,
    credentials: ArcSwapOption<Credentials>,
    roots: Arc<ArcSwap<Roots>>,
}

impl Live {
    pub fn new(
        identity: SpiffeId,
        credentials: Option<Arc<Credentials>>,
        roots: Arc<ArcSwap<Roots>>,
    ) -> Live {
        Live { identity, credentials: ArcSwapOption::new(credentials), roots }
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// What may be shown now: never an expired certificate.
    pub fn credentials(&self) -> Option<Arc<Credentials>> {
        self.credentials.load_full().filter(|credentials| credentials.is_valid_at(SystemTime::now()))
    }

    /// What was last obtained, valid or not; for reports.
    pub fn last(&self) -> Option<Arc<Credentials>> {
        self.credentials.load_full()
    }

    pub fn roots(&self) -> Arc<Roots> {
        self.roots.load_full()
    }

    /// Shows `credentials` from the next handshake on; `None` ends all handshakes.
    pub fn replace(&self, credentials: Option<Arc<Credentials>>) {
        self.credentials.store(credentials);
    }
}

fn unix_time(moment: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::request::SigningRequest;
    use crate::ca::{self, Authority, Subject};
    use std::time::Duration;

    const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

    fn authority() -> (tempfile::TempDir, Authority) {
        let dir = tempfile::tempdir().unwrap();
        ca::init(dir.path(), &Default::default()).unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        (dir, authority)
    }

    /// What an authority answers to a request for `cart`, an hour long.
    fn answer(authority: &Authority, request: &KeyRequest) -> Vec<CertificateDer<'static>> {
        let csr = SigningRequest::from_pem(&request.csr_pem().unwrap()).unwrap();
        let subject = Subject::Workload(CART.parse().unwrap());
        let issued = authority.issue(&subject, &csr.public_key, Duration::from_secs(3600)).unwrap();
        split_chain(&issued.chain).unwrap().0
    }

    #[test]
    fn a_good_answer_is_taken_and_a_bad_one_says_why() {
        let (_dir, ca) = authority();
        let (_other_dir, other) = authority();
        let request = KeyRequest::new(CART).unwrap();
        let chain = answer(&ca, &request);
        let now = SystemTime::now();
        let (hour, day) = (Duration::from_secs(3600), Duration::from_secs(86_400));
        assert_eq!(Credentials::new(&request, chain.clone(), &ca.roots(), now).unwrap().uri(), CART);

        let refused = |request: &KeyRequest, chain: &[CertificateDer<'static>], roots: &Roots, now| {
            Credentials::new(request, chain.to_vec(), roots, now).unwrap_err().to_string()
        };
        let slow = refused(&request, &chain, &ca.roots(), now - hour);
        assert!(slow.contains("valid only from") && slow.contains("check the clocks"), "{slow}");
        let fast = refused(&request, &chain, &ca.roots(), now + day);
        assert!(fast.contains("expired at") && fast.contains("check the clocks"), "{fast}");
        let foreign = refused(&request, &chain, &other.roots(), now);
        assert!(foreign.contains("does not chain to a trusted root"), "{foreign}");
        let key = refused(&KeyRequest::new(CART).unwrap(), &chain, &ca.roots(), now);
        assert!(key.contains("for another key"), "{key}");
        let db = KeyRequest::with_key("spiffe://cluster.local/ns/shop/sa/db", &request.key_pem()).unwrap();
        let identity = refused(&db, &chain, &ca.roots(), now);
        assert!(
            identity.contains("shop/sa/cart\"], not for spiffe://cluster.local/ns/shop/sa/db"),
            "{identity}"
        );
        assert!(
            refused(&request, &chain[..1], &ca.roots(), now).contains("does not chain"),
            "intermediate missing"
        );
        assert!(refused(&request, &[], &ca.roots(), now).contains("no certificate"));
    }

    #[test]
    fn an_answer_is_split_into_chain_and_roots() {
        let (_dir, ca) = authority();
        let request = KeyRequest::new(CART).unwrap();
        let csr = SigningRequest::from_pem(&request.csr_pem().unwrap()).unwrap();
        let issued =
            ca.issue(&Subject::Workload(CART.parse().unwrap()), &csr.public_key, Duration::from_secs(60));
        let pems = issued.unwrap().chain;
        let (chain, roots) = split_chain(&pems).unwrap();
        assert_eq!((chain.len(), roots.as_slice()), (2, ca.roots().certificates()));
        // As one text, as some servers answer.
        assert_eq!(split_chain(&[pems.concat()]).unwrap().0, chain);
        assert!(matches!(split_chain(&pems[..2]), Err(CredentialError::NoRoot)));
        assert!(matches!(split_chain(&["rubbish".to_owned()]), Err(CredentialError::Read(ReadError::Empty))));
    }
}
