//! Workloads into the kernel: whose network namespace, whose interface, whose address.
//!
//! A new workload is policed before anybody can reach it by a shortcut: its addresses and interface are known and both
//! TC programs attached before its namespace (which redirects what it dials) and its endpoint (which makes others dial it
//! directly) appear. Leaving happens in the reverse order.
//!
//! INVARIANT: an address of the manifests is an endpoint even while its workload cannot be enrolled, or it would count
//! as outside of the mesh and be reached in clear.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use weft_datapath::abi::{Addr, Endpoint, Iface, IfaceAddr, Netns as NetnsRow};
use weft_policy::model::cidr::{Cidr, addr, ip};

use super::error::{Error, Result};
use super::load::Kernel;
use super::maps::{Maps, Prefix};
use super::mirror::Mirror;
use super::netlink::Netlink;
use crate::netns::Netns;

/// A workload of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// `namespace/name`.
    pub name: String,
    /// Its identity number.
    pub identity: u32,
    /// Such as `/run/netns/NAME`.
    pub netns: PathBuf,
    /// The addresses it may send from; one interface carries them.
    pub addresses: Vec<IpAddr>,
}

/// Who is where.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub local: Vec<Workload>,
    /// Every address of the manifests with its identity number; those of `local` workloads are filled in.
    pub endpoints: BTreeMap<Addr, Endpoint>,
    /// What belongs to the mesh without being a workload's, such as `--mesh-cidr`.
    pub inside: Vec<Cidr>,
}

/// A workload whose traffic is under control.
#[derive(Clone, Debug)]
pub struct Enrolled {
    pub name: String,
    pub identity: u32,
    pub netns: Arc<Netns>,
    /// The host side of its veth.
    pub ifindex: u32,
}

/// What following the desired state led to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub enrolled: Vec<Enrolled>,
    /// Workload or address, and why it is not enrolled. The rest went on.
    pub problems: Vec<(String, Error)>,
    /// An address, interface or namespace changed hands, so what was decided about living flows must be decided again.
    pub moved: bool,
}

/// The maps about workloads, as they are in the kernel.
#[derive(Debug)]
pub struct Enrolment {
    iface_addrs: Mirror<IfaceAddr, u32>,
    ifaces: Mirror<u32, Iface>,
    netns: Mirror<u64, NetnsRow>,
    endpoints: Mirror<Addr, Endpoint>,
    node_addrs: Mirror<Addr, u32>,
    inside: Mirror<Prefix<Addr>, u32>,
}

/// The rows of one workload.
struct Rows {
    enrolled: Enrolled,
    addresses: Vec<Addr>,
}

impl Enrolment {
    /// Reads what a former agent left.
    pub fn read(maps: &Maps) -> Result<Enrolment> {
        Ok(Enrolment {
            iface_addrs: Mirror::read(&maps.iface_addr)?,
            ifaces: Mirror::read(&maps.iface)?,
            netns: Mirror::read(&maps.netns)?,
            endpoints: Mirror::read(&maps.endpoint)?,
            node_addrs: Mirror::read(&maps.node_addr)?,
            inside: Mirror::read(&maps.inside)?,
        })
    }

    /// Makes the kernel follow `desired`. Also looks whether interfaces were replaced, so it is to be called now and
    /// then without a change. An error means that nothing could be found out; what concerns one workload is a problem
    /// in the outcome.
    pub fn follow(&mut self, kernel: &Kernel, desired: &Places) -> Result<Outcome> {
        let netlink = |source| Error::Netlink { action: "list the node's interfaces", source };
        let mut route = Netlink::route().map_err(netlink)?;
        let links = route.links().map_err(netlink)?;
        let node_addrs =
            route.addresses().map_err(netlink)?.into_iter().map(|(_, ip)| (addr(ip), 1)).collect();
        let maps = &kernel.maps;
        let mut outcome = Outcome::default();
        self.follow_plain(maps, &node_addrs, &desired.inside, &mut outcome);

        let mut endpoints = desired.endpoints.clone();
        let mut rows: Vec<Rows> = Vec::new();
        let mut claims = Claims::default();
        for workload in &desired.local {
            let found = find(workload, &mut route, &links)
                .and_then(|(netns, ifindex)| {
                    claims.check(workload, netns.cookie(), ifindex).map(|()| (netns, ifindex))
                })
                .and_then(|(netns, ifindex)| {
                    self.police(kernel, workload, netns, ifindex, &mut outcome.moved)
                });
            match found {
                Ok(row) => rows.push(row),
                Err(error) => outcome.problems.push((workload.name.clone(), error)),
            }
            for address in &workload.addresses {
                let endpoint = Endpoint { identity: workload.identity, ..Endpoint::default() };
                endpoints.entry(addr(*address)).or_insert(endpoint);
            }
        }
        for row in rows {
            let Rows { enrolled, addresses } = &row;
            let value =
                NetnsRow { identity: enrolled.identity, ifindex: enrolled.ifindex, ..NetnsRow::default() };
            if let Err(error) = self.netns.write(&maps.netns, enrolled.netns.cookie(), value) {
                outcome.problems.push((enrolled.name.clone(), error));
                continue;
            }
            for address in addresses {
                let (identity, ifindex) = (enrolled.identity, enrolled.ifindex);
                endpoints.insert(*address, Endpoint { identity, ifindex, ..Endpoint::default() });
            }
            outcome.enrolled.push(row.enrolled);
        }
        for (address, endpoint) in &endpoints {
            match self.endpoints.write(&maps.endpoint, *address, *endpoint) {
                Ok(changed) => outcome.moved |= changed,
                Err(error) => outcome.problems.push((ip(address).to_string(), error)),
            }
        }
        self.release(kernel, &endpoints, &mut outcome)?;
        Ok(outcome)
    }

    /// The maps in which order does not matter.
    fn follow_plain(
        &mut self,
        maps: &Maps,
        node_addrs: &BTreeMap<Addr, u32>,
        inside: &[Cidr],
        outcome: &mut Outcome,
    ) {
        let inside = inside.iter().map(|range| (prefix(range), 1)).collect();
        let mut note = |what: &str, result: Result<usize>| match result {
            Ok(changes) => outcome.moved |= changes != 0,
            Err(error) => outcome.problems.push((what.into(), error)),
        };
        note("addresses of the node", self.node_addrs.follow(&maps.node_addr, node_addrs));
        note("addresses inside the mesh", self.inside.follow(&maps.inside, &inside));
    }

    /// Puts a workload's interface under control.
    fn police(
        &mut self,
        kernel: &Kernel,
        workload: &Workload,
        netns: Netns,
        ifindex: u32,
        moved: &mut bool,
    ) -> Result<Rows> {
        let maps = &kernel.maps;
        let addresses: Vec<Addr> = workload.addresses.iter().map(|ip| addr(*ip)).collect();
        for address in &addresses {
            let key = IfaceAddr { ifindex, addr: *address };
            self.iface_addrs.write(&maps.iface_addr, key, 1)?;
        }
        let iface = Iface { netns_cookie: netns.cookie(), identity: workload.identity, flags: 0 };
        *moved |= self.ifaces.write(&maps.iface, ifindex, iface)?;
        kernel.attach_interface(ifindex)?;
        let enrolled = Enrolled {
            name: workload.name.clone(),
            identity: workload.identity,
            netns: Arc::new(netns),
            ifindex,
        };
        Ok(Rows { enrolled, addresses })
    }

    /// Takes away what no enrolled workload needs.
    fn release(
        &mut self,
        kernel: &Kernel,
        endpoints: &BTreeMap<Addr, Endpoint>,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let maps = &kernel.maps;
        let cookies: BTreeSet<u64> =
            outcome.enrolled.iter().map(|workload| workload.netns.cookie()).collect();
        let ifaces: BTreeSet<u32> = outcome.enrolled.iter().map(|workload| workload.ifindex).collect();

        outcome.moved |= self.endpoints.remove_extra(&maps.endpoint, endpoints)? != 0;
        let stale: Vec<u64> =
            self.netns.have().keys().filter(|key| !cookies.contains(key)).copied().collect();
        for cookie in stale {
            self.netns.remove(&maps.netns, &cookie)?;
        }
        for ifindex in kernel.attached_interfaces()?.into_iter().filter(|ifindex| !ifaces.contains(ifindex)) {
            kernel.detach_interface(ifindex)?;
        }
        let stale: Vec<u32> =
            self.ifaces.have().keys().filter(|key| !ifaces.contains(key)).copied().collect();
        for ifindex in stale {
            outcome.moved |= self.ifaces.remove(&maps.iface, &ifindex)?;
        }
        let owned = |key: &IfaceAddr| {
            endpoints
                .get(&key.addr)
                .is_some_and(|endpoint| endpoint.ifindex == key.ifindex && key.ifindex != 0)
        };
        let stale: Vec<IfaceAddr> =
            self.iface_addrs.have().keys().filter(|key| !owned(key)).copied().collect();
        for key in stale {
            outcome.moved |= self.iface_addrs.remove(&maps.iface_addr, &key)?;
        }
        Ok(())
    }
}

/// Two workloads behind one interface or address could not be told apart.
#[derive(Default)]
struct Claims {
    taken: BTreeMap<String, String>,
}

impl Claims {
    fn check(&mut self, workload: &Workload, cookie: u64, ifindex: u32) -> Result<()> {
        let addresses = workload.addresses.iter().map(|ip| format!("the address {ip}"));
        let kernel = [format!("interface {ifindex}"), format!("the network namespace with cookie {cookie}")];
        for what in addresses.chain(kernel) {
            match self.taken.get(&what) {
                Some(first) if *first != workload.name => {
                    let (first, second) = (first.clone(), workload.name.clone());
                    return Err(Error::Twice { first, second, what });
                }
                _ => self.taken.insert(what, workload.name.clone()),
            };
        }
        Ok(())
    }
}

/// A workload's namespace, and the host side of the veth that carries its addresses.
fn find(
    workload: &Workload,
    host: &mut Netlink,
    host_links: &[super::netlink::Link],
) -> Result<(Netns, u32)> {
    let path = || workload.netns.clone();
    let entered = |source| Error::Netns { path: path(), source };
    let netlink = |source| Error::Netlink { action: "list a workload's interfaces", source };
    let netns = Netns::open(&workload.netns).map_err(entered)?;
    let mut inside = netns.run(Netlink::route).map_err(entered)?.map_err(netlink)?;
    let addresses = inside.addresses().map_err(netlink)?;
    let links = inside.links().map_err(netlink)?;

    let mut own = None;
    for wanted in &workload.addresses {
        let carrier = addresses.iter().find(|(_, ip)| ip == wanted).map(|(index, _)| *index);
        let carrier = carrier.ok_or_else(|| Error::NoInterface { path: path(), addr: *wanted })?;
        if *own.get_or_insert(carrier) != carrier {
            return Err(Error::SeveralInterfaces { path: path() });
        }
    }
    let index = own.ok_or_else(|| Error::NoAddress { workload: workload.name.clone() })?;

    // Both ends name each other, and the host's end says that the other is in this very namespace.
    let not_ours = || Error::NotOurVeth { path: path(), ifindex: index };
    let ifindex =
        links.iter().find(|link| link.index == index).and_then(|link| link.peer).ok_or_else(not_ours)?;
    let file = File::open(&workload.netns).map_err(entered)?;
    let id = host.netns_id(&file).map_err(netlink)?.ok_or_else(not_ours)?;
    let end = host_links.iter().find(|link| link.index == ifindex).ok_or_else(not_ours)?;
    if end.kind != "veth" || end.peer != Some(index) || end.peer_netns != Some(id) {
        return Err(not_ours());
    }
    Ok((netns, ifindex))
}

fn prefix(range: &Cidr) -> Prefix<Addr> {
    let (data, bits) = range.mapped();
    Prefix { bits: bits.into(), data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_shares_an_address_or_interface() {
        let workload = |name: &str, ip: &str| Workload {
            name: name.into(),
            identity: 16,
            netns: "/run/netns/x".into(),
            addresses: vec![ip.parse().unwrap()],
        };
        let mut claims = Claims::default();
        claims.check(&workload("a/a", "10.0.0.1"), 1, 2).unwrap();
        claims.check(&workload("a/b", "10.0.0.2"), 3, 4).unwrap();
        assert!(matches!(claims.check(&workload("a/c", "10.0.0.1"), 5, 6), Err(Error::Twice { .. })));
        assert!(matches!(claims.check(&workload("a/c", "10.0.0.3"), 3, 6), Err(Error::Twice { .. })));
        assert!(matches!(claims.check(&workload("a/c", "10.0.0.3"), 5, 2), Err(Error::Twice { .. })));
    }
}
