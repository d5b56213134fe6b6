//! Every key, value and event that crosses between kernel programs and agent.
//!
//! INVARIANT: all types are `repr(C)`, made of integers and byte arrays, without implicit padding (checked at
//! compile time by [`shared!`]). Padding fields are named and always zero, because map keys are compared as bytes.
//! Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`; ports are in host order.

/// Version of the layouts in this file. Raise it with any change here: an agent refuses to adopt pinned maps that
/// carry another number. `cargo xtask lint` compares the file's hash with the one recorded beside this number.
pub const ABI: u32 = 1;

/// Marks a type that may be copied byte by byte between kernel and agent.
///
/// # Safety
/// The type must be `repr(C)`, have no padding bytes and accept any bit pattern. Only [`shared!`] implements it for
/// structs.
pub unsafe trait Shared: Copy + 'static {}

// SAFETY: integers and byte arrays have no padding and accept any bit pattern.
unsafe impl Shared for u32 {}
// SAFETY: as above.
unsafe impl Shared for u64 {}
// SAFETY: as above.
unsafe impl<const N: usize> Shared for [u8; N] {}

macro_rules! shared {
    ($($(#[$meta:meta])* $name:ident = $size:literal { $($(#[$fmeta:meta])* $field:ident : $ty:ty),+ $(,)? })+) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),+ }

        // The sum of the fields equals the size of the struct, so there is no hidden padding.
        const _: () = assert!(0 $(+ size_of::<$ty>())+ == size_of::<$name>());
        const _: () = assert!(size_of::<$name>() == $size);
        // SAFETY: repr(C), integers and byte arrays only, no padding (asserted above).
        unsafe impl Shared for $name {}
    )+};
}

/// Rows of [`UdpPeers`].
pub const UDP_PEERS: usize = 4;

/// An IPv6 address in network order, or an IPv4 address mapped into `::ffff:0:0/96`.
pub type Addr = [u8; 16];

shared! {
    /// Key of `weft_policy`: what does `subject` say to flows from or to `peer`?
    PolicyKey = 20 {
        /// Low bit of the policy revision: which of the two banks this entry belongs to.
        bank: u32,
        /// Identity number of the workload whose policy this is.
        subject: u32,
        /// Identity number of the other end, or one of the constants in [`crate::identity`].
        peer: u32,
        /// Class of the peer's address in `weft_cidr`; 0 for addresses that the subject's policies do not tell apart.
        class: u32,
        /// Destination port, or the number of a range of them; 0 for any.
        port: u16,
        /// IP protocol number; 0 for any.
        protocol: u8,
        /// Bit set of [`crate::policy::OUTWARD`], [`crate::policy::RANGE`].
        kind: u8,
    }
    /// Value of `weft_policy`.
    PolicyValue = 8 {
        /// One of [`crate::policy::ALLOW`], [`crate::policy::DENY`], [`crate::policy::HTTP`]; anything else denies.
        verdict: u32,
        /// Number of the rule that decided, for events and `weft policy explain`; 0 for a default.
        rule: u32,
    }
    /// Key of `weft_subject`: one per workload identity.
    SubjectKey = 8 { bank: u32, identity: u32 }
    /// Value of `weft_subject`: what the datapath must know about a workload before it asks for a verdict.
    Subject = 8 {
        /// Bit set of [`crate::policy::BY_CLASS`] and its neighbours.
        flags: u32,
        /// mTLS mode of ports without one of their own: [`crate::policy::Mode`] as u32.
        mode: u32,
    }
    /// Key of `weft_mode`: the mTLS mode of one port, where it differs from the subject's.
    ModeKey = 12 { bank: u32, identity: u32, port: u16, pad: u16 }
    /// Key of `weft_cidr` behind the prefix length: bank in network order, then address. With [`crate::policy::PORTS`] in
    /// the bank the address is a port, and the class the number of a range.
    CidrKey = 20 { bank_be: [u8; 4], addr: Addr }
    /// Value of `weft_endpoint`, keyed by address: the workload that owns it. A hint for remote workloads, never
    /// proof of who sent a packet.
    Endpoint = 16 {
        /// Identity number.
        identity: u32,
        /// Host-side interface of the workload's veth; 0 when it runs on another node.
        ifindex: u32,
        /// Zero, for later use.
        flags: u32,
        /// Zero.
        pad: u32,
    }
    /// Value of `weft_netns`, keyed by netns cookie: a workload enrolled on this node.
    Netns = 16 { identity: u32, ifindex: u32, flags: u32, pad: u32 }
    /// Value of `weft_iface`, keyed by host-side ifindex: whose veth this is.
    Iface = 16 { netns_cookie: u64, identity: u32, flags: u32 }
    /// Key of `weft_iface_addr`: an address that the workload behind `ifindex` may use as source.
    IfaceAddr = 20 { ifindex: u32, addr: Addr }
    /// Key of `weft_service`.
    ServiceKey = 20 { addr: Addr, port: u16, protocol: u8, pad: u8 }
    /// Value of `weft_service`.
    Service = 16 {
        /// Service number, part of [`BackendKey`].
        id: u32,
        /// Which backend array is current: arrays are written under a new epoch, then switched to.
        epoch: u32,
        /// Length of the backend array; 0 refuses the connection.
        count: u32,
        /// [`crate::service::ROUND_ROBIN`] or [`crate::service::LEAST_CONNECTIONS`].
        balance: u32,
    }
    /// Key of `weft_backend`.
    BackendKey = 12 { service: u32, epoch: u32, slot: u32 }
    /// Value of `weft_backend`, and key of `weft_active` (how many connections this node has open to it).
    Backend = 20 { addr: Addr, port: u16, pad: u16 }
    /// Where a redirected socket wanted to go. Socket storage of the application's socket (`weft_orig_sk`), and
    /// value of `weft_orig_dst` for the agent.
    OrigDst = 64 {
        /// Network namespace of the application's socket.
        netns_cookie: u64,
        /// What the application dialled (a service address, or the workload's own).
        dst: Addr,
        /// The workload address chosen for it; equals `dst` when no service was involved.
        backend: Addr,
        /// Identity numbers of both ends as known when it connected.
        source: u32,
        destination: u32,
        dst_port: u16,
        backend_port: u16,
        /// One of the `MODE_*` constants in [`crate::connect`].
        mode: u32,
        /// Number of the service that was dialled, 0 for none.
        service: u32,
        /// Zero.
        pad: u32,
    }
    /// A socket's local end inside one network namespace: key of `weft_orig_dst` and `weft_leg`.
    LocalEnd = 32 { netns_cookie: u64, addr: Addr, port: u16, pad: u16, pad2: u32 }
    /// Value of `weft_leg`: the real client behind a connection that the agent opened to a local application.
    Client = 20 { addr: Addr, port: u16, pad: u16 }
    /// One row of [`UdpPeers`]: replies of `backend` are shown to the application as coming from `service`.
    UdpPeer = 40 { backend: Addr, service: Addr, backend_port: u16, service_port: u16, pad: u32 }
    /// Key of `weft_conntrack`: a flow at one workload interface, seen from the workload. Both directions of the flow
    /// have this one key; [`FlowState`] says who began it.
    FlowKey = 44 {
        ifindex: u32,
        own: Addr,
        peer: Addr,
        own_port: u16,
        peer_port: u16,
        /// IP protocol number.
        protocol: u32,
    }
    /// Value of `weft_conntrack`.
    FlowState = 28 {
        /// Policy revision under which `verdict` was taken; another revision decides again.
        revision: u32,
        /// Identity number of the interface's workload.
        own: u32,
        /// Identity number of the other end: verified for flows that came in, looked up for flows that went out.
        peer: u32,
        /// As in [`PolicyValue`].
        verdict: u32,
        /// Rule that decided.
        rule: u32,
        /// [`crate::conntrack::OUT`] when the interface's workload began the flow, [`crate::conntrack::IN`] when its peer did.
        origin: u32,
        /// The interface that the peer's packets were shown to come in by, or [`crate::conntrack::NOT_SEEN`].
        ingress: u32,
    }
    /// Key of `weft_fragment`: a UDP datagram whose first fragment passed in this direction.
    FragmentKey = 44 { ifindex: u32, src: Addr, dst: Addr, id: u32, protocol: u32 }
    /// Key of `weft_meter`.
    MeterKey = 12 { source: u32, destination: u32, direction: u32 }
    /// Value of `weft_meter`, per CPU.
    Meter = 16 { packets: u64, bytes: u64 }
    /// Key of `weft_tcp`: connections counted by the kernel on the direct path, each once, at its client's socket. Also
    /// in socket storage (`weft_tcp_sk`) while the connection lives.
    TcpKey = 12 { source: u32, destination: u32, service: u32 }
    /// Value of `weft_tcp`, per CPU, as the client's socket sees it; bytes are those of the application, added when the
    /// connection closes.
    TcpStats = 48 {
        opened: u64,
        closed: u64,
        sent: u64,
        received: u64,
        retransmits: u64,
        /// Smoothed round-trip times at close, in microseconds, added up; divide by `closed`.
        srtt_us: u64,
    }
    /// Record of the `weft_events` ring.
    Event = 72 {
        /// Monotonic time.
        time_ns: u64,
        src: Addr,
        dst: Addr,
        source: u32,
        destination: u32,
        src_port: u16,
        dst_port: u16,
        protocol: u8,
        /// Which hook: [`crate::event`] constants.
        hook: u8,
        /// [`crate::reason::Reason`] as u8; 0 for an allowed new flow.
        reason: u8,
        /// As in [`PolicyValue`].
        verdict: u8,
        rule: u32,
        ifindex: u32,
        /// Events of this reason that the rate limit swallowed on this CPU since the last one.
        suppressed: u32,
        pad: u32,
    }
    /// Socket storage `weft_udp_sk`: the services that a UDP socket last spoke to. When all rows are taken the oldest goes,
    /// and its replies show the backend's own address.
    UdpPeers = 168 { rows: [UdpPeer; UDP_PEERS], next: u32, pad: u32 }
    /// Value of `weft_rate`, per CPU and reason: a token bucket.
    Rate = 16 { window_start_ns: u64, used: u32, suppressed: u32 }
}
