//! The CA's listener: TLS under the CA's own root, client certificates optional (a joining node has none yet).

use super::CaError;
use super::authority::{Authority, MAX_TTL};
use super::decide::{Placement, Subject};
use super::proto::istio_certificate_service_server::IstioCertificateServiceServer;
use super::service::Service;
use crate::identity::credentials::{KeyRequest, split_chain};
use crate::identity::tls::{server_config_with, supported_schemes, verify_signature};
use crate::identity::{Credentials, Refusal};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved, SignatureScheme};
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::warn;

/// Connections at once, handshakes included; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// A handshake that takes longer is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A request that takes longer is given up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections are closed after this long, so that certificates are verified anew.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(600);
/// Requests at once on one connection.
const MAX_STREAMS: u32 = 64;
/// Bytes of a request: a signing request and an identity need less than 4 KiB.
const MAX_MESSAGE_LEN: usize = 32 * 1024;

/// Serves until `shutdown`, then finishes the requests it has.
pub async fn serve(
    authority: Arc<Authority>,
    listener: TcpListener,
    placement: watch::Receiver<Arc<Placement>>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let own = OwnCertificate::new(authority.clone()).map_err(io::Error::other)?;
    let verifier = NodeVerifier { authority: authority.clone() };
    let config = server_config_with(Arc::new(verifier), Arc::new(own));
    let acceptor = TlsAcceptor::from(Arc::new(config));

    let service = IstioCertificateServiceServer::new(Service::new(authority, placement))
        .max_decoding_message_size(MAX_MESSAGE_LEN);
    let (accepted, incoming) = mpsc::channel(16);
    let (stop, mut stopped) = watch::channel(false);
    let server = tonic::transport::Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .max_connection_age(MAX_CONNECTION_AGE)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .http2_max_header_list_size(16 * 1024)
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        });
    let accepting = accept(listener, acceptor, accepted, shutdown);
    let (accepting, served) = tokio::join!(
        async {
            let result = accepting.await;
            let _ = stop.send(true);
            result
        },
        server
    );
    accepting?;
    served.map_err(io::Error::other)
}

/// Accepts and shakes hands until `shutdown`.
async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    accepted: mpsc::Sender<io::Result<Connection>>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut handshakes = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            () = &mut shutdown => return Ok(()),
            Some(_) = handshakes.join_next() => continue,
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => (place, stream),
                Err(error) => {
                    // Out of descriptors or memory; what was accepted goes on meanwhile.
                    warn!("accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        handshakes.spawn(async move {
            let peer = stream.peer_addr().map(|address| address.to_string()).unwrap_or_default();
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let _ = accepted.send(Ok(Connection { stream, _place: place })).await;
                }
                Ok(Err(error)) => warn!("{peer}: {}", Refusal::from(&error)),
                Err(_) => {
                    warn!("{peer}: no TLS handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())
                }
            }
        });
    }
}

/// The CA's own certificate: signed by itself, renewed at half-life when a handshake asks for it, or when the directory
/// changed.
struct OwnCertificate {
    authority: Arc<Authority>,
    current: Mutex<Own>,
}

struct Own {
    credentials: Credentials,
    /// Under these roots; others mean that the directory was rotated.
    roots: Arc<crate::identity::Roots>,
    renew_at: SystemTime,
}

impl OwnCertificate {
    fn new(authority: Arc<Authority>) -> Result<OwnCertificate, CaError> {
        let current = Mutex::new(Own::sign(&authority)?);
        Ok(OwnCertificate { authority, current })
    }
}

impl Own {
    fn sign(authority: &Authority) -> Result<Own, CaError> {
        let roots = authority.roots();
        let failed = |error: &dyn ToString| CaError::Sign(error.to_string());
        let request = KeyRequest::new(&authority.trust_domain().ca_uri()).map_err(|e| failed(&e))?;
        let csr = super::request::SigningRequest::from_pem(&request.csr_pem().map_err(|e| failed(&e))?)
            .map_err(|e| failed(&e))?;
        let issued = authority.issue(&Subject::Ca, &csr.public_key, MAX_TTL)?;
        let (chain, _) = split_chain(&issued.chain).map_err(|e| failed(&e))?;
        let now = SystemTime::now();
        let credentials = Credentials::new(&request, chain, &roots, now).map_err(|e| failed(&e))?;
        let left = credentials.not_after().duration_since(now).unwrap_or_default();
        Ok(Own { credentials, roots, renew_at: now + left / 2 })
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Err(error) = self.authority.refresh() {
            warn!("{error}; going on with what was read before");
        }
        let mut own = self.current.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if SystemTime::now() >= own.renew_at || !Arc::ptr_eq(&own.roots, &self.authority.roots()) {
            match Own::sign(&self.authority) {
                Ok(renewed) => *own = renewed,
                Err(error) => warn!("its own certificate: {error}"),
            }
        }
        own.credentials.is_valid_at(SystemTime::now()).then(|| own.credentials.certified())
    }
}

impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnCertificate")
    }
}

/// Verifies a caller's certificate if it shows one. Which identity it has is asked per request.
struct NodeVerifier {
    authority: Arc<Authority>,
}

impl fmt::Debug for NodeVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeVerifier")
    }
}

impl ClientCertVerifier for NodeVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.authority.roots().verify_client_chain(end_entity, intermediates, now)?;
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

/// A connection that holds its place until it is closed.
struct Connection {
    stream: TlsStream<TcpStream>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = <TlsStream<TcpStream> as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
