//! Stopping in order: who holds a [`Watch`] is told to finish, and is waited for up to a deadline.

use std::time::Duration;

use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    Running,
    Draining,
    Closing,
}

/// The side that stops the others.
#[derive(Debug)]
pub struct Trigger(watch::Sender<Phase>);

/// Held by a task = shutdown waits for it, up to the deadline.
#[derive(Clone, Debug)]
pub struct Watch(watch::Receiver<Phase>);

/// A pair that belongs together.
pub fn channel() -> (Trigger, Watch) {
    let (sender, receiver) = watch::channel(Phase::Running);
    (Trigger(sender), Watch(receiver))
}

impl Trigger {
    /// Tells everyone to finish and waits until all have, at most for `deadline`; then tells the rest to close at
    /// once and gives them a second. True when nobody had to be cut.
    pub async fn drain(self, deadline: Duration) -> bool {
        self.0.send_replace(Phase::Draining);
        if tokio::time::timeout(deadline, self.0.closed()).await.is_ok() {
            return true;
        }
        self.0.send_replace(Phase::Closing);
        let _ = tokio::time::timeout(Duration::from_secs(1), self.0.closed()).await;
        false
    }
}

impl Watch {
    /// Resolves when no new work should be taken.
    pub async fn draining(&mut self) {
        self.reached(Phase::Draining).await;
    }

    /// Resolves when the deadline has passed: drop what you hold.
    pub async fn closing(&mut self) {
        self.reached(Phase::Closing).await;
    }

    /// A trigger that is gone without draining stops everyone, as the agent does then.
    async fn reached(&mut self, phase: Phase) {
        let _ = self.0.wait_for(|now| *now >= phase).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_held_watch_delays_until_it_is_dropped() {
        let (trigger, mut watch) = channel();
        let task = tokio::spawn(async move {
            watch.draining().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        });
        assert!(trigger.drain(Duration::from_secs(5)).await);
        assert!(task.is_finished());
    }

    #[tokio::test]
    async fn the_deadline_closes_the_rest() {
        let (trigger, mut watch) = channel();
        let task = tokio::spawn(async move { watch.closing().await });
        assert!(!trigger.drain(Duration::from_millis(20)).await);
        task.await.unwrap();
    }
}
