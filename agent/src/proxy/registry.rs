//! Living connections: listed, and asked again whenever the agent's knowledge changes.
//!
//! INVARIANT: a connection is registered before its first check. So a change of policy either is seen by that check or
//! finds the connection here; both use [`Connection::check`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use super::record::{ConnectionEvent, Happening, Reason, ReasonKind, Recorder, Reporter};
use super::view::{Access, Verdict, View, Workload};
use crate::identity::SpiffeId;

/// A connection that the proxy carries.
#[derive(Debug)]
pub struct Connection {
    /// Number on this agent, never used twice while it runs.
    pub id: u64,
    /// At which end we stand.
    pub reporter: Reporter,
    /// Identity of the client.
    pub source: SpiffeId,
    /// Workload of the client, where it is known.
    pub source_workload: Option<Arc<Workload>>,
    /// Address of the client.
    pub client: SocketAddr,
    /// Workload of the server.
    pub destination: Arc<Workload>,
    /// Address of the server.
    pub target: SocketAddr,
    /// When it began.
    pub since: SystemTime,
    /// Bytes from client to server.
    pub to_server: AtomicU64,
    /// Bytes from server to client.
    pub to_client: AtomicU64,
    began: Instant,
    cut: OnceLock<Reason>,
    wake: Notify,
}

/// What a connection is about: all that [`Connection`] is made from.
pub(super) struct Facts {
    pub(super) reporter: Reporter,
    pub(super) source: SpiffeId,
    pub(super) source_workload: Option<Arc<Workload>>,
    pub(super) client: SocketAddr,
    pub(super) destination: Arc<Workload>,
    pub(super) target: SocketAddr,
}

impl Connection {
    /// May this connection be, as `view` knows the world? The reason if not.
    ///
    /// Where the server is, its ingress policy decides. Where the client is, its egress policy, and the address must still
    /// belong to the workload that the tunnel was opened to.
    pub fn check(&self, view: &dyn View) -> Result<(), Reason> {
        let access = Access {
            source: &self.source,
            source_addr: self.client.ip(),
            destination: &self.destination,
            destination_addr: self.target.ip(),
            port: self.target.port(),
        };
        let judged = |verdict: Verdict| {
            if verdict.allowed { Ok(()) } else { Err(Reason::new(ReasonKind::Policy, verdict.by)) }
        };
        match self.reporter {
            Reporter::Destination => judged(view.check(&access)),
            Reporter::Source => match view.workload(self.target.ip()) {
                Some(now) if now.identity == self.destination.identity => judged(view.check_egress(&access)),
                Some(now) => Err(Reason::new(
                    ReasonKind::UnknownDestination,
                    format!("{} now belongs to {}", self.target.ip(), now.identity),
                )),
                None => Err(Reason::new(
                    ReasonKind::UnknownDestination,
                    format!("no workload has the address {} any more", self.target.ip()),
                )),
            },
        }
    }

    /// Ends the connection. Only the first reason counts.
    pub fn cut(&self, reason: Reason) {
        if self.cut.set(reason).is_ok() {
            self.wake.notify_one();
        }
    }

    /// Resolves when the connection was cut. For one waiter at a time: the connection's own task.
    pub(super) async fn was_cut(&self) -> Arc<str> {
        loop {
            if let Some(reason) = self.cut.get() {
                return reason.detail.clone();
            }
            self.wake.notified().await;
        }
    }

    /// Is `workload` the end of this connection that this agent serves?
    pub(super) fn belongs_to(&self, workload: &Arc<Workload>) -> bool {
        match self.reporter {
            Reporter::Source => {
                self.source_workload.as_ref().is_some_and(|source| Arc::ptr_eq(source, workload))
            }
            Reporter::Destination => Arc::ptr_eq(&self.destination, workload),
        }
    }

    fn event(&self, happening: Happening) -> ConnectionEvent {
        ConnectionEvent {
            id: self.id,
            happening,
            reporter: self.reporter,
            source: self.source.clone(),
            source_workload: self.source_workload.clone(),
            client: self.client,
            destination: self.destination.clone(),
            target: self.target,
            to_server: self.to_server.load(Ordering::Relaxed),
            to_client: self.to_client.load(Ordering::Relaxed),
            duration: self.began.elapsed(),
        }
    }
}

/// All living connections of this agent. Their number is bounded by the listeners' limits.
pub struct Registry {
    living: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    recorder: Arc<dyn Recorder>,
}

impl Registry {
    /// An empty registry that reports to `recorder`.
    pub fn new(recorder: Arc<dyn Recorder>) -> Registry {
        Registry { living: Mutex::default(), next: AtomicU64::new(1), recorder }
    }

    /// Every living connection, oldest first.
    pub fn list(&self) -> Vec<Arc<Connection>> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_unstable_by_key(|connection| connection.id);
        all
    }

    /// Asks every living connection again and cuts those that may not be; returns how many.
    pub fn recheck(&self, view: &dyn View) -> usize {
        self.cut_where(|connection| connection.check(view).err())
    }

    /// Cuts every connection for which `why` gives a reason; returns how many.
    pub fn cut_where(&self, why: impl Fn(&Connection) -> Option<Reason>) -> usize {
        // The lock is not held while asking: new connections must not wait for a long recheck.
        let mut cut = 0;
        for connection in self.list() {
            if let Some(reason) = why(&connection) {
                connection.cut(reason);
                cut += 1;
            }
        }
        cut
    }

    /// Resolves when no connection of `workload` is left.
    pub(super) async fn gone(&self, workload: &Arc<Workload>) {
        while self.lock().values().any(|connection| connection.belongs_to(workload)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(super) fn register(self: &Arc<Self>, facts: Facts) -> Registered {
        let Facts { reporter, source, source_workload, client, destination, target } = facts;
        let connection = Arc::new(Connection {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            reporter,
            source,
            source_workload,
            client,
            destination,
            target,
            since: SystemTime::now(),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            began: Instant::now(),
            cut: OnceLock::new(),
            wake: Notify::new(),
        });
        self.lock().insert(connection.id, connection.clone());
        Registered {
            registry: self.clone(),
            connection,
            opened: AtomicBool::new(false),
            reason: OnceLock::new(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        // Nothing under this lock can leave the map half changed.
        self.living.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a connection registered. Dropping it takes the connection off the list and reports how it ended, also when its
/// task panicked.
pub(super) struct Registered {
    registry: Arc<Registry>,
    connection: Arc<Connection>,
    opened: AtomicBool,
    reason: OnceLock<Reason>,
}

impl Registered {
    /// Both ends are connected.
    pub(super) fn opened(&self) {
        self.opened.store(true, Ordering::Relaxed);
        self.registry.recorder.connection(&self.connection.event(Happening::Opened));
    }

    /// Says how it ended; a cut overrules, because then everything else is its consequence.
    pub(super) fn ended(&self, reason: Reason) {
        let _ = self.reason.set(reason);
    }
}

impl std::ops::Deref for Registered {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let reason = self.connection.cut.get().or(self.reason.get()).cloned();
        let reason = reason.unwrap_or_else(|| Reason::new(ReasonKind::Aborted, "its task was ended"));
        let happening = match self.opened.load(Ordering::Relaxed) {
            true => Happening::Closed(reason),
            false => Happening::Refused(reason),
        };
        // Last: who sees no connection any more finds all of them told.
        self.registry.recorder.connection(&self.connection.event(happening));
        self.registry.lock().remove(&self.connection.id);
    }
}
