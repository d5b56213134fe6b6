//! The user-space datapath: captured connections go out through mutual TLS, tunnels come in and reach the application.
//!
//! A connection travels `listen -> outbound -> tunnel` on the client's node and `listen -> inbound` on the server's;
//! [`copy`] moves its bytes, [`registry`] knows it while it lives, [`record`] tells about it.
//!
//! What it does not do: decide policy ([`View::check`] does), move identities ([`crate::identity`]), or touch the kernel
//! other than by sockets and [`Datapath`].

mod copy;
pub mod datapath;
pub mod drain;
mod hbone;
mod inbound;
mod listen;
mod outbound;
pub mod record;
pub mod registry;
pub mod sock;
mod tunnel;
pub mod view;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::sync::watch;
use tokio::task::JoinError;

pub use datapath::Datapath;
pub use listen::PodProxy;
pub use record::{ConnectionEvent, Happening, Problem, ProblemKind, Reason, ReasonKind, Recorder, Reporter};
pub use registry::{Connection, Registry};
pub use view::{Access, Verdict, View, Workload};

use crate::identity::{Live, tls};
use crate::netns::Netns;

/// A workload of this node, as the proxy serves it. Made anew when its identity or addresses change.
pub struct Pod {
    /// Who it is.
    pub workload: Arc<Workload>,
    /// Where it is.
    pub netns: Arc<Netns>,
    live: Arc<Live>,
    server_config: Arc<ServerConfig>,
    unread: OnceLock<copy::Budget>,
}

impl Pod {
    /// `live` holds the certificate of the workload's identity.
    pub fn new(workload: Arc<Workload>, netns: Arc<Netns>, live: Arc<Live>) -> Pod {
        let server_config = tls::server_config(live.clone());
        Pod { workload, netns, live, server_config, unread: OnceLock::new() }
    }
}

impl Pod {
    fn unread(&self, settings: &Settings) -> &copy::Budget {
        self.unread.get_or_init(|| copy::Budget::new(settings.unread_bytes))
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.workload.namespace, self.workload.name)
    }
}

/// Limits and times. The defaults are meant to be kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Captured connections per workload; more wait in the listener's queue. Below the 28,000 ports of one address.
    pub outbound_connections: usize,
    /// Tunnels (not streams) per workload; more wait in the listener's queue.
    pub inbound_tunnels: usize,
    /// Bytes per workload that arrived for its applications and that they do not read.
    pub unread_bytes: usize,
    /// For one TCP connect, of a tunnel or to an application.
    pub connect_timeout: Duration,
    /// For a TLS handshake, so that silent peers cannot hold tunnels.
    pub handshake_timeout: Duration,
    /// After so long without streams a pooled tunnel closes.
    pub idle_close: Duration,
    /// A pooled tunnel older than this takes no new streams. Less than half of a certificate's default life (1 h), so a
    /// certificate that was replaced at half-life is never used after its expiry.
    pub tunnel_age: Duration,
    /// Pause between pings on a tunnel.
    pub ping_pause: Duration,
    /// A tunnel whose ping is not answered in this time is given up.
    pub ping_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            outbound_connections: 10_000,
            inbound_tunnels: 4_096,
            unread_bytes: 512 << 20,
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            idle_close: Duration::from_secs(300),
            tunnel_age: Duration::from_secs(20 * 60),
            ping_pause: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
        }
    }
}

/// What the proxies of all workloads share.
pub struct Proxy {
    settings: Settings,
    datapath: Arc<dyn Datapath>,
    registry: Arc<Registry>,
    recorder: Arc<dyn Recorder>,
    view: watch::Receiver<Arc<dyn View>>,
    tunnels: tunnel::Pool,
}

impl Proxy {
    /// Whoever publishes to `view` calls [`Registry::recheck`] right after.
    pub fn new(
        settings: Settings,
        datapath: Arc<dyn Datapath>,
        view: watch::Receiver<Arc<dyn View>>,
        recorder: Arc<dyn Recorder>,
    ) -> Arc<Proxy> {
        let tunnels = tunnel::Pool::new(settings.clone(), datapath.clone(), recorder.clone());
        let registry = Arc::new(Registry::new(recorder.clone()));
        Arc::new(Proxy { settings, datapath, registry, recorder, view, tunnels })
    }

    /// Serves a workload until the handle is stopped or the agent drains. On a tokio runtime.
    pub fn serve(self: &Arc<Self>, pod: Pod, drain: drain::Watch) -> PodProxy {
        PodProxy::start(self.clone(), Arc::new(pod), drain)
    }

    /// The living connections.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Pooled connections to other agents.
    pub fn pooled_tunnels(&self) -> usize {
        self.tunnels.len()
    }

    fn view(&self) -> Arc<dyn View> {
        self.view.borrow().clone()
    }

    fn problem(&self, pod: &Pod, kind: ProblemKind, text: String) {
        self.recorder.problem(Problem { workload: pod.workload.full_name(), kind, text });
    }

    /// A connection's task ended; a panic cost that connection, and is told.
    fn joined(&self, pod: &Pod, done: Result<(), JoinError>) {
        if let Err(error) = done
            && error.is_panic()
        {
            self.problem(pod, ProblemKind::Panic, format!("a connection's task failed: {error}"));
        }
    }
}
