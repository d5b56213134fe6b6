//! Addresses between their form in the maps and the standard library's.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use weft_datapath::abi::{Addr, LocalEnd};

/// As maps have it: 16 bytes, IPv4 mapped.
pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// As the standard library has it: mapped addresses are IPv4.
pub fn ip(addr: Addr) -> IpAddr {
    Ipv6Addr::from(addr).to_canonical()
}

/// The key of a socket's local end.
pub(crate) fn local_end(netns_cookie: u64, end: SocketAddr) -> LocalEnd {
    LocalEnd { netns_cookie, addr: addr(end.ip()), port: end.port(), ..LocalEnd::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_maps() {
        for text in ["10.1.2.3", "fd00::1", "127.0.0.1", "::1"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(ip(addr(address)), address);
        }
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        assert_eq!(addr(mapped), addr("10.1.2.3".parse().unwrap()));
    }
}
