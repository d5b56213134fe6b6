//! A capture without libpcap: what passes one interface, whole frames, into a pcap file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::sockopt::RcvBufForce;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use serde_json::json;

use crate::say;

/// Room for what arrives while we write: a capture that loses frames proves nothing.
const BUFFER: usize = 256 << 20;
/// A frame with offloads is up to 64 KiB, more with BIG TCP.
const FRAME: usize = 512 << 10;

pub(crate) fn run(interface: &str, file: &Path) {
    let index = if_nametoindex(interface).unwrap_or_else(|e| panic!("interface {interface}: {e}"));
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .expect("open a packet socket");
    setsockopt(&fd, RcvBufForce, &BUFFER).expect("a large buffer");
    let mut out =
        BufWriter::new(File::create(file).unwrap_or_else(|e| panic!("create {}: {e}", file.display())));
    out.write_all(&header()).expect("write the capture");
    out.flush().expect("write the capture");
    say(&json!({"capturing": interface}));
    // The timeout is the longest time that a captured frame may be missing in the file.
    setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))
        .expect("set a timeout");
    let mut frame = vec![0; FRAME];
    loop {
        match recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut frame) {
            Ok((len, Some(from))) if from.ifindex() == index as usize => {
                let size = u32::try_from(len).expect("a frame").to_le_bytes();
                let record = [&[0; 8][..], &size, &size, &frame[..len]].concat();
                out.write_all(&record).expect("write the capture");
            }
            Ok(_) => {}
            Err(_) => out.flush().expect("write the capture"),
        }
    }
}

/// pcap's file header: little-endian, version 2.4, Ethernet.
fn header() -> Vec<u8> {
    let mut bytes = 0xa1b2_c3d4_u32.to_le_bytes().to_vec();
    bytes.extend([2, 0, 4, 0]);
    bytes.extend([0; 8]);
    bytes.extend((FRAME as u32).to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes
}
