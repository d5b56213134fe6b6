//! Owns the agent's tasks. Nothing runs detached: a task is listed in `run.rs` with its name and whether the agent can
//! live without it.
//!
//! A critical task that ends, fails or panics starts a drain and makes the exit status non-zero. One that is not
//! critical is reported and counted, and the agent goes on. Readiness: a task that has a [`ReadyGuard`] is ready when
//! it drops it; the agent is ready when all are dropped.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{Id, JoinSet};

use crate::drain::{Drain, Drainer};

/// What happens to the agent when a task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// The agent drains and exits with an error.
    Critical,
    /// The agent goes on without it.
    Optional,
}

/// The set of tasks.
#[derive(Debug)]
pub struct Supervisor {
    tasks: JoinSet<anyhow::Result<()>>,
    names: HashMap<Id, (&'static str, Weight)>,
    drainer: Drainer,
    drain: Drain,
}

impl Supervisor {
    /// No task yet.
    pub fn new() -> Supervisor {
        let (drainer, drain) = crate::drain::channel();
        Supervisor { tasks: JoinSet::new(), names: HashMap::new(), drainer, drain }
    }

    /// For tasks that must end in order.
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// Starts a task.
    pub fn spawn<F>(&mut self, name: &'static str, weight: Weight, task: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let handle = self.tasks.spawn(task);
        self.names.insert(handle.id(), (name, weight));
    }

    /// Runs until SIGTERM, SIGINT or the end of a critical task, then drains. An error is the reason to exit non-zero.
    pub async fn run(mut self, deadline: Duration) -> anyhow::Result<()> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let cause = loop {
            tokio::select! {
                _ = term.recv() => break Ok("SIGTERM"),
                _ = int.recv() => break Ok("SIGINT"),
                Some(ended) = self.tasks.join_next_with_id() => match self.verdict(ended) {
                    Some(error) => break Err(error),
                    None => continue,
                },
            }
        };
        match &cause {
            Ok(name) => tracing::info!("draining after {name}, {} s at most", deadline.as_secs()),
            Err(error) => tracing::error!("draining because {error:#}"),
        }
        let Supervisor { mut tasks, drainer, .. } = self;
        if !drainer.drain(deadline).await {
            tracing::warn!("connections were still open at the end of the drain; they are cut");
        }
        tasks.shutdown().await;
        cause.map(|_| ())
    }

    /// What the end of a task means: an error when it was critical.
    fn verdict(
        &mut self,
        ended: Result<(Id, anyhow::Result<()>), tokio::task::JoinError>,
    ) -> Option<anyhow::Error> {
        let (id, error) = match ended {
            Ok((id, Ok(()))) => (id, anyhow::anyhow!("it ended")),
            Ok((id, Err(error))) => (id, error),
            Err(panic) => (panic.id(), anyhow::anyhow!("it panicked")),
        };
        let (name, weight) = self.names.remove(&id).unwrap_or(("unknown", Weight::Critical));
        match weight {
            Weight::Critical => Some(error.context(format!("the task `{name}` stopped"))),
            Weight::Optional => {
                tracing::error!("the task `{name}` stopped: {error:#}");
                None
            }
        }
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        Supervisor::new()
    }
}

/// Counts what must still happen before the agent is ready.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    pending: Arc<AtomicUsize>,
}

impl Ready {
    /// One thing to wait for; done when the guard is dropped.
    pub fn guard(&self) -> ReadyGuard {
        self.pending.fetch_add(1, Ordering::AcqRel);
        ReadyGuard { pending: self.pending.clone() }
    }

    /// Is everything done?
    pub fn is_ready(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }
}

/// The agent is not ready while this is held.
#[derive(Debug)]
pub struct ReadyGuard {
    pending: Arc<AtomicUsize>,
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.pending.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_critical_task_ends_the_agent_and_is_named() {
        for (name, task) in [
            ("ends", tokio::task::spawn(async { Ok(()) })),
            ("fails", tokio::task::spawn(async { Err(anyhow::anyhow!("no disk")) })),
            ("panics", tokio::task::spawn(async { panic!("bug") })),
        ] {
            let mut supervisor = Supervisor::new();
            supervisor.spawn(name, Weight::Critical, async move {
                match task.await {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic.into_panic()),
                }
            });
            let error = supervisor.run(Duration::from_millis(50)).await.expect_err("it was critical");
            assert!(format!("{error:#}").contains(name), "{error:#}");
        }
    }

    #[tokio::test]
    async fn an_optional_task_may_end() {
        let mut supervisor = Supervisor::new();
        supervisor.spawn("optional", Weight::Optional, async { Ok(()) });
        supervisor.spawn("critical", Weight::Critical, async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Err(anyhow::anyhow!("later"))
        });
        let error = supervisor.run(Duration::from_millis(50)).await.expect_err("the critical one failed");
        assert!(format!("{error:#}").contains("later"));
    }

    #[test]
    fn ready_when_the_last_guard_is_dropped() {
        let ready = Ready::default();
        let (first, second) = (ready.guard(), ready.guard());
        drop(first);
        assert!(!ready.is_ready());
        drop(second);
        assert!(ready.is_ready());
    }
}
