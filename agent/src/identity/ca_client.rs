//! Asks a CA over the network, weft's own or istiod, for certificates.
//!
//! With weft's CA a node first redeems a join token for its own certificate, then proves itself by that. The node's key
//! and certificate lie in one file of mode 0600 in the state directory, so that a restarted agent needs no new token.
//! With any other token (a projected Kubernetes token for istiod) every request carries the token, read anew each time.
//!
//! The CA's server is trusted if its chain ends at a root of `--ca-root` or one that the CA has sent before, and its
//! certificate is for the trust domain's CA or for the host in the URL. A workload's certificate is neither.

use super::ca_stream::CaStream;
use super::ca_trust::{CaVerifier, Shown};
use super::certificate::read_pem;
use super::credentials::{Credentials, KeyRequest, Roots, split_chain};
use super::node_file::{self, JOIN_PREFIX, NodeFile};
use super::refusal::Refusal;
use super::signer::SignError;
use super::spiffe::{NodeName, TrustDomain};
use super::store::{CertStatus, half_life, pause};
use super::tls::client_config_with;
use crate::ca::proto::IstioCertificateRequest;
use crate::ca::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use hyper_util::rt::TokioIo;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tracing::warn;

/// Lifetime that a node asks for its own certificate: after a longer outage it needs a new join token.
const NODE_TTL: Duration = Duration::from_secs(24 * 3600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of an answer: a chain with several roots is some 10 KiB.
const MAX_ANSWER_LEN: usize = 256 * 1024;

/// Where the CA is and how to prove who we are.
#[derive(Clone, Debug)]
pub struct CaClientConfig {
    /// `https://host:port`.
    pub url: String,
    /// PEM file of the roots that the CA's server is verified against; read at each connection.
    pub ca_root: PathBuf,
    /// File of a join token, or of a bearer token for istiod.
    pub token: Option<PathBuf>,
    /// Holds the node's key and certificate.
    pub state_dir: PathBuf,
    pub node: NodeName,
    pub trust_domain: TrustDomain,
    /// Sent as `clusterid`, as istiod wants it.
    pub cluster_id: String,
    /// Lifetime asked for the node's own certificate; a day when `None`.
    pub node_ttl: Option<Duration>,
}

/// A client of one CA.
pub struct CaClient {
    config: CaClientConfig,
    host: String,
    port: u16,
    node: tokio::sync::Mutex<()>,
    state: Mutex<NodeState>,
    learned: Mutex<Option<Roots>>,
}

/// The node's own certificate and how its renewal goes.
#[derive(Clone)]
struct NodeState {
    credentials: Option<Arc<Credentials>>,
    due: SystemTime,
    failures: u32,
    error: Option<SignError>,
}

/// How one request is authenticated.
enum Auth {
    Certificate(Arc<Credentials>),
    Bearer(String),
}

impl CaClient {
    /// Reads what an earlier run left in the state directory. Asks nothing yet.
    pub fn new(config: CaClientConfig) -> Result<CaClient, SignError> {
        let (host, port) = host_and_port(&config.url)?;
        let file = NodeFile::new(&config.state_dir);
        let learned = file.read_roots()?;
        let client = CaClient {
            host,
            port,
            node: tokio::sync::Mutex::new(()),
            state: Mutex::new(NodeState {
                credentials: None,
                due: SystemTime::now(),
                failures: 0,
                error: None,
            }),
            learned: Mutex::new(learned),
            config,
        };
        client.adopt(&file)?;
        Ok(client)
    }

    /// Takes over the certificate that lies in the state directory, if it is still good.
    fn adopt(&self, file: &NodeFile) -> Result<(), SignError> {
        let Some((request, chain)) = file.read(&self.uri())? else { return Ok(()) };
        if chain.is_empty() {
            return Ok(());
        }
        let now = SystemTime::now();
        let mut state = self.node_state();
        match Credentials::new(&request, chain, &self.trusted_roots()?, now) {
            Ok(credentials) => {
                state.due = half_life(&credentials, now);
                state.credentials = Some(Arc::new(credentials));
            }
            Err(error) => warn!("the node's certificate in {} is of no use: {error}", file.path().display()),
        }
        Ok(())
    }

    /// The roots of `--ca-root` and those that the CA has sent.
    pub(super) fn trusted_roots(&self) -> Result<Roots, SignError> {
        let path = &self.config.ca_root;
        let failed = |cause: String| SignError::File { path: path.display().to_string(), cause };
        let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let roots = read_pem(&pem)
            .map_err(|error| failed(error.to_string()))
            .and_then(|certificates| Roots::new(certificates).map_err(|error| failed(error.to_string())))?;
        match &*self.learned.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(learned) => roots.union(learned).map_err(SignError::from),
            None => Ok(roots),
        }
    }

    /// A chain for a workload's request.
    pub(super) async fn sign(&self, request: &KeyRequest, ttl: Duration) -> Result<Vec<String>, SignError> {
        let auth = match self.token()? {
            Some(token) if !token.starts_with(JOIN_PREFIX) => Auth::Bearer(token),
            token => Auth::Certificate(self.node_credentials(token).await?),
        };
        let result = self.ask(&auth, request, ttl).await;
        if matches!((&auth, &result), (Auth::Certificate(_), Err(SignError::Tls { .. }))) {
            // Another CA than the one that signed for this node: have the node renew, or join again by its token.
            let mut state = self.node_state();
            if state.failures == 0 {
                state.due = SystemTime::now();
            }
        }
        result
    }

    /// Renews the node's certificate if it is time; says when to come back. Without a node certificate nothing is done:
    /// the first workload brings it.
    pub(super) async fn maintain(&self) -> Option<SystemTime> {
        let state = self.node_state().clone();
        state.credentials?;
        if state.due <= SystemTime::now() {
            let token = self.token().ok().flatten();
            // Its error is in the state.
            let _ = self.node_credentials(token).await;
        }
        Some(self.node_state().due)
    }

    pub(super) fn status(&self) -> Option<CertStatus> {
        let state = self.node_state().clone();
        if state.credentials.is_none() && state.error.is_none() {
            return None;
        }
        let error = state.error.as_ref().map(SignError::to_string);
        Some(CertStatus::new(&self.uri(), state.credentials.as_deref(), state.due, state.failures, error))
    }

    /// The node's valid certificate: the present one, renewed when it is time, or a new one for the join token.
    async fn node_credentials(&self, token: Option<String>) -> Result<Arc<Credentials>, SignError> {
        let _one_at_a_time = self.node.lock().await;
        let now = SystemTime::now();
        let state = self.node_state().clone();
        let valid = state.credentials.filter(|credentials| credentials.is_valid_at(now));
        if now < state.due {
            match (valid, state.error) {
                (Some(credentials), _) => return Ok(credentials),
                // Others of this node's workloads have just heard the same.
                (None, Some(error)) => return Err(error),
                (None, None) => return self.renew(None, token).await,
            }
        }
        match self.renew(valid.clone(), token).await {
            Err(error) => valid.ok_or(error),
            renewed => renewed,
        }
    }

    async fn renew(
        &self,
        valid: Option<Arc<Credentials>>,
        token: Option<String>,
    ) -> Result<Arc<Credentials>, SignError> {
        let result = self.request_node_certificate(valid.clone(), token).await;
        let now = SystemTime::now();
        let mut state = self.node_state();
        match &result {
            Ok(credentials) => {
                let due = half_life(credentials, now);
                *state = NodeState { credentials: Some(credentials.clone()), due, failures: 0, error: None };
            }
            Err(error) => {
                if state.error.as_ref() != Some(error) {
                    warn!("no new certificate for this node: {error}");
                }
                state.due = now + pause(state.failures, valid.as_deref(), now);
                state.failures = state.failures.saturating_add(1);
                state.error = Some(error.clone());
            }
        }
        result
    }

    async fn request_node_certificate(
        &self,
        valid: Option<Arc<Credentials>>,
        token: Option<String>,
    ) -> Result<Arc<Credentials>, SignError> {
        let file = NodeFile::new(&self.config.state_dir);
        let token = token.filter(|token| token.starts_with(JOIN_PREFIX));
        let renewed = match valid {
            Some(credentials) => {
                let request = KeyRequest::new(&self.uri())?;
                let auth = Auth::Certificate(credentials);
                Some(self.node_certificate(&file, auth, request).await)
            }
            None => None,
        };
        match (renewed, token) {
            // The CA does not know our certificate any more, but there is a token to join with.
            (Some(Err(error @ (SignError::Tls { .. } | SignError::Refused { .. }))), Some(token)) => {
                self.join(&file, token).await.map_err(|_| error)
            }
            (Some(renewed), _) => renewed,
            (None, Some(token)) => self.join(&file, token).await,
            (None, None) => Err(SignError::NoToken(self.config.node.clone())),
        }
    }

    /// The key is on the disk before the token is used: if the answer is lost, the same key may ask again.
    async fn join(&self, file: &NodeFile, token: String) -> Result<Arc<Credentials>, SignError> {
        let request = file.key_for_joining(&self.uri())?;
        self.node_certificate(file, Auth::Bearer(token), request).await
    }

    async fn node_certificate(
        &self,
        file: &NodeFile,
        auth: Auth,
        request: KeyRequest,
    ) -> Result<Arc<Credentials>, SignError> {
        let pems = self.ask(&auth, &request, self.config.node_ttl.unwrap_or(NODE_TTL)).await?;
        let (chain, roots) = split_chain(&pems)?;
        let credentials = Credentials::new(&request, chain, &Roots::new(roots)?, SystemTime::now())?;
        file.write(&request, credentials.chain())?;
        Ok(Arc::new(credentials))
    }

    /// One request over a connection of its own: certificates and roots are those of this moment.
    async fn ask(&self, auth: &Auth, request: &KeyRequest, ttl: Duration) -> Result<Vec<String>, SignError> {
        let (channel, broke) = self.connect(auth).await?;
        let identity = Value { kind: Some(Kind::StringValue(request.uri().to_owned())) };
        let metadata = Struct { fields: [("ImpersonatedIdentity".to_owned(), identity)].into() };
        let mut message = Request::new(IstioCertificateRequest {
            csr: request.csr_pem()?,
            validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(metadata),
        });
        let header =
            |text: &str| text.parse().map_err(|_| SignError::Key("a header cannot hold it".to_owned()));
        if let Auth::Bearer(token) = auth {
            let mut value: tonic::metadata::MetadataValue<_> = header(&format!("Bearer {token}"))?;
            value.set_sensitive(true);
            message.metadata_mut().insert("authorization", value);
        }
        message.metadata_mut().insert("clusterid", header(&self.config.cluster_id)?);
        let mut client =
            IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_LEN);
        let answer =
            client.create_certificate(message).await.map_err(|status| self.refused(&status, broke.get()))?;
        let pems = answer.into_inner().cert_chain;
        self.learn(&pems)?;
        Ok(pems)
    }

    async fn connect(&self, auth: &Auth) -> Result<(Channel, Arc<OnceLock<Refusal>>), SignError> {
        let unreachable = |error: io::Error| SignError::Unreachable {
            url: self.config.url.clone(),
            cause: error.to_string(),
        };
        let timeout = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer");
        let dial = TcpStream::connect((self.host.as_str(), self.port));
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, dial)
            .await
            .map_err(timeout)
            .and_then(|result| result)
            .map_err(unreachable)?;
        let verifier = CaVerifier::new(self.trusted_roots()?, &self.config.trust_domain);
        let shown = match auth {
            Auth::Certificate(credentials) => Shown::new(Some(credentials)),
            Auth::Bearer(_) => Shown::new(None),
        };
        let config = client_config_with(Arc::new(verifier), Arc::new(shown));
        let name = self
            .host
            .clone()
            .try_into()
            .map_err(|_| SignError::Key(format!("{:?} is no host name", self.host)))?;
        let handshake = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(timeout)
            .and_then(|result| result)
            .map_err(|error| self.broken(Refusal::from(&error)))?;

        // The channel is given the stream that exists; it never dials by itself.
        let (stream, broke) = CaStream::new(stream);
        let stream = Mutex::new(Some(TokioIo::new(stream)));
        let connector = tower::service_fn(move |_: http::Uri| {
            let stream = stream.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
        });
        let channel = Endpoint::from_shared(format!("http://{}", authority(&self.host, self.port)))
            .map_err(|error| SignError::Key(error.to_string()))?
            .timeout(REQUEST_TIMEOUT)
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                self.broken(broke.get().cloned().unwrap_or(Refusal::Connection(error.to_string())))
            })?;
        Ok((channel, broke))
    }

    /// What a failed call means; `broke` says whether the stream below it broke, and why.
    fn refused(&self, status: &Status, broke: Option<&Refusal>) -> SignError {
        let cause = bounded(status.message());
        match (broke, status.code()) {
            (Some(refusal), _) => self.broken(refusal.clone()),
            // Made by the client itself when the connection ended.
            (None, _) if status.source().is_some() => self.broken(Refusal::Connection(cause)),
            (None, Code::Unavailable | Code::DeadlineExceeded) => self.broken(Refusal::Connection(cause)),
            (None, _) => SignError::Refused { url: self.config.url.clone(), cause },
        }
    }

    fn broken(&self, refusal: Refusal) -> SignError {
        let url = self.config.url.clone();
        match refusal {
            Refusal::Connection(cause) => SignError::Unreachable { url, cause },
            refusal => SignError::Tls { url, cause: refusal.to_string() },
        }
    }

    /// Remembers the roots of an answer for verifying the CA itself, across restarts too.
    fn learn(&self, pems: &[String]) -> Result<(), SignError> {
        let roots = Roots::new(split_chain(pems)?.1)?;
        let mut learned = self.learned.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if learned.as_ref().is_none_or(|learned| learned.certificates() != roots.certificates()) {
            if let Err(error) = NodeFile::new(&self.config.state_dir).write_roots(&roots) {
                warn!("the CA's roots are not kept over a restart: {error}");
            }
            *learned = Some(roots);
        }
        Ok(())
    }

    /// The token, if a file is named; a missing file is no error once the node has joined.
    fn token(&self) -> Result<Option<String>, SignError> {
        let Some(path) = &self.config.token else { return Ok(None) };
        node_file::read_token(path, self.node_state().credentials.is_some())
    }

    fn uri(&self) -> String {
        self.config.node.uri(&self.config.trust_domain)
    }

    fn node_state(&self) -> std::sync::MutexGuard<'_, NodeState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn host_and_port(url: &str) -> Result<(String, u16), SignError> {
    let wrong = || SignError::Unreachable {
        url: url.to_owned(),
        cause: "this is no CA address; write https://HOST:PORT".to_owned(),
    };
    let uri: http::Uri = url.parse().map_err(|_| wrong())?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), uri.port_u16().ok_or_else(wrong)?))
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// What of a server's text goes into an error.
fn bounded(text: &str) -> String {
    text.chars().take(300).collect()
}
