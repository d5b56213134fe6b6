//! The kernel programs of weft: entry points only. What they decide is in `weft_datapath`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(unreachable_pub, reason = "a binary: nothing is reachable, `pub` marks what a module offers")]

mod connect;
mod context;
mod lookup;
mod maps;
mod outcome;
mod sockops;

use aya_ebpf::macros::{cgroup_sock_addr, classifier, sock_ops};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext, TcContext};
use weft_datapath::traffic::{self, Hook, Passed, Work};

use context::{Skb, SockAddr, SockOps};

/// Feature bits of the running kernel (`names::config`), set by the loader before the verifier looks.
#[unsafe(no_mangle)]
static WEFT_FEATURES: u32 = 0;

#[inline(always)]
fn features() -> u32 {
    // SAFETY: a static of this program. Volatile, because its value is the loader's, not the compiler's.
    unsafe { core::ptr::read_volatile(&WEFT_FEATURES) }
}

macro_rules! sock_addr {
    ($($name:ident, $hook:ident, $function:ident, $six:literal;)+) => {$(
        #[cgroup_sock_addr($hook)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            connect::$function(SockAddr::<$six>(ctx.sock_addr))
        }
    )+};
}

sock_addr! {
    weft_connect4, connect4, connect, false;
    weft_connect6, connect6, connect, true;
    weft_sendmsg4, sendmsg4, sendmsg, false;
    weft_sendmsg6, sendmsg6, sendmsg, true;
    weft_recvmsg4, recvmsg4, recvmsg, false;
    weft_recvmsg6, recvmsg6, recvmsg, true;
    weft_getpeer4, getpeername4, getpeername, false;
    weft_getpeer6, getpeername6, getpeername, true;
    weft_bind4, bind4, bind, false;
    weft_bind6, bind6, bind, true;
}

#[sock_ops]
pub fn weft_sockops(ctx: SockOpsContext) -> u32 {
    sockops::sockops(SockOps(ctx.ops));
    1
}

/// Packets that the workload sends: ingress of the host side of its veth.
#[classifier]
pub fn weft_from_wl(ctx: TcContext) -> i32 {
    tc(Skb(ctx.skb.skb), traffic::FROM)
}

/// Packets that the workload will receive: egress of the host side of its veth.
#[classifier]
pub fn weft_to_wl(ctx: TcContext) -> i32 {
    tc(Skb(ctx.skb.skb), traffic::TO)
}

/// Not final: other programs of the chain still run (TCX_NEXT, TC_ACT_UNSPEC).
const NEXT: i32 = -1;
/// TC_ACT_SHOT.
const DROP: i32 = 2;

#[inline(always)]
fn tc(skb: Skb, direction: u32) -> i32 {
    let hook = Hook { ifindex: skb.ifindex(), ingress_ifindex: skb.ingress_ifindex(), direction };
    let Some(work) = maps::WORK.get_ptr_mut(0) else { return DROP };
    // SAFETY: this CPU's own value; TC programs run with bottom halves disabled, so none interrupts another.
    let work: &mut Work = unsafe { &mut *work };
    match traffic::decide(&lookup::Maps, &hook, &skb, work) {
        Ok(Passed::Known) => NEXT,
        Ok(Passed::Accepted) => {
            outcome::accepted(|| work.event(&hook));
            NEXT
        }
        Err(reason) => {
            outcome::refused(reason, || work.event(&hook));
            DROP
        }
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Helpers such as `bpf_sk_storage_get` want a GPL-compatible program.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
