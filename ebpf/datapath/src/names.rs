//! Names, sizes and ports that both sides must agree on.

/// Captured outbound connections arrive here, on loopback of the workload's network namespace.
pub const OUTBOUND_PORT: u16 = 15001;
/// Captured inbound plaintext (reserved).
pub const INBOUND_PORT: u16 = 15006;
/// The mTLS tunnel (HBONE), on every address of the workload's network namespace.
pub const TUNNEL_PORT: u16 = 15008;

/// Is this one of the ports that the agent keeps for itself inside a workload's network namespace?
#[inline(always)]
pub fn is_agent_port(port: u16) -> bool {
    port == OUTBOUND_PORT || port == INBOUND_PORT || port == TUNNEL_PORT
}

/// Slots of `weft_config`, an array of u32.
pub mod config {
    /// [`crate::abi::ABI`] of whoever created the maps.
    pub const ABI: u32 = 0;
    /// Policy revision; the low bit is the bank. 0: nothing was ever published, and every lookup in it misses.
    pub const REVISION: u32 = 1;
    /// The next identity number to hand out.
    pub const NEXT_IDENTITY: u32 = 2;
    /// Length of the array.
    pub const LEN: u32 = 8;

    /// `bpf_set_retval` exists in sock_addr programs (6.1): a refused connect() says ECONNREFUSED instead of EPERM.
    pub const SET_RETVAL: u32 = 1 << 0;
    /// `bpf_get_netns_cookie` exists in sock_ops programs (5.15): accepted connections are counted.
    pub const SOCKOPS_NETNS: u32 = 1 << 1;
    /// TCX links (6.6) hold the TC programs; clsact filters do without them. Of no interest to programs.
    pub const TCX: u32 = 1 << 2;
    /// Sockets tell the cookie of their network namespace (5.14); a program on the agent's cgroup does without. Of no
    /// interest to programs.
    pub const SO_NETNS_COOKIE: u32 = 1 << 3;
    /// Name of the programs' read-only global that holds the feature bits; the loader sets it, so that the verifier
    /// never sees calls that this kernel lacks.
    pub const GLOBAL: &str = "WEFT_FEATURES";
}

/// Map names, at most 15 bytes. What each holds is said in `ebpf/src/maps.rs`.
pub mod map {
    pub const CONFIG: &str = "weft_config";
    pub const SUBJECT: &str = "weft_subject";
    pub const MODE: &str = "weft_mode";
    pub const POLICY: &str = "weft_policy";
    pub const CIDR: &str = "weft_cidr";
    pub const INSIDE: &str = "weft_inside";
    pub const IDENTITY: &str = "weft_identity";
    pub const ENDPOINT: &str = "weft_endpoint";
    pub const NETNS: &str = "weft_netns";
    pub const IFACE: &str = "weft_iface";
    pub const IFACE_ADDR: &str = "weft_iface_addr";
    pub const NODE_ADDR: &str = "weft_node_addr";
    pub const SERVICE: &str = "weft_service";
    pub const BACKEND: &str = "weft_backend";
    pub const ACTIVE: &str = "weft_active";
    pub const ROUND: &str = "weft_round";
    pub const AGENT_SK: &str = "weft_agent_sk";
    pub const ORIG_SK: &str = "weft_orig_sk";
    pub const ORIG_DST: &str = "weft_orig_dst";
    pub const LEG: &str = "weft_leg";
    pub const UDP_SK: &str = "weft_udp_sk";
    pub const TCP_SK: &str = "weft_tcp_sk";
    pub const CONNTRACK: &str = "weft_conntrack";
    pub const FRAGMENT: &str = "weft_fragment";
    pub const METER: &str = "weft_meter";
    pub const TCP: &str = "weft_tcp";
    pub const DROPS: &str = "weft_drops";
    pub const EVENTS: &str = "weft_events";
    pub const RATE: &str = "weft_rate";
}
