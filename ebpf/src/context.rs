//! The reads and writes of kernel contexts.
//!
//! Fields are read by inline assembly at constant offsets: LLVM otherwise merges the loads of two branches into one at a
//! variable offset, which the verifier refuses ("dereference of modified ctx ptr").

use core::ffi::c_void;
use core::mem::{MaybeUninit, offset_of};

use aya_ebpf::bindings::{__sk_buff, bpf_sock, bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::helpers::generated::bpf_sk_fullsock;
use weft_datapath::abi::Addr;
use weft_datapath::addr::{is_v4, v4};
use weft_datapath::packet::Packet;

use crate::connect::is_agent;

macro_rules! load {
    ($ctx:expr, $offset:expr, $size:literal) => {{
        let value: u64;
        // SAFETY: an aligned load inside the context, which the verifier checks.
        unsafe {
            core::arch::asm!(concat!("{v} = *(", $size, " *)({c} + {o})"),
                v = lateout(reg) value, c = in(reg) $ctx, o = const $offset, options(nostack, readonly, preserves_flags));
        }
        value
    }};
}

macro_rules! store {
    ($ctx:expr, $offset:expr, $value:expr) => {{
        // SAFETY: an aligned store into a writable field of the context, which the verifier checks.
        unsafe {
            core::arch::asm!("*(u32 *)({c} + {o}) = {v}",
                v = in(reg) u64::from($value), c = in(reg) $ctx, o = const $offset, options(nostack, preserves_flags));
        }
    }};
}

const V4: u64 = 2;

/// The context of the sock_addr hooks. `SIX`: one of the IPv6 hooks, which also see v4-mapped addresses.
#[derive(Clone, Copy)]
pub struct SockAddr<const SIX: bool>(pub *mut bpf_sock_addr);

impl<const SIX: bool> SockAddr<SIX> {
    /// The address being dialled, bound or reported.
    #[inline(always)]
    pub fn addr(self) -> Addr {
        if SIX {
            addr6(
                load!(self.0, offset_of!(bpf_sock_addr, user_ip6), "u32"),
                load!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 4, "u32"),
                load!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 8, "u32"),
                load!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 12, "u32"),
            )
        } else {
            v4((load!(self.0, offset_of!(bpf_sock_addr, user_ip4), "u32") as u32).to_ne_bytes())
        }
    }

    /// Its port.
    #[inline(always)]
    pub fn port(self) -> u16 {
        u16::from_be(load!(self.0, offset_of!(bpf_sock_addr, user_port), "u32") as u16)
    }

    /// Replaces the address; `false` if its family is not the hook's.
    #[inline(always)]
    pub fn set(self, addr: &Addr, port: u16) -> bool {
        let word = |i: usize| u32::from_ne_bytes([addr[i], addr[i + 1], addr[i + 2], addr[i + 3]]);
        if SIX {
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6), word(0));
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 4, word(4));
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 8, word(8));
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 12, word(12));
        } else if is_v4(addr) {
            store!(self.0, offset_of!(bpf_sock_addr, user_ip4), word(12));
        } else {
            return false;
        }
        store!(self.0, offset_of!(bpf_sock_addr, user_port), u32::from(port.to_be()));
        true
    }

    /// IP protocol of the socket.
    #[inline(always)]
    pub fn protocol(self) -> u8 {
        load!(self.0, offset_of!(bpf_sock_addr, protocol), "u32") as u8
    }

    /// The socket.
    #[inline(always)]
    pub fn sk(self) -> *mut bpf_sock {
        load!(self.0, offset_of!(bpf_sock_addr, __bindgen_anon_1), "u64") as *mut bpf_sock
    }

    /// The context, for helpers.
    #[inline(always)]
    pub fn raw(self) -> *mut c_void {
        self.0.cast()
    }
}

/// The context of the sock_ops hook.
#[derive(Clone, Copy)]
pub struct SockOps(pub *mut bpf_sock_ops);

impl SockOps {
    /// Which callback.
    #[inline(always)]
    pub fn op(self) -> u32 {
        load!(self.0, offset_of!(bpf_sock_ops, op), "u32") as u32
    }

    /// First argument: the old state in a state callback.
    #[inline(always)]
    pub fn old_state(self) -> u32 {
        load!(self.0, offset_of!(bpf_sock_ops, __bindgen_anon_1), "u32") as u32
    }

    /// Second argument: the new state in a state callback.
    #[inline(always)]
    pub fn new_state(self) -> u32 {
        load!(self.0, offset_of!(bpf_sock_ops, __bindgen_anon_1) + 4, "u32") as u32
    }

    /// Local address.
    #[inline(always)]
    pub fn local(self) -> Addr {
        if load!(self.0, offset_of!(bpf_sock_ops, family), "u32") == V4 {
            v4((load!(self.0, offset_of!(bpf_sock_ops, local_ip4), "u32") as u32).to_ne_bytes())
        } else {
            addr6(
                load!(self.0, offset_of!(bpf_sock_ops, local_ip6), "u32"),
                load!(self.0, offset_of!(bpf_sock_ops, local_ip6) + 4, "u32"),
                load!(self.0, offset_of!(bpf_sock_ops, local_ip6) + 8, "u32"),
                load!(self.0, offset_of!(bpf_sock_ops, local_ip6) + 12, "u32"),
            )
        }
    }

    /// Local port.
    #[inline(always)]
    pub fn local_port(self) -> u16 {
        load!(self.0, offset_of!(bpf_sock_ops, local_port), "u32") as u16
    }

    /// Remote address.
    #[inline(always)]
    pub fn remote(self) -> Addr {
        if load!(self.0, offset_of!(bpf_sock_ops, family), "u32") == V4 {
            v4((load!(self.0, offset_of!(bpf_sock_ops, remote_ip4), "u32") as u32).to_ne_bytes())
        } else {
            addr6(
                load!(self.0, offset_of!(bpf_sock_ops, remote_ip6), "u32"),
                load!(self.0, offset_of!(bpf_sock_ops, remote_ip6) + 4, "u32"),
                load!(self.0, offset_of!(bpf_sock_ops, remote_ip6) + 8, "u32"),
                load!(self.0, offset_of!(bpf_sock_ops, remote_ip6) + 12, "u32"),
            )
        }
    }

    /// Application bytes the peer has acknowledged.
    #[inline(always)]
    pub fn bytes_acked(self) -> u64 {
        load!(self.0, offset_of!(bpf_sock_ops, bytes_acked), "u64")
    }

    /// Application bytes received.
    #[inline(always)]
    pub fn bytes_received(self) -> u64 {
        load!(self.0, offset_of!(bpf_sock_ops, bytes_received), "u64")
    }

    /// Segments sent again.
    #[inline(always)]
    pub fn retransmits(self) -> u64 {
        load!(self.0, offset_of!(bpf_sock_ops, total_retrans), "u32")
    }

    /// Smoothed round-trip time in microseconds; the kernel keeps eight times that.
    #[inline(always)]
    pub fn srtt_us(self) -> u64 {
        load!(self.0, offset_of!(bpf_sock_ops, srtt_us), "u32") >> 3
    }

    /// The socket; null when it is not a full one.
    #[inline(always)]
    pub fn sk(self) -> *mut bpf_sock {
        load!(self.0, offset_of!(bpf_sock_ops, __bindgen_anon_2), "u64") as *mut bpf_sock
    }
}

/// The context of the TC hooks.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

impl Skb {
    /// The interface that the program is attached to.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        load!(self.0, offset_of!(__sk_buff, ifindex), "u32") as u32
    }

    /// The interface that the packet came in by; 0 when a process of this network namespace made it.
    #[inline(always)]
    pub fn ingress_ifindex(self) -> u32 {
        load!(self.0, offset_of!(__sk_buff, ingress_ifindex), "u32") as u32
    }

    /// The socket that the packet belongs to, possibly of another network namespace; may be null or a request.
    #[inline(always)]
    pub fn sk(self) -> *mut bpf_sock {
        load!(self.0, offset_of!(__sk_buff, __bindgen_anon_2), "u64") as *mut bpf_sock
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the destination is N bytes long.
        let failed = unsafe {
            aya_ebpf::helpers::bpf_skb_load_bytes(self.0.cast(), offset, bytes.as_mut_ptr().cast(), N as u32)
        };
        // SAFETY: the helper filled it.
        if failed == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
    }

    #[inline(always)]
    fn headers(&self) -> Option<[u32; 10]> {
        const ETH: u64 = 14;
        let start = load!(self.0, offset_of!(__sk_buff, data), "u32");
        let end = load!(self.0, offset_of!(__sk_buff, data_end), "u32");
        // The verifier knows these two as the ends of the frame's linear part, and follows this comparison.
        if start + ETH + 40 > end {
            return None;
        }
        // Words, although the frame may lie at any address: kernels that want aligned access refuse the program.
        Some([
            u32::from_be(load!(start, ETH, "u32") as u32),
            u32::from_be(load!(start, ETH + 4, "u32") as u32),
            u32::from_be(load!(start, ETH + 8, "u32") as u32),
            u32::from_be(load!(start, ETH + 12, "u32") as u32),
            u32::from_be(load!(start, ETH + 16, "u32") as u32),
            u32::from_be(load!(start, ETH + 20, "u32") as u32),
            u32::from_be(load!(start, ETH + 24, "u32") as u32),
            u32::from_be(load!(start, ETH + 28, "u32") as u32),
            u32::from_be(load!(start, ETH + 32, "u32") as u32),
            u32::from_be(load!(start, ETH + 36, "u32") as u32),
        ])
    }

    #[inline(always)]
    fn ethertype(&self) -> Option<u16> {
        Some(u16::from_be(load!(self.0, offset_of!(__sk_buff, protocol), "u32") as u16))
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        load!(self.0, offset_of!(__sk_buff, len), "u32") as u32
    }

    /// The socket survives the crossing of the veth, and its storage with it.
    #[inline(always)]
    fn is_agents(&self) -> bool {
        let sk = self.sk();
        if sk.is_null() {
            return false;
        }
        // SAFETY: checked for null; the helper turns what is not a full socket into null.
        let sk = unsafe { bpf_sk_fullsock(sk) };
        !sk.is_null() && is_agent(sk)
    }
}

#[inline(always)]
fn addr6(a: u64, b: u64, c: u64, d: u64) -> Addr {
    let [a, b, c, d] = [
        (a as u32).to_ne_bytes(),
        (b as u32).to_ne_bytes(),
        (c as u32).to_ne_bytes(),
        (d as u32).to_ne_bytes(),
    ];
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}
