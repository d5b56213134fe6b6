//! The one place where a refusal is counted and told.

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use weft_datapath::abi::Event;
use weft_datapath::event::{RATE_LIMIT, RATE_WINDOW_NS};
use weft_datapath::reason::Reason;

use crate::maps;

/// Counts a refusal and, within the rate limit, reports it.
#[inline(always)]
pub fn refused<'a>(reason: Reason, event: impl FnOnce() -> &'a mut Event) {
    count(reason);
    report(reason as u8, 0, event);
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
pub fn accepted<'a>(event: impl FnOnce() -> &'a mut Event) {
    report(0, BPF_RB_NO_WAKEUP.into(), event);
}

/// `event` is asked for only within the rate limit: making it costs as much as a lookup.
#[inline(always)]
fn report<'a>(reason: u8, flags: u64, event: impl FnOnce() -> &'a mut Event) {
    let Some(rate) = maps::RATE.get_ptr_mut(reason.into()) else { return };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
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
    let event = event();
    event.reason = reason;
    event.time_ns = now;
    event.suppressed = rate.suppressed;
    rate.suppressed = 0;
    let _ = maps::EVENTS.output::<Event>(&*event, flags);
}
