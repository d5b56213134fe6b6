//! From bytes on a veth to what a decision needs. Anything that is not understood is an error, never a guess.

use crate::abi::Addr;
use crate::addr::{UNSPECIFIED, v4};
use crate::connect::{TCP, UDP};
use crate::reason::Reason;

/// Length of an Ethernet header.
const ETH: u32 = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const ARP: u16 = 0x0806;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;

/// TCP flag bits.
pub const SYN: u8 = 0x02;
/// TCP flag bits.
pub const ACK: u8 = 0x10;

/// Bytes of a frame, starting with its Ethernet header.
#[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
pub trait Packet {
    /// `N` bytes at `offset`; `None` when the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// The 40 bytes behind the Ethernet header, ten big-endian words, if they are at hand without a copy.
    fn headers(&self) -> Option<[u32; 10]>;
    /// Ethernet protocol number.
    fn ethertype(&self) -> Option<u16>;
    /// Length of the whole frame.
    fn len(&self) -> u32;
    /// Does the packet's socket carry the agent's mark? Asked only where it matters.
    fn is_agents(&self) -> bool;
}

/// Both ends of a packet. Aligned, so that addresses are copied by words: BPF has no unaligned access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Tuple {
    pub src: Addr,
    pub dst: Addr,
    pub src_port: u16,
    pub dst_port: u16,
    /// TCP, UDP, SCTP or ICMP (1 for both families; the echo identifier stands for the requester's port, 0 for the other).
    pub protocol: u8,
}

/// Fragment state of a datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Piece {
    /// Not fragmented.
    #[default]
    Whole = 0,
    /// The first fragment, which has the ports.
    First = 1,
    /// A later one, which has none.
    Later = 2,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// TCP, UDP, SCTP or ICMP echo.
    #[default]
    Flow = 0,
    /// An ICMP error; `tuple` is the packet it is about, which its receiver had sent.
    IcmpError = 1,
    /// ARP; `tuple.src` speaks about `tuple.dst`.
    Arp = 2,
    /// Neighbour discovery with hop limit 255; `tuple.dst` is the address advertised, or unspecified.
    Neighbour = 3,
    /// Multicast listener discovery.
    Listener = 4,
}

/// A frame that was read. Lives in per-CPU memory in the kernel, whose stack is small, so it is filled in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Parsed {
    pub tuple: Tuple,
    /// Source of the packet itself; differs from `tuple.src` for ICMP errors.
    pub src: Addr,
    pub kind: Kind,
    pub piece: Piece,
    pub tcp_flags: u8,
    /// Does a TCP segment carry data?
    pub payload: bool,
    /// IP identification of a fragment.
    pub id: u32,
}

/// Reads a frame.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn parse<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Reason> {
    parsed.kind = Kind::Flow;
    parsed.piece = Piece::Whole;
    if let Some(tcp) = plain_tcp(packet) {
        let PlainTcp { src, dst, src_port, dst_port, flags, payload } = tcp;
        parsed.tuple = Tuple { src, dst, src_port, dst_port, protocol: TCP };
        parsed.src = src;
        parsed.tcp_flags = flags;
        parsed.payload = payload;
        return Ok(());
    }
    let ethertype = packet.ethertype().ok_or(Reason::Malformed)?;
    parsed.tuple.src_port = 0;
    parsed.tuple.dst_port = 0;
    parsed.tcp_flags = 0;
    parsed.payload = false;
    match ethertype {
        IPV4 => ipv4(packet, parsed),
        IPV6 => ipv6(packet, parsed),
        ARP => arp(packet, parsed),
        _ => Err(Reason::EtherType),
    }
}

/// A whole TCP segment over IPv4 without options, by far the most frequent packet.
#[derive(Clone, Copy, Debug)]
pub struct PlainTcp {
    pub src: Addr,
    pub dst: Addr,
    pub src_port: u16,
    pub dst_port: u16,
    pub flags: u8,
    pub payload: bool,
}

/// Reads one, without a copy. `None`: [`parse`] looks closer.
#[inline(always)]
pub fn plain_tcp<P: Packet>(packet: &P) -> Option<PlainTcp> {
    if packet.ethertype() != Some(IPV4) {
        return None;
    }
    let words = packet.headers()?;
    let total = words[0] & 0xffff;
    let header = (words[8] >> 28) * 4;
    let protocol = (words[2] >> 16) as u8;
    if words[0] >> 24 != 0x45
        || protocol != TCP
        || words[1] & 0x3fff != 0
        || header < 20
        || total < 20 + header
    {
        return None;
    }
    Some(PlainTcp {
        src: v4(words[3].to_be_bytes()),
        dst: v4(words[4].to_be_bytes()),
        src_port: (words[5] >> 16) as u16,
        dst_port: words[5] as u16,
        flags: (words[8] >> 16) as u8,
        payload: total > 20 + header,
    })
}

#[inline(always)]
fn arp<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Reason> {
    let head = packet.load::<8>(ETH).ok_or(Reason::Malformed)?;
    // Ethernet, IPv4, address lengths 6 and 4 (RFC 826).
    if u64::from_be_bytes(head) >> 16 != 0x0001_0800_0604 {
        return Err(Reason::Arp);
    }
    parsed.kind = Kind::Arp;
    parsed.tuple.src = v4(packet.load::<4>(ETH + 14).ok_or(Reason::Malformed)?);
    parsed.tuple.dst = v4(packet.load::<4>(ETH + 24).ok_or(Reason::Malformed)?);
    parsed.src = parsed.tuple.src;
    Ok(())
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Reason> {
    let head = packet.load::<20>(ETH).ok_or(Reason::Malformed)?;
    if head[0] != 0x45 {
        return Err(if head[0] >> 4 == 4 && head[0] & 0xf > 5 {
            Reason::IpOptions
        } else {
            Reason::Malformed
        });
    }
    let total = u32::from(u16::from_be_bytes([head[2], head[3]]));
    // The kernel writes 0 into packets too big for the field (BIG TCP); then the frame's length counts.
    let end = if total == 0 { packet.len() } else { ETH + total };
    let flags = u16::from_be_bytes([head[6], head[7]]);
    parsed.id = u32::from(u16::from_be_bytes([head[4], head[5]]));
    parsed.piece = match (flags & 0x1fff, flags & 0x2000) {
        (0, 0) => Piece::Whole,
        (0, _) => Piece::First,
        _ => Piece::Later,
    };
    parsed.tuple.src = v4([head[12], head[13], head[14], head[15]]);
    parsed.tuple.dst = v4([head[16], head[17], head[18], head[19]]);
    parsed.tuple.protocol = head[9];
    parsed.src = parsed.tuple.src;
    transport(packet, ETH + 20, end, parsed)
}

#[inline(always)]
fn ipv6<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Reason> {
    let head = packet.load::<8>(ETH).ok_or(Reason::Malformed)?;
    if head[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let payload = u32::from(u16::from_be_bytes([head[4], head[5]]));
    let end = if payload == 0 { packet.len() } else { ETH + 40 + payload };
    parsed.tuple.src = packet.load::<16>(ETH + 8).ok_or(Reason::Malformed)?;
    parsed.tuple.dst = packet.load::<16>(ETH + 24).ok_or(Reason::Malformed)?;
    parsed.tuple.protocol = head[6];
    parsed.src = parsed.tuple.src;
    let mut offset = ETH + 40;
    match head[6] {
        HOP_BY_HOP => return listener(packet, parsed),
        FRAGMENT => {
            let ext = packet.load::<8>(offset).ok_or(Reason::Malformed)?;
            let flags = u16::from_be_bytes([ext[2], ext[3]]);
            parsed.id = u32::from_be_bytes([ext[4], ext[5], ext[6], ext[7]]);
            parsed.piece = if flags >> 3 == 0 { Piece::First } else { Piece::Later };
            parsed.tuple.protocol = ext[0];
            offset += 8;
        }
        ICMPV6 if matches!(packet.load::<1>(offset), Some([133..=137])) => {
            return neighbour(packet, head[7], parsed);
        }
        _ => {}
    }
    transport(packet, offset, end, parsed)
}

/// A hop-by-hop header is accepted in front of multicast listener discovery only (router alert, RFC 2710, RFC 3810).
#[inline(always)]
fn listener<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Reason> {
    let ext = packet.load::<9>(ETH + 40).ok_or(Reason::Malformed)?;
    parsed.kind = Kind::Listener;
    match (ext[0], ext[1], ext[8]) {
        (ICMPV6, 0, 130..=132 | 143) => Ok(()),
        _ => Err(Reason::IpOptions),
    }
}

#[inline(always)]
fn neighbour<P: Packet>(packet: &P, hop_limit: u8, parsed: &mut Parsed) -> Result<(), Reason> {
    if hop_limit != 255 {
        return Err(Reason::Icmp); // RFC 4861 sections 6.1, 7.1, 8.1: it crossed a router, so it is forged.
    }
    parsed.kind = Kind::Neighbour;
    let [kind] = packet.load::<1>(ETH + 40).ok_or(Reason::Malformed)?;
    // Only an advertisement (136) claims an address.
    parsed.tuple.dst =
        if kind == 136 { packet.load::<16>(ETH + 48).ok_or(Reason::Malformed)? } else { UNSPECIFIED };
    Ok(())
}

/// TCP, UDP, SCTP or ICMP at `offset`; `end` is where the IP packet ends.
#[inline(always)]
fn transport<P: Packet>(packet: &P, offset: u32, end: u32, parsed: &mut Parsed) -> Result<(), Reason> {
    let whole = matches!(parsed.piece, Piece::Whole);
    match parsed.tuple.protocol {
        TCP if whole => {
            let head = packet.load::<14>(offset).ok_or(Reason::Malformed)?;
            let header = u32::from(head[12] >> 4) * 4;
            if header < 20 || offset + header > end {
                return Err(Reason::Malformed);
            }
            parsed.tuple.src_port = u16::from_be_bytes([head[0], head[1]]);
            parsed.tuple.dst_port = u16::from_be_bytes([head[2], head[3]]);
            parsed.tcp_flags = head[13];
            parsed.payload = offset + header < end;
            Ok(())
        }
        UDP | SCTP => {
            if !matches!(parsed.piece, Piece::Later) {
                let head = packet.load::<8>(offset).ok_or(Reason::Malformed)?;
                parsed.tuple.src_port = u16::from_be_bytes([head[0], head[1]]);
                parsed.tuple.dst_port = u16::from_be_bytes([head[2], head[3]]);
            }
            Ok(())
        }
        ICMP | ICMPV6 if whole => icmp(packet, offset, parsed),
        TCP | ICMP | ICMPV6 => Err(Reason::Fragment),
        _ => Err(Reason::Protocol),
    }
}

#[inline(always)]
fn icmp<P: Packet>(packet: &P, offset: u32, parsed: &mut Parsed) -> Result<(), Reason> {
    let head = packet.load::<8>(offset).ok_or(Reason::Malformed)?;
    let six = parsed.tuple.protocol == ICMPV6;
    parsed.tuple.protocol = ICMP;
    let id = u16::from_be_bytes([head[4], head[5]]);
    match (six, head[0]) {
        (false, 8) | (true, 128) => parsed.tuple.src_port = id,
        (false, 0) | (true, 129) => parsed.tuple.dst_port = id,
        (false, 3 | 11 | 12) | (true, 1..=4) => {
            parsed.kind = Kind::IcmpError;
            return quoted(packet, offset + 8, six, parsed);
        }
        _ => return Err(Reason::Icmp),
    }
    Ok(())
}

/// The header of the packet that an ICMP error is about.
#[inline(always)]
fn quoted<P: Packet>(packet: &P, offset: u32, six: bool, parsed: &mut Parsed) -> Result<(), Reason> {
    let (protocol, ports) = if six {
        let [next] = packet.load::<1>(offset + 6).ok_or(Reason::Icmp)?;
        parsed.tuple.src = packet.load::<16>(offset + 8).ok_or(Reason::Icmp)?;
        parsed.tuple.dst = packet.load::<16>(offset + 24).ok_or(Reason::Icmp)?;
        (next, offset + 40)
    } else {
        let [version] = packet.load::<1>(offset).ok_or(Reason::Icmp)?;
        let [protocol] = packet.load::<1>(offset + 9).ok_or(Reason::Icmp)?;
        if version != 0x45 {
            return Err(Reason::Icmp);
        }
        parsed.tuple.src = v4(packet.load::<4>(offset + 12).ok_or(Reason::Icmp)?);
        parsed.tuple.dst = v4(packet.load::<4>(offset + 16).ok_or(Reason::Icmp)?);
        (protocol, offset + 20)
    };
    let head = packet.load::<8>(ports).ok_or(Reason::Icmp)?;
    let (src_port, dst_port, protocol) = match protocol {
        TCP | UDP => {
            (u16::from_be_bytes([head[0], head[1]]), u16::from_be_bytes([head[2], head[3]]), protocol)
        }
        // An echo request, whose identifier stands for the requester's port.
        ICMP | ICMPV6 => (u16::from_be_bytes([head[4], head[5]]), 0, ICMP),
        _ => return Err(Reason::Icmp),
    };
    parsed.tuple.src_port = src_port;
    parsed.tuple.dst_port = dst_port;
    parsed.tuple.protocol = protocol;
    Ok(())
}
