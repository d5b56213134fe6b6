//! Workloads into the kernel: whose network namespace, whose interface, whose address.
//!
//! A new workload is policed before anybody can reach it by a shortcut: its addresses and interface are known and both
//! TC programs attached before its namespace (which redirects what it dials) and its endpoint (which makes others dial it
//! directly) appear. Leaving happens in the reverse order.
//!
//! INVARIANT: what was once under control stays so until its workload leaves the manifests or its interface is gone;
//! nothing that goes wrong in between detaches a program.
//!
//! INVARIANT: an address of the manifests is an endpoint even while its workload cannot be enrolled, or it would count
//! as outside of the mesh and be reached in clear.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use weft_datapath::abi::{Addr, Endpoint, Iface, IfaceAddr, Netns as NetnsRow, Shared};
use weft_policy::model::cidr::{Cidr, addr, ip};

use super::error::{Error, Result};
use super::load::Kernel;
use super::maps::{Maps, Prefix};
use super::mirror::Mirror;
use super::netlink::{Link, Netlink};
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

/// A workload and where it is.
struct Place<'a> {
    workload: &'a Workload,
    cookie: u64,
    ifindex: u32,
    /// `None`: it was enrolled here and cannot be looked at now.
    netns: Option<Netns>,
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
        let mut places = Vec::new();
        let mut policed = BTreeSet::new();
        let mut claims = Claims::default();
        for workload in &desired.local {
            for address in &workload.addresses {
                let endpoint = Endpoint { identity: workload.identity, ..Endpoint::default() };
                endpoints.entry(addr(*address)).or_insert(endpoint);
            }
            let mut note = |error| outcome.problems.push((workload.name.clone(), error));
            let place = match find(workload, &mut route, &links) {
                Ok(place) => place,
                Err(error) => {
                    note(error);
                    let Some(place) = self.former(workload, &links) else { continue };
                    place
                }
            };
            if let Err(error) = claims.check(&place) {
                note(error);
                continue;
            }
            match self.police(kernel, &place) {
                Ok(moved) => {
                    outcome.moved |= moved;
                    policed.insert(place.ifindex);
                }
                Err(error) => note(error),
            }
            places.push(place);
        }
        for &Place { workload, cookie, ifindex, .. } in &places {
            if !policed.contains(&ifindex) {
                continue;
            }
            let value = NetnsRow { identity: workload.identity, ifindex, ..NetnsRow::default() };
            if let Err(error) = self.netns.write(&maps.netns, cookie, value) {
                outcome.problems.push((workload.name.clone(), error));
                policed.remove(&ifindex);
                continue;
            }
            for address in &workload.addresses {
                let endpoint = Endpoint { identity: workload.identity, ifindex, ..Endpoint::default() };
                endpoints.insert(addr(*address), endpoint);
            }
        }
        for (address, endpoint) in &endpoints {
            match self.endpoints.write(&maps.endpoint, *address, *endpoint) {
                Ok(changed) => outcome.moved |= changed,
                Err(error) => outcome.problems.push((ip(address).to_string(), error)),
            }
        }
        outcome.moved |= self.release(kernel, &places, &endpoints)?;
        for Place { workload, ifindex, netns, .. } in places {
            if let (true, Some(netns)) = (policed.contains(&ifindex), netns) {
                let (name, identity) = (workload.name.clone(), workload.identity);
                outcome.enrolled.push(Enrolled { name, identity, netns: Arc::new(netns), ifindex });
            }
        }
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

    /// Where a workload was enrolled, if that interface still exists. A workload that hides (it may take its address off
    /// its interface, or move the interface into a namespace below) stays under control that way.
    fn former<'a>(&self, workload: &'a Workload, links: &[Link]) -> Option<Place<'a>> {
        let addresses: BTreeSet<Addr> = workload.addresses.iter().map(|ip| addr(*ip)).collect();
        let mut known = self.iface_addrs.have().keys().filter(|key| addresses.contains(&key.addr));
        let ifindex = known.find(|key| links.iter().any(|link| link.index == key.ifindex))?.ifindex;
        let cookie = self.ifaces.have().get(&ifindex)?.netns_cookie;
        Some(Place { workload, cookie, ifindex, netns: None })
    }

    /// Puts a workload's interface under control; `true` when it changed hands.
    fn police(&mut self, kernel: &Kernel, place: &Place<'_>) -> Result<bool> {
        let maps = &kernel.maps;
        for key in place.addresses() {
            self.iface_addrs.write(&maps.iface_addr, key, 1)?;
        }
        let iface = Iface { netns_cookie: place.cookie, identity: place.workload.identity, flags: 0 };
        let moved = self.ifaces.write(&maps.iface, place.ifindex, iface)?;
        kernel.attach_interface(place.ifindex)?;
        Ok(moved)
    }

    /// Takes away what belongs to no place; `true` when an address or interface lost its owner.
    fn release(
        &mut self,
        kernel: &Kernel,
        places: &[Place<'_>],
        endpoints: &BTreeMap<Addr, Endpoint>,
    ) -> Result<bool> {
        let maps = &kernel.maps;
        let cookies: BTreeSet<u64> = places.iter().map(|place| place.cookie).collect();
        let ifaces: BTreeSet<u32> = places.iter().map(|place| place.ifindex).collect();
        let addresses: BTreeSet<IfaceAddr> = places.iter().flat_map(Place::addresses).collect();

        let mut moved = self.endpoints.remove_extra(&maps.endpoint, endpoints)? != 0;
        for cookie in missing(&self.netns, &cookies) {
            self.netns.remove(&maps.netns, &cookie)?;
        }
        for ifindex in kernel.attached_interfaces()?.into_iter().filter(|ifindex| !ifaces.contains(ifindex)) {
            kernel.detach_interface(ifindex)?;
        }
        for ifindex in missing(&self.ifaces, &ifaces) {
            moved |= self.ifaces.remove(&maps.iface, &ifindex)?;
        }
        for key in missing(&self.iface_addrs, &addresses) {
            moved |= self.iface_addrs.remove(&maps.iface_addr, &key)?;
        }
        Ok(moved)
    }
}

impl Place<'_> {
    fn addresses(&self) -> impl Iterator<Item = IfaceAddr> {
        self.workload.addresses.iter().map(|ip| IfaceAddr { ifindex: self.ifindex, addr: addr(*ip) })
    }
}

/// Keys of the map that `wanted` lacks.
fn missing<K: Shared + Ord, V: Shared + Eq>(mirror: &Mirror<K, V>, wanted: &BTreeSet<K>) -> Vec<K> {
    mirror.have().keys().filter(|key| !wanted.contains(key)).copied().collect()
}

/// Two workloads behind one interface or address could not be told apart.
#[derive(Default)]
struct Claims {
    taken: BTreeMap<String, String>,
}

impl Claims {
    fn check(&mut self, place: &Place<'_>) -> Result<()> {
        let Place { workload, cookie, ifindex, .. } = place;
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

/// Where a workload is: its namespace, and the host side of the veth that carries its addresses.
fn find<'a>(workload: &'a Workload, host: &mut Netlink, host_links: &[Link]) -> Result<Place<'a>> {
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
    Ok(Place { workload, cookie: netns.cookie(), ifindex, netns: Some(netns) })
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
        let mut claims = Claims::default();
        let mut check = |name: &str, ip: &str, cookie, ifindex| {
            let workload = Workload {
                name: name.into(),
                identity: 16,
                netns: "/run/netns/x".into(),
                addresses: vec![ip.parse().unwrap()],
            };
            claims.check(&Place { workload: &workload, cookie, ifindex, netns: None })
        };
        check("a/a", "10.0.0.1", 1, 2).unwrap();
        check("a/b", "10.0.0.2", 3, 4).unwrap();
        for (ip, cookie, ifindex) in [("10.0.0.1", 5, 6), ("10.0.0.3", 3, 6), ("10.0.0.3", 5, 2)] {
            assert!(matches!(check("a/c", ip, cookie, ifindex), Err(Error::Twice { .. })));
        }
    }
}
