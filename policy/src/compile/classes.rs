//! What policies tell apart of addresses and ports, as numbers that the kernel looks up.
//!
//! CIDRs are nested or disjoint, so the longest one around an address tells all others around it: each CIDR is a class,
//! and class 0 is outside of all. Ranges of ports cut the ports into pieces without an edge inside; a piece is numbered by
//! its first port. Numbers are made from what they stand for, so that other policies do not move them.

use super::PortSet;
use crate::model::Cidr;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use weft_datapath::abi::Addr;

pub(super) struct Classes {
    /// Sorted, so that a range is followed by those inside it.
    list: Vec<(Cidr, u32)>,
    /// Pieces of the port space, sorted and disjoint.
    pieces: Vec<(u16, u16)>,
}

impl Classes {
    pub(super) fn new(mut cidrs: BTreeSet<Cidr>, ranges: &BTreeSet<(u16, u16)>) -> Self {
        // In the kernel's table IPv4 lies inside IPv6: without an entry of its own it would be taken for `::/0`.
        if cidrs.iter().any(|cidr| cidr.network().is_ipv6()) {
            cidrs.insert(Cidr::ALL_V4);
        }
        let mut taken = HashSet::new();
        let number = |cidr: &Cidr| {
            let (addr, prefix) = cidr.mapped();
            free(hash(addr.iter().copied().chain([prefix])), |number| !taken.insert(number))
        };
        let numbers: Vec<u32> = cidrs.iter().map(number).collect();
        Classes { list: cidrs.into_iter().zip(numbers).collect(), pieces: pieces(ranges) }
    }

    /// The ranges that only one of the two has. `None` where one that both have has another number.
    pub(super) fn others(&self, other: &Classes) -> Option<Vec<Cidr>> {
        let (one, two): (BTreeMap<_, _>, BTreeMap<_, _>) =
            (self.list.iter().copied().collect(), other.list.iter().copied().collect());
        if one.iter().any(|(cidr, number)| two.get(cidr).is_some_and(|now| now != number)) {
            return None;
        }
        let only = |of: &BTreeMap<Cidr, u32>, not: &BTreeMap<Cidr, u32>| -> Vec<Cidr> {
            of.keys().filter(|cidr| !not.contains_key(cidr)).copied().collect()
        };
        Some([only(&one, &two), only(&two, &one)].concat())
    }

    pub(super) fn addresses(&self) -> BTreeMap<(Addr, u8), u32> {
        self.list.iter().map(|(cidr, number)| (cidr.mapped(), *number)).collect()
    }

    /// Prefixes of the port space, as a longest-prefix table wants them.
    pub(super) fn ports(&self) -> BTreeMap<(u16, u8), u32> {
        let mut table = BTreeMap::new();
        for (first, last) in &self.pieces {
            let (mut at, end) = (u32::from(*first), u32::from(*last) + 1);
            while at < end {
                // The largest aligned block that begins here and fits.
                let block = (1 << at.trailing_zeros().min(16)).min(1u32 << (end - at).ilog2());
                table.insert((at as u16, 16 - block.ilog2() as u8), u32::from(*first));
                at += block;
            }
        }
        table
    }

    /// The classes of addresses inside any of these ranges.
    pub(super) fn inside(&self, ranges: &BTreeSet<Cidr>) -> BTreeSet<(Cidr, u32)> {
        let within = |range: &Cidr| {
            let range = *range;
            let first = self.list.partition_point(|(cidr, _)| *cidr < range);
            self.list[first..].iter().take_while(move |(cidr, _)| range.covers(cidr)).copied()
        };
        ranges.iter().flat_map(within).collect()
    }

    /// The pieces inside any of these ranges.
    pub(super) fn pieces_inside(&self, ranges: &BTreeSet<(u16, u16)>) -> BTreeSet<(u16, u16)> {
        let within = |(first, last): &(u16, u16)| {
            let (first, last) = (*first, *last);
            let from = self.pieces.partition_point(|piece| piece.0 < first);
            self.pieces[from..].iter().take_while(move |piece| piece.1 <= last).copied()
        };
        ranges.iter().flat_map(within).collect()
    }

    /// The piece around a port, as a set of ports.
    pub(super) fn around(&self, port: u16) -> PortSet {
        let index = self.pieces.partition_point(|piece| piece.1 < port);
        match self.pieces.get(index) {
            Some((first, last)) if *first <= port => PortSet::Piece(*first, *last),
            _ => PortSet::Other,
        }
    }
}

/// Cuts all ranges at the edges of each other.
fn pieces(ranges: &BTreeSet<(u16, u16)>) -> Vec<(u16, u16)> {
    // How many ranges more (or fewer) there are from this port on.
    let mut edges: BTreeMap<u32, i32> = BTreeMap::new();
    for (first, last) in ranges {
        *edges.entry(u32::from(*first)).or_default() += 1;
        *edges.entry(u32::from(*last) + 1).or_default() -= 1;
    }
    let mut pieces = Vec::new();
    let mut depth = 0;
    let mut begin = 0;
    for (at, change) in edges {
        if depth > 0 {
            pieces.push((begin as u16, (at - 1) as u16));
        }
        depth += change;
        begin = at;
    }
    pieces
}

/// FNV-1a, folded to a number that is neither 0 nor one that the kernel gives a meaning to.
pub(super) fn hash(bytes: impl Iterator<Item = u8>) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in bytes {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    ((hash ^ hash >> 32) as u32 & 0x7fff_ffff).max(1)
}

/// The first number from `wanted` on that is not taken.
pub(super) fn free(wanted: u32, mut taken: impl FnMut(u32) -> bool) -> u32 {
    let mut number = wanted;
    while taken(number) {
        number = number % 0x7fff_ffff + 1;
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_each_others_edges() {
        let classes = Classes::new(BTreeSet::new(), &BTreeSet::from([(1024, 65535), (8000, 9000)]));
        assert_eq!(classes.pieces, [(1024, 7999), (8000, 9000), (9001, 65535)]);
        let table = classes.ports();
        for port in 0..=u16::MAX {
            let first = |bits: u8| port & u16::MAX.checked_shl(16 - u32::from(bits)).unwrap_or(0);
            let found = (0..=16).rev().find_map(|bits| table.get(&(first(bits), bits)));
            let expected = match classes.around(port) {
                PortSet::Piece(first, _) => Some(u32::from(first)),
                _ => None,
            };
            assert_eq!(found.copied(), expected, "{port}");
        }
        assert_eq!(classes.pieces_inside(&BTreeSet::from([(8000, 9000)])), BTreeSet::from([(8000, 9000)]));
    }

    #[test]
    fn a_clash_moves_on() {
        let mut taken = HashSet::from([5, 6]);
        assert_eq!(free(5, |number| !taken.insert(number)), 7);
        let mut taken = HashSet::from([0x7fff_ffff]);
        assert_eq!(free(0x7fff_ffff, |number| !taken.insert(number)), 1, "numbers go round without 0");
    }
}
