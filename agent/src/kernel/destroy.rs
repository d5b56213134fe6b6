//! Cuts living connections that policy no longer allows.
//!
//! The datapath drops their next packet by itself, since the revision moved. But an idle connection sends none, and a
//! dropped packet only makes its sender wait; so the sockets at both ends on this node are destroyed as well.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use weft_datapath::abi::{Addr, FlowKey, FlowState, PolicyValue};
use weft_datapath::connect::TCP;
use weft_datapath::conntrack::IN;
use weft_datapath::identity::{ANONYMOUS, NODE};
use weft_datapath::names::TUNNEL_PORT;
use weft_datapath::policy::{self, ALLOW, Access, Mode};
use weft_datapath::tables::Tables;
use weft_policy::model::cidr::ip;

use super::enrol::Enrolled;
use super::error::{Error, Result};
use super::lookup::KernelTables;
use super::maps::Maps;
use super::netlink::Netlink;

/// A connection that was cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Who began it.
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Identity numbers of both.
    pub source: u32,
    pub destination: u32,
    /// The rule that decided; 0 for a default.
    pub rule: u32,
}

/// Destroys the sockets of all tracked TCP connections that the tables in force refuse. To be called after every new
/// revision. Connections of the tunnel are not judged here: the agent does, by their certificates.
pub fn cut_revoked(maps: &Maps, enrolled: &[Enrolled]) -> Result<Vec<Cut>> {
    let tables = KernelTables::new(maps)?;
    let mut judge = Judge { tables, known: HashMap::new() };
    let mut sockets = Sockets { enrolled, open: BTreeMap::new() };
    let mut cuts = Vec::new();
    for (key, state) in maps.conntrack.entries()? {
        let Some(rule) = judge.refusal(&key, &state) else { continue };
        let own = SocketAddr::new(ip(&key.own), key.own_port);
        let peer = SocketAddr::new(ip(&key.peer), key.peer_port);
        let mut found = sockets.destroy(key.ifindex, own, peer)?;
        match tables.endpoint(&key.peer) {
            Some(endpoint) if endpoint.ifindex != 0 => {
                found |= sockets.destroy(endpoint.ifindex, peer, own)?
            }
            _ if state.peer == NODE => found |= sockets.destroy(0, peer, own)?,
            _ => {}
        }
        // Entries outlive their connections; those are not worth a word.
        if found {
            let incoming = state.origin == IN;
            let (client, server) = if incoming { (peer, own) } else { (own, peer) };
            let (source, destination) =
                if incoming { (state.peer, state.own) } else { (state.own, state.peer) };
            cuts.push(Cut { client, server, source, destination, rule });
        }
    }
    Ok(cuts)
}

/// Is it asked of the source; source, its address, destination, its address, port.
type Question = (bool, u32, Addr, u32, Addr, u16);

/// Judges flows as TC does, remembering the answers: many flows ask the same.
struct Judge<'a> {
    tables: KernelTables<'a>,
    known: HashMap<Question, PolicyValue>,
}

impl Judge<'_> {
    /// The rule that refuses a flow, or `None` if it may live.
    fn refusal(&mut self, key: &FlowKey, state: &FlowState) -> Option<u32> {
        if key.protocol != u32::from(TCP) || key.own_port == TUNNEL_PORT || key.peer_port == TUNNEL_PORT {
            return None;
        }
        let outward = state.origin != IN;
        if outward && self.unreachable(key) {
            return Some(0);
        }
        let (source_addr, destination_addr) = if outward { (key.own, key.peer) } else { (key.peer, key.own) };
        let (source, destination, port) = if outward {
            (state.own, self.destination(&key.peer), key.peer_port)
        } else {
            (state.peer, state.own, key.own_port)
        };
        let access = Access { source, source_addr, destination, destination_addr, protocol: TCP, port };
        let question = (outward, source, source_addr, destination, destination_addr, port);
        let (tables, bank) = (&self.tables, self.tables.revision() & 1);
        let value = self.known.entry(question).or_insert_with(|| match outward {
            true => policy::egress(tables, bank, &access),
            false => policy::ingress(tables, bank, &access),
        });
        (value.verdict != ALLOW).then_some(value.rule)
    }

    /// Who has the address now: it may have changed hands since the flow was judged.
    fn destination(&self, addr: &Addr) -> u32 {
        let owner = self.tables.endpoint(addr).map_or(ANONYMOUS, |endpoint| endpoint.identity);
        policy::party(&self.tables, owner, addr)
    }

    /// At its own veth a flow is refused when it goes in clear where it must not. What its receiver on this node
    /// thinks of it is asked at the receiver's entry.
    fn unreachable(&self, key: &FlowKey) -> bool {
        let bank = self.tables.revision() & 1;
        match self.tables.endpoint(&key.peer) {
            Some(endpoint) => {
                endpoint.ifindex == 0
                    && policy::mode(&self.tables, bank, endpoint.identity, key.peer_port) == Mode::Strict
            }
            None => self.tables.inside(&key.peer),
        }
    }
}

/// Netlink sockets by workload, opened when the first connection of one is to be cut.
struct Sockets<'a> {
    enrolled: &'a [Enrolled],
    open: BTreeMap<u32, Option<Netlink>>,
}

impl Sockets<'_> {
    /// Destroys a connection of the workload behind `ifindex`, or of the node itself for 0. A workload that is not
    /// enrolled has no sockets that concern weft.
    fn destroy(&mut self, ifindex: u32, local: SocketAddr, remote: SocketAddr) -> Result<bool> {
        let error = |source| Error::Netlink { action: "destroy a connection", source };
        if let std::collections::btree_map::Entry::Vacant(entry) = self.open.entry(ifindex) {
            let workload = self.enrolled.iter().find(|workload| workload.ifindex == ifindex);
            entry.insert(match workload {
                Some(workload) => Some(workload.netns.run(Netlink::sock_diag).flatten().map_err(error)?),
                None if ifindex == 0 => Some(Netlink::sock_diag().map_err(error)?),
                None => None,
            });
        }
        match self.open.get_mut(&ifindex) {
            Some(Some(netlink)) => netlink.destroy(local, remote).map_err(error),
            _ => Ok(false),
        }
    }
}
