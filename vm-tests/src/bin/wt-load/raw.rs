//! Hand-made IP packets from a raw socket: what a hostile workload with CAP_NET_RAW can send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use clap::ValueEnum;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use serde_json::json;

use crate::say;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A TCP segment that opens a connection.
    Syn,
    /// A TCP segment with data and ACK, as in the middle of a connection.
    Data,
    /// A UDP datagram.
    Udp,
    /// An ICMP echo request.
    Ping,
    /// SCTP.
    Sctp,
    /// A protocol that nothing tracks (GRE).
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dress {
    /// Nothing between IP header and payload.
    Plain,
    /// IPv4: a record-route option. IPv6: a hop-by-hop header.
    Options,
    /// IPv6: a destination-options header.
    Destination,
    /// Two fragments; the second alone carries the text.
    Fragments,
    /// A second fragment without its first.
    LateFragment,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    kind: Kind,
    /// Source address and port; any address.
    from: SocketAddr,
    to: SocketAddr,
    #[arg(long, default_value = "known text")]
    text: String,
    #[arg(long, value_enum, default_value = "plain")]
    dress: Dress,
    #[arg(long, default_value_t = 3)]
    count: u32,
}

const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;
const PROTO_ICMP: u8 = 1;
const PROTO_ICMP6: u8 = 58;
const PROTO_SCTP: u8 = 132;
const PROTO_GRE: u8 = 47;
const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

pub(crate) fn run(args: &Args) {
    let (proto, payload) = transport(args);
    let packets = dress(args, proto, &payload);
    let family = if args.to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // IPPROTO_RAW: the header is ours, in both families.
    let fd =
        socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).expect("open a raw socket");
    let to = SockaddrStorage::from(SocketAddr::new(args.to.ip(), 0));
    let mut errors = Vec::new();
    for _ in 0..args.count {
        for packet in &packets {
            if let Err(e) = sendto(fd.as_raw_fd(), packet, &to, MsgFlags::empty()) {
                errors.push(format!("{e:?}"));
            }
        }
    }
    say(&json!({"packets": packets.len() as u32 * args.count, "errors": errors}));
}

fn transport(args: &Args) -> (u8, Vec<u8>) {
    let text = args.text.as_bytes();
    let (sport, dport) = (args.from.port().to_be_bytes(), args.to.port().to_be_bytes());
    let mut bytes = Vec::new();
    let (proto, checksum_at) = match args.kind {
        Kind::Syn | Kind::Data => {
            let flags = if args.kind == Kind::Syn { 0x02 } else { 0x18 };
            bytes.extend(sport.into_iter().chain(dport));
            bytes.extend([0, 0, 0x10, 0, 0, 0, 0x20, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
            (PROTO_TCP, 16)
        }
        Kind::Udp => {
            let len = u16::try_from(8 + text.len()).expect("a short text");
            bytes.extend(sport.into_iter().chain(dport).chain(len.to_be_bytes()).chain([0, 0]));
            (PROTO_UDP, 6)
        }
        Kind::Ping if args.to.is_ipv4() => {
            bytes.extend([8, 0, 0, 0, 0, 9, 0, 1]);
            (PROTO_ICMP, 2)
        }
        Kind::Ping => {
            bytes.extend([128, 0, 0, 0, 0, 9, 0, 1]);
            (PROTO_ICMP6, 2)
        }
        Kind::Sctp | Kind::Other => {
            bytes.extend(sport.into_iter().chain(dport).chain([0; 8]));
            (if args.kind == Kind::Sctp { PROTO_SCTP } else { PROTO_GRE }, 8)
        }
    };
    bytes.extend(text);
    let pseudo = if proto == PROTO_ICMP { Vec::new() } else { pseudo_header(args, proto, bytes.len()) };
    let sum = checksum(pseudo.iter().chain(&bytes).copied().collect());
    bytes[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    (proto, bytes)
}

fn pseudo_header(args: &Args, proto: u8, len: usize) -> Vec<u8> {
    let len = u32::try_from(len).expect("short").to_be_bytes();
    match (args.from.ip(), args.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            [&from.octets()[..], &to.octets(), &[0, proto], &len[2..]].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            [&from.octets()[..], &to.octets(), &len, &[0, 0, 0, proto]].concat()
        }
        _ => panic!("source and destination are of different families"),
    }
}

fn checksum(mut bytes: Vec<u8>) -> u16 {
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

fn dress(args: &Args, proto: u8, payload: &[u8]) -> Vec<Vec<u8>> {
    // A first fragment must be a multiple of 8 bytes; 24 hold a TCP header and a bit.
    let cut = 24.min(payload.len() / 8 * 8);
    match (args.from.ip(), args.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => match args.dress {
            Dress::Options => vec![ipv4(from, to, proto, &[7, 7, 4, 0, 0, 0, 0, 0], 0, payload)],
            Dress::Fragments => vec![
                ipv4(from, to, proto, &[], 0x2000, &payload[..cut]),
                ipv4(from, to, proto, &[], fragment_offset(cut), &payload[cut..]),
            ],
            Dress::LateFragment => vec![ipv4(from, to, proto, &[], fragment_offset(cut), &payload[cut..])],
            Dress::Plain | Dress::Destination => vec![ipv4(from, to, proto, &[], 0, payload)],
        },
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // Both option headers hold one PadN of four bytes.
            let option = |next: u8| vec![next, 0, 1, 4, 0, 0, 0, 0];
            let fragment = |offset: u16| [&[proto, 0][..], &offset.to_be_bytes(), &[0, 0, 0, 77]].concat();
            let last = fragment_offset(cut) << 3;
            match args.dress {
                Dress::Plain => vec![ipv6(from, to, proto, &[payload])],
                Dress::Options => vec![ipv6(from, to, HOP_BY_HOP, &[&option(proto), payload])],
                Dress::Destination => vec![ipv6(from, to, DESTINATION, &[&option(proto), payload])],
                Dress::Fragments => vec![
                    ipv6(from, to, FRAGMENT, &[&fragment(1), &payload[..cut]]),
                    ipv6(from, to, FRAGMENT, &[&fragment(last), &payload[cut..]]),
                ],
                Dress::LateFragment => vec![ipv6(from, to, FRAGMENT, &[&fragment(last), &payload[cut..]])],
            }
        }
        _ => panic!("source and destination are of different families"),
    }
}

fn fragment_offset(bytes: usize) -> u16 {
    u16::try_from(bytes / 8).expect("a small packet")
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, proto: u8, options: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
    let words = 5 + options.len() / 4;
    let len = u16::try_from(words * 4 + payload.len()).expect("a small packet");
    let mut packet = vec![0x40 | u8::try_from(words).expect("few options"), 0];
    packet.extend(len.to_be_bytes());
    packet.extend([0, 77]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, proto, 0, 0]);
    packet.extend(from.octets().into_iter().chain(to.octets()).chain(options.iter().copied()));
    let sum = checksum(packet.clone());
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).expect("a small packet").to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets().into_iter().chain(to.octets()));
    packet.extend(payload);
    packet
}
