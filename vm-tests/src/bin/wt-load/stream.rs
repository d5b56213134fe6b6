//! A checkable byte stream: 16 bytes of header (seed, length), then bytes that only this seed yields.

use std::io::{self, Read, Write};

/// Splitmix64: tiny, and every bit depends on the seed.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
}

/// The whole message, header included.
pub(crate) fn message(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + len);
    bytes.extend(seed.to_be_bytes());
    bytes.extend((len as u64).to_be_bytes());
    bytes.extend(body(seed, len));
    bytes
}

fn body(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(random.number().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Longest message that a reader accepts: what a broken stream may not exceed.
const MAX_LEN: u64 = 16 << 20;

/// Reads one message and checks every byte. Returns its seed.
pub(crate) fn receive(from: &mut impl Read) -> io::Result<u64> {
    let mut header = [0; 16];
    from.read_exact(&mut header)?;
    let (seed, len) = header.split_at(8);
    let seed = u64::from_be_bytes(seed.try_into().expect("8 bytes"));
    let len = u64::from_be_bytes(len.try_into().expect("8 bytes"));
    if len > MAX_LEN {
        return Err(corrupt("a length out of range"));
    }
    let mut bytes = vec![0; usize::try_from(len).expect("checked above")];
    from.read_exact(&mut bytes)?;
    if bytes != body(seed, bytes.len()) {
        return Err(corrupt("other bytes than were sent"));
    }
    Ok(seed)
}

/// The stream must end here.
pub(crate) fn expect_end(from: &mut impl Read) -> io::Result<()> {
    match from.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(corrupt("bytes after the end")),
    }
}

/// Sends a message in pieces of random size, down to one byte.
pub(crate) fn send_chunked(to: &mut impl Write, seed: u64, len: usize) -> io::Result<()> {
    let mut random = Random::new(!seed);
    let bytes = message(seed, len);
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let piece = 1 + usize::try_from(random.below(4096)).expect("small");
        let (head, tail) = rest.split_at(piece.min(rest.len()));
        to.write_all(head)?;
        rest = tail;
    }
    Ok(())
}

fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
