//! Captures: proof of what is and what is not on a wire.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::leftovers::Dir;
use crate::process::{Place, Process};

/// The only port whose bytes may look like noise.
pub const TUNNEL_PORT: u16 = 15008;

/// A running capture of one interface.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    _dir: Dir,
}

/// One captured packet, as far as it could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// IP protocol, after IPv6 extension headers; 0 for what is not IP.
    pub proto: u8,
    /// Ports, for TCP and UDP that is not a later fragment.
    pub ports: Option<(u16, u16)>,
    /// What follows the transport header (or the IP header, where there is no transport that we know).
    pub payload: Vec<u8>,
}

impl Capture {
    /// Starts to capture `interface`, from the namespace of `place`; returns when it runs.
    pub fn start(place: &Place, interface: &str) -> Capture {
        let dir = Dir::create("capture");
        let file = dir.path().join("frames.pcap");
        let mut process = Process::load(place, &format!("capture {interface} {}", file.display()));
        process.line();
        Capture { process, file, _dir: dir }
    }

    /// Ends the capture and reads it.
    pub fn finish(mut self) -> Wire {
        // Frames already sent are in the socket's buffer; the sniffer flushes when it has been idle for 20 ms.
        sleep(Duration::from_millis(300));
        let mut size = 0;
        loop {
            let now = std::fs::metadata(&self.file).map(|m| m.len()).unwrap_or(0);
            if now == size {
                break;
            }
            size = now;
            sleep(Duration::from_millis(100));
        }
        self.process.kill9();
        Wire::read(&self.file)
    }
}

/// What was on a wire.
#[derive(Debug, Default)]
pub struct Wire {
    /// The frames, as they were.
    pub frames: Vec<Vec<u8>>,
}

impl Wire {
    /// Reads a pcap file; a torn last record is ignored.
    pub fn read(file: &Path) -> Wire {
        let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("read {}: {e}", file.display()));
        let mut rest = bytes.get(24..).unwrap_or_default();
        let mut frames = Vec::new();
        while rest.len() >= 16 {
            let len = u32::from_le_bytes(rest[8..12].try_into().expect("4 bytes")) as usize;
            let Some(frame) = rest.get(16..16 + len) else { break };
            frames.push(frame.to_vec());
            rest = &rest[16 + len..];
        }
        Wire { frames }
    }

    /// Frames that contain `text`.
    pub fn count(&self, text: &[u8]) -> usize {
        self.frames.iter().filter(|frame| contains(frame, text)).count()
    }

    /// The packets of all frames.
    pub fn packets(&self) -> Vec<Packet> {
        self.frames.iter().map(|frame| parse(frame)).collect()
    }

    /// Bytes of payload outside the tunnel, by protocol and lower port. ICMPv6 and ARP are how IP works and carry none
    /// of an application's bytes, so they are left out.
    pub fn outside_tunnel(&self) -> BTreeMap<(u8, u16), usize> {
        let mut seen = BTreeMap::new();
        for packet in self.packets().iter().filter(|packet| packet.proto != 0 && packet.proto != 58) {
            let tunnel = packet.ports.is_some_and(|(from, to)| from == TUNNEL_PORT || to == TUNNEL_PORT);
            let tls = packet.proto == 6 && tunnel;
            if !tls && !packet.payload.is_empty() {
                let port = packet.ports.map_or(0, |(from, to)| from.min(to));
                *seen.entry((packet.proto, port)).or_insert(0) += packet.payload.len();
            }
        }
        seen
    }

    /// Checks that what goes through the tunnel port is TLS and nothing else: each direction of each connection is put
    /// together from its segments and read as TLS records (RFC 8446 section 5.1). Returns how many connections there
    /// were. A last record may be torn, as a capture ends anywhere.
    pub fn tunnel_is_tls(&self) -> Result<usize, String> {
        let mut streams: BTreeMap<Vec<u8>, BTreeMap<u32, Vec<u8>>> = BTreeMap::new();
        for segment in self.frames.iter().filter_map(|frame| Segment::read(frame)) {
            let stream = streams.entry(segment.ends).or_default();
            if segment.syn {
                stream.insert(segment.seq, Vec::new());
            } else if !segment.payload.is_empty() {
                // Sent again: the longer one has it all.
                let known = stream.entry(segment.seq).or_default();
                if known.len() < segment.payload.len() {
                    *known = segment.payload;
                }
            }
        }
        for (ends, segments) in &streams {
            let bytes = joined(segments).ok_or_else(|| format!("{ends:?}: segments are missing"))?;
            records(&bytes).map_err(|at| format!("{ends:?}: no TLS record at byte {at}"))?;
        }
        Ok(streams.len() / 2)
    }

    /// Payload bytes in the tunnel.
    pub fn in_tunnel(&self) -> usize {
        let tunnel = |p: &&Packet| p.ports.is_some_and(|(from, to)| from == TUNNEL_PORT || to == TUNNEL_PORT);
        self.packets().iter().filter(tunnel).map(|p| p.payload.len()).sum()
    }
}

/// A TCP segment of the tunnel port.
struct Segment {
    /// Addresses and ports, in the segment's direction.
    ends: Vec<u8>,
    seq: u32,
    syn: bool,
    payload: Vec<u8>,
}

impl Segment {
    fn read(frame: &[u8]) -> Option<Segment> {
        let ip = frame.get(14..)?;
        let (addresses, (proto, _, body)) = match [frame[12], frame[13]] {
            [0x08, 0x00] => (ip.get(12..20)?, ipv4(ip)?),
            [0x86, 0xdd] => (ip.get(8..40)?, ipv6(ip)?),
            _ => return None,
        };
        let Packet { ports: Some((from, to)), payload, .. } = parse(frame) else { return None };
        if proto != 6 || (from != TUNNEL_PORT && to != TUNNEL_PORT) {
            return None;
        }
        let seq = u32::from_be_bytes(body.get(4..8)?.try_into().ok()?);
        let ends = [addresses, body.get(..4)?].concat();
        Some(Segment { ends, seq, syn: body.get(13)? & 2 != 0, payload })
    }
}

/// The bytes behind the SYN in their order; `None` when one is missing in the middle.
fn joined(segments: &BTreeMap<u32, Vec<u8>>) -> Option<Vec<u8>> {
    // Sequence numbers wrap: they are counted from the SYN, which is the one segment without payload.
    let syn = *segments.iter().find(|(_, payload)| payload.is_empty())?.0;
    let mut ordered: Vec<(u32, &Vec<u8>)> = segments
        .iter()
        .filter(|(_, p)| !p.is_empty())
        .map(|(seq, p)| (seq.wrapping_sub(syn.wrapping_add(1)), p))
        .collect();
    ordered.sort_unstable_by_key(|(at, _)| *at);
    let mut bytes = Vec::new();
    for (at, payload) in ordered {
        let known = bytes.len().checked_sub(at as usize)?;
        bytes.extend(payload.get(known..).unwrap_or_default());
    }
    Some(bytes)
}

/// Reads TLS records to the end; the position of the first that is none.
fn records(bytes: &[u8]) -> Result<(), usize> {
    let mut at = 0;
    while let Some(head) = bytes.get(at..at + 5) {
        let len = usize::from(u16::from_be_bytes([head[3], head[4]]));
        // Change cipher spec to application data; TLS 1.2 on the wire, 1.0 in a first hello; RFC 8446 section 5.2.
        if !(20..=23).contains(&head[0]) || head[1] != 3 || head[2] > 3 || len > (1 << 14) + 256 {
            return Err(at);
        }
        at += 5 + len;
    }
    Ok(())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Reads Ethernet, IPv4 or IPv6 with extension headers, TCP or UDP.
fn parse(frame: &[u8]) -> Packet {
    let none = Packet { proto: 0, ports: None, payload: Vec::new() };
    let Some(ip) = frame.get(14..) else { return none };
    let Some((proto, later_fragment, body)) = (match [frame[12], frame[13]] {
        [0x08, 0x00] => ipv4(ip),
        [0x86, 0xdd] => ipv6(ip),
        _ => return none,
    }) else {
        return none;
    };
    let header = match proto {
        6 if !later_fragment => body.get(12).map(|offset| usize::from(offset >> 4) * 4),
        17 if !later_fragment => Some(8),
        _ => None,
    };
    let ports = header
        .and(body.get(..4))
        .map(|p| (u16::from_be_bytes([p[0], p[1]]), u16::from_be_bytes([p[2], p[3]])));
    let payload = body.get(header.unwrap_or(0)..).unwrap_or_default().to_vec();
    Packet { proto, ports, payload }
}

/// Protocol, whether it is a later fragment, and what follows the header up to the packet's length.
fn ipv4(ip: &[u8]) -> Option<(u8, bool, &[u8])> {
    let header = usize::from(ip.first()? & 15) * 4;
    let len = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    // Length 0: a BIG TCP packet. Otherwise what follows is the padding of a short frame.
    let end = if len == 0 { ip.len() } else { len.min(ip.len()) };
    let fragment = u16::from_be_bytes([*ip.get(6)?, *ip.get(7)?]) & 0x1fff;
    Some((*ip.get(9)?, fragment != 0, ip.get(header..end)?))
}

fn ipv6(ip: &[u8]) -> Option<(u8, bool, &[u8])> {
    let (mut next, mut at, mut later) = (*ip.get(6)?, 40, false);
    loop {
        let size = match next {
            0 | 43 | 60 => (usize::from(*ip.get(at + 1)?) + 1) * 8,
            44 => {
                later = u16::from_be_bytes([*ip.get(at + 2)?, *ip.get(at + 3)?]) >> 3 != 0;
                8
            }
            _ => return Some((next, later, ip.get(at..)?)),
        };
        next = *ip.get(at)?;
        at += size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_what_is_none() {
        let hello = [&[22, 3, 1, 0, 2][..], b"hi", &[23, 3, 3, 0, 1], b"x", &[23, 3]].concat();
        assert_eq!(records(&hello), Ok(()));
        let clear = [&hello[..13], b"GET / HTTP/1.1"].concat();
        assert_eq!(records(&clear), Err(13));
        // Wrapped, sent twice, and with a hole.
        let first = (u32::MAX, Vec::new());
        let stream = BTreeMap::from([first.clone(), (0, b"ab".to_vec()), (1, b"bc".to_vec())]);
        assert_eq!(joined(&stream), Some(b"abc".to_vec()));
        assert_eq!(joined(&BTreeMap::from([first, (1, b"b".to_vec())])), None);
    }

    #[test]
    fn payload_starts_after_options_and_ends_before_padding() {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x46, 0, 0, 24 + 20 + 3, 0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend([0; 12]);
        frame.extend([0, 80, 0x3a, 0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 5 << 4, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(b"abcpadding");
        let packet = parse(&frame);
        assert_eq!((packet.proto, packet.ports), (6, Some((80, 15008))));
        assert_eq!(packet.payload, b"abc");
    }

    #[test]
    fn bytes_outside_the_tunnel_are_found() {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 13, 60, 64]);
        frame.extend([0; 32]);
        frame.extend([17, 0, 1, 4, 0, 0, 0, 0]);
        frame.extend([0, 53, 0, 99, 0, 12, 0, 0]);
        frame.extend(b"leak");
        let wire = Wire { frames: vec![frame] };
        assert_eq!(wire.outside_tunnel(), BTreeMap::from([((17, 53), 4)]));
        assert_eq!((wire.count(b"leak"), wire.in_tunnel()), (1, 0));
    }
}
