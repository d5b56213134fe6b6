//! The sock_addr hooks: connect, sendmsg, recvmsg, getpeername, bind.

use aya_ebpf::bindings::{BPF_ANY, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_set_retval, bpf_sk_storage_delete, bpf_sk_storage_get,
};
use core::ptr::null_mut;
use weft_datapath::abi::*;
use weft_datapath::addr::{is_loopback, is_v4, v4};
use weft_datapath::connect::{Action, Dial, MODE_CAPTURE, MODE_DIRECT, Plan, TCP, UDP, decide};
use weft_datapath::event;
use weft_datapath::names::{OUTBOUND_PORT, config, is_agent_port};
use weft_datapath::reason::Reason;
use weft_datapath::service::LEAST_CONNECTIONS;
use weft_datapath::tables::Tables;

use crate::context::SockAddr;
use crate::features;
use crate::lookup::Maps;
use crate::maps;
use crate::outcome::refused;

/// Return values of the hooks.
const PASS: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// connect4, connect6.
#[inline(always)]
pub fn connect<const SIX: bool>(ctx: SockAddr<SIX>) -> i32 {
    let sk = ctx.sk();
    let protocol = ctx.protocol();
    if is_agent(sk) || (protocol != TCP && protocol != UDP) {
        return PASS;
    }
    let cookie = netns_cookie(ctx);
    let Some(caller) = Maps.netns(cookie) else { return PASS };
    // A socket may connect again after a refusal or AF_UNSPEC; what it wanted before must not stick.
    // SAFETY: the socket of this call.
    unsafe { bpf_sk_storage_delete(maps::ORIG_SK.as_ptr(), sk.cast()) };
    let dial = Dial { dst: ctx.addr(), port: ctx.port(), protocol };
    let plan = decide(&Maps, &caller, &dial, pick);
    let (target, port) = match plan.action {
        Action::Pass => return PASS,
        // Nothing is rewritten, and sockops finds both identities by itself where it can.
        Action::Direct if plan.service == 0 && features() & config::SOCKOPS_NETNS != 0 => return PASS,
        Action::Direct => (plan.backend.addr, plan.backend.port),
        Action::Capture => (if is_v4(&dial.dst) { LOOPBACK_V4 } else { LOOPBACK_V6 }, OUTBOUND_PORT),
        Action::Refuse(reason) => return refuse(event::CONNECT, &caller, &dial, &plan, reason),
    };
    if !remember(sk, cookie, caller.identity, &dial, &plan) {
        return refuse(event::CONNECT, &caller, &dial, &plan, Reason::StorageFull);
    }
    if protocol == UDP && plan.service != 0 && !remember_udp(sk, &dial, &plan.backend) {
        return refuse(event::CONNECT, &caller, &dial, &plan, Reason::StorageFull);
    }
    if ctx.set(&target, port) {
        PASS
    } else {
        refuse(event::CONNECT, &caller, &dial, &plan, Reason::NoBackend)
    }
}

/// Notes with the socket what it dialled and where that leads. A function of its own, because older kernels (6.1) add up
/// the frames of a call chain in steps of 32 bytes, and `decide` needs most of the 512 below [`connect`].
#[inline(never)]
fn remember(sk: *mut bpf_sock, netns_cookie: u64, source: u32, dial: &Dial, plan: &Plan) -> bool {
    let mut orig = OrigDst {
        netns_cookie,
        dst: dial.dst,
        backend: plan.backend.addr,
        source,
        destination: plan.destination,
        dst_port: dial.port,
        backend_port: plan.backend.port,
        mode: if plan.action == Action::Direct { MODE_DIRECT } else { MODE_CAPTURE },
        service: plan.service,
        pad: 0,
    };
    !storage(maps::ORIG_SK.as_ptr(), sk, &mut orig).is_null()
}

const LOOPBACK_V4: Addr = v4([127, 0, 0, 1]);
const LOOPBACK_V6: Addr = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// sendmsg4, sendmsg6: datagrams with an address of their own.
#[inline(always)]
pub fn sendmsg<const SIX: bool>(ctx: SockAddr<SIX>) -> i32 {
    let sk = ctx.sk();
    let Some(caller) = Maps.netns(netns_cookie(ctx)) else { return PASS };
    let dial = Dial { dst: ctx.addr(), port: ctx.port(), protocol: UDP };
    let plan = decide(&Maps, &caller, &dial, pick);
    match plan.action {
        Action::Refuse(reason) => return refuse(event::SENDMSG, &caller, &dial, &plan, reason),
        _ if plan.service == 0 => {
            forget_udp(sk, &dial);
            return PASS;
        }
        _ => {}
    }
    if !remember_udp(sk, &dial, &plan.backend) {
        return refuse(event::SENDMSG, &caller, &dial, &plan, Reason::StorageFull);
    }
    if ctx.set(&plan.backend.addr, plan.backend.port) {
        PASS
    } else {
        refuse(event::SENDMSG, &caller, &dial, &plan, Reason::NoBackend)
    }
}

/// recvmsg4, recvmsg6: a backend's reply comes from the service that was asked.
#[inline(always)]
pub fn recvmsg<const SIX: bool>(ctx: SockAddr<SIX>) -> i32 {
    let (addr, port) = (ctx.addr(), ctx.port());
    if let Some(peers) = udp_peers(ctx.sk(), 0) {
        let mut row = 0;
        while row < UDP_PEERS {
            let peer = &peers.rows[row];
            if peer.backend_port == port && same(&peer.backend, &addr) {
                let service = peer.service;
                ctx.set(&service, peer.service_port);
                break;
            }
            row += 1;
        }
    }
    PASS
}

/// getpeername4, getpeername6, which also serve accept().
#[inline(always)]
pub fn getpeername<const SIX: bool>(ctx: SockAddr<SIX>) -> i32 {
    let sk = ctx.sk();
    // SAFETY: the socket of this call.
    let orig =
        unsafe { bpf_sk_storage_get(maps::ORIG_SK.as_ptr(), sk.cast(), null_mut(), 0) }.cast::<OrigDst>();
    if !orig.is_null() {
        // SAFETY: checked for null; a live value of this type.
        let orig = unsafe { &*orig };
        let dst = orig.dst;
        ctx.set(&dst, orig.dst_port);
        return PASS;
    }
    let addr = ctx.addr();
    // Over IPv4 the agent dials from loopback, so that most servers need no second look.
    if (is_v4(&addr) && !is_loopback(&addr)) || is_agent(sk) {
        return PASS;
    }
    let end = LocalEnd { netns_cookie: netns_cookie(ctx), addr, port: ctx.port(), pad: 0, pad2: 0 };
    // SAFETY: the value is plain integers.
    if let Some(client) = unsafe { maps::LEG.get(&end) } {
        let addr = client.addr;
        ctx.set(&addr, client.port);
    }
    PASS
}

/// bind4, bind6: the agent's ports are the agent's.
#[inline(always)]
pub fn bind<const SIX: bool>(ctx: SockAddr<SIX>) -> i32 {
    let port = ctx.port();
    if ctx.protocol() != TCP || !is_agent_port(port) || is_agent(ctx.sk()) {
        return PASS;
    }
    let Some(caller) = Maps.netns(netns_cookie(ctx)) else { return PASS };
    let mut event = Event {
        dst: ctx.addr(),
        dst_port: port,
        source: caller.identity,
        protocol: TCP,
        hook: event::BIND,
        ifindex: caller.ifindex,
        ..Event::default()
    };
    refused(Reason::ReservedPort, || &mut event);
    REFUSE
}

/// Chooses a slot below `service.count`, which is not 0.
#[inline(always)]
fn pick(service: &Service) -> u32 {
    if service.balance == LEAST_CONNECTIONS {
        let (first, second) = (below(random(), service), below(random(), service));
        return if active(service, first) <= active(service, second) { first } else { second };
    }
    if let Some(turn) = maps::ROUND.get_ptr_mut(&service.id) {
        // SAFETY: a live map value. Two CPUs may take the same turn: then one backend gets two in a row.
        let slot = unsafe { *turn };
        // SAFETY: as above.
        unsafe { *turn = slot.wrapping_add(1) };
        return below(slot, service);
    }
    let slot = random();
    let _ = maps::ROUND.insert(&service.id, &slot.wrapping_add(1), BPF_ANY.into());
    below(slot, service)
}

#[inline(always)]
fn active(service: &Service, slot: u32) -> u64 {
    let Some(backend) = Maps.backend(service, slot) else { return u64::MAX };
    // SAFETY: the value is a plain integer.
    unsafe { maps::ACTIVE.get(&backend) }.copied().unwrap_or(0)
}

/// A slot of the service. `checked_rem`, because the panic on division by zero is not for the verifier.
#[inline(always)]
fn below(number: u32, service: &Service) -> u32 {
    number.checked_rem(service.count).unwrap_or(0)
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_prandom_u32() }
}

#[inline(never)]
fn refuse(hook: u8, caller: &Netns, dial: &Dial, plan: &Plan, reason: Reason) -> i32 {
    let mut event = Event {
        dst: plan.backend.addr,
        dst_port: plan.backend.port,
        source: caller.identity,
        destination: plan.destination,
        protocol: dial.protocol,
        hook,
        rule: plan.rule,
        ifindex: caller.ifindex,
        ..Event::default()
    };
    refused(reason, || &mut event);
    if hook == event::CONNECT && features() & config::SET_RETVAL != 0 {
        // SAFETY: a helper on the running program; without it the kernel says EPERM.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}

/// Is this one of the agent's sockets?
#[inline(always)]
pub fn is_agent(sk: *mut bpf_sock) -> bool {
    // SAFETY: the socket of this call; the map does not create on a miss.
    let mark = unsafe { bpf_sk_storage_get(maps::AGENT_SK.as_ptr(), sk.cast(), null_mut(), 0) };
    !mark.is_null()
}

/// Stores a copy of `value` with the socket; null when the kernel has no memory for it.
#[inline(always)]
pub fn storage<T>(map: *mut core::ffi::c_void, sk: *mut bpf_sock, value: &mut T) -> *mut T {
    let value: *mut T = value;
    // SAFETY: the socket of this call and an initialised value of the map's type.
    unsafe { bpf_sk_storage_get(map, sk.cast(), value.cast(), BPF_SK_STORAGE_GET_F_CREATE.into()) }.cast()
}

#[inline(always)]
fn udp_peers<'a>(sk: *mut bpf_sock, flags: u64) -> Option<&'a mut UdpPeers> {
    // SAFETY: the socket of this call; a value that is created starts as zeros.
    let peers = unsafe { bpf_sk_storage_get(maps::UDP_SK.as_ptr(), sk.cast(), null_mut(), flags) };
    // SAFETY: null is checked by as_mut; threads that share the socket may interleave rows of the same shape.
    unsafe { peers.cast::<UdpPeers>().as_mut() }
}

/// Notes that replies of `backend` are replies of what was dialled.
#[inline(never)]
fn remember_udp(sk: *mut bpf_sock, dial: &Dial, backend: &Backend) -> bool {
    let Some(peers) = udp_peers(sk, BPF_SK_STORAGE_GET_F_CREATE.into()) else { return false };
    let mut row = 0;
    while row < UDP_PEERS {
        let peer = &mut peers.rows[row];
        if peer.backend_port == backend.port && same(&peer.backend, &backend.addr) {
            peer.service = dial.dst;
            peer.service_port = dial.port;
            return true;
        }
        row += 1;
    }
    let slot = (peers.next as usize) & (UDP_PEERS - 1);
    peers.next = peers.next.wrapping_add(1);
    peers.rows[slot] = UdpPeer {
        backend: backend.addr,
        service: dial.dst,
        backend_port: backend.port,
        service_port: dial.port,
        pad: 0,
    };
    true
}

/// A datagram that goes to a backend directly: its replies are the backend's own.
#[inline(never)]
fn forget_udp(sk: *mut bpf_sock, dial: &Dial) {
    let Some(peers) = udp_peers(sk, 0) else { return };
    let mut row = 0;
    while row < UDP_PEERS {
        let peer = &mut peers.rows[row];
        if peer.backend_port == dial.port && same(&peer.backend, &dial.dst) {
            peer.backend_port = 0;
        }
        row += 1;
    }
}

/// Compares by words: a byte-array comparison becomes a call to a libc function that BPF lacks.
#[inline(always)]
fn same(a: &Addr, b: &Addr) -> bool {
    let word = |x: &Addr, i: usize| u32::from_ne_bytes([x[i], x[i + 1], x[i + 2], x[i + 3]]);
    word(a, 12) == word(b, 12)
        && word(a, 8) == word(b, 8)
        && word(a, 4) == word(b, 4)
        && word(a, 0) == word(b, 0)
}

#[inline(always)]
fn netns_cookie<const SIX: bool>(ctx: SockAddr<SIX>) -> u64 {
    // SAFETY: the program's context.
    unsafe { bpf_get_netns_cookie(ctx.raw()) }
}
