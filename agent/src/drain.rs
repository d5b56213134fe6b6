//! Ending in order: a guard that is held delays the shutdown, up to a deadline.
//!
//! A [`Drain`] is cloned into whatever must end well. [`Drain::begun`] tells when to stop taking new work; whoever
//! holds a [`Guard`] is waited for. One `watch` channel carries both: its value says whether the drain has begun, and its
//! receivers are the guards.

use std::time::Duration;

use tokio::sync::watch;

/// Starts the drain and waits for the guards.
#[derive(Debug)]
pub struct Drainer {
    begun: watch::Sender<bool>,
}

/// Tells when the drain begins, and hands out guards.
#[derive(Clone, Debug)]
pub struct Drain {
    // Holding this receiver would be waited for, so a `Drain` keeps a sender and subscribes per guard.
    begun: watch::Sender<bool>,
}

/// Shutdown waits while this is held.
#[derive(Debug)]
pub struct Guard {
    begun: watch::Receiver<bool>,
}

/// A drain that has not begun.
pub fn channel() -> (Drainer, Drain) {
    let (begun, _) = watch::channel(false);
    (Drainer { begun: begun.clone() }, Drain { begun })
}

impl Drain {
    /// A guard that shutdown waits for.
    pub fn guard(&self) -> Guard {
        Guard { begun: self.begun.subscribe() }
    }

    /// Resolves once the drain has begun.
    pub async fn begun(&self) {
        self.guard().begun().await;
    }

    /// Has it begun?
    pub fn has_begun(&self) -> bool {
        *self.begun.borrow()
    }
}

impl Guard {
    /// Resolves once the drain has begun.
    pub async fn begun(&mut self) {
        // An error means that no sender is left, so nobody waits for us any more: end as well.
        let _ = self.begun.wait_for(|begun| *begun).await;
    }
}

impl Drainer {
    /// Begins the drain, then waits until every guard is dropped. False when the deadline came first.
    pub async fn drain(self, deadline: Duration) -> bool {
        self.begun.send_replace(true);
        tokio::time::timeout(deadline, self.begun.closed()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_guards() {
        let (drainer, drain) = channel();
        let mut guard = drain.guard();
        let worker = tokio::spawn(async move {
            guard.begun().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(guard);
        });
        assert!(drainer.drain(Duration::from_secs(5)).await);
        worker.await.expect("the worker ends");
        assert!(drain.has_begun());
        drain.begun().await;
    }

    #[tokio::test]
    async fn a_guard_that_stays_meets_the_deadline() {
        let (drainer, drain) = channel();
        let _guard = drain.guard();
        assert!(!drainer.drain(Duration::from_millis(20)).await);
    }
}
