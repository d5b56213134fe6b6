//! TC programs on the host side of a workload's veth.
//!
//! By TCX links (6.6), pinned as `<program>-<ifindex>`. Older kernels get filters on a clsact qdisc, which last without a
//! process or pin and are found again by their priority, handle and name, on the interfaces of `weft_iface`. The qdisc
//! goes with them unless others have filters on it.

use std::os::fd::AsFd;
use std::path::Path;

use weft_datapath::names::{config, map};

use super::error::{Error, Result};
use super::load::{FROM_WORKLOAD, Kernel, TO_WORKLOAD};
use super::netlink::{EGRESS, Filter, INGRESS, Netlink};
use super::sys::{self, attach};

/// What the workload sends comes in at the host side of its veth, so the first is ingress. Program, TCX attach type,
/// side of a clsact qdisc.
const SIDES: [(&str, u32, u32); 2] =
    [(FROM_WORKLOAD, attach::TCX_INGRESS, INGRESS), (TO_WORKLOAD, attach::TCX_EGRESS, EGRESS)];

impl Kernel {
    /// Attaches both programs to the interface, or brings them up to date; `false` when they were.
    pub fn attach_interface(&self, ifindex: u32) -> Result<bool> {
        if !self.has_tcx() {
            return self.attach_filters(ifindex);
        }
        let mut changed = false;
        for (program, kind, _) in SIDES {
            changed |= self.attach(program, &pin(program, ifindex), ifindex, u64::from(ifindex), kind)?;
        }
        Ok(changed)
    }

    fn attach_filters(&self, ifindex: u32) -> Result<bool> {
        let mut route = route()?;
        let mut changed = false;
        for filter in filters(ifindex) {
            let program = self.program(filter.name);
            let error = |source| Error::attach(pin(filter.name, ifindex), source);
            if route.filter_program(&filter).map_err(error)? != Some(program.id) {
                route.put_filter(&filter, program.fd.as_fd()).map_err(error)?;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Detaches both programs; nothing happens when they are not attached.
    pub fn detach_interface(&self, ifindex: u32) -> Result<()> {
        if !self.has_tcx() {
            return remove_filters(&mut route()?, ifindex);
        }
        SIDES.iter().try_for_each(|(program, ..)| self.pins.unpin_link(&pin(program, ifindex)))
    }

    /// The interfaces that have a program of ours, whether they still exist or not.
    pub fn attached_interfaces(&self) -> Result<Vec<u32>> {
        let mut interfaces: Vec<u32> =
            self.pins.link_names()?.iter().filter_map(|name| interface(name)).collect();
        if !self.has_tcx() {
            interfaces.extend(self.maps.iface.entries()?.into_iter().map(|(ifindex, _)| ifindex));
        }
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }

    /// The filters in place, named as links are, and whether each runs a program of this agent.
    pub(crate) fn filters(&self) -> Result<Vec<(String, bool)>> {
        if self.has_tcx() {
            return Ok(Vec::new());
        }
        let mut route = route()?;
        let mut found = Vec::new();
        for filter in self.attached_interfaces()?.into_iter().flat_map(filters) {
            let name = pin(filter.name, filter.ifindex);
            let id = route.filter_program(&filter).map_err(|source| Error::attach(&name, source))?;
            if let Some(id) = id {
                found.push((name, id == self.program(filter.name).id));
            }
        }
        Ok(found)
    }

    fn has_tcx(&self) -> bool {
        self.features & config::TCX != 0
    }
}

/// Removes the filters on all interfaces that the maps in `maps`, of any ABI, know.
pub(crate) fn detach_filters(maps: &Path) -> Result<()> {
    let path = maps.join(map::IFACE);
    let Ok(ifaces) = sys::open_pin(&path) else { return Ok(()) };
    let info = sys::map_info(ifaces.as_fd()).map_err(Error::file("inspect", &path))?;
    if info.key_size as usize != size_of::<u32>() {
        return Err(Error::Layout { path });
    }
    let mut route = route()?;
    let (mut last, mut next) = (None, 0_u32);
    // The agent is not running, so nothing is removed under the walk.
    while sys::next_key(ifaces.as_fd(), last.as_ref(), &mut next).map_err(Error::file("walk", &path))? {
        remove_filters(&mut route, next)?;
        last = Some(next);
    }
    Ok(())
}

fn remove_filters(route: &mut Netlink, ifindex: u32) -> Result<()> {
    let mut ours = false;
    for filter in filters(ifindex) {
        let removed = route.remove_filter(&filter);
        ours |= removed.map_err(|source| Error::attach(pin(filter.name, ifindex), source))?;
    }
    // One that had no filter of ours may be somebody's who is about to use it.
    if ours {
        let action = "remove the clsact qdisc";
        route.remove_idle_qdisc(ifindex).map_err(|source| Error::Netlink { action, source })?;
    }
    Ok(())
}

fn route() -> Result<Netlink> {
    Netlink::route().map_err(|source| Error::Netlink { action: "reach traffic control", source })
}

fn filters(ifindex: u32) -> [Filter; 2] {
    SIDES.map(|(name, _, parent)| Filter { ifindex, parent, name })
}

fn pin(program: &str, ifindex: u32) -> String {
    // No dots: the BPF file system keeps names with one for itself.
    format!("{program}-{ifindex}")
}

fn interface(pin: &str) -> Option<u32> {
    SIDES.iter().find_map(|(program, ..)| pin.strip_prefix(program)?.strip_prefix('-')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_name_their_interface() {
        for (program, ..) in SIDES {
            assert_eq!(interface(&pin(program, 4711)), Some(4711));
        }
        assert_eq!(interface("weft_connect4"), None);
    }
}
