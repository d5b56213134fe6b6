//! Puts the agent together, and lists its tasks.
//!
//! | task | input | output | critical |
//! |---|---|---|---|
//! | `control` | the manifest directory | snapshots, kernel maps, cut connections | yes |
//! | `pods` | snapshots and enrolments | a proxy per pod | yes |
//! | `certificates` | identities of this node | credentials | yes |
//! | `events` | the datapath's ring | flow events | yes |
//! | `metrics` | HTTP | the metrics page, readiness | no |
//! | `admin` | unix socket | tables, flow events | no |

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::ca::Authority;
use crate::config::{CaSource, Cgroup, Config};
use crate::control::{Control, Outlets, Standing};
use crate::drain::Drain;
use crate::identity::{CaClient, CaClientConfig, CertStore, LocalCa, NodeName, Signer, TrustDomain};
use crate::kernel::Kernel;
use crate::kernel::events::Events;
use crate::manifests::{files, watch::Watch};
use crate::observe::admin::Socket;
use crate::observe::desk::Desk;
use crate::observe::events::EventLog;
use crate::observe::http;
use crate::observe::metrics::Metrics;
use crate::observe::recorder::Recorder;
use crate::pods::{Pods, Waiting};
use crate::proxy::{self, Proxy, View};
use crate::snapshot::Snapshot;
use crate::supervise::{Ready, ReadyGuard, Supervisor, Weight};

/// The agent's own cgroup below the one that the hooks are attached to.
const OWN_CGROUP: &str = "weft-agent";

/// Runs the agent until a signal or a critical failure.
pub async fn agent(config: Config) -> anyhow::Result<()> {
    let started = Instant::now();
    // First, whatever can be taken or missing: it is better said before anything is attached.
    let socket = Socket::bind(&config.admin_socket)
        .await
        .with_context(|| format!("cannot open the admin socket {}", config.admin_socket.display()))?;
    let listener = TcpListener::bind(config.metrics)
        .await
        .with_context(|| format!("cannot listen on {} for --metrics", config.metrics))?;
    let certs = CertStore::new(signer(&config)?, config.cert_ttl)?;
    if config.cgroup.join {
        join(&config.cgroup)?;
    }
    let kernel = Arc::new(Kernel::load(&config.bpffs)?);
    kernel.attach_hooks(&config.cgroup.path)?;

    let snapshot = Arc::new(Snapshot::empty());
    let (view_out, view) = watch::channel::<Arc<dyn View>>(snapshot.clone());
    let (snapshot_out, snapshots) = watch::channel(snapshot);
    let (standing_out, standings) = watch::channel(Arc::new(Standing {
        revision: 0,
        since: started,
        enrolled: Vec::new(),
        problems: Vec::new(),
        services: Default::default(),
    }));
    let (metrics, events) = (Arc::new(Metrics::default()), Arc::new(EventLog::default()));
    let recorder = Arc::new(Recorder::new(snapshots.clone(), metrics.clone(), events.clone()));
    let proxy = Proxy::new(proxy::Settings::default(), kernel.clone(), view, recorder.clone());
    let control = Control::new(
        &config,
        kernel.clone(),
        Outlets {
            snapshot: snapshot_out,
            view: view_out,
            standing: standing_out,
            registry: proxy.registry().clone(),
            recorder: recorder.clone(),
        },
    )?;
    let datapath_events = Events::open(&kernel)?;

    let mut supervisor = Supervisor::new();
    let drain = supervisor.drain();
    let (ready, waiting) = (Ready::default(), Waiting::default());
    let (pods_drain, pods_watch) = proxy::drain::channel();
    let pods = Pods::new(proxy.clone(), certs.clone(), pods_watch, waiting.clone(), ready.clone());
    let desk = Arc::new(Desk {
        node: config.node.clone(),
        trust_domain: config.trust_domain.clone(),
        started,
        ready: ready.clone(),
        kernel,
        certs: certs.clone(),
        proxy,
        metrics,
        waiting,
        snapshot: snapshots.clone(),
        standing: standings.clone(),
    });
    let (show, scrape) = (desk.clone(), desk);

    use Weight::{Critical, Optional};
    let first = ready.guard();
    supervisor.spawn("control", Critical, follow_manifests(config.manifests, control, drain.clone()));
    let deadline = config.drain;
    supervisor.spawn(
        "pods",
        Critical,
        follow_snapshots(pods, snapshots, standings, pods_drain, deadline, first, drain.clone()),
    );
    supervisor.spawn("certificates", Critical, keep_certificates(certs, drain.clone()));
    supervisor.spawn("events", Critical, read_events(datapath_events, recorder, drain.clone()));
    let page = Arc::new(move || scrape.scrape());
    supervisor.spawn("metrics", Optional, http::serve(listener, page, ready, drain.clone()));
    let tables = Arc::new(move |table| show.show(table));
    supervisor.spawn("admin", Optional, socket.serve(tables, events, drain));
    // The proxies' own deadline comes first, then a moment to close.
    supervisor.run(deadline + Duration::from_secs(3)).await
}

fn signer(config: &Config) -> anyhow::Result<Signer> {
    let node: NodeName = config.node.parse()?;
    let trust_domain: TrustDomain = config.trust_domain.parse()?;
    Ok(match &config.ca {
        CaSource::Local(dir) => {
            let authority = Authority::open(dir)?;
            if authority.trust_domain() != trust_domain {
                bail!(
                    "--trust-domain {trust_domain}: the authority in {} signs for {}",
                    dir.display(),
                    authority.trust_domain()
                );
            }
            Signer::Local(LocalCa::new(Arc::new(authority), node))
        }
        CaSource::Remote { url, root, token } => Signer::Remote(Box::new(CaClient::new(CaClientConfig {
            url: url.clone(),
            ca_root: root.clone(),
            token: Some(token.clone()),
            state_dir: config.state_dir.clone(),
            node,
            trust_domain,
            // istiod wants one; Istio's own default.
            cluster_id: "Kubernetes".into(),
            node_ttl: None,
        })?)),
    })
}

/// Moves this process below the cgroup of the hooks, so that they see what it dials.
fn join(cgroup: &Cgroup) -> anyhow::Result<()> {
    let own = cgroup.path.join(OWN_CGROUP);
    let joined = match fs::create_dir(&own) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::OpenOptions::new()
            .write(true)
            .open(own.join("cgroup.procs"))
            .and_then(|mut procs| procs.write_all(std::process::id().to_string().as_bytes())),
    };
    joined.with_context(|| format!("cannot join the cgroup {}", own.display()))
}

/// Task `control`.
async fn follow_manifests(dir: PathBuf, mut control: Control, drain: Drain) -> anyhow::Result<()> {
    /// Between looks while a workload's namespace is missing: no file event tells of it.
    const IMPATIENT: Duration = Duration::from_millis(500);

    let mut watch = Watch::new().context("cannot watch files")?;
    let mut unreadable = false;
    loop {
        // Watched before they are read, and read again when the watch learns of new directories.
        match files::list(&dir) {
            Ok(listing) => watch.cover(&listing.directories),
            Err(_) => watch.cover(&[]),
        }
        let path = dir.clone();
        let waiting;
        (control, waiting, unreadable) = tokio::task::spawn_blocking(move || {
            let mut broken = false;
            match files::read(&path) {
                Ok((files, _)) => control.turn(files),
                Err(error) => {
                    // A directory that cannot be listed says nothing about its manifests: they stay in force.
                    if !unreadable {
                        tracing::error!(
                            "{}: {error}; the manifests read before stay in force",
                            path.display()
                        );
                    }
                    broken = true;
                }
            }
            let waiting = broken || control.is_waiting();
            (control, waiting, broken)
        })
        .await
        .context("a turn failed")?;
        tokio::select! {
            changed = watch.changed() => changed.context("cannot watch files")?,
            () = tokio::time::sleep(IMPATIENT), if waiting => {}
            () = drain.begun() => return Ok(()),
        }
    }
}

/// Task `pods`.
async fn follow_snapshots(
    mut pods: Pods,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    mut standings: watch::Receiver<Arc<Standing>>,
    pods_drain: proxy::drain::Trigger,
    deadline: Duration,
    first: ReadyGuard,
    drain: Drain,
) -> anyhow::Result<()> {
    let _held = drain.guard();
    let mut first = Some(first);
    loop {
        tokio::select! {
            // Without a sender the task `control` has ended, and the drain is about to begin.
            Ok(()) = standings.changed() => {}
            () = drain.begun() => break,
        }
        let standing = standings.borrow_and_update().clone();
        let snapshot = snapshots.borrow().clone();
        pods.follow(&snapshot, &standing.enrolled);
        // The guards of the first pods are there now.
        first = None;
    }
    drop(first);
    let (drained, ()) = tokio::join!(pods_drain.drain(deadline), pods.ended());
    if !drained {
        tracing::warn!("connections were still open after {} s and were cut", deadline.as_secs());
    }
    Ok(())
}

/// Task `certificates`.
async fn keep_certificates(certs: Arc<CertStore>, drain: Drain) -> anyhow::Result<()> {
    // Goes on while connections drain: they may outlive a certificate.
    let _ = drain;
    certs.run(std::future::pending()).await;
    Ok(())
}

/// Task `events`.
async fn read_events(mut events: Events, recorder: Arc<Recorder>, drain: Drain) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            event = events.next() => recorder.datapath(&event.context("cannot read the datapath's events")?),
            () = drain.begun() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_says_which_cgroup() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cgroup = Cgroup { path: dir.path().join("missing"), join: true };
        let error = join(&cgroup).expect_err("there is no such directory");
        assert!(format!("{error:#}").contains(OWN_CGROUP));
    }
}
