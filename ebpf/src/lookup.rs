//! The decisions' view of the maps.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::maps::lpm_trie::Key;
use weft_datapath::abi::*;
use weft_datapath::names::config;
use weft_datapath::reason::Reason;
use weft_datapath::tables::Tables;
use weft_datapath::traffic::Flows;

use crate::maps;

/// The kernel's maps.
pub struct Maps;

/// Copies a map value. The agent replaces values as a whole, and the kernel frees replaced elements after a grace period
/// (or reuses preallocated ones, whose fields are then those of another element for at most this one packet).
macro_rules! copied {
    ($map:expr, $key:expr) => {{
        // SAFETY: the pointer stays valid for the run of the program; the value is plain integers.
        unsafe { $map.get($key) }.copied()
    }};
}

impl Tables for Maps {
    #[inline(always)]
    fn revision(&self) -> u32 {
        maps::CONFIG.get(config::REVISION).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn subject(&self, bank: u32, identity: u32) -> Option<Subject> {
        copied!(maps::SUBJECT, &SubjectKey { bank, identity })
    }
    #[inline(always)]
    fn port_mode(&self, bank: u32, identity: u32, port: u16) -> Option<u32> {
        copied!(maps::MODE, &ModeKey { bank, identity, port, pad: 0 })
    }
    #[inline(always)]
    fn class(&self, bank: u32, addr: &Addr) -> u32 {
        let key = Key::new(160, CidrKey { bank_be: bank.to_be_bytes(), addr: *addr });
        maps::CIDR.get(&key).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn policy(&self, key: &PolicyKey) -> Option<PolicyValue> {
        copied!(maps::POLICY, key)
    }
    #[inline(always)]
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        copied!(maps::ENDPOINT, addr)
    }
    #[inline(always)]
    fn netns(&self, cookie: u64) -> Option<Netns> {
        copied!(maps::NETNS, &cookie)
    }
    #[inline(always)]
    fn inside(&self, addr: &Addr) -> bool {
        maps::INSIDE.get(&Key::new(128, *addr)).is_some()
    }
    #[inline(always)]
    fn is_node_addr(&self, addr: &Addr) -> bool {
        maps::NODE_ADDR.get_ptr(addr).is_some()
    }
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        copied!(maps::SERVICE, key)
    }
    #[inline(always)]
    fn backend(&self, service: &Service, slot: u32) -> Option<Backend> {
        copied!(maps::BACKEND, &BackendKey { service: service.id, epoch: service.epoch, slot })
    }
}

impl Flows for Maps {
    #[inline(always)]
    fn iface(&self, ifindex: u32) -> Option<Iface> {
        copied!(maps::IFACE, &ifindex)
    }
    #[inline(always)]
    fn owns(&self, key: &IfaceAddr) -> bool {
        maps::IFACE_ADDR.get_ptr(key).is_some()
    }
    #[inline(always)]
    fn flow(&self, key: &FlowKey, state: &mut FlowState) -> bool {
        let mut found = 0;
        if let Some(entry) = maps::CONNTRACK.get_ptr(key) {
            copy_words(entry, state);
            found = 1;
        }
        opaque(found) != 0
    }
    #[inline(always)]
    fn put_flow(&self, key: &FlowKey, state: &FlowState) -> Result<(), Reason> {
        maps::CONNTRACK.insert(key, state, BPF_ANY.into()).map_err(|_| Reason::ConntrackFull)
    }
    #[inline(always)]
    fn show_peer(&self, key: &FlowKey, ingress: u32) {
        if let Some(entry) = maps::CONNTRACK.get_ptr_mut(key) {
            // SAFETY: a live map value; one aligned word, so that no reader sees half of it. An update would allocate.
            unsafe { (&raw mut (*entry).ingress).write_volatile(ingress) };
        }
    }
    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> bool {
        maps::FRAGMENT.get_ptr(key).is_some()
    }
    #[inline(always)]
    fn put_fragment(&self, key: &FragmentKey) -> Result<(), Reason> {
        maps::FRAGMENT.insert(key, &1, BPF_ANY.into()).map_err(|_| Reason::Fragment)
    }
    #[inline(always)]
    fn meter(&self, key: &MeterKey, bytes: u32) -> Result<(), Reason> {
        let meter = match maps::METER.get_ptr_mut(key) {
            Some(meter) => meter,
            None => {
                // Another packet of the same pair may have been faster: then the lookup below finds its row.
                let _ = maps::METER.insert(key, &Meter::default(), BPF_NOEXIST.into());
                maps::METER.get_ptr_mut(key).ok_or(Reason::MeterFull)?
            }
        };
        // SAFETY: a per-CPU value, which no other CPU writes.
        unsafe {
            (*meter).packets += 1;
            (*meter).bytes += u64::from(bytes);
        }
        Ok(())
    }
}

/// Copies a value by words, where the compiler would call a loop over its bytes.
#[inline(always)]
fn copy_words<T>(from: *const T, to: *mut T) {
    const { assert!(size_of::<T>() % 4 == 0 && align_of::<T>() == 4) };
    let mut word = 0;
    while word < size_of::<T>() / 4 {
        // SAFETY: inside both values, which are plain integers; volatile keeps the compiler from making it a memmove.
        unsafe { to.cast::<u32>().add(word).write_volatile(from.cast::<u32>().add(word).read_volatile()) };
        word += 1;
    }
}

/// The same number, but the compiler no longer knows where it comes from. Without it LLVM folds "was it found" and other
/// conditions into arithmetic on the map value's pointer, which the verifier refuses.
#[inline(always)]
fn opaque(number: u64) -> u64 {
    let mut number = number;
    // SAFETY: moves a register onto itself.
    unsafe { core::arch::asm!("{n} = {n}", n = inout(reg) number, options(nomem, nostack, preserves_flags)) };
    number
}

/// Adds to a counter that all CPUs share.
#[inline(always)]
pub fn add(counter: *mut u64, amount: u64) {
    // SAFETY: an aligned u64 in a live map value. This is BPF_XADD, which every kernel has; core has no atomics for the
    // base BPF instruction set.
    unsafe {
        core::arch::asm!("lock *(u64 *)({c} + 0) += {v}", c = in(reg) counter, v = in(reg) amount, options(nostack));
    }
}
