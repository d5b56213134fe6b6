//! The one place where a refusal is counted and told.

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use weft_datapath::abi::Event;
use weft_datapath::event::{RATE_LIMIT, RATE_WINDOW_NS};
use weft_datapath::reason::Reason;

use crate::maps;

/// Monotonic time.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Counts a refusal and, within the rate limit, reports it.
#[inline(always)]
pub fn refused(event: &mut Event, reason: Reason) {
    count(reason);
    event.reason = reason as u8;
    report(event, reason as u32, 0);
}

/// Counts a refusal that has no flow to tell of.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(drops) = maps::DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU value.
        unsafe { *drops += 1 };
    }
}

/// Reports an accepted flow, within the rate limit. It wakes nobody: the agent comes by soon enough, and a connection does
/// not pay for a process switch.
#[inline(always)]
pub fn accepted(event: &mut Event) {
    event.reason = 0;
    report(event, 0, BPF_RB_NO_WAKEUP.into());
}

#[inline(always)]
fn report(event: &mut Event, bucket: u32, flags: u64) {
    let Some(rate) = maps::RATE.get_ptr_mut(bucket) else { return };
    let now = now_ns();
    // SAFETY: a per-CPU value; a hook that interrupts another on this CPU costs at most a miscounted token.
    let rate = unsafe { &mut *rate };
    if now.wrapping_sub(rate.window_start_ns) > RATE_WINDOW_NS {
        rate.window_start_ns = now;
        rate.used = 0;
    }
    if rate.used >= RATE_LIMIT {
        rate.suppressed += 1;
        return;
    }
    rate.used += 1;
    event.time_ns = now;
    event.suppressed = rate.suppressed;
    rate.suppressed = 0;
    let _ = maps::EVENTS.output::<Event>(&*event, flags);
}
