//! How often one caller may ask. A caller that asks more often is told so and writes no audit line, so the log grows
//! no faster than these rates.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

/// Requests at once: a node that starts asks for all of its workloads.
const BURST: f64 = 500.0;
/// Requests per second after the burst.
const PER_SECOND: f64 = 50.0;
/// Callers that are told apart; beyond, the rest share one allowance.
const MAX_CALLERS: usize = 4096;

/// Allowances per caller (node name, or address of one that has not proved its name).
#[derive(Default)]
pub(super) struct Limit {
    callers: Mutex<HashMap<String, Bucket>>,
}

struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Limit {
    /// Takes one request from the caller's allowance.
    pub(super) fn take(&self, caller: &str, now: Instant) -> bool {
        let mut callers = self.callers.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if callers.len() >= MAX_CALLERS && !callers.contains_key(caller) {
            callers.retain(|_, bucket| bucket.level(now) < BURST);
        }
        let caller = if callers.len() >= MAX_CALLERS && !callers.contains_key(caller) { "" } else { caller };
        let bucket = callers.entry(caller.to_owned()).or_insert(Bucket { tokens: BURST, filled: now });
        bucket.tokens = bucket.level(now);
        bucket.filled = now;
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        allowed
    }
}

impl Bucket {
    fn level(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        (self.tokens + elapsed * PER_SECOND).min(BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let limit = Limit::default();
        let start = Instant::now();
        assert_eq!((0..1000).filter(|_| limit.take("a", start)).count(), 500);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| limit.take("a", later)).count(), 50);
        assert!(limit.take("b", later));
    }

    #[test]
    fn memory_is_bounded() {
        let limit = Limit::default();
        let now = Instant::now();
        for caller in 0..3 * MAX_CALLERS {
            limit.take(&caller.to_string(), now);
        }
        assert!(limit.callers.lock().unwrap().len() <= MAX_CALLERS + 1);
    }
}
