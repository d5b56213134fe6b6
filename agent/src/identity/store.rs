//! One valid certificate per local identity.
//!
//! Obtained when first asked for (many askers, one request), renewed at half-life with jitter by [`CertStore::run`],
//! forgotten when the identity leaves the node. A failed renewal keeps the valid certificate, raises an alarm and tries
//! again with growing pauses.
//!
//! INVARIANT: an expired certificate is never handed out; [`Live::credentials`] checks at each use.

use super::certificate::rfc3339;
use super::credentials::{Credentials, KeyRequest, Live, Roots, split_chain};
use super::signer::{SignError, Signer};
use super::spiffe::SpiffeId;
use crate::ca::directory::random;
use arc_swap::ArcSwap;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{info, warn};

/// An unanswered request is given up after this.
const SIGN_TIMEOUT: Duration = Duration::from_secs(20);
/// Renewals at once.
const PARALLEL: usize = 16;
/// The clock is looked at this often at least: it may be set while we sleep.
const MAX_SLEEP: Duration = Duration::from_secs(30);
/// First pause after a failure; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause while there is no valid certificate: somebody waits for it.
const MAX_PAUSE_WITHOUT: Duration = Duration::from_secs(5);
/// Longest pause while the present certificate is valid.
const MAX_PAUSE: Duration = Duration::from_secs(150);

/// Why there are no credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("{0} is no workload of this node")]
    NotLocal(SpiffeId),
    #[error("no certificate for {id}: {cause}")]
    Sign { id: String, cause: SignError },
}

/// Certificates of the identities of this node.
pub struct CertStore {
    signer: Signer,
    ttl: Duration,
    roots: Arc<ArcSwap<Roots>>,
    entries: Mutex<BTreeMap<SpiffeId, Arc<Entry>>>,
    changed: Notify,
}

struct Entry {
    live: Arc<Live>,
    /// Held by the one who asks the signer.
    asking: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// When to ask the signer (again).
    due: SystemTime,
    failures: u32,
    error: Option<SignError>,
    /// Set when the identity left the node; what arrives later is dropped.
    forgotten: bool,
}

/// A line of `weft certs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CertStatus {
    pub spiffe: String,
    pub serial: Option<String>,
    /// RFC 3339.
    pub not_before: Option<String>,
    pub not_after: Option<String>,
    /// Negative once it expired; `None` while there is no certificate.
    pub seconds_left: Option<i64>,
    pub next_renewal: String,
    /// Names from the issuer up to the root.
    pub chain: Vec<String>,
    /// Failed attempts since the last success.
    pub failures: u32,
    /// What went wrong last, until it works again: an alarm.
    pub error: Option<String>,
}

impl CertStore {
    /// A store without identities; `ttl` is the lifetime it asks for.
    pub fn new(signer: Signer, ttl: Duration) -> Result<Arc<CertStore>, SignError> {
        let roots = Arc::new(ArcSwap::new(signer.roots()?));
        Ok(Arc::new(CertStore { signer, ttl, roots, entries: Mutex::default(), changed: Notify::new() }))
    }

    /// The identities that this node has from now on: new ones are obtained, others forgotten at once.
    pub fn set_local(&self, identities: &BTreeSet<SpiffeId>) {
        let mut entries = lock(&self.entries);
        entries.retain(|id, entry| {
            let keep = identities.contains(id);
            if !keep {
                lock(&entry.state).forgotten = true;
                entry.live.replace(None);
            }
            keep
        });
        for id in identities {
            entries.entry(id.clone()).or_insert_with(|| Arc::new(Entry::new(id, &self.roots)));
        }
        drop(entries);
        self.changed.notify_one();
    }

    /// Valid credentials of a local identity, obtained now if need be.
    pub async fn credentials(&self, id: &SpiffeId) -> Result<Arc<Credentials>, StoreError> {
        let entry = self.entry(id)?;
        match entry.live.credentials() {
            Some(credentials) => Ok(credentials),
            None => self.obtain(&entry).await.map_err(|cause| StoreError::Sign { id: id.to_string(), cause }),
        }
    }

    /// The handle for TLS configurations; valid now, and following each renewal.
    pub async fn live(&self, id: &SpiffeId) -> Result<Arc<Live>, StoreError> {
        self.credentials(id).await?;
        Ok(self.entry(id)?.live.clone())
    }

    /// The roots that peers are verified against now.
    pub fn roots(&self) -> Arc<Roots> {
        self.roots.load_full()
    }

    /// All certificates, the node's own first.
    pub fn status(&self) -> Vec<CertStatus> {
        let entries: Vec<_> = lock(&self.entries).values().cloned().collect();
        self.signer.node_status().into_iter().chain(entries.iter().map(|entry| entry.status())).collect()
    }

    /// Obtains, renews and retries until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                () = self.clone().turn() => {}
            }
        }
    }

    /// Does what is due, then waits for the next.
    async fn turn(self: Arc<Self>) {
        let node_due = self.signer.maintain().await;
        let now = SystemTime::now();
        let entries: Vec<_> = lock(&self.entries).values().cloned().collect();
        let due: Vec<_> = entries.iter().filter(|entry| entry.due() <= now).take(PARALLEL).cloned().collect();
        if !due.is_empty() {
            let mut renewals = JoinSet::new();
            for entry in due {
                let store = self.clone();
                renewals.spawn(async move {
                    // Its error is in the entry's state.
                    let _ = store.obtain(&entry).await;
                });
            }
            while renewals.join_next().await.is_some() {}
            return;
        }
        let next = entries.iter().map(|entry| entry.due()).chain(node_due).min();
        let pause =
            next.map_or(MAX_SLEEP, |next| next.duration_since(now).unwrap_or_default().min(MAX_SLEEP));
        tokio::select! {
            () = self.changed.notified() => {}
            () = tokio::time::sleep(pause.max(Duration::from_millis(1))) => {}
        }
    }

    fn entry(&self, id: &SpiffeId) -> Result<Arc<Entry>, StoreError> {
        lock(&self.entries).get(id).cloned().ok_or_else(|| StoreError::NotLocal(id.clone()))
    }

    /// Asks the signer unless somebody just did.
    async fn obtain(&self, entry: &Entry) -> Result<Arc<Credentials>, SignError> {
        let _asking = entry.asking.lock().await;
        if SystemTime::now() < entry.due() {
            // Obtained, or failed, while we waited for our turn.
            if let Some(credentials) = entry.live.credentials() {
                return Ok(credentials);
            }
            if let Some(error) = lock(&entry.state).error.clone() {
                return Err(error);
            }
        }
        match self.ask(entry.live.identity()).await {
            Ok((credentials, roots)) => {
                if roots.certificates() != self.roots.load().certificates() {
                    self.roots.store(Arc::new(roots));
                }
                entry.succeeded(credentials.clone());
                self.changed.notify_one();
                Ok(credentials)
            }
            Err(error) => {
                entry.failed(&error);
                Err(error)
            }
        }
    }

    async fn ask(&self, id: &SpiffeId) -> Result<(Arc<Credentials>, Roots), SignError> {
        let request = KeyRequest::new(id.as_str())?;
        let answer = tokio::time::timeout(SIGN_TIMEOUT, self.signer.sign(&request, self.ttl)).await;
        let pems = answer.unwrap_or_else(|_| {
            Err(SignError::Answer(format!("it did not come within {} s", SIGN_TIMEOUT.as_secs())))
        })?;
        let (chain, roots) = split_chain(&pems)?;
        let roots = Roots::new(roots)?;
        Ok((Arc::new(Credentials::new(&request, chain, &roots, SystemTime::now())?), roots))
    }
}

impl Entry {
    fn new(id: &SpiffeId, roots: &Arc<ArcSwap<Roots>>) -> Entry {
        Entry {
            live: Arc::new(Live::new(id.clone(), None, roots.clone())),
            asking: tokio::sync::Mutex::new(()),
            state: Mutex::new(State { due: SystemTime::now(), failures: 0, error: None, forgotten: false }),
        }
    }

    fn due(&self) -> SystemTime {
        lock(&self.state).due
    }

    fn succeeded(&self, credentials: Arc<Credentials>) {
        let mut state = lock(&self.state);
        state.due = half_life(&credentials, SystemTime::now());
        if state.failures > 0 {
            info!("certificate of {} obtained after {} failures", self.live.identity(), state.failures);
        }
        (state.failures, state.error) = (0, None);
        if !state.forgotten {
            self.live.replace(Some(credentials));
        }
    }

    fn failed(&self, error: &SignError) {
        let mut state = lock(&self.state);
        let now = SystemTime::now();
        state.due = now + pause(state.failures, self.live.credentials().as_deref(), now);
        state.failures = state.failures.saturating_add(1);
        if state.error.as_ref() != Some(error) {
            warn!("no new certificate for {}: {error}", self.live.identity());
        }
        state.error = Some(error.clone());
    }

    fn status(&self) -> CertStatus {
        let state = lock(&self.state);
        let error = state.error.as_ref().map(SignError::to_string);
        CertStatus::new(
            self.live.identity().as_str(),
            self.live.last().as_deref(),
            state.due,
            state.failures,
            error,
        )
    }
}

impl CertStatus {
    pub(super) fn new(
        spiffe: &str,
        credentials: Option<&Credentials>,
        due: SystemTime,
        failures: u32,
        error: Option<String>,
    ) -> CertStatus {
        CertStatus {
            spiffe: spiffe.to_owned(),
            serial: credentials.map(|credentials| credentials.serial().to_owned()),
            not_before: credentials.map(|credentials| rfc3339(credentials.not_before())),
            not_after: credentials.map(|credentials| rfc3339(credentials.not_after())),
            seconds_left: credentials.map(|credentials| seconds_left(credentials.not_after())),
            next_renewal: rfc3339(due),
            chain: credentials.map(Credentials::issuers).unwrap_or_default(),
            failures,
            error,
        }
    }
}

fn seconds_left(not_after: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    match not_after.duration_since(SystemTime::now()) {
        Ok(left) => seconds(left),
        Err(past) => -seconds(past.duration()),
    }
}

/// When to renew: after 45 to 55 of 100 of what is left, so that a node's certificates do not renew all at once.
pub(super) fn half_life(credentials: &Credentials, now: SystemTime) -> SystemTime {
    let left = credentials.not_after().duration_since(now).unwrap_or_default();
    now + left.mul_f64(0.45 + 0.1 * unit())
}

/// How long to wait after a failure: doubling, with jitter, and never so long that a valid certificate would run out
/// before a few more attempts.
pub(super) fn pause(failures: u32, valid: Option<&Credentials>, now: SystemTime) -> Duration {
    let longest = match valid {
        Some(credentials) => {
            let left = credentials.not_after().duration_since(now).unwrap_or_default();
            (left / 10).clamp(FIRST_PAUSE, MAX_PAUSE)
        }
        None => MAX_PAUSE_WITHOUT,
    };
    FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(longest).mul_f64(0.75 + 0.25 * unit())
}

/// Evenly from 0 to 1.
fn unit() -> f64 {
    f64::from(u32::from_ne_bytes(random())) / f64::from(u32::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded sections only assign, so a panic elsewhere left nothing half-done.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
