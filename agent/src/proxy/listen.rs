//! The agent's listeners inside a workload's network namespace, and the tasks of what they accept.
//!
//! A listener lives until its workload leaves. It is opened again when it dies: root inside the workload can kill it
//! (`ss -K`), and then accept() fails for ever. Meanwhile connections are refused, never let past.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use weft_datapath::names::{OUTBOUND_PORT, TUNNEL_PORT};

use super::record::{ProblemKind, Reason, ReasonKind};
use super::{Pod, Proxy, drain, inbound, outbound, sock};

/// First and longest pause before a listener is opened again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Pause when the agent is out of descriptors or memory: the connection stays in the queue.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Outbound,
    Tunnel,
}

/// The proxy of one workload.
#[derive(Debug)]
pub struct PodProxy {
    stop: Option<tokio::sync::oneshot::Sender<Reason>>,
    up: watch::Receiver<usize>,
    needed: usize,
    task: tokio::task::JoinHandle<()>,
}

impl PodProxy {
    pub(super) fn start(proxy: Arc<Proxy>, pod: Arc<Pod>, drain: drain::Watch) -> PodProxy {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (up, is_up) = watch::channel(0);
        // IPv6 may be switched off in the namespace; without an IPv6 address nothing could arrive there anyway.
        let families: &[bool] =
            if pod.workload.addresses.iter().any(|addr| addr.is_ipv6()) { &[false, true] } else { &[false] };
        let needed = families.len() * 2;
        let task = tokio::spawn(serve(proxy, pod, families.to_vec(), up, stopped, drain));
        PodProxy { stop: Some(stop), up: is_up, needed, task }
    }

    /// Resolves when all listeners are open: only now may connections be redirected to them.
    pub async fn ready(&mut self) {
        // The sender lives as long as the task; when it is gone there is nothing to wait for.
        let _ = self.up.wait_for(|up| *up >= self.needed).await;
    }

    /// Are all listeners open at this moment?
    pub fn is_ready(&self) -> bool {
        *self.up.borrow() >= self.needed
    }

    /// Closes the listeners and cuts this workload's connections with `reason`.
    pub async fn stop(mut self, reason: &str) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(Reason::new(ReasonKind::Stopped, reason));
        }
        let _ = (&mut self.task).await;
    }

    /// Waits for the end that a drain brings.
    pub async fn ended(mut self) {
        let _ = (&mut self.task).await;
    }
}

impl Drop for PodProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs all listeners of a workload until it leaves, or until the agent has drained.
async fn serve(
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    families: Vec<bool>,
    up: watch::Sender<usize>,
    stopped: tokio::sync::oneshot::Receiver<Reason>,
    mut drain: drain::Watch,
) {
    let up = Arc::new(up);
    let outbound_limit = Arc::new(Semaphore::new(proxy.settings.outbound_connections));
    let tunnel_limit = Arc::new(Semaphore::new(proxy.settings.inbound_tunnels));
    let mut listeners = JoinSet::new();
    for v6 in families {
        for role in [Role::Outbound, Role::Tunnel] {
            let (addr, limit) = match role {
                Role::Outbound => (SocketAddr::new(sock::loopback(v6), OUTBOUND_PORT), &outbound_limit),
                Role::Tunnel => (SocketAddr::new(sock::unspecified(v6), TUNNEL_PORT), &tunnel_limit),
            };
            let listener = Listener {
                proxy: proxy.clone(),
                pod: pod.clone(),
                role,
                addr,
                limit: limit.clone(),
                up: up.clone(),
            };
            listeners.spawn(listener.run(drain.clone()));
        }
    }
    let cut = |reason: Reason| {
        let cookie = pod.netns.cookie();
        proxy.registry.cut_where(|connection| connection.belongs_to(&pod.workload).then(|| reason.clone()));
        proxy.tunnels.forget(cookie);
    };
    let all = async { while listeners.join_next().await.is_some() {} };
    tokio::select! {
        _ = all => {}
        reason = stopped => {
            // A dropped handle aborts this task, so an error here cannot be.
            cut(reason.unwrap_or_else(|_| Reason::new(ReasonKind::Stopped, "the workload left")));
        }
        _ = drain.closing() => cut(Reason::new(ReasonKind::Stopped, "the agent stops")),
    }
    // Those that were cut get a moment to say so; the rest is aborted, which resets too.
    let _ = tokio::time::timeout(Duration::from_millis(200), proxy.registry.gone(&pod.workload)).await;
    listeners.shutdown().await;
}

struct Listener {
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    role: Role,
    addr: SocketAddr,
    limit: Arc<Semaphore>,
    up: Arc<watch::Sender<usize>>,
}

impl Listener {
    /// Until drained: open, accept, open again.
    async fn run(self, mut drain: drain::Watch) {
        let mut connections = JoinSet::new();
        let mut pause = FIRST_PAUSE;
        let mut said = None;
        loop {
            match sock::listen(&self.pod.netns, &*self.proxy.datapath, self.addr) {
                Ok(listener) => {
                    (pause, said) = (FIRST_PAUSE, None);
                    self.up.send_modify(|up| *up += 1);
                    let ended = self.accept(&listener, &mut connections, &mut drain).await;
                    self.up.send_modify(|up| *up -= 1);
                    drop(listener);
                    match ended {
                        Some(error) => self.problem(format!(
                            "the listener on {} died: {error}; opening it again",
                            self.addr
                        )),
                        None => break,
                    }
                }
                // Said once per cause: it is tried again every few seconds, maybe for hours.
                Err(error) if said != Some(error.kind()) => {
                    said = Some(error.kind());
                    self.problem(self.explain(&error));
                }
                Err(_) => {}
            }
            tokio::select! {
                _ = tokio::time::sleep(pause) => {}
                _ = drain.draining() => break,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        while let Some(done) = connections.join_next().await {
            self.proxy.joined(&self.pod, done);
        }
    }

    /// Accepts until the listener fails for good (the error), or until draining (`None`).
    async fn accept(
        &self,
        listener: &TcpListener,
        connections: &mut JoinSet<()>,
        drain: &mut drain::Watch,
    ) -> Option<io::Error> {
        loop {
            let permit = tokio::select! {
                permit = self.limit.clone().acquire_owned() => permit.expect("never closed"),
                Some(done) = connections.join_next() => {
                    self.proxy.joined(&self.pod, done);
                    continue;
                }
                _ = drain.draining() => return None,
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(done) = connections.join_next() => {
                    self.proxy.joined(&self.pod, done);
                    continue;
                }
                _ = drain.draining() => return None,
            };
            match accepted {
                Ok((stream, from)) => {
                    let served = self.serve(stream, from, drain.clone());
                    connections.spawn(async move {
                        served.await;
                        drop(permit);
                    });
                }
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    // About one connection, not about the listener (accept(2)).
                    Some(
                        Errno::ECONNABORTED
                        | Errno::EINTR
                        | Errno::EPROTO
                        | Errno::EPERM
                        | Errno::ENETDOWN
                        | Errno::EHOSTDOWN
                        | Errno::EHOSTUNREACH
                        | Errno::ENETUNREACH
                        | Errno::ENOPROTOOPT
                        | Errno::EOPNOTSUPP
                        | Errno::ENONET,
                    ) => {}
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {
                        self.problem(format!("cannot accept on {}: {error}; trying again", self.addr));
                        tokio::time::sleep(SHORTAGE_PAUSE).await;
                    }
                    _ => return Some(error),
                },
            }
        }
    }

    fn serve(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        drain: drain::Watch,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        let (proxy, pod) = (self.proxy.clone(), self.pod.clone());
        match self.role {
            Role::Outbound => Box::pin(async move {
                // Held so that shutdown waits for this connection.
                let _drain = drain;
                outbound::serve(proxy, pod, stream, from).await;
            }),
            Role::Tunnel => Box::pin(inbound::serve(proxy, pod, stream, from, drain)),
        }
    }

    fn problem(&self, text: String) {
        self.proxy.problem(&self.pod, ProblemKind::Listener, text);
    }

    fn explain(&self, error: &io::Error) -> String {
        let addr = self.addr;
        match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "port {} is taken inside the workload: make the process that listens on it use another port; \
                 until then the workload has no connections through the mesh",
                addr.port()
            ),
            io::ErrorKind::AddrNotAvailable if self.role == Role::Outbound => {
                format!("cannot listen on {addr}: loopback is down inside the workload; waiting for it")
            }
            _ => format!("cannot listen on {addr}: {error}; trying again"),
        }
    }
}
