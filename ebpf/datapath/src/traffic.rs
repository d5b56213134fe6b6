//! What happens to a packet on the host side of a workload's veth.
//!
//! "From" is the hook that sees what the workload sends, "to" the one that sees what it will receive. The hook on the
//! receiver's veth asks the receiver's ingress policy, because only there is the sender known by the interface it came in
//! by; the hook on the sender's veth asks the sender's egress policy and keeps the sender honest: its own addresses, no
//! clear text where the tunnel is due, no traffic of the tunnel port that is not the agent's.

use crate::abi::{Addr, Event, FlowKey, FlowState, FragmentKey, Iface, IfaceAddr, MeterKey};
use crate::addr::{is_link_local_v6, is_multicast, is_unspecified, is_v4};
use crate::connect::TCP;
use crate::conntrack::{IN, NOT_SEEN, OUT};
use crate::event::{FROM_WORKLOAD, TO_WORKLOAD};
use crate::identity::{ANONYMOUS, NODE};
use crate::names::TUNNEL_PORT;
use crate::packet::{ACK, Kind, Packet, Parsed, Piece, PlainTcp, SYN, Tuple, parse, plain_tcp};
use crate::policy::{self, ALLOW, Access, DENY, HTTP, Mode};
use crate::reason::Reason;
use crate::tables::Tables;

/// [`MeterKey::direction`]: seen on the sender's veth.
pub const FROM: u32 = 1;
/// [`MeterKey::direction`]: seen on the receiver's veth.
pub const TO: u32 = 2;

/// What the TC programs read and write besides [`Tables`].
pub trait Flows: Tables {
    /// Whose veth is this?
    fn iface(&self, ifindex: u32) -> Option<Iface>;
    /// May the workload behind this interface use this source address?
    fn owns(&self, key: &IfaceAddr) -> bool;
    /// Copies the tracked state of a flow into `state`; false, and `state` untouched, when there is none.
    fn flow(&self, key: &FlowKey, state: &mut FlowState) -> bool;
    /// Records or replaces it.
    fn put_flow(&self, key: &FlowKey, state: &FlowState) -> Result<(), Reason>;
    /// Notes in an entry by which interface the peer's packets come in. An entry that is gone is decided again.
    fn show_peer(&self, key: &FlowKey, ingress: u32);
    /// Has the first fragment of this datagram passed?
    fn fragment(&self, key: &FragmentKey) -> bool;
    /// It has.
    fn put_fragment(&self, key: &FragmentKey) -> Result<(), Reason>;
    /// Counts a passing packet.
    fn meter(&self, key: &MeterKey, bytes: u32) -> Result<(), Reason>;
}

/// Where a packet was seen.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// The workload's interface.
    pub ifindex: u32,
    /// Towards the workload: the interface the packet came in by, 0 for the node's own processes.
    pub ingress_ifindex: u32,
    /// [`FROM`] or [`TO`].
    pub direction: u32,
}

/// What a decision works on: per-CPU memory in the kernel, whose stack is small.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(8))]
pub struct Work {
    parsed: Parsed,
    key: FlowKey,
    state: FlowState,
    event: Event,
    /// Is `state` that of this packet's flow?
    judged: bool,
}

/// Passes or refuses a packet.
#[inline(always)]
pub fn decide<T: Flows, P: Packet>(
    tables: &T,
    hook: &Hook,
    packet: &P,
    work: &mut Work,
) -> Result<Passed, Reason> {
    if known(tables, hook, packet, work) {
        meter(tables, hook, packet, &work.state)?;
        return Ok(Passed::Known);
    }
    work.judged = false;
    parse(packet, &mut work.parsed)?;
    match work.parsed.kind {
        Kind::Flow => {
            let passed = flow(tables, hook, packet, work)?;
            meter(tables, hook, packet, &work.state)?;
            Ok(passed)
        }
        Kind::IcmpError => icmp_error(tables, hook, work),
        Kind::Arp => {
            let Tuple { src, dst, .. } = &work.parsed.tuple;
            // A probe (RFC 5227) has no sender address yet and asks for the one it is about to take.
            let claimed = if is_unspecified(src) { dst } else { src };
            from_needs(hook, owns(tables, hook, claimed), Reason::Arp)
        }
        Kind::Neighbour => {
            let Tuple { src, dst, .. } = &work.parsed.tuple;
            let honest =
                |addr: &Addr| is_unspecified(addr) || is_link_local_v6(addr) || owns(tables, hook, addr);
            from_needs(hook, honest(src) && honest(dst), Reason::Icmp)
        }
        Kind::Listener => {
            let src = &work.parsed.src;
            let honest = is_unspecified(src) || is_link_local_v6(src) || owns(tables, hook, src);
            from_needs(hook, honest, Reason::SourceAddress)
        }
    }
}

/// The short way for most packets: a TCP segment in the middle of a connection that was allowed under this revision.
/// Whatever else it may be takes the long way, [`flow`], which says the same of these packets.
#[inline(always)]
fn known<T: Flows, P: Packet>(tables: &T, hook: &Hook, packet: &P, work: &mut Work) -> bool {
    let Some(tcp) = plain_tcp(packet) else { return false };
    let PlainTcp { src, dst, src_port, dst_port, flags, .. } = tcp;
    if flags & (SYN | ACK) == SYN || src_port == TUNNEL_PORT || dst_port == TUNNEL_PORT {
        return false;
    }
    let from = hook.direction == FROM;
    let (own, peer, own_port, peer_port) =
        if from { (src, dst, src_port, dst_port) } else { (dst, src, dst_port, src_port) };
    work.key = FlowKey { ifindex: hook.ifindex, own, peer, own_port, peer_port, protocol: TCP.into() };
    tables.flow(&work.key, &mut work.state)
        && work.state.revision == tables.revision()
        && work.state.verdict == ALLOW
        && (from || work.state.ingress == hook.ingress_ifindex)
}

#[inline(always)]
fn meter<T: Flows, P: Packet>(tables: &T, hook: &Hook, packet: &P, state: &FlowState) -> Result<(), Reason> {
    let FlowState { own, peer, .. } = *state;
    let (source, destination) = if hook.direction == FROM { (own, peer) } else { (peer, own) };
    tables.meter(&MeterKey { source, destination, direction: hook.direction }, packet.len())
}

/// A packet that may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Part of something known, or not a flow.
    Known,
    /// The first packet of a flow that its receiver's policy just allowed.
    Accepted,
}

/// Who began a flow, as far as a packet shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The sender of this packet.
    Sender,
    /// Its receiver.
    Receiver,
}

/// Decides about a TCP, UDP or echo packet. Leaves the flow's state in `work.state` when it may pass.
#[inline(always)]
fn flow<T: Flows, P: Packet>(tables: &T, hook: &Hook, packet: &P, work: &mut Work) -> Result<Passed, Reason> {
    let from = hook.direction == FROM;
    let Parsed { tcp_flags, payload, piece, .. } = work.parsed;
    work.key = key(hook, &work.parsed.tuple);
    if matches!(piece, Piece::Later) {
        // It has no ports; its first fragment, which had, was allowed in this direction at this interface.
        work.state.own = tables.iface(hook.ifindex).ok_or(Reason::NotEnrolled)?.identity;
        work.state.peer = ANONYMOUS;
        let known = tables.fragment(&fragment_key(hook, &work.parsed));
        return if known { Ok(Passed::Known) } else { Err(Reason::Fragment) };
    }
    let tcp = work.key.protocol == u32::from(TCP);
    let (own_port, peer_port) = (work.key.own_port, work.key.peer_port);
    let tunnel = tcp && (own_port == TUNNEL_PORT || peer_port == TUNNEL_PORT);
    let opens = tcp && tcp_flags & (SYN | ACK) == SYN;
    // Towards the workload the mark means nothing: the sender's socket is on another veth, or another node.
    let agents = from && tunnel && packet.is_agents();
    if from && tunnel && !agents && (payload || opens) {
        return Err(Reason::TunnelPort);
    }
    let revision = tables.revision();
    let known = tables.flow(&work.key, &mut work.state);
    // A SYN against the recorded sense is a new flow on old ports.
    let against = opens && (work.state.origin == OUT) != from;
    // Only what comes in by the interface that was shown to be the peer's is the peer's. Whoever owns an interface or an
    // address changes together with the revision.
    let shown = from || work.state.ingress == hook.ingress_ifindex;
    if known && !against && shown && work.state.revision == revision {
        work.judged = true;
        if work.state.verdict != ALLOW {
            return Err(refusal(work.state.verdict));
        }
        remember_fragment(tables, hook, &work.parsed)?;
        return Ok(Passed::Known);
    }
    let own = &tables.iface(hook.ifindex).ok_or(Reason::NotEnrolled)?;
    // Refused without a trace in the entry: a forged reply must not cut a living flow.
    if known && !against && !shown && work.state.origin == OUT {
        if !by_its_interface(tables, hook, &work.key.peer) {
            return Err(Reason::SourceAddress);
        }
        // The first answer. What the workload asked for was decided when it asked.
        if work.state.revision == revision && work.state.verdict == ALLOW {
            work.judged = true;
            tables.show_peer(&work.key, hook.ingress_ifindex);
            remember_fragment(tables, hook, &work.parsed)?;
            return Ok(Passed::Known);
        }
    }
    if !tables.owns(&IfaceAddr { ifindex: hook.ifindex, addr: work.key.own })
        && (from || !is_multicast(&work.key.own))
    {
        return Err(if from { Reason::SourceAddress } else { Reason::UnknownInside });
    }
    // Control segments of the tunnel port that no marked socket vouches for belong to a known flow, or to none.
    if tunnel && !known && !agents && (from || peer_port == TUNNEL_PORT) {
        return Err(Reason::TunnelPort);
    }
    let followed = known && !opens;
    if !followed {
        work.state.ingress = NOT_SEEN;
    }
    // In the middle of a connection that was forgotten.
    let forgotten = tcp && !known && tcp_flags & SYN == 0;
    let mut verdict = if followed {
        let sender_began = (work.state.origin == OUT) == from;
        judge(
            tables,
            hook,
            own,
            work,
            (if sender_began { Origin::Sender } else { Origin::Receiver }, How::Followed),
        )
    } else if tcp && !opens && tcp_flags & SYN != 0 {
        judge(tables, hook, own, work, (Origin::Receiver, How::New))
    } else {
        judge(tables, hook, own, work, (Origin::Sender, if forgotten { How::Forgotten } else { How::New }))
    };
    if verdict.is_err() && forgotten {
        verdict = judge(tables, hook, own, work, (Origin::Receiver, How::Forgotten));
    }
    work.judged = true;
    work.state.revision = revision;
    if !from {
        work.state.ingress = hook.ingress_ifindex;
    }
    if let Err(reason) = verdict {
        // A living flow that is no longer allowed keeps its entry, so that its sense is not forgotten. Neither a SYN nor
        // what comes in by another interface touches the entry of a living flow, or anybody could cut it.
        if followed && shown {
            tables.put_flow(&work.key, &work.state)?;
        }
        return Err(reason);
    }
    tables.put_flow(&work.key, &work.state)?;
    remember_fragment(tables, hook, &work.parsed)?;
    Ok(if !known && !from && work.state.origin == IN { Passed::Accepted } else { Passed::Known })
}

/// How much is known of a flow that is judged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// This packet opens it.
    New,
    /// `work.state` holds it, including who was verified to have begun it.
    Followed,
    /// It was there before, but its entry is gone, and with it who began it.
    Forgotten,
}

/// The verdict on a flow in the originator's sense, left in `work.state`.
///
/// Five parameters at most: kernel 7.2 believes the debug information about a sixth and refuses the call.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn judge<T: Flows>(
    tables: &T,
    hook: &Hook,
    own: &Iface,
    work: &mut Work,
    (origin, how): (Origin, How),
) -> Result<(), Reason> {
    let from = hook.direction == FROM;
    let outgoing = matches!(origin, Origin::Sender) == from;
    let revision = tables.revision();
    let Work { key, state, .. } = work;
    // Where the originator wanted to go.
    let port = if outgoing { key.peer_port } else { key.own_port };
    let tunnel = key.protocol == u32::from(TCP) && port == TUNNEL_PORT;
    state.own = own.identity;
    state.verdict = DENY;
    state.rule = 0;
    state.origin = if outgoing { OUT } else { IN };
    if outgoing {
        if !from && !by_its_interface(tables, hook, &key.peer) {
            return Err(Reason::SourceAddress);
        }
        state.peer = ANONYMOUS;
        let mut here = false;
        match tables.endpoint(&key.peer) {
            Some(endpoint) => {
                state.peer = endpoint.identity;
                let clear = endpoint.ifindex == 0 && !tunnel;
                if clear && policy::mode(tables, revision & 1, endpoint.identity, port) == Mode::Strict {
                    return Err(Reason::ClearToStrict);
                }
                here = endpoint.ifindex != 0;
            }
            None if tables.inside(&key.peer) => return Err(Reason::UnknownInside),
            None => {}
        }
        if tunnel {
            state.verdict = ALLOW; // The agent asked for egress policy before it dialled.
            return Ok(());
        }
        let (protocol, port) = asked(key, port);
        let access = Access {
            source: own.identity,
            source_addr: key.own,
            destination: policy::party(tables, state.peer, &key.peer),
            destination_addr: key.peer,
            protocol,
            port,
        };
        let mut value = policy::egress(tables, revision & 1, &access);
        // Normally the receiver's veth asks for its policy. But when nobody remembers who began the flow, it must not
        // pass as one that its receiver would have refused to let begin.
        if value.verdict == ALLOW && here && matches!(how, How::Forgotten) {
            let inward = policy::ingress(tables, revision & 1, &access);
            if inward.verdict != ALLOW {
                value = inward;
            }
        }
        state.verdict = value.verdict;
        state.rule = value.rule;
        return if value.verdict == ALLOW { Ok(()) } else { Err(refusal(value.verdict)) };
    }
    if !from {
        state.peer = sender(tables, hook, &key.peer);
    } else if !matches!(how, How::Followed) {
        state.peer = owner(tables, &key.peer);
    }
    if tunnel {
        state.verdict = ALLOW; // The agent's listener asks for a certificate and for policy.
        return Ok(());
    }
    // Its sender's egress policy was asked on the sender's veth, or on its node.
    let (protocol, port) = asked(key, port);
    let access = Access {
        source: state.peer,
        source_addr: key.peer,
        destination: own.identity,
        destination_addr: key.own,
        protocol,
        port,
    };
    let value = policy::ingress(tables, revision & 1, &access);
    state.verdict = value.verdict;
    state.rule = value.rule;
    if value.verdict == ALLOW { Ok(()) } else { Err(refusal(value.verdict)) }
}

/// Protocol and port as policy names them. Of ICMP only echo is a flow, and its request is what is asked for.
#[inline(always)]
pub fn asked(key: &FlowKey, port: u16) -> (u8, u16) {
    const ICMP: u32 = 1;
    if key.protocol != ICMP {
        return (key.protocol as u8, port);
    }
    if is_v4(&key.own) { (1, 8 + 1) } else { (58, 128 + 1) }
}

/// Who sent a packet towards a workload: known by the interface it came in by, never by its address.
#[inline(always)]
fn sender<T: Flows>(tables: &T, hook: &Hook, addr: &Addr) -> u32 {
    if hook.ingress_ifindex == 0 {
        return if tables.is_node_addr(addr) { NODE } else { ANONYMOUS };
    }
    match tables.iface(hook.ingress_ifindex) {
        Some(iface) => iface.identity,
        None => ANONYMOUS,
    }
}

/// Who owns an address of this node: the receiver of a reply whose forward direction was forgotten.
#[inline(always)]
fn owner<T: Flows>(tables: &T, addr: &Addr) -> u32 {
    match tables.endpoint(addr) {
        Some(endpoint) if endpoint.ifindex != 0 => endpoint.identity,
        _ if tables.is_node_addr(addr) => NODE,
        _ => ANONYMOUS,
    }
}

/// Does a reply come in by the interface of whom the workload asked? An enrolled interface lets out its own addresses
/// only; any other is not that of a workload of this node. Who is elsewhere comes by the wire, where the tunnel proves
/// more than an interface could.
#[inline(always)]
fn by_its_interface<T: Flows>(tables: &T, hook: &Hook, asked: &Addr) -> bool {
    tables.iface(hook.ingress_ifindex).is_some()
        || tables.endpoint(asked).is_none_or(|endpoint| endpoint.ifindex == 0)
}

/// ICMP errors pass when they are about a flow that is tracked and allowed at this interface.
#[inline(always)]
fn icmp_error<T: Flows>(tables: &T, hook: &Hook, work: &mut Work) -> Result<Passed, Reason> {
    from_needs(hook, owns(tables, hook, &work.parsed.src), Reason::SourceAddress)?;
    // The quoted packet travelled the other way: towards the workload when the workload now complains about it.
    let opposite = Hook { direction: if hook.direction == FROM { TO } else { FROM }, ..*hook };
    work.key = key(&opposite, &work.parsed.tuple);
    if tables.flow(&work.key, &mut work.state) && work.state.verdict == ALLOW {
        Ok(Passed::Known)
    } else {
        Err(Reason::Icmp)
    }
}

#[inline(always)]
fn from_needs(hook: &Hook, condition: bool, reason: Reason) -> Result<Passed, Reason> {
    if hook.direction == FROM && !condition { Err(reason) } else { Ok(Passed::Known) }
}

#[inline(always)]
fn owns<T: Flows>(tables: &T, hook: &Hook, addr: &Addr) -> bool {
    tables.owns(&IfaceAddr { ifindex: hook.ifindex, addr: *addr })
}

#[inline(always)]
fn refusal(verdict: u32) -> Reason {
    if verdict == HTTP { Reason::NeedsHttp } else { Reason::Policy }
}

#[inline(always)]
fn key(hook: &Hook, tuple: &Tuple) -> FlowKey {
    let (own, peer, own_port, peer_port) = if hook.direction == FROM {
        (tuple.src, tuple.dst, tuple.src_port, tuple.dst_port)
    } else {
        (tuple.dst, tuple.src, tuple.dst_port, tuple.src_port)
    };
    FlowKey { ifindex: hook.ifindex, own, peer, own_port, peer_port, protocol: tuple.protocol.into() }
}

#[inline(always)]
fn fragment_key(hook: &Hook, parsed: &Parsed) -> FragmentKey {
    FragmentKey {
        ifindex: hook.ifindex,
        src: parsed.tuple.src,
        dst: parsed.tuple.dst,
        id: parsed.id,
        protocol: u32::from(parsed.tuple.protocol) << 8 | hook.direction,
    }
}

#[inline(always)]
fn remember_fragment<T: Flows>(tables: &T, hook: &Hook, parsed: &Parsed) -> Result<(), Reason> {
    match parsed.piece {
        Piece::First => tables.put_fragment(&fragment_key(hook, parsed)),
        _ => Ok(()),
    }
}

impl Work {
    /// What happened, for a report: both ends of the packet, and both identities in the originator's sense if a flow was
    /// judged.
    #[inline(always)]
    pub fn event(&mut self, hook: &Hook) -> &mut Event {
        let Work { parsed, state, event, judged, .. } = self;
        event.hook = if hook.direction == FROM { FROM_WORKLOAD } else { TO_WORKLOAD };
        event.ifindex = hook.ifindex;
        event.src = parsed.src;
        event.dst = parsed.tuple.dst;
        event.src_port = parsed.tuple.src_port;
        event.dst_port = parsed.tuple.dst_port;
        event.protocol = parsed.tuple.protocol;
        (event.rule, event.verdict) = if *judged { (state.rule, state.verdict as u8) } else { (0, 0) };
        (event.source, event.destination) = match (*judged, state.origin) {
            (false, _) => (ANONYMOUS, ANONYMOUS),
            (true, OUT) => (state.own, state.peer),
            _ => (state.peer, state.own),
        };
        event
    }
}
