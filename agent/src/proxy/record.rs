//! What the proxy tells the rest of the agent: one record when a connection opens and one when it ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::view::Workload;
use crate::identity::SpiffeId;

/// At which end of the connection this agent stands, as Istio's label `reporter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// With the client.
    Source,
    /// With the server.
    Destination,
}

impl Reporter {
    /// As in labels and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// Both ends are connected.
    Opened,
    /// An opened connection ended.
    Closed(Reason),
    /// It never opened.
    Refused(Reason),
}

/// Why a connection ended or never began: a kind for counters and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The kind, bounded in number.
    pub kind: ReasonKind,
    /// What exactly; empty for a proper end.
    pub detail: Arc<str>,
}

/// Kinds of [`Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReasonKind {
    /// Both ends finished.
    Finished,
    /// The local application reset its connection.
    AppReset,
    /// The other agent reset the stream, or the tunnel broke.
    TunnelReset,
    /// Policy refused it, or a policy change cut it.
    Policy,
    /// The agent is stopping, or the workload left.
    Stopped,
    /// The agent panicked over it, or its task was aborted.
    Aborted,
    /// Nobody owns the destination address.
    UnknownDestination,
    /// The tunnel could not be opened.
    Tunnel,
    /// The local application does not accept connections.
    Dial,
    /// The other agent sent a request that makes no sense.
    BadRequest,
    /// The workload leaves too much unread.
    Memory,
    /// The kernel could not be told, or did not know.
    Datapath,
}

impl ReasonKind {
    /// As in labels and tables.
    pub const fn name(self) -> &'static str {
        match self {
            ReasonKind::Finished => "finished",
            ReasonKind::AppReset => "app_reset",
            ReasonKind::TunnelReset => "tunnel_reset",
            ReasonKind::Policy => "policy",
            ReasonKind::Stopped => "stopped",
            ReasonKind::Aborted => "aborted",
            ReasonKind::UnknownDestination => "unknown_destination",
            ReasonKind::Tunnel => "tunnel",
            ReasonKind::Dial => "dial",
            ReasonKind::BadRequest => "bad_request",
            ReasonKind::Memory => "memory",
            ReasonKind::Datapath => "datapath",
        }
    }
}

impl Reason {
    /// A reason with its sentence.
    pub fn new(kind: ReasonKind, detail: impl Into<Arc<str>>) -> Reason {
        Reason { kind, detail: detail.into() }
    }
}

/// One record. Every connection of the proxy runs inside mutual TLS.
#[derive(Clone, Debug)]
pub struct ConnectionEvent {
    /// Number of the connection on this agent, as in `weft connections`.
    pub id: u64,
    /// Opened, closed or refused.
    pub happening: Happening,
    /// At which end we stand.
    pub reporter: Reporter,
    /// Identity of the client: of the workload here, or of the peer's certificate.
    pub source: SpiffeId,
    /// The client's workload, if exactly one known workload has its identity and address.
    pub source_workload: Option<Arc<Workload>>,
    /// Address of the client.
    pub client: SocketAddr,
    /// The server's workload.
    pub destination: Arc<Workload>,
    /// Address of the server.
    pub target: SocketAddr,
    /// Bytes of the application from client to server.
    pub to_server: u64,
    /// Bytes of the application from server to client.
    pub to_client: u64,
    /// Since the connection began.
    pub duration: Duration,
}

/// A trouble of the proxy that is not about one registered connection.
#[derive(Clone, Debug)]
pub struct Problem {
    /// `namespace/name` of the workload.
    pub workload: Arc<str>,
    /// Kind, for a counter.
    pub kind: ProblemKind,
    /// One sentence that says what is wrong and, where there is something, what to do.
    pub text: String,
}

/// Kinds of [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemKind {
    /// A listener could not be opened, or died.
    Listener,
    /// A captured connection without an original destination, or of a workload without policy.
    Capture,
    /// A tunnel handshake failed: no certificate, a wrong one, or not TLS at all.
    Handshake,
    /// A task panicked.
    Panic,
}

impl ProblemKind {
    /// As in labels.
    pub const fn name(self) -> &'static str {
        match self {
            ProblemKind::Listener => "listener",
            ProblemKind::Capture => "capture",
            ProblemKind::Handshake => "handshake",
            ProblemKind::Panic => "panic",
        }
    }
}

/// Takes the records. Called from the tasks of connections, so it must not block.
pub trait Recorder: Send + Sync + 'static {
    /// A connection opened, ended or was refused.
    fn connection(&self, event: &ConnectionEvent);
    /// Something else went wrong.
    fn problem(&self, problem: Problem);
    /// A tunnel was opened to another agent: TCP connect plus TLS handshake took this long.
    fn handshake(&self, _took: Duration) {}
    /// A local application was dialled, which took this long.
    fn dial(&self, _took: Duration) {}
}
