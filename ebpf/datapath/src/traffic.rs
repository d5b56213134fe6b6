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
use crate::policy::{self, ALLOW, Access, DENY, HTTP, Mode, Search};
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
    question: Question,
    search: Search,
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

/// What [`classify`] leaves for [`judge`] and [`settle`], besides `work.key` and `work.state`. In memory, not in arguments
/// or locals: the verifier walks a function once for each combination of values that it knows on the way there.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Question {
    /// Policy revision: one packet must not see two.
    revision: u32,
    /// Identity of the interface's workload.
    own: u32,
    /// Did the interface's workload begin the flow, as far as the packet shows?
    outgoing: u32,
    /// One of [`NEW`], [`FOLLOWED`], [`FORGOTTEN`].
    how: u32,
    /// Was there an entry?
    known: u32,
    /// Is the packet's interface the one that was shown to be the peer's?
    shown: u32,
}

/// This packet opens the flow.
const NEW: u32 = 0;
/// `work.state` holds it, including who was verified to have begun it.
const FOLLOWED: u32 = 1;
/// It was there before, but its entry is gone, and with it who began it.
const FORGOTTEN: u32 = 2;

/// What a packet needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing more: it belongs to what was allowed.
    Pass,
    /// A verdict.
    Judge,
}

/// Decides about a TCP, UDP or echo packet. Leaves the flow's state in `work.state` when it may pass.
#[inline(always)]
fn flow<T: Flows, P: Packet>(tables: &T, hook: &Hook, packet: &P, work: &mut Work) -> Result<Passed, Reason> {
    let passed = match classify(tables, hook, packet, work)? {
        Step::Pass => Passed::Known,
        Step::Judge => settle(tables, hook, work)?,
    };
    remember_fragment(tables, hook, &work.parsed)?;
    Ok(passed)
}

/// Finds out what a packet is part of, and refuses what no policy could allow.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn classify<T: Flows, P: Packet>(
    tables: &T,
    hook: &Hook,
    packet: &P,
    work: &mut Work,
) -> Result<Step, Reason> {
    let from = hook.direction == FROM;
    let Parsed { tcp_flags, payload, piece, .. } = work.parsed;
    work.key = key(hook, &work.parsed.tuple);
    if matches!(piece, Piece::Later) {
        // It has no ports; its first fragment, which had, was allowed in this direction at this interface.
        work.state.own = tables.iface(hook.ifindex).ok_or(Reason::NotEnrolled)?.identity;
        work.state.peer = ANONYMOUS;
        let known = tables.fragment(&fragment_key(hook, &work.parsed));
        return if known { Ok(Step::Pass) } else { Err(Reason::Fragment) };
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
        return if work.state.verdict == ALLOW { Ok(Step::Pass) } else { Err(refusal(work.state.verdict)) };
    }
    let own = tables.iface(hook.ifindex).ok_or(Reason::NotEnrolled)?.identity;
    // Refused without a trace in the entry: a forged reply must not cut a living flow.
    if known && !against && !shown && work.state.origin == OUT {
        if !by_its_interface(tables, hook, &work.key.peer) {
            return Err(Reason::SourceAddress);
        }
        // The first answer. What the workload asked for was decided when it asked.
        if work.state.revision == revision && work.state.verdict == ALLOW {
            work.judged = true;
            tables.show_peer(&work.key, hook.ingress_ifindex);
            return Ok(Step::Pass);
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
    // An answer (SYN and ACK) to what nobody remembers was asked for by its receiver.
    let answers = tcp && !opens && tcp_flags & SYN != 0;
    let sender_began = if followed { (work.state.origin == OUT) == from } else { !answers };
    // In the middle of a connection that was forgotten.
    let forgotten = tcp && !known && tcp_flags & SYN == 0;
    work.question = Question {
        revision,
        own,
        outgoing: (sender_began == from).into(),
        how: if followed {
            FOLLOWED
        } else if forgotten {
            FORGOTTEN
        } else {
            NEW
        },
        known: known.into(),
        shown: shown.into(),
    };
    Ok(Step::Judge)
}

/// Asks for the verdict and records it.
#[inline(always)]
fn settle<T: Flows>(tables: &T, hook: &Hook, work: &mut Work) -> Result<Passed, Reason> {
    let verdict = judge(tables, hook, work);
    let from = hook.direction == FROM;
    let Question { revision, how, known, shown, .. } = work.question;
    work.judged = true;
    work.state.revision = revision;
    if !from {
        work.state.ingress = hook.ingress_ifindex;
    }
    // A living flow that is no longer allowed keeps its entry, so that its sense is not forgotten. Neither a SYN nor what
    // comes in by another interface touches the entry of a living flow, or anybody could cut it.
    if verdict.is_ok() || (how == FOLLOWED && shown != 0) {
        tables.put_flow(&work.key, &work.state)?;
    }
    verdict?;
    Ok(if known == 0 && !from && work.state.origin == IN { Passed::Accepted } else { Passed::Known })
}

/// The verdict on a flow in the originator's sense, left in `work.state`. Of a flow that was forgotten the sender of this
/// packet may have been either: as the one who began it, or else as the one who answers.
#[inline(always)]
fn judge<T: Flows>(tables: &T, hook: &Hook, work: &mut Work) -> Result<(), Reason> {
    // Written out by direction, which each program knows, so that each holds either function once.
    if hook.direction == FROM {
        if work.question.outgoing != 0 {
            let verdict = outgoing(tables, hook, work);
            if verdict.is_ok() || work.question.how != FORGOTTEN {
                return verdict;
            }
        }
        return incoming(tables, hook, work);
    }
    if work.question.outgoing == 0 {
        let verdict = incoming(tables, hook, work);
        if verdict.is_ok() || work.question.how != FORGOTTEN {
            return verdict;
        }
    }
    outgoing(tables, hook, work)
}

/// The interface's workload began it.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn outgoing<T: Flows>(tables: &T, hook: &Hook, work: &mut Work) -> Result<(), Reason> {
    let Work { key, state, search, question, .. } = work;
    let bank = question.revision & 1;
    let port = key.peer_port;
    let tunnel = key.protocol == u32::from(TCP) && port == TUNNEL_PORT;
    *state = FlowState { own: question.own, verdict: DENY, rule: 0, origin: OUT, ..*state };
    if hook.direction != FROM && !by_its_interface(tables, hook, &key.peer) {
        return Err(Reason::SourceAddress);
    }
    state.peer = ANONYMOUS;
    let mut here = false;
    match tables.endpoint(&key.peer) {
        Some(endpoint) => {
            state.peer = endpoint.identity;
            let clear = endpoint.ifindex == 0 && !tunnel;
            if clear && policy::mode(tables, bank, endpoint.identity, port) == Mode::Strict {
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
        source: question.own,
        source_addr: key.own,
        destination: policy::party(tables, state.peer, &key.peer),
        destination_addr: key.peer,
        protocol,
        port,
    };
    let mut value = policy::egress_in(tables, bank, &access, search);
    // Normally the receiver's veth asks for its policy. But when nobody remembers who began the flow, it must not pass
    // as one that its receiver would have refused to let begin.
    if value.verdict == ALLOW && here && question.how == FORGOTTEN {
        let inward = policy::ingress_in(tables, bank, &access, search);
        if inward.verdict != ALLOW {
            value = inward;
        }
    }
    state.verdict = value.verdict;
    state.rule = value.rule;
    if value.verdict == ALLOW { Ok(()) } else { Err(refusal(value.verdict)) }
}

/// Its peer began it. The peer's egress policy was asked on the peer's veth, or on its node.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn incoming<T: Flows>(tables: &T, hook: &Hook, work: &mut Work) -> Result<(), Reason> {
    let Work { key, state, search, question, .. } = work;
    let port = key.own_port;
    *state = FlowState { own: question.own, verdict: DENY, rule: 0, origin: IN, ..*state };
    if hook.direction != FROM {
        state.peer = sender(tables, hook, &key.peer);
    } else if question.how != FOLLOWED {
        state.peer = owner(tables, &key.peer);
    }
    if key.protocol == u32::from(TCP) && port == TUNNEL_PORT {
        state.verdict = ALLOW; // The agent's listener asks for a certificate and for policy.
        return Ok(());
    }
    let (protocol, port) = asked(key, port);
    let access = Access {
        source: state.peer,
        source_addr: key.peer,
        destination: question.own,
        destination_addr: key.own,
        protocol,
        port,
    };
    let value = policy::ingress_in(tables, question.revision & 1, &access, search);
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
