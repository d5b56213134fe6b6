//! Flow events: the last ones remembered, and a stream for whoever watches.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

/// Events that are remembered, and that a slow subscriber may lag behind before it loses some.
pub const REMEMBERED: usize = 4096;
/// Subscribers at a time: each can hold [`REMEMBERED`] events back from being freed.
pub const MAX_SUBSCRIBERS: usize = 32;

/// One flow, when it was decided, ended or cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowEvent {
    /// RFC 3339 in UTC, with milliseconds.
    pub time: String,
    /// `allowed` or `denied`.
    pub verdict: String,
    /// `opened`, `closed`, `refused`, `cut`, `dropped`.
    pub what: String,
    pub from: Party,
    pub to: Party,
    /// `tcp`, `udp`, `icmp` or a number.
    pub protocol: String,
    /// `direct` through the kernel, `tunnel` through mutual TLS.
    pub path: String,
    /// Where it was seen: a hook of the datapath, or `proxy`.
    pub seen_by: String,
    /// Why it was refused or ended, as counted in `weft_drops_total`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The policy that decided, `kind namespace/name`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub policy: String,
    /// The rule inside it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rule: String,
    /// One sentence: what happened, and what would have allowed it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Like events that the datapath's rate limit swallowed before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub suppressed: u32,
    /// Bytes of the application, at the end of a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Bytes>,
}

/// One end of a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    /// `namespace/name`; empty when no workload is known for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub workload: String,
    /// SPIFFE ID; empty for an anonymous end.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub identity: String,
    pub address: String,
    pub port: u16,
}

/// Bytes of the application in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    pub to_server: u64,
    pub to_client: u64,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Selects events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// `namespace/name` of the source.
    pub from: Option<String>,
    /// `namespace/name` of the destination.
    pub to: Option<String>,
    /// `allowed` or `denied`.
    pub verdict: Option<String>,
}

impl Filter {
    /// Is this one of them?
    pub fn selects(&self, event: &FlowEvent) -> bool {
        let fits = |want: &Option<String>, have: &str| want.as_deref().is_none_or(|want| want == have);
        fits(&self.from, &event.from.workload)
            && fits(&self.to, &event.to.workload)
            && fits(&self.verdict, &event.verdict)
    }
}

/// Takes events and gives them to subscribers. Taking never waits for them.
#[derive(Debug)]
pub struct EventLog {
    remembered: Mutex<VecDeque<Arc<FlowEvent>>>,
    live: broadcast::Sender<Arc<FlowEvent>>,
}

impl Default for EventLog {
    fn default() -> Self {
        EventLog { remembered: Mutex::default(), live: broadcast::channel(REMEMBERED).0 }
    }
}

impl EventLog {
    /// Takes one event.
    pub fn push(&self, event: FlowEvent) {
        let event = Arc::new(event);
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() == REMEMBERED {
            remembered.pop_front();
        }
        remembered.push_back(event.clone());
        // Under the lock, so that `subscribe` sees each event exactly once. No receiver is no error.
        let _ = self.live.send(event);
    }

    /// What is remembered, and all that comes after. `None` when there are too many subscribers.
    #[allow(clippy::type_complexity)]
    pub fn subscribe(&self) -> Option<(Vec<Arc<FlowEvent>>, broadcast::Receiver<Arc<FlowEvent>>)> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        (self.live.receiver_count() < MAX_SUBSCRIBERS)
            .then(|| (remembered.iter().cloned().collect(), self.live.subscribe()))
    }
}

/// RFC 3339 in UTC with milliseconds.
pub fn rfc3339(time: SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.millisecond()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(port: u16) -> FlowEvent {
        let to = Party { workload: "shop/db".into(), port, ..Party::default() };
        FlowEvent { verdict: "denied".into(), to, ..FlowEvent::default() }
    }

    #[test]
    fn memory_and_subscribers_are_bounded() {
        let log = EventLog::default();
        for port in 0..(REMEMBERED + 10) as u16 {
            log.push(event(port));
        }
        let (remembered, _live) = log.subscribe().expect("the first subscriber");
        assert_eq!(remembered.len(), REMEMBERED);
        assert_eq!(remembered[0].to.port, 10);
        let others: Vec<_> = (1..MAX_SUBSCRIBERS).map(|_| log.subscribe().expect("room")).collect();
        assert!(log.subscribe().is_none());
        drop(others);
        assert!(log.subscribe().is_some());
    }

    #[tokio::test]
    async fn a_slow_subscriber_is_told_what_it_lost() {
        let log = EventLog::default();
        let (_, mut live) = log.subscribe().expect("the first subscriber");
        for port in 0..(REMEMBERED + 5) as u16 {
            log.push(event(port));
        }
        assert!(matches!(live.recv().await, Err(broadcast::error::RecvError::Lagged(5))));
        assert_eq!(live.recv().await.expect("the oldest that is left").to.port, 5);
    }

    #[test]
    fn filters() {
        let select = |from: &str, to: &str, verdict: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Filter { from: some(from), to: some(to), verdict: some(verdict) }.selects(&event(1))
        };
        assert!(select("", "", "") && select("", "shop/db", "denied"));
        assert!(!select("shop/web", "", "") && !select("", "shop/d", "") && !select("", "", "allowed"));
    }

    #[test]
    fn times_are_rfc3339() {
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_042);
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20.042Z");
    }
}
