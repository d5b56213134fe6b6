//! sockops: hands original destinations to the agent and counts connections of the direct path.

use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get, bpf_sock_ops_cb_flags_set};
use weft_datapath::abi::{Backend, LocalEnd, OrigDst, TcpKey, TcpStats};
use weft_datapath::connect::{MODE_CAPTURE, MODE_DIRECT};
use weft_datapath::names::config;
use weft_datapath::reason::Reason;
use weft_datapath::tables::Tables;

use crate::connect::{is_agent, storage};
use crate::context::SockOps;
use crate::features;
use crate::lookup::{Maps, add};
use crate::maps;
use crate::outcome::count;

// include/uapi/linux/bpf.h, include/net/tcp_states.h
const TCP_CONNECT: u32 = 3;
const ACTIVE_ESTABLISHED: u32 = 4;
const STATE: u32 = 10;
const STATE_FLAG: i32 = 1 << 2;
const TCP_CLOSE: u32 = 7;
const TCP_FIN_WAIT2: u32 = 5;

/// The hook.
#[inline(always)]
pub fn sockops(ctx: SockOps) {
    let op = ctx.op();
    if op != TCP_CONNECT && op != ACTIVE_ESTABLISHED && op != STATE {
        return;
    }
    if op == STATE && ctx.new_state() != TCP_CLOSE {
        return;
    }
    let sk = ctx.sk();
    if sk.is_null() || is_agent(sk) {
        return;
    }
    match op {
        TCP_CONNECT => connecting(ctx, sk),
        ACTIVE_ESTABLISHED => active(ctx, sk),
        _ => closed(ctx, sk),
    }
}

/// Before the SYN leaves: the source port is known, so the agent can be told where the connection wanted to go.
#[inline(always)]
fn connecting(ctx: SockOps, sk: *mut bpf_sock) {
    let Some(orig) = orig_dst(sk) else { return };
    if orig.service != 0 || orig.mode == MODE_CAPTURE {
        watch_state(ctx);
    }
    if orig.service != 0 {
        let backend = Backend { addr: orig.backend, port: orig.backend_port, pad: 0 };
        if let Some(open) = maps::ACTIVE.get_ptr_mut(&backend) {
            add(open, 1);
        } else {
            let _ = maps::ACTIVE.insert(&backend, &1, BPF_NOEXIST.into());
        }
    }
    if orig.mode == MODE_CAPTURE
        && maps::ORIG_DST.insert(&local_end(ctx, orig), orig, BPF_ANY.into()).is_err()
    {
        count(Reason::StorageFull); // The agent finds nothing and resets the connection.
    }
}

/// A connection of the direct path is counted at its client's socket: both ends are on this node and see the same.
#[inline(always)]
fn active(ctx: SockOps, sk: *mut bpf_sock) {
    if let Some(orig) = orig_dst(sk) {
        if orig.mode == MODE_DIRECT && orig.destination != 0 {
            let OrigDst { source, destination, service, .. } = *orig;
            opened(ctx, sk, TcpKey { source, destination, service });
        }
    } else if let Some((own, peer)) = neighbours(ctx) {
        opened(ctx, sk, TcpKey { source: own, destination: peer, service: 0 });
    }
}

/// The identities of both ends, own first, if both are workloads of this node.
#[inline(always)]
fn neighbours(ctx: SockOps) -> Option<(u32, u32)> {
    if features() & config::SOCKOPS_NETNS == 0 {
        return None;
    }
    // SAFETY: the program's context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.0.cast()) };
    let own = Maps.netns(netns_cookie)?;
    let peer = Maps.endpoint(&ctx.remote())?;
    if peer.ifindex == 0 || peer.ifindex == own.ifindex { None } else { Some((own.identity, peer.identity)) }
}

#[inline(always)]
fn opened(ctx: SockOps, sk: *mut bpf_sock, mut key: TcpKey) {
    if storage(maps::TCP_SK.as_ptr(), sk, &mut key).is_null() {
        return;
    }
    watch_state(ctx);
    if let Some(stats) = stats(&key) {
        // SAFETY: a per-CPU value.
        unsafe { (*stats).opened += 1 };
    }
}

#[inline(always)]
fn closed(ctx: SockOps, sk: *mut bpf_sock) {
    if let Some(orig) = orig_dst(sk) {
        if orig.service != 0 {
            let backend = Backend { addr: orig.backend, port: orig.backend_port, pad: 0 };
            if let Some(open) = maps::ACTIVE.get_ptr_mut(&backend) {
                add(open, u64::MAX); // minus one
            }
        }
        // For connections that the agent never sees; where it took the entry, nothing is left. An application that
        // sends and closes at once leaves this state by a timewait socket while its connection, with all its bytes,
        // may still wait to be accepted.
        if orig.mode == MODE_CAPTURE && ctx.old_state() != TCP_FIN_WAIT2 {
            let _ = maps::ORIG_DST.remove(&local_end(ctx, orig));
        }
    }
    // SAFETY: the socket of this call.
    let key = unsafe { bpf_sk_storage_get(maps::TCP_SK.as_ptr(), sk.cast(), null_mut(), 0) }.cast::<TcpKey>();
    if key.is_null() {
        return;
    }
    // SAFETY: checked for null.
    let key = unsafe { *key };
    if let Some(stats) = stats(&key) {
        // SAFETY: a per-CPU value.
        let stats = unsafe { &mut *stats };
        stats.closed += 1;
        stats.sent += ctx.bytes_acked();
        stats.received += ctx.bytes_received();
        stats.retransmits += ctx.retransmits();
        stats.srtt_us += ctx.srtt_us();
    }
}

#[inline(always)]
fn stats(key: &TcpKey) -> Option<*mut TcpStats> {
    if let Some(stats) = maps::TCP.get_ptr_mut(key) {
        return Some(stats);
    }
    let _ = maps::TCP.insert(key, &TcpStats::default(), BPF_NOEXIST.into());
    let stats = maps::TCP.get_ptr_mut(key);
    if stats.is_none() {
        count(Reason::MeterFull);
    }
    stats
}

#[inline(always)]
fn orig_dst<'a>(sk: *mut bpf_sock) -> Option<&'a OrigDst> {
    // SAFETY: the socket of this call.
    let orig =
        unsafe { bpf_sk_storage_get(maps::ORIG_SK.as_ptr(), sk.cast(), null_mut(), 0) }.cast::<OrigDst>();
    // SAFETY: null is checked by as_ref; a live value of this type.
    unsafe { orig.as_ref() }
}

#[inline(always)]
fn local_end(ctx: SockOps, orig: &OrigDst) -> LocalEnd {
    LocalEnd { netns_cookie: orig.netns_cookie, addr: ctx.local(), port: ctx.local_port(), pad: 0, pad2: 0 }
}

#[inline(always)]
fn watch_state(ctx: SockOps) {
    // SAFETY: the program's context.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.0, STATE_FLAG) };
}
