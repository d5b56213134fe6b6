//! A CA that serves, nodes that ask it, and certificates that no CA of ours would sign.

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use weft_agent::ca::{self, Authority, Placement};
use weft_agent::identity::{
    CaClient, CaClientConfig, CertStore, LocalCa, NodeName, Signer, SpiffeId, TrustDomain,
};

pub(crate) const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
pub(crate) const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub(crate) fn ids(texts: &[&str]) -> BTreeSet<SpiffeId> {
    texts.iter().map(|text| id(text)).collect()
}

pub(crate) fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

/// A CA directory and, while it runs, its server. Node `a` has the workload `cart`, node `b` has `db`.
pub(crate) struct TestCa {
    pub(crate) dir: TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) placement: watch::Sender<Arc<Placement>>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl TestCa {
    pub(crate) async fn start() -> TestCa {
        let dir = tempfile::tempdir().unwrap();
        ca::init(dir.path(), &TrustDomain::default()).unwrap();
        let placement = Placement::from([(node("a"), ids(&[CART])), (node("b"), ids(&[DB]))]);
        let mut ca = TestCa {
            dir,
            address: ([127, 0, 0, 1], 0).into(),
            placement: watch::channel(Arc::new(placement)).0,
            running: None,
        };
        ca.resume().await;
        ca
    }

    /// Serves (again) on the same address.
    pub(crate) async fn resume(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let authority = Arc::new(Authority::open(self.dir.path()).unwrap());
        let (stop, stopped) = oneshot::channel();
        let placement = self.placement.subscribe();
        let task = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            ca::serve(authority, listener, placement, shutdown).await.unwrap();
        });
        self.running = Some((stop, task));
    }

    pub(crate) async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.send(()).unwrap();
        task.await.unwrap();
    }

    /// The file of the only root.
    pub(crate) fn root(&self) -> PathBuf {
        root_of(self.dir.path())
    }

    pub(crate) fn token(&self, name: &str) -> String {
        ca::create_token(self.dir.path(), &node(name), Duration::from_secs(60)).unwrap()
    }

    /// A node with a state directory of its own.
    pub(crate) fn node(&self, name: &str) -> TestNode {
        let state = tempfile::tempdir().unwrap();
        let token = state.path().join("token");
        write_token(&token, self.token(name));
        TestNode {
            config: CaClientConfig {
                url: format!("https://{}", self.address),
                ca_root: self.root(),
                token: Some(token),
                state_dir: state.path().join("state"),
                node: node(name),
                trust_domain: TrustDomain::default(),
                cluster_id: "Kubernetes".to_owned(),
                node_ttl: None,
            },
            _state: state,
        }
    }

    pub(crate) fn audit(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit.log")).unwrap_or_default()
    }
}

pub(crate) struct TestNode {
    pub(crate) config: CaClientConfig,
    _state: TempDir,
}

impl TestNode {
    pub(crate) fn client(&self) -> CaClient {
        CaClient::new(self.config.clone()).unwrap()
    }

    pub(crate) fn store(&self, ttl: Duration, local: &[&str]) -> Arc<CertStore> {
        let store = CertStore::new(Signer::Remote(self.client().into()), ttl).unwrap();
        store.set_local(&ids(local));
        store
    }
}

/// A store that signs in process with the CA of `dir`.
pub(crate) fn local_store(dir: &Path, local: &[&str]) -> Arc<CertStore> {
    let authority = Arc::new(Authority::open(dir).unwrap());
    let signer = Signer::Local(LocalCa::new(authority, node("a")));
    let store = CertStore::new(signer, Duration::from_secs(3600)).unwrap();
    store.set_local(&ids(local));
    store
}

pub(crate) fn root_of(dir: &Path) -> PathBuf {
    let mut files = dir.join("roots").read_dir().unwrap();
    files.next().unwrap().unwrap().path()
}

/// A leaf under the intermediate of `dir`, changed by `change`: what a stolen or broken CA might sign.
pub(crate) fn forge(
    dir: &Path,
    uris: &[&str],
    change: impl FnOnce(&mut CertificateParams),
) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let intermediate = std::fs::read_to_string(dir.join("intermediate.pem")).unwrap();
    let ca_key = KeyPair::from_pem(&std::fs::read_to_string(dir.join("intermediate.key")).unwrap()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&intermediate, ca_key).unwrap();
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + Duration::from_secs(60)).into();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    let chain = vec![leaf.der().clone(), CertificateDer::from_pem_slice(intermediate.as_bytes()).unwrap()];
    (chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()))
}

/// Writes a token as it must lie: for its owner only.
pub(crate) fn write_token(path: &Path, token: impl AsRef<str>) {
    std::fs::write(path, token.as_ref()).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Waits up to ten seconds for `condition`.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within ten seconds: {what}");
}
