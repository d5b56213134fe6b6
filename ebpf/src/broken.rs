//! Programs that kernels must refuse: what weft says then is tested with them (`vm-tests/tests/load.rs`). Nothing installs
//! this object.
#![no_std]
#![no_main]
#![allow(unreachable_pub, reason = "a binary: nothing is reachable")]

use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::{classifier, sock_ops};
use aya_ebpf::programs::{SockOpsContext, TcContext};

/// Reads behind what it has not compared with the end of the frame: refused everywhere.
#[classifier]
pub fn broken_bounds(ctx: TcContext) -> i32 {
    // SAFETY: none, which is the point.
    i32::from(unsafe { ((*ctx.skb.skb).data as usize as *const u8).add(14).read_volatile() })
}

/// Calls a helper that `sock_ops` programs have from 5.14 on: refused before.
#[sock_ops]
pub fn broken_helper(ctx: SockOpsContext) -> u32 {
    // SAFETY: the program's own context.
    u32::from(unsafe { bpf_get_netns_cookie(ctx.ops.cast()) } != 0)
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// As that of the real programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
