//! Address ranges, family-aware: an IPv6 range never holds an IPv4 address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use weft_datapath::abi::Addr;

/// A range of addresses, with no bit set below its prefix. Order: IPv4 before IPv6, then address, then length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// All of IPv4.
    pub const ALL_V4: Cidr = Cidr { network: IpAddr::V4(Ipv4Addr::UNSPECIFIED), prefix: 0 };

    /// The range of one length around an address; bits below the length are cleared. `None` if the length is too long.
    pub fn new(addr: IpAddr, prefix: u8) -> Option<Cidr> {
        let (addr, prefix) = match addr {
            IpAddr::V6(v6) if prefix >= 96 && v6.to_ipv4_mapped().is_some() => {
                (addr.to_canonical(), prefix - 96)
            }
            _ => (addr, prefix),
        };
        let network = match addr {
            IpAddr::V4(v4) if prefix <= 32 => IpAddr::V4(Ipv4Addr::from_bits(
                v4.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0),
            )),
            IpAddr::V6(v6) if prefix <= 128 => IpAddr::V6(Ipv6Addr::from_bits(
                v6.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0),
            )),
            _ => return None,
        };
        Some(Cidr { network, prefix })
    }

    /// Just this address.
    pub fn host(addr: IpAddr) -> Cidr {
        let addr = addr.to_canonical();
        Cidr { network: addr, prefix: if addr.is_ipv4() { 32 } else { 128 } }
    }

    pub fn contains(&self, addr: IpAddr) -> bool {
        let addr = addr.to_canonical();
        addr.is_ipv4() == self.network.is_ipv4()
            && Cidr::new(addr, self.prefix).is_some_and(|c| c.network == self.network)
    }

    /// Is all of `other` inside this range?
    pub fn covers(&self, other: &Cidr) -> bool {
        self.prefix <= other.prefix && self.contains(other.network)
    }

    pub fn network(&self) -> IpAddr {
        self.network
    }

    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Address and length as in kernel tables, where IPv4 lies in `::ffff:0:0/96`.
    pub fn mapped(&self) -> (Addr, u8) {
        (addr(self.network), if self.network.is_ipv4() { self.prefix + 96 } else { self.prefix })
    }
}

/// An address in the form of the kernel tables.
pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address behind [`addr`].
pub fn ip(addr: &Addr) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(*addr)).to_canonical()
}

impl FromStr for Cidr {
    type Err = String;

    /// `10.0.0.0/8`, `2001:db8::/32` or a single address.
    fn from_str(text: &str) -> Result<Cidr, String> {
        let wrong = || {
            format!(
                "{text:?} is no address range; write it as 10.1.0.0/16, 2001:db8::/32 or a single address"
            )
        };
        let (addr, prefix) = match text.split_once('/') {
            None => return text.parse().map(Cidr::host).map_err(|_| wrong()),
            Some((addr, prefix)) => (addr, prefix),
        };
        if !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let addr = addr.parse().map_err(|_| wrong())?;
        Cidr::new(addr, prefix.parse().map_err(|_| wrong())?).ok_or_else(wrong)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_know_their_family() {
        let all_v6: Cidr = "::/0".parse().unwrap();
        assert!(all_v6.contains("2001:db8::1".parse().unwrap()));
        assert!(!all_v6.contains("10.0.0.1".parse().unwrap()));
        assert!(!all_v6.contains("::ffff:10.0.0.1".parse().unwrap()));
        let net: Cidr = "10.1.2.3/8".parse().unwrap();
        assert_eq!(net.to_string(), "10.0.0.0/8");
        assert_eq!(net, "::ffff:10.0.0.0/104".parse().unwrap());
        assert_eq!(net.mapped().1, 104);
        assert!(Cidr::ALL_V4.covers(&net) && !net.covers(&Cidr::ALL_V4) && !all_v6.covers(&net));
        assert!("10.0.0.0/0".parse::<Cidr>().unwrap().contains("255.255.255.255".parse().unwrap()));
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "",
            "/8",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "a.example",
            "10.0.0.0/8/8",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
