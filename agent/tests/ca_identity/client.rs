//! What an agent says when the CA is not as it should be, and a bare client to ask a CA oddly.

use super::fixture::*;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;
use weft_agent::ca::proto::IstioCertificateRequest;
use weft_agent::ca::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use weft_agent::identity::credentials::KeyRequest;

const TTL: Duration = Duration::from_secs(3600);

/// Asks for `cart` with any certificate (or none), and any text in place of the signing request.
pub(crate) async fn ask_raw(
    ca: &TestCa,
    shown: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    csr: Option<String>,
) -> Result<(), tonic::Status> {
    let builder =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(super::handshake::gullible());
    let mut config = match shown {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(ca.address).await.unwrap();
    let name = ca.address.ip().into();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = stream.lock().unwrap().take().unwrap();
        async move { Ok::<_, std::io::Error>(stream) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://ca");
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let csr = csr.unwrap_or_else(|| KeyRequest::new(CART).unwrap().csr_pem().unwrap());
    let request = IstioCertificateRequest { csr, validity_duration: 60, metadata: None };
    IstioCertificateServiceClient::new(channel).create_certificate(request).await.map(|_| ())
}

#[tokio::test]
async fn each_trouble_with_the_ca_has_its_sentence() {
    let mut ca = TestCa::start().await;
    let error = |node: TestNode| async move {
        node.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap_err().to_string()
    };

    let mut node = ca.node("a");
    node.config.token = None;
    let text = error(node).await;
    assert!(text.contains("weft ca token --node a"), "{text}");

    // A server under another root.
    let elsewhere = TestCa::start().await;
    let mut node = ca.node("a");
    node.config.ca_root = elsewhere.root();
    let text = error(node).await;
    assert!(text.contains("not issued under a root that this node trusts"), "{text}");

    let mut node = ca.node("a");
    node.config.ca_root = "/nonexistent/root.pem".into();
    let text = match weft_agent::identity::CertStore::new(
        weft_agent::identity::Signer::Remote(node.client().into()),
        TTL,
    ) {
        Ok(_) => panic!("there are no roots"),
        Err(error) => error.to_string(),
    };
    assert!(text.contains("/nonexistent/root.pem"), "{text}");

    ca.stop().await;
    let text = error(ca.node("a")).await;
    assert!(text.contains("cannot be reached"), "{text}");
}

#[tokio::test]
async fn a_workload_cannot_pose_as_the_ca() {
    // A server with cart's certificate, at the address where the CA is expected.
    let ca = TestCa::start().await;
    let (chain, key) = forge(ca.dir.path(), &[CART], |_| {});
    let config = super::handshake::raw_server((chain, key));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut node = ca.node("a");
    node.config.url = format!("https://{}", listener.local_addr().unwrap());
    let impostor = async {
        let (stream, _) = listener.accept().await.unwrap();
        assert!(tokio_rustls::TlsAcceptor::from(config).accept(stream).await.is_err());
    };
    let store = node.store(TTL, &[CART]);
    let cart = id(CART);
    let (_, result) = tokio::join!(impostor, store.credentials(&cart));
    let text = result.unwrap_err().to_string();
    assert!(text.contains("expected the CA"), "{text}");
}

#[tokio::test]
async fn many_askers_make_one_request() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    let store = node.store(TTL, &[CART]);
    let mut askers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let store = store.clone();
        askers.spawn(async move { store.credentials(&id(CART)).await.unwrap().serial().to_owned() });
    }
    let serials: std::collections::BTreeSet<_> = askers.join_all().await.into_iter().collect();
    assert_eq!(serials.len(), 1);
    assert_eq!(ca.audit().lines().count(), 2, "one for the node, one for the workload");
}

#[tokio::test]
async fn a_node_whose_ca_was_replaced_joins_the_new_one() {
    let first = TestCa::start().await;
    let mut node = first.node("a");
    node.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap();

    let second = TestCa::start().await;
    node.config.url = format!("https://{}", second.address);
    node.config.ca_root = second.root();
    write_token(node.config.token.as_ref().unwrap(), second.token("a"));
    let store = node.store(TTL, &[CART]);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(store.clone().run(async { drop(stopped.await) }));
    eventually("a certificate of the new CA", || {
        store.status().iter().any(|status| status.spiffe == CART && status.serial.is_some())
    })
    .await;
    stop.send(()).unwrap();
    running.await.unwrap();
}
