//! The proxies of this node's workloads: one per enrolled pod, begun, ended and begun anew as pods come and go.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::identity::CertStore;
use crate::kernel::enrol::Enrolled;
use crate::netns::Netns;
use crate::proxy::{Pod, Proxy, Workload, drain};
use crate::snapshot::{Local, Snapshot};
use crate::supervise::{Ready, ReadyGuard};

/// Longest pause before a certificate is asked for again by a pod that has none.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why the proxy of a workload is not serving, by `namespace/name`.
pub type Waiting = Arc<Mutex<BTreeMap<String, String>>>;

/// See the module.
pub struct Pods {
    proxy: Arc<Proxy>,
    certs: Arc<CertStore>,
    drain: drain::Watch,
    running: HashMap<String, Running>,
    tasks: JoinSet<()>,
    waiting: Waiting,
    ready: Ready,
}

struct Running {
    place: Place,
    stop: oneshot::Sender<&'static str>,
}

/// A proxy is made anew when any of this changes.
#[derive(Clone, Debug)]
struct Place {
    netns: Arc<Netns>,
    workload: Arc<Workload>,
}

impl PartialEq for Place {
    fn eq(&self, other: &Place) -> bool {
        self.netns.cookie() == other.netns.cookie() && self.workload == other.workload
    }
}

impl Pods {
    /// No pod yet. Readiness waits for those of the first call of [`Pods::follow`].
    pub fn new(
        proxy: Arc<Proxy>,
        certs: Arc<CertStore>,
        drain: drain::Watch,
        waiting: Waiting,
        ready: Ready,
    ) -> Pods {
        Pods { proxy, certs, drain, running: HashMap::new(), tasks: JoinSet::new(), waiting, ready }
    }

    /// Serves exactly the pods that are enrolled.
    pub fn follow(&mut self, snapshot: &Snapshot, enrolled: &[Enrolled]) {
        while self.tasks.try_join_next().is_some() {}
        self.certs.set_local(&snapshot.local_identities());
        let places: HashMap<&str, &Arc<Netns>> =
            enrolled.iter().map(|enrolled| (enrolled.name.as_str(), &enrolled.netns)).collect();
        let mut wanted = HashMap::new();
        for Local { name, workload, .. } in &snapshot.local {
            if let Some(netns) = places.get(name.as_str()) {
                let (netns, workload) = (Arc::clone(netns), workload.clone());
                wanted.insert(name.clone(), Place { netns, workload });
            }
        }
        let gone: HashSet<String> = self
            .running
            .iter()
            .filter(|(name, running)| wanted.get(*name) != Some(&running.place) || running.stop.is_closed())
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Some(running) = self.running.remove(&name) {
                let why =
                    if wanted.contains_key(&name) { "the workload changed" } else { "the workload left" };
                // The task may have ended by itself.
                let _ = running.stop.send(why);
            }
        }
        for (name, place) in wanted {
            if !self.running.contains_key(&name) {
                let (stop, stopped) = oneshot::channel();
                self.tasks.spawn(serve(
                    self.proxy.clone(),
                    self.certs.clone(),
                    self.drain.clone(),
                    place.clone(),
                    stopped,
                    Wait { name: name.clone(), waiting: self.waiting.clone() },
                    self.ready.guard(),
                ));
                self.running.insert(name, Running { place, stop });
            }
        }
    }

    /// Waits until every proxy has ended, after the drain began.
    pub async fn ended(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// A line in [`Waiting`], gone when dropped.
struct Wait {
    name: String,
    waiting: Waiting,
}

impl Wait {
    fn because(&self, why: String) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.get(&self.name) != Some(&why) {
            tracing::warn!("{} waits: {why}", self.name);
            waiting.insert(self.name.clone(), why);
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// Serves one pod. Until its certificate is there, captured connections find no listener and are refused.
async fn serve(
    proxy: Arc<Proxy>,
    certs: Arc<CertStore>,
    mut drain: drain::Watch,
    place: Place,
    mut stopped: oneshot::Receiver<&'static str>,
    wait: Wait,
    ready: ReadyGuard,
) {
    let mut pause = Duration::from_millis(100);
    let live = loop {
        let attempt = tokio::select! {
            live = certs.live(&place.workload.identity) => live,
            _ = &mut stopped => return,
            () = drain.draining() => return,
        };
        match attempt {
            Ok(live) => break live,
            Err(error) => wait.because(error.to_string()),
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            _ = &mut stopped => return,
            () = drain.draining() => return,
        }
    };
    let mut pod = proxy.serve(Pod::new(place.workload, place.netns, live), drain.clone());
    let mut until_ready = Some((wait, ready));
    loop {
        tokio::select! {
            () = pod.ready(), if until_ready.is_some() => until_ready = None,
            why = &mut stopped => return pod.stop(why.unwrap_or("the agent stops")).await,
            () = drain.draining() => {
                drop(drain);
                return pod.ended().await;
            }
        }
    }
}
