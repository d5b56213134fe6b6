//! The policy verdict: may this source reach that port of that destination?
//!
//! The compiler in `policy/` writes, for each destination identity, one complete row for [`ANY`] source, and further
//! complete rows for the sources (and address classes) that are treated differently. A row is its any-port entry (port
//! 0) and the ports that differ from it. So the first row that exists decides, and inside it the exact port wins.

use crate::abi::{Addr, PolicyKey, PolicyValue};
use crate::identity::ANY;
use crate::tables::Tables;

/// The flow may pass.
pub const ALLOW: u32 = 1;
/// The flow is refused by a rule or by the default.
pub const DENY: u32 = 2;
/// The verdict depends on HTTP: refused unless the flow goes through the HTTP engine.
pub const HTTP: u32 = 3;

/// Subject flag: verdicts for this destination depend on the class of the source address.
pub const BY_CLASS: u32 = 1 << 0;
/// Subject flag: some port of this destination has an mTLS mode of its own.
pub const PORT_MODES: u32 = 1 << 1;

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
    /// Address of the source, for rules that name CIDRs.
    pub source_addr: Addr,
    /// Identity number of the destination.
    pub destination: u32,
    /// Destination port; 0 for protocols without ports.
    pub port: u16,
}

const REFUSED: PolicyValue = PolicyValue { verdict: DENY, rule: 0 };

/// The verdict under the current policy revision. A table miss denies with rule 0.
#[inline(always)]
pub fn decide<T: Tables>(tables: &T, access: &Access) -> PolicyValue {
    decide_in(tables, tables.revision() & 1, access)
}

/// As [`decide`], for a bank read before: one packet must not see two revisions.
#[inline(always)]
pub fn decide_in<T: Tables>(tables: &T, bank: u32, access: &Access) -> PolicyValue {
    let Some(subject) = tables.subject(bank, access.destination) else { return REFUSED };
    let class = if subject.flags & BY_CLASS != 0 { tables.class(bank, &access.source_addr) } else { 0 };
    let mut key = PolicyKey {
        bank,
        destination: access.destination,
        source: access.source,
        class,
        port: access.port,
        pad: 0,
    };
    if let Some(value) = row(tables, &mut key) {
        return value;
    }
    key.source = ANY;
    key.port = access.port;
    row(tables, &mut key).unwrap_or(REFUSED)
}

/// The entry of one row: the exact port, else the any-port entry; `None` when there is no such row.
#[inline(always)]
fn row<T: Tables>(tables: &T, key: &mut PolicyKey) -> Option<PolicyValue> {
    if let Some(value) = tables.policy(key) {
        return Some(value);
    }
    key.port = 0;
    tables.policy(key)
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
