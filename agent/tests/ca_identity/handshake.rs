//! Who is accepted, who is refused, and with which sentence.

use super::fixture::*;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, DigitallySignedStruct, NamedGroup, ProtocolVersion, ServerConfig, SignatureScheme,
};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_agent::ca;
use weft_agent::identity::tls::{client_config, peer_spiffe, server_config};
use weft_agent::identity::{Refusal, TrustDomain};

/// What both sides saw: the peer's identity, or why there is none.
type Seen = Result<String, Refusal>;

/// One connection with one byte each way.
async fn connect(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> (Seen, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream =
            TlsAcceptor::from(server).accept(stream).await.map_err(|error| Refusal::from(&error))?;
        let peer = peer_spiffe(stream.get_ref().1)?;
        assert_eq!(stream.get_ref().1.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        assert!(stream.get_ref().1.server_name().is_none());
        stream.write_all(b"x").await.unwrap();
        let _ = stream.read_u8().await;
        Ok(peer.to_string())
    };
    let dial = async {
        let stream = TcpStream::connect(address).await.unwrap();
        // A name, as an address is never sent as SNI.
        let name = ServerName::try_from("db.shop").unwrap();
        let stream = TlsConnector::from(client).connect(name, stream).await;
        let mut stream = stream.map_err(|error| Refusal::from(&error))?;
        stream.read_u8().await.map_err(|error| Refusal::from(&error))?;
        let group = stream.get_ref().1.negotiated_key_exchange_group().map(|group| group.name());
        assert_eq!(group, Some(NamedGroup::X25519MLKEM768));
        let peer = peer_spiffe(stream.get_ref().1)?;
        stream.write_all(b"y").await.unwrap();
        Ok(peer.to_string())
    };
    tokio::join!(serve, dial)
}

fn ca_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    ca::init(dir.path(), &TrustDomain::default()).unwrap();
    dir
}

/// The server of `db` under the CA of `dir`.
async fn db_server(dir: &Path) -> Arc<ServerConfig> {
    server_config(local_store(dir, &[DB]).live(&id(DB)).await.unwrap())
}

/// The client of `cart` under the CA of `dir` that wants to reach `db`.
async fn cart_client(dir: &Path) -> Arc<ClientConfig> {
    client_config(local_store(dir, &[CART]).live(&id(CART)).await.unwrap(), ids(&[DB]))
}

/// A client that shows what it is told to and believes every server.
fn raw_client(shown: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>) -> Arc<ClientConfig> {
    let builder =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(gullible());
    let mut config = match shown {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    Arc::new(config)
}

pub(crate) fn raw_server(
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> Arc<ServerConfig> {
    let mut config =
        ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Believes every server.
pub(crate) fn gullible() -> Arc<dyn ServerCertVerifier> {
    Arc::new(Gullible)
}

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

#[tokio::test]
async fn both_sides_learn_the_other_identity() {
    let dir = ca_dir();
    let (server, client) = connect(db_server(dir.path()).await, cart_client(dir.path()).await).await;
    assert_eq!(server, Ok(CART.to_owned()));
    assert_eq!(client, Ok(DB.to_owned()));
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let dir = ca_dir();
    let (server, client) = connect(db_server(dir.path()).await, raw_client(None)).await;
    assert_eq!(server, Err(Refusal::NoCertificate));
    assert_eq!(client, Err(Refusal::ByPeer("we showed none")));
}

#[tokio::test]
async fn expired_and_not_yet_valid_clients_are_refused() {
    let dir = ca_dir();
    let now = SystemTime::now();
    let expired =
        forge(dir.path(), &[CART], |params| params.not_after = (now - Duration::from_secs(5)).into());
    let (server, client) = connect(db_server(dir.path()).await, raw_client(Some(expired))).await;
    assert!(matches!(&server, Err(Refusal::Expired(_))), "{server:?}");
    assert_eq!(client, Err(Refusal::ByPeer("expired or not valid yet by the peer's clock")));

    let early =
        forge(dir.path(), &[CART], |params| params.not_before = (now + Duration::from_secs(50)).into());
    let (server, _) = connect(db_server(dir.path()).await, raw_client(Some(early))).await;
    let text = server.unwrap_err().to_string();
    assert!(text.contains("not valid yet") && text.contains("clock"), "{text}");
}

#[tokio::test]
async fn a_foreign_root_is_refused_by_both_sides() {
    let (ours, theirs) = (ca_dir(), ca_dir());
    let (server, client) = connect(db_server(ours.path()).await, cart_client(theirs.path()).await).await;
    assert_eq!(client, Err(Refusal::ForeignRoot));
    assert_eq!(server, Err(Refusal::ByPeer("not issued under a root that the peer trusts")));

    let foreign = forge(theirs.path(), &[CART], |_| {});
    let (server, _) = connect(db_server(ours.path()).await, raw_client(Some(foreign))).await;
    assert_eq!(server, Err(Refusal::ForeignRoot));
}

#[tokio::test]
async fn a_client_accepts_only_the_identity_it_expects() {
    let dir = ca_dir();
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let server = raw_server(forge(dir.path(), &[other], |_| {}));
    let (_, client) = connect(server, cart_client(dir.path()).await).await;
    assert_eq!(client, Err(Refusal::UnexpectedIdentity { peer: id(other), expected: vec![id(DB)] }));
}

#[tokio::test]
async fn an_expired_server_is_refused() {
    let dir = ca_dir();
    let past = SystemTime::now() - Duration::from_secs(5);
    let server = raw_server(forge(dir.path(), &[DB], |params| params.not_after = past.into()));
    let (_, client) = connect(server, cart_client(dir.path()).await).await;
    assert!(matches!(&client, Err(Refusal::Expired(_))), "{client:?}");
}

#[tokio::test]
async fn certificates_that_are_no_workloads_are_refused() {
    let dir = ca_dir();
    let server = db_server(dir.path()).await;
    let cases: [(&[&str], &str); 5] = [
        (&[], "has 0 URI names"),
        (&[CART, DB], "has 2 URI names"),
        (&["spiffe://cluster.local/node/a"], "for no workload"),
        (&["spiffe://cluster.local/ca"], "for no workload"),
        (&["spiffe://elsewhere/ns/shop/sa/cart"], "outside the trust domain cluster.local"),
    ];
    for (uris, sentence) in cases {
        let (seen, client) = connect(server.clone(), raw_client(Some(forge(dir.path(), uris, |_| {})))).await;
        let text = seen.unwrap_err().to_string();
        assert!(text.contains(sentence), "{uris:?}: {text}");
        assert_eq!(client, Err(Refusal::ByPeer("not the identity that the peer expects")));
    }
}

#[tokio::test]
async fn a_workload_cannot_sign_certificates() {
    // A leaf used as an intermediate: the chain must not verify.
    let dir = ca_dir();
    let (chain, key) = forge(dir.path(), &[DB], |_| {});
    let issuer_key = rcgen::KeyPair::try_from(key.secret_der()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&chain[0], issuer_key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(CART.try_into().unwrap())];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let leaf_key = rcgen::KeyPair::generate().unwrap();
    let leaf = params.signed_by(&leaf_key, &issuer).unwrap();
    let mut forged = vec![leaf.der().clone()];
    forged.extend(chain);
    let shown = (forged, PrivateKeyDer::Pkcs8(leaf_key.serialize_der().into()));
    let (server, _) = connect(db_server(dir.path()).await, raw_client(Some(shown))).await;
    assert!(server.is_err(), "{server:?}");
}

#[tokio::test]
async fn a_forgotten_identity_shakes_no_hands() {
    let dir = ca_dir();
    let store = local_store(dir.path(), &[DB]);
    let server = server_config(store.live(&id(DB)).await.unwrap());
    store.set_local(&ids(&[]));
    let (seen, _) = connect(server, cart_client(dir.path()).await).await;
    assert_eq!(seen, Err(Refusal::NothingToShow));
    let error = store.credentials(&id(DB)).await.unwrap_err();
    assert_eq!(error.to_string(), format!("{DB} is no workload of this node"));
}
