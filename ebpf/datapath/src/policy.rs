//! The policy verdict: may this source reach that port of that destination?
//!
//! It is asked of both ends: egress of the source's rows, ingress of the destination's. A subject's rows in one direction
//! are one complete row for [`ANY`] peer, and further complete rows for the peers, and classes of the peer's address, that
//! are treated differently. The first row that exists decides: (peer, class), (peer, 0), ([`ANY`], class), ([`ANY`], 0).
//! A row is its entry for everything (protocol 0, port 0) and what differs from it: a port, a range of ports, a protocol.
//! Inside it the narrowest entry wins. The subject's flags say which of these lookups its rows can answer at all.

use crate::abi::{Addr, PolicyKey, PolicyValue, Subject};
use crate::identity::{ANY, FIRST_WORKLOAD, NODE};
use crate::tables::Tables;

/// The flow may pass.
pub const ALLOW: u32 = 1;
/// The flow is refused by a rule or by the default.
pub const DENY: u32 = 2;
/// The verdict depends on HTTP: refused unless the flow goes through the HTTP engine.
pub const HTTP: u32 = 3;

/// Subject flag: its ingress rows differ by the class of the peer's address.
pub const BY_CLASS: u32 = 1 << 0;
/// Subject flag: some port of this destination has an mTLS mode of its own.
pub const PORT_MODES: u32 = 1 << 1;
/// Subject flag: its ingress rows name protocols, and ports as those of a protocol; else of any.
pub const BY_PROTOCOL: u32 = 1 << 2;
/// Subject flag: its ingress rows name ranges of ports; only with [`BY_PROTOCOL`].
pub const BY_RANGE: u32 = 1 << 3;
/// Subject flag: it has egress rows; without them it may reach everything.
pub const EGRESS: u32 = 1 << 4;
/// [`BY_CLASS`], [`BY_PROTOCOL`] and [`BY_RANGE`] of egress rows stand this much further left.
pub const EGRESS_SHIFT: u32 = 8;

/// [`PolicyKey::kind`]: rows of flows that the subject begins; without it, of flows that come to it.
pub const OUTWARD: u8 = 1 << 0;
/// [`PolicyKey::kind`]: the port is the number of a range.
pub const RANGE: u8 = 1 << 1;

/// In place of a bank, together with its number: asks [`Tables::class`] for the range of a port, see [`port_addr`].
pub const PORTS: u32 = 1 << 31;

/// IP protocol numbers that carry ports.
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// What a destination port accepts, as Istio's `PeerAuthentication` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    /// Only authenticated peers: the tunnel, or kernel-verified on one node.
    Strict = 1,
    /// Authenticated or in clear.
    Permissive = 2,
    /// In clear.
    Disable = 3,
}

impl Mode {
    /// The mode behind a table's number; an unknown number is the strictest mode.
    pub fn from_table(mode: u32) -> Mode {
        match mode {
            2 => Mode::Permissive,
            3 => Mode::Disable,
            _ => Mode::Strict,
        }
    }
}

/// Who wants to reach what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Identity number of the source.
    pub source: u32,
    /// Its address, for ingress rules that name CIDRs.
    pub source_addr: Addr,
    /// Identity number of the destination, or what [`party`] says of its address.
    pub destination: u32,
    /// Its address, for egress rules that name CIDRs.
    pub destination_addr: Addr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port. For ICMP the type plus one; 0 for other protocols without ports.
    pub port: u16,
}

const ALLOWED: PolicyValue = PolicyValue { verdict: ALLOW, rule: 0 };
const REFUSED: PolicyValue = PolicyValue { verdict: DENY, rule: 0 };

/// The verdict of both ends under the current policy revision. A table miss denies with rule 0.
#[inline(always)]
pub fn decide<T: Tables>(tables: &T, access: &Access) -> PolicyValue {
    decide_in(tables, tables.revision() & 1, access)
}

/// As [`decide`], for a bank read before: one packet must not see two revisions.
#[inline(always)]
pub fn decide_in<T: Tables>(tables: &T, bank: u32, access: &Access) -> PolicyValue {
    let outward = egress(tables, bank, access);
    if outward.verdict != ALLOW && outward.verdict != HTTP {
        return outward;
    }
    let inward = ingress(tables, bank, access);
    if outward.verdict == HTTP && (inward.verdict == ALLOW || inward.verdict == HTTP) {
        outward
    } else {
        inward
    }
}

/// May this flow come to its destination? What is no workload asks nothing.
#[inline(always)]
pub fn ingress<T: Tables>(tables: &T, bank: u32, access: &Access) -> PolicyValue {
    ingress_in(tables, bank, access, &mut Search::default())
}

/// May its source begin this flow? What is no workload may.
#[inline(always)]
pub fn egress<T: Tables>(tables: &T, bank: u32, access: &Access) -> PolicyValue {
    egress_in(tables, bank, access, &mut Search::default())
}

/// As [`ingress`], with the memory to search in.
#[inline(always)]
pub fn ingress_in<T: Tables>(tables: &T, bank: u32, access: &Access, search: &mut Search) -> PolicyValue {
    if access.destination < FIRST_WORKLOAD {
        return ALLOWED;
    }
    let Some(Subject { flags, .. }) = tables.subject(bank, access.destination) else { return REFUSED };
    search.key = question(bank, access, access.destination, access.source);
    rows(tables, flags, &access.source_addr, search)
}

/// As [`egress`], with the memory to search in.
#[inline(always)]
pub fn egress_in<T: Tables>(tables: &T, bank: u32, access: &Access, search: &mut Search) -> PolicyValue {
    if access.source < FIRST_WORKLOAD {
        return ALLOWED;
    }
    let Some(Subject { flags, .. }) = tables.subject(bank, access.source) else { return REFUSED };
    if flags & EGRESS == 0 {
        return ALLOWED;
    }
    search.key = question(bank, access, access.source, access.destination);
    search.key.kind = OUTWARD;
    rows(tables, flags >> EGRESS_SHIFT, &access.destination_addr, search)
}

/// Who stands behind an address, for egress rules: the workload that owns it, if `owner` is one, the node, or nobody known.
#[inline(always)]
pub fn party<T: Tables>(tables: &T, owner: u32, addr: &Addr) -> u32 {
    if owner < FIRST_WORKLOAD && tables.is_node_addr(addr) { NODE } else { owner }
}

#[inline(always)]
fn question(bank: u32, access: &Access, subject: u32, peer: u32) -> PolicyKey {
    PolicyKey { bank, subject, peer, class: 0, port: access.port, protocol: access.protocol, kind: 0 }
}

/// A question to the rows, and the answer. The TC programs keep it in a map's memory, whose contents the verifier does not
/// follow: on the stack it would walk [`search`] once for each combination of what it knows to be zero.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Search {
    key: PolicyKey,
    class: u32,
    range: u32,
    port: u16,
    protocol: u8,
    kind: u8,
    found: PolicyValue,
}

/// The first row that exists decides; without one the answer is no.
#[inline(always)]
fn rows<T: Tables>(tables: &T, flags: u32, peer: &Addr, asked: &mut Search) -> PolicyValue {
    let Search { key, class, range, port, protocol, kind, found } = asked;
    *found = REFUSED;
    *class = if flags & BY_CLASS != 0 { tables.class(key.bank, peer) } else { 0 };
    *range = if flags & BY_RANGE != 0 { tables.class(key.bank | PORTS, &port_addr(key.port)) } else { 0 };
    let by_protocol = flags & BY_PROTOCOL != 0;
    *port = if by_protocol || matches!(key.protocol, TCP | UDP | SCTP) { key.port } else { 0 };
    *protocol = if by_protocol { key.protocol } else { 0 };
    *kind = key.kind;
    search(tables, asked);
    asked.found
}

/// Asks row by row: the peer's by the class of its address, then without; then those of any peer.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn search<T: Tables>(tables: &T, asked: &mut Search) {
    let mut turn = 0;
    while turn < 4 {
        if turn == 2 {
            asked.key.peer = ANY;
        }
        let classless = turn & 1 != 0;
        // Without a class the even turns ask all there is.
        if !classless || asked.class != 0 {
            asked.key.class = if classless { 0 } else { asked.class };
            if row(tables, asked) {
                return;
            }
        }
        turn += 1;
    }
}

/// Asks one row, from its narrowest entry to its widest. Every field is read anew, which keeps the verifier from following
/// each combination of those that are zero through all that comes after.
#[inline(always)]
fn row<T: Tables>(tables: &T, asked: &mut Search) -> bool {
    asked.key.port = asked.port;
    asked.key.protocol = asked.protocol;
    asked.key.kind = asked.kind;
    if entry(tables, asked) {
        return true;
    }
    if asked.range != 0 {
        asked.key.port = asked.range as u16;
        asked.key.kind |= RANGE;
        if entry(tables, asked) {
            return true;
        }
        asked.key.kind = asked.kind;
    }
    if asked.port != 0 {
        asked.key.port = 0;
        if entry(tables, asked) {
            return true;
        }
    }
    asked.key.port = 0;
    asked.key.protocol = 0;
    asked.protocol != 0 && entry(tables, asked)
}

#[inline(always)]
fn entry<T: Tables>(tables: &T, asked: &mut Search) -> bool {
    match tables.policy(&asked.key) {
        Some(value) => {
            asked.found = value;
            true
        }
        None => false,
    }
}

/// A port in the form of a class lookup: its two bytes, most significant first, before nothing.
#[inline(always)]
pub const fn port_addr(port: u16) -> Addr {
    ((port as u128) << 112).to_be_bytes()
}

/// The mTLS mode of one port of a destination under `bank`; STRICT when the destination is unknown.
#[inline(always)]
pub fn mode<T: Tables>(tables: &T, bank: u32, destination: u32, port: u16) -> Mode {
    let Some(subject) = tables.subject(bank, destination) else { return Mode::Strict };
    if subject.flags & PORT_MODES != 0
        && let Some(mode) = tables.port_mode(bank, destination, port)
    {
        return Mode::from_table(mode);
    }
    Mode::from_table(subject.mode)
}
