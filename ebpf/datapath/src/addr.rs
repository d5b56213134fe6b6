//! Addresses in their one form: 16 bytes, IPv4 mapped into `::ffff:0:0/96`.

use crate::abi::Addr;

/// The unspecified IPv6 address.
pub const UNSPECIFIED: Addr = [0; 16];

/// An IPv4 address, given as its four bytes in network order.
#[inline(always)]
pub const fn v4(octets: [u8; 4]) -> Addr {
    // As a number: the compiler makes two stores of it, where the prefix as bytes becomes a loop in BPF.
    (0xffff_0000_0000 | u32::from_be_bytes(octets) as u128).to_be_bytes()
}

/// Is this an IPv4 address in mapped form?
#[inline(always)]
pub fn is_v4(addr: &Addr) -> bool {
    let (high, low) = halves(addr);
    high == 0 && low >> 32 == 0xffff
}

/// 127.0.0.0/8 or ::1.
#[inline(always)]
pub fn is_loopback(addr: &Addr) -> bool {
    let (high, low) = halves(addr);
    high == 0 && (low == 1 || low >> 24 == 0x00ff_ff7f)
}

/// 0.0.0.0 or ::, which connect() takes for "this host".
#[inline(always)]
pub fn is_unspecified(addr: &Addr) -> bool {
    let (high, low) = halves(addr);
    high == 0 && (low == 0 || low == 0xffff_0000_0000)
}

/// 224.0.0.0/4, 255.255.255.255 or ff00::/8.
#[inline(always)]
pub fn is_multicast(addr: &Addr) -> bool {
    addr[0] == 0xff || (is_v4(addr) && (addr[12] & 0xf0 == 0xe0 || halves(addr).1 == 0xffff_ffff_ffff))
}

/// fe80::/10.
#[inline(always)]
pub fn is_link_local_v6(addr: &Addr) -> bool {
    addr[0] == 0xfe && addr[1] & 0xc0 == 0x80
}

/// The address as two numbers, most significant first.
#[inline(always)]
fn halves(addr: &Addr) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *addr;
    (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes([i, j, k, l, m, n, o, p]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_address() {
        assert!(is_loopback(&v4([127, 9, 8, 7])) && !is_loopback(&v4([128, 0, 0, 1])));
        let mut one = UNSPECIFIED;
        one[15] = 1;
        assert!(is_loopback(&one) && !is_v4(&one));
        assert!(is_unspecified(&UNSPECIFIED) && is_unspecified(&v4([0, 0, 0, 0])));
        assert!(is_multicast(&v4([224, 0, 0, 1])) && is_multicast(&v4([255; 4])));
        assert!(!is_multicast(&v4([10, 0, 0, 255])));
        let mut multicast = UNSPECIFIED;
        multicast[0] = 0xff;
        assert!(is_multicast(&multicast));
    }
}
