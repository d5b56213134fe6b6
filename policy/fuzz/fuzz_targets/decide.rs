//! Any rows and any question: [`policy::decide`] says what a plain reading of its contract says, and never panics.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use weft_datapath::abi::{Addr, PolicyKey, PolicyValue, Subject, SubjectKey};
use weft_datapath::identity::{ANY, FIRST_WORKLOAD};
use weft_datapath::policy::{
    self, ALLOW, Access, BY_CLASS, BY_PROTOCOL, BY_RANGE, DENY, EGRESS, EGRESS_SHIFT, HTTP, OUTWARD, RANGE,
};
use weft_policy::Tables;

/// Few of each, so that questions hit rows.
const IDENTITIES: &[u32] = &[0, 1, FIRST_WORKLOAD, FIRST_WORKLOAD + 1, FIRST_WORKLOAD + 2];
const PEERS: &[u32] = &[0, 1, FIRST_WORKLOAD, FIRST_WORKLOAD + 1, FIRST_WORKLOAD + 2, ANY];
const PORTS: &[u16] = &[0, 1, 53, 80, 8080, 8191, 8192, 65535];
const PROTOCOLS: &[u8] = &[0, 1, 6, 17, 47, 58, 132];
const ADDRS: &[[u8; 4]] = &[[10, 0, 0, 1], [10, 0, 0, 2], [10, 1, 0, 1], [192, 168, 0, 1]];

fuzz_target!(|bytes: &[u8]| {
    let _ = run(&mut Unstructured::new(bytes));
});

fn addr(v4: [u8; 4]) -> Addr {
    let mut addr = [0; 16];
    addr[10..12].fill(0xff);
    addr[12..].copy_from_slice(&v4);
    addr
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let mut tables = Tables::default();
    for identity in IDENTITIES {
        if input.ratio(7, 8)? {
            let mut flags: u32 = input.arbitrary()?;
            // Rows that name ranges of ports name protocols.
            for shift in [0, EGRESS_SHIFT] {
                if flags >> shift & BY_PROTOCOL == 0 {
                    flags &= !(BY_RANGE << shift);
                }
            }
            let subject = Subject { flags, mode: input.int_in_range(0..=4)?, ..Subject::default() };
            tables.subjects.insert(SubjectKey { bank: 0, identity: *identity }, subject);
        }
    }
    for _ in 0..input.int_in_range(0..=6)? {
        let prefix = *input.choose(&[96u8, 104, 112, 120, 128])?;
        let whole = u128::from_be_bytes(addr(*input.choose(ADDRS)?))
            & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
        tables.cidrs.insert((whole.to_be_bytes(), prefix), input.int_in_range(0..=3)?);
    }
    for _ in 0..input.int_in_range(0..=6)? {
        let prefix = input.int_in_range(0..=16u8)?;
        let first = *input.choose(PORTS)? & u16::MAX.checked_shl(16 - u32::from(prefix)).unwrap_or(0);
        // Ranges begin at 1: port 0 stands for no port at all.
        if first != 0 {
            tables.ranges.insert((first, prefix), input.int_in_range(0..=3)?);
        }
    }
    for rule in 0..input.int_in_range(0..=60u32)? {
        let key = PolicyKey {
            bank: 0,
            subject: *input.choose(IDENTITIES)?,
            peer: *input.choose(PEERS)?,
            class: input.int_in_range(0..=3)?,
            port: if input.ratio(1, 2)? { input.int_in_range(0..=3)? } else { *input.choose(PORTS)? },
            protocol: *input.choose(PROTOCOLS)?,
            kind: input.int_in_range(0..=3)?,
        };
        let verdict =
            if input.ratio(1, 16)? { input.arbitrary()? } else { *input.choose(&[ALLOW, DENY, HTTP])? };
        tables.policies.insert(key, PolicyValue { verdict, rule });
    }
    for _ in 0..8 {
        let access = Access {
            source: *input.choose(IDENTITIES)?,
            source_addr: addr(*input.choose(ADDRS)?),
            destination: *input.choose(IDENTITIES)?,
            destination_addr: addr(*input.choose(ADDRS)?),
            protocol: *input.choose(PROTOCOLS)?,
            port: *input.choose(PORTS)?,
        };
        let (got, expected) = (policy::decide(&tables, &access), reference(&tables, &access));
        assert_eq!((got.verdict, got.rule), (expected.verdict, expected.rule), "{access:?}\n{tables:#?}");
    }
    Ok(())
}

/// The contract at the head of `weft_datapath::policy`, read aloud.
fn reference(tables: &Tables, access: &Access) -> PolicyValue {
    let outward = side(tables, access, true);
    if ![ALLOW, HTTP].contains(&outward.verdict) {
        return outward;
    }
    let inward = side(tables, access, false);
    if outward.verdict == HTTP && [ALLOW, HTTP].contains(&inward.verdict) { outward } else { inward }
}

fn side(tables: &Tables, access: &Access, outward: bool) -> PolicyValue {
    let allowed = PolicyValue { verdict: ALLOW, rule: 0 };
    let refused = PolicyValue { verdict: DENY, rule: 0 };
    let (identity, peer, peer_addr) = match outward {
        true => (access.source, access.destination, access.destination_addr),
        false => (access.destination, access.source, access.source_addr),
    };
    // Only workloads have policy.
    if identity < FIRST_WORKLOAD {
        return allowed;
    }
    let Some(subject) = tables.subjects.get(&SubjectKey { bank: 0, identity }) else { return refused };
    if outward && subject.flags & EGRESS == 0 {
        return allowed;
    }
    let flags = if outward { subject.flags >> EGRESS_SHIFT } else { subject.flags };
    let class = if flags & BY_CLASS == 0 { 0 } else { class_of(tables, peer_addr) };
    let range = if flags & BY_RANGE == 0 { 0 } else { range_of(tables, access.port) };
    // The first row that exists decides: a row exists if one of its entries answers.
    let own: BTreeMap<&PolicyKey, &PolicyValue> =
        tables.policies.iter().filter(|(key, _)| key.subject == identity).collect();
    for (peer, class) in [(peer, class), (peer, 0), (ANY, class), (ANY, 0)] {
        let entry = |protocol: u8, port: u16, ranged: bool| {
            let kind = if outward { OUTWARD } else { 0 } | if ranged { RANGE } else { 0 };
            own.get(&PolicyKey { bank: 0, subject: identity, peer, class, port, protocol, kind }).copied()
        };
        let has_ports = [6, 17, 132].contains(&access.protocol);
        let found = if flags & BY_PROTOCOL != 0 {
            let protocol = access.protocol;
            // Types of ICMP stand where others have ports.
            let exact = (access.port != 0).then(|| entry(protocol, access.port, false)).flatten();
            let ranged = (range != 0).then(|| entry(protocol, range as u16, true)).flatten();
            exact.or(ranged).or(entry(protocol, 0, false)).or(entry(0, 0, false))
        } else {
            let exact = (has_ports && access.port != 0).then(|| entry(0, access.port, false)).flatten();
            exact.or(entry(0, 0, false))
        };
        if let Some(value) = found {
            return *value;
        }
    }
    refused
}

/// The class of the longest prefix that holds an address.
fn class_of(tables: &Tables, addr: Addr) -> u32 {
    let holds = |(first, prefix): &(Addr, u8)| {
        let shift = 128 - u32::from(*prefix);
        u128::from_be_bytes(*first).checked_shr(shift) == u128::from_be_bytes(addr).checked_shr(shift)
    };
    let longest =
        tables.cidrs.iter().filter(|(range, _)| holds(range)).max_by_key(|((_, prefix), _)| *prefix);
    longest.map_or(0, |(_, class)| *class)
}

/// The number of the longest prefix that holds a port.
fn range_of(tables: &Tables, port: u16) -> u32 {
    let holds = |(first, prefix): &(u16, u8)| {
        let shift = 16 - u32::from(*prefix);
        first.checked_shr(shift) == port.checked_shr(shift)
    };
    let longest =
        tables.ranges.iter().filter(|(range, _)| holds(range)).max_by_key(|((_, prefix), _)| *prefix);
    longest.map_or(0, |(_, number)| *number)
}
