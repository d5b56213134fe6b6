//! The client's side of tunnels: a pool of HTTP/2 connections to other agents.
//!
//! A connection is shared only by streams with the same source workload, source address, destination address and
//! expected identity, because all four are what the other side's policy sees or what the handshake proved. One dial per
//! key is under way at a time; who waited for a dial that failed shares its failure.
//!
//! A connection takes no new streams once it is old, full, idle for long, or its peer said GOAWAY; streams it has go on.
//! So no new stream is ever opened under a certificate that has long been replaced.

use std::collections::{BTreeSet, HashMap};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Request, StatusCode};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use weft_datapath::names::TUNNEL_PORT;

use super::datapath::Datapath;
use super::record::Recorder;
use super::sock::Buffered;
use super::{Pod, Settings, hbone, sock};
use crate::identity::{Refusal, SpiffeId, tls};

/// Where a tunnel begins and must end.
#[derive(Clone)]
pub(super) struct Route {
    pub(super) pod: Arc<Pod>,
    pub(super) source_addr: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) expected: SpiffeId,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    cookie: u64,
    source: SpiffeId,
    source_addr: IpAddr,
    destination: IpAddr,
    expected: SpiffeId,
}

/// Why a tunnel could not be opened. Shared by all who waited for the same dial.
#[derive(Debug, thiserror::Error)]
pub(super) enum TunnelError {
    #[error("this workload has no valid certificate yet")]
    NoCertificate,
    #[error("cannot make a socket in the workload's network namespace: {0}")]
    Socket(io::Error),
    #[error("cannot connect to {0}: {1}")]
    Connect(SocketAddr, io::Error),
    #[error("the handshake with {0} failed: {1}")]
    Handshake(SocketAddr, Refusal),
    #[error("{0} did not choose HTTP/2 in the handshake")]
    NotHttp2(SocketAddr),
    #[error("HTTP/2 with {0} failed: {1}")]
    Http2(SocketAddr, h2::Error),
    #[error("{0} did not answer in time")]
    Slow(SocketAddr),
    #[error("refused by the other end with status {0}{1}")]
    Refused(StatusCode, String),
}

/// An open stream. Its place on the connection is free again when this is dropped.
pub(super) struct Stream {
    pub(super) send: SendStream<Bytes>,
    pub(super) recv: RecvStream,
    pub(super) place: Place,
}

/// All pooled connections of this agent.
pub(super) struct Pool {
    entries: Arc<Mutex<HashMap<Key, Arc<Entry>>>>,
    drivers: Mutex<JoinSet<()>>,
    settings: Settings,
    datapath: Arc<dyn Datapath>,
    recorder: Arc<dyn Recorder>,
}

/// The connections of one key.
#[derive(Default)]
struct Entry {
    pooled: Mutex<Vec<Arc<Pooled>>>,
    /// Held while dialling; inside is the last failure.
    dialing: tokio::sync::Mutex<Option<Arc<TunnelError>>>,
    failures: AtomicU64,
}

struct Pooled {
    requests: SendRequest<Bytes>,
    usage: Arc<Usage>,
}

/// What a connection's driver and its streams both look at.
struct Usage {
    streams: AtomicUsize,
    retired: AtomicBool,
    idle_since: Mutex<Instant>,
}

/// A place among the streams of a connection. Keeps the connection from closing.
pub(super) struct Place(Arc<Pooled>);

impl Pool {
    pub(super) fn new(settings: Settings, datapath: Arc<dyn Datapath>, recorder: Arc<dyn Recorder>) -> Pool {
        Pool { entries: Arc::default(), drivers: Mutex::default(), settings, datapath, recorder }
    }

    /// Opens a stream along `route`; the other side has connected its application when this returns.
    ///
    /// Tries again only what the peer certainly did not begin: a connection that ended before the request left, or that
    /// refused the stream by GOAWAY or REFUSED_STREAM.
    pub(super) async fn open(
        &self,
        route: &Route,
        request: &Request<()>,
    ) -> Result<Stream, Arc<TunnelError>> {
        let peer = SocketAddr::new(route.destination, TUNNEL_PORT);
        // The other side's dial has this limit too; ours begins earlier and must end later.
        let answer_limit = self.settings.connect_timeout * 2;
        let mut last = None;
        for _ in 0..3 {
            let place = self.place(route).await?;
            match tokio::time::timeout(answer_limit, ask(place, request.clone(), peer)).await {
                Err(_) => return Err(Arc::new(TunnelError::Slow(peer))),
                Ok(Err(Asked::Unsent(error))) => last = Some(TunnelError::Http2(peer, error)),
                Ok(Err(Asked::Failed(error))) => return Err(Arc::new(error)),
                Ok(Ok(stream)) => return Ok(stream),
            }
        }
        Err(Arc::new(last.expect("the loop ran")))
    }

    /// Closes what belongs to a network namespace that is no longer ours. Streams that are open must have been cut.
    pub(super) fn forget(&self, cookie: u64) {
        let gone: Vec<_> = lock(&self.entries).extract_if(|key, _| key.cookie == cookie).collect();
        for (_, entry) in gone {
            for pooled in lock(&entry.pooled).drain(..) {
                pooled.usage.retired.store(true, Ordering::Release);
            }
        }
    }

    /// How many connections are pooled.
    pub(super) fn len(&self) -> usize {
        lock(&self.entries).values().map(|entry| lock(&entry.pooled).len()).sum()
    }

    async fn place(&self, route: &Route) -> Result<Place, Arc<TunnelError>> {
        let key = Key {
            cookie: route.pod.netns.cookie(),
            source: route.pod.workload.identity.clone(),
            source_addr: route.source_addr,
            destination: route.destination,
            expected: route.expected.clone(),
        };
        let entry = lock(&self.entries).entry(key.clone()).or_default().clone();
        if let Some(place) = entry.take() {
            return Ok(place);
        }
        let failures = entry.failures.load(Ordering::Acquire);
        let mut last = entry.dialing.lock().await;
        if let Some(place) = entry.take() {
            return Ok(place);
        }
        if let Some(error) = last.as_ref().filter(|_| entry.failures.load(Ordering::Acquire) != failures) {
            return Err(error.clone());
        }
        match self.dial(route, &key, &entry).await {
            Ok(place) => Ok(place),
            Err(error) => {
                let error = Arc::new(error);
                *last = Some(error.clone());
                entry.failures.fetch_add(1, Ordering::AcqRel);
                drop(last);
                remove_if_empty(&self.entries, &key, entry);
                Err(error)
            }
        }
    }

    async fn dial(&self, route: &Route, key: &Key, entry: &Arc<Entry>) -> Result<Place, TunnelError> {
        let began = Instant::now();
        let not_after = route.pod.live.credentials().ok_or(TunnelError::NoCertificate)?.not_after();
        let peer = SocketAddr::new(route.destination, TUNNEL_PORT);
        let socket = sock::new(&route.pod.netns, &*self.datapath, peer.ip()).map_err(TunnelError::Socket)?;
        socket.bind(SocketAddr::new(route.source_addr, 0)).map_err(TunnelError::Socket)?;
        let tcp = sock::connect(socket, peer, self.settings.connect_timeout)
            .await
            .map_err(|error| TunnelError::Connect(peer, error))?;

        let config = tls::client_config(route.pod.live.clone(), BTreeSet::from([route.expected.clone()]));
        let handshake = TlsConnector::from(config).connect(peer.ip().into(), sock::buffered(tcp));
        let tls = tokio::time::timeout(self.settings.handshake_timeout, handshake)
            .await
            .map_err(|_| TunnelError::Slow(peer))?
            .map_err(|error| TunnelError::Handshake(peer, Refusal::from(&error)))?;
        if tls.get_ref().1.alpn_protocol() != Some(tls::ALPN) {
            return Err(TunnelError::NotHttp2(peer));
        }
        let (requests, mut connection) = h2::client::Builder::new()
            .initial_window_size(hbone::STREAM_WINDOW)
            .initial_connection_window_size(hbone::CONNECTION_WINDOW)
            .max_frame_size(hbone::FRAME)
            .max_header_list_size(hbone::HEADER_LIST)
            .max_send_buffer_size(hbone::SEND_BUFFER)
            .initial_max_send_streams(hbone::CLIENT_STREAMS)
            .enable_push(false)
            .handshake(tls)
            .await
            .map_err(|error| TunnelError::Http2(peer, error))?;
        self.recorder.handshake(began.elapsed());

        // The place of the caller is taken at once, so the connection is never idle before its first stream.
        let usage = Arc::new(Usage {
            streams: AtomicUsize::new(1),
            retired: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        });
        let pooled = Arc::new(Pooled { requests, usage: usage.clone() });
        lock(&entry.pooled).push(pooled.clone());

        let until_expiry = not_after.duration_since(SystemTime::now()).unwrap_or_default();
        let retire_at = Instant::now() + self.settings.tunnel_age.min(until_expiry);
        let settings = self.settings.clone();
        let (entries, key, entry) = (self.entries.clone(), key.clone(), entry.clone());
        let mut drivers = lock(&self.drivers);
        while drivers.try_join_next().is_some() {}
        drivers.spawn(async move {
            let lost = hbone::lost(connection.ping_pong(), settings.ping_pause, settings.ping_timeout);
            let pool_side = async {
                retire(&usage, retire_at, settings.idle_close).await;
                remove(&entries, &key, entry, &usage);
                std::future::pending::<()>().await;
            };
            drive(connection, lost, pool_side).await;
            usage.retired.store(true, Ordering::Release);
            remove_dead(&entries, &key, &usage);
        });
        Ok(Place(pooled))
    }
}

/// Polls the connection to its end, which comes when its last user is gone, when it breaks, or when the peer is lost.
async fn drive(
    connection: Connection<TlsStream<Buffered>, Bytes>,
    lost: impl Future<Output = ()>,
    pool_side: impl Future<Output = ()>,
) {
    tokio::select! {
        // How it ended is told to each stream; a pooled connection without streams may end as it likes.
        _ = connection => {}
        _ = lost => {}
        _ = pool_side => {}
    }
}

/// Resolves when the connection should take no more streams.
async fn retire(usage: &Usage, at: Instant, idle_close: Duration) {
    loop {
        let idle_at = *lock(&usage.idle_since) + idle_close;
        let busy = usage.streams.load(Ordering::Acquire) > 0;
        let now = Instant::now();
        if now >= at || usage.retired.load(Ordering::Acquire) || (!busy && now >= idle_at) {
            usage.retired.store(true, Ordering::Release);
            return;
        }
        // A busy connection is looked at again after a whole idle period: it cannot be idle for that long before.
        let next = if busy { now + idle_close } else { idle_at };
        tokio::time::sleep_until(next.min(at)).await;
    }
}

enum Asked {
    Unsent(h2::Error),
    Failed(TunnelError),
}

async fn ask(place: Place, request: Request<()>, peer: SocketAddr) -> Result<Stream, Asked> {
    let usage = place.0.usage.clone();
    let unsent = |error: h2::Error| {
        usage.retired.store(true, Ordering::Release);
        Asked::Unsent(error)
    };
    let mut requests = place.0.requests.clone();
    poll_fn(|cx| requests.poll_ready(cx)).await.map_err(unsent)?;
    let (response, send) = requests.send_request(request, false).map_err(unsent)?;
    let response = response.await.map_err(|error| {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        if error.is_remote() && (error.is_go_away() || refused) {
            return unsent(error);
        }
        Asked::Failed(TunnelError::Http2(peer, error))
    })?;
    if response.status() != StatusCode::OK {
        let reason = response.headers().get(hbone::REASON).and_then(|value| value.to_str().ok());
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        return Err(Asked::Failed(TunnelError::Refused(response.status(), reason)));
    }
    Ok(Stream { send, recv: response.into_body(), place })
}

impl Entry {
    /// A place on the first connection that has one.
    fn take(&self) -> Option<Place> {
        lock(&self.pooled).iter().find(|pooled| pooled.enter()).map(|pooled| Place(pooled.clone()))
    }
}

impl Pooled {
    fn enter(&self) -> bool {
        let limit = hbone::CLIENT_STREAMS.min(self.requests.current_max_send_streams());
        !self.usage.retired.load(Ordering::Acquire)
            && self
                .usage
                .streams
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now < limit).then_some(now + 1))
                .is_ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Before the count: who sees no streams must not see an old time.
        *lock(&self.0.usage.idle_since) = Instant::now();
        self.0.usage.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Takes a connection out of the pool, so that it closes when its last stream ends.
fn remove(entries: &Mutex<HashMap<Key, Arc<Entry>>>, key: &Key, entry: Arc<Entry>, usage: &Arc<Usage>) {
    lock(&entry.pooled).retain(|pooled| !Arc::ptr_eq(&pooled.usage, usage));
    remove_if_empty(entries, key, entry);
}

fn remove_dead(entries: &Mutex<HashMap<Key, Arc<Entry>>>, key: &Key, usage: &Arc<Usage>) {
    let entry = lock(entries).get(key).cloned();
    if let Some(entry) = entry {
        remove(entries, key, entry, usage);
    }
}

/// Forgets a key without connections that nobody is using.
fn remove_if_empty(entries: &Mutex<HashMap<Key, Arc<Entry>>>, key: &Key, entry: Arc<Entry>) {
    let mut entries = lock(entries);
    let same = entries.get(key).is_some_and(|now| Arc::ptr_eq(now, &entry));
    // Two references: the map's and ours. Others are of callers about to dial; they come here again.
    if same && Arc::strong_count(&entry) == 2 && lock(&entry.pooled).is_empty() {
        entries.remove(key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code under these locks can leave the data half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
