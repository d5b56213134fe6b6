//! Why something was refused. Every refusal of the datapath is counted under one of these.

macro_rules! reasons {
    ($($(#[$meta:meta])* $name:ident = $number:literal, $text:literal;)+) => {
        /// Why the datapath refused a packet, a connection or a bind.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[$meta])* $name = $number),+ }

        impl Reason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &[Reason] = &[$(Reason::$name),+];

            /// The name in metrics and tables.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$name => $text),+ }
            }

            /// The reason behind a number of an [`crate::abi::Event`].
            pub fn from_number(number: u8) -> Option<Reason> {
                match number { $($number => Some(Reason::$name),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// A policy, or the default, refused it; the event names the rule.
    Policy = 1, "policy";
    /// The verdict depends on HTTP, and no HTTP engine is in the path.
    NeedsHttp = 2, "needs_http";
    /// The source address does not belong to the interface.
    SourceAddress = 3, "source_address";
    /// Clear traffic towards a workload on another node whose port is STRICT.
    ClearToStrict = 4, "clear_to_strict";
    /// Traffic of the tunnel port from a socket that is not the agent's.
    TunnelPort = 5, "tunnel_port";
    /// An address inside the mesh that no workload owns.
    UnknownInside = 6, "unknown_inside";
    /// The interface is not (or no longer) enrolled.
    NotEnrolled = 7, "not_enrolled";
    /// A header that could not be read whole.
    Malformed = 8, "malformed";
    /// IPv4 options or an IPv6 extension header that weft does not track.
    IpOptions = 9, "ip_options";
    /// A TCP fragment, or a UDP fragment whose first one was not seen.
    Fragment = 10, "fragment";
    /// A link-layer protocol other than ARP, IPv4 and IPv6.
    EtherType = 11, "ether_type";
    /// ARP for an address of somebody else.
    Arp = 12, "arp";
    /// ICMP that is neither allowed by policy nor about a tracked flow.
    Icmp = 13, "icmp";
    /// An IP protocol other than TCP, UDP, SCTP and ICMP.
    Protocol = 14, "protocol";
    /// The connection table refused an entry.
    ConntrackFull = 15, "conntrack_full";
    /// The metering table refused an entry.
    MeterFull = 16, "meter_full";
    /// The service has no backend.
    NoBackend = 17, "no_backend";
    /// A socket's original destination could not be stored.
    StorageFull = 18, "storage_full";
    /// A workload wanted to bind one of the agent's ports.
    ReservedPort = 19, "reserved_port";
    /// A workload dialled one of the agent's ports.
    AgentPort = 20, "agent_port";
}

/// Length of the per-reason arrays: one more than the largest number.
pub const COUNT: u32 = 21;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_reversible() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index + 1);
            assert_eq!(Reason::from_number(*reason as u8), Some(*reason));
        }
        assert_eq!(Reason::ALL.len() as u32 + 1, COUNT);
        assert_eq!(Reason::from_number(0), None);
    }
}
