//! TC programs on the host side of a workload's veth.
//!
//! By TCX links (6.6), pinned as `<program>-<ifindex>`. Older kernels refuse the link with EINVAL; attaching there by a
//! clsact filter belongs into [`Kernel::attach_interface`] and [`Kernel::detach_interface`] and nowhere else.

use super::error::Result;
use super::load::{FROM_WORKLOAD, Kernel, TO_WORKLOAD};
use super::sys::attach;

/// What the workload sends comes in at the host side of its veth, so the first is ingress.
const SIDES: [(&str, u32); 2] = [(FROM_WORKLOAD, attach::TCX_INGRESS), (TO_WORKLOAD, attach::TCX_EGRESS)];

impl Kernel {
    /// Attaches both programs to the interface, or brings them up to date; `false` when they were.
    pub fn attach_interface(&self, ifindex: u32) -> Result<bool> {
        let mut changed = false;
        for (program, kind) in SIDES {
            changed |= self.attach(program, &pin(program, ifindex), ifindex, u64::from(ifindex), kind)?;
        }
        Ok(changed)
    }

    /// Detaches both programs; nothing happens when they are not attached.
    pub fn detach_interface(&self, ifindex: u32) -> Result<()> {
        SIDES.iter().try_for_each(|(program, _)| self.pins.unpin_link(&pin(program, ifindex)))
    }

    /// The interfaces that have a pinned program, whether they still exist or not.
    pub fn attached_interfaces(&self) -> Result<Vec<u32>> {
        let mut interfaces: Vec<u32> =
            self.pins.link_names()?.iter().filter_map(|name| interface(name)).collect();
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }
}

fn pin(program: &str, ifindex: u32) -> String {
    // No dots: the BPF file system keeps names with one for itself.
    format!("{program}-{ifindex}")
}

fn interface(pin: &str) -> Option<u32> {
    SIDES.iter().find_map(|(program, _)| pin.strip_prefix(program)?.strip_prefix('-')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_name_their_interface() {
        for (program, _) in SIDES {
            assert_eq!(interface(&pin(program, 4711)), Some(4711));
        }
        assert_eq!(interface("weft_connect4"), None);
    }
}
