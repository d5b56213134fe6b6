//! A server in istiod's shape: a bearer token with every request, a DNS name in its certificate, no node certificates.

use super::fixture::*;
use rcgen::SanType;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use weft_agent::ca::proto::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use weft_agent::ca::proto::{IstioCertificateRequest, IstioCertificateResponse};
use weft_agent::ca::request::SigningRequest;
use weft_agent::ca::{self, Authority, Subject};
use weft_agent::identity::TrustDomain;

struct Istiod {
    authority: Authority,
}

#[tonic::async_trait]
impl IstioCertificateService for Istiod {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header =
            |name| request.metadata().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if header("authorization") != "Bearer a.projected.token" || header("clusterid") != "Kubernetes" {
            return Err(Status::unauthenticated("authentication failure"));
        }
        let message = request.get_ref();
        let fields = &message.metadata.as_ref().unwrap().fields;
        let Some(prost_types::value::Kind::StringValue(asked)) = &fields["ImpersonatedIdentity"].kind else {
            return Err(Status::invalid_argument("no identity"));
        };
        let csr = SigningRequest::from_pem(&message.csr)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let ttl = Duration::from_secs(message.validity_duration as u64);
        let issued = self.authority.issue(&Subject::Workload(id(asked)), &csr.public_key, ttl).unwrap();
        Ok(Response::new(IstioCertificateResponse { cert_chain: issued.chain }))
    }
}

/// Its port, and the directory of its CA. Serves until the runtime ends.
async fn istiod() -> (u16, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    ca::init(dir.path(), &TrustDomain::default()).unwrap();
    let (chain, key) = forge(dir.path(), &["spiffe://cluster.local/ns/istio-system/sa/istiod"], |params| {
        params.subject_alt_names.push(SanType::DnsName("localhost".try_into().unwrap()));
    });
    let acceptor = TlsAcceptor::from(super::handshake::raw_server((chain, key)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (accepted, incoming) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(stream).await {
                accepted.send(Ok::<_, std::io::Error>(stream)).await.unwrap();
            }
        }
    });
    let service =
        IstioCertificateServiceServer::new(Istiod { authority: Authority::open(dir.path()).unwrap() });
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
    (port, dir)
}

#[tokio::test]
async fn a_projected_token_is_shown_with_every_request() {
    let (port, dir) = istiod().await;
    let ours = TestCa::start().await;
    let mut node = ours.node("a");
    node.config.url = format!("https://localhost:{port}");
    node.config.ca_root = root_of(dir.path());
    let token = node.config.token.clone().unwrap();
    write_token(&token, "a.projected.token\n");
    let store = node.store(Duration::from_secs(600), &[CART, DB]);
    assert_eq!(store.credentials(&id(CART)).await.unwrap().uri(), CART);
    assert!(!node.config.state_dir.join("node.pem").exists(), "no node certificate is asked for");

    // The file is read anew: tokens of Kubernetes change.
    write_token(&token, "another.token");
    let error = store.credentials(&id(DB)).await.unwrap_err().to_string();
    assert!(error.contains("authentication failure"), "{error}");
}

#[tokio::test]
async fn its_name_must_be_the_one_dialled() {
    let (port, dir) = istiod().await;
    let ours = TestCa::start().await;
    let mut node = ours.node("a");
    node.config.url = format!("https://127.0.0.1:{port}");
    node.config.ca_root = root_of(dir.path());
    write_token(node.config.token.as_ref().unwrap(), "a.projected.token");
    let error =
        node.store(Duration::from_secs(600), &[CART]).credentials(&id(CART)).await.unwrap_err().to_string();
    assert!(error.contains("or the host 127.0.0.1"), "{error}");
}
