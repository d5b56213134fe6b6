//! What a decision may look up. The kernel's maps implement it in `ebpf/`, the agent's in-memory tables in `policy/`.

use crate::abi::{Addr, Backend, Endpoint, Netns, PolicyKey, PolicyValue, Service, ServiceKey, Subject};

/// Read access to the tables that the agent publishes. A miss is `None` (or class 0), and the caller denies.
pub trait Tables {
    /// Current policy revision; its low bit selects the bank.
    fn revision(&self) -> u32;
    /// What is known about a destination identity.
    fn subject(&self, bank: u32, identity: u32) -> Option<Subject>;
    /// mTLS mode of one port.
    fn port_mode(&self, bank: u32, identity: u32, port: u16) -> Option<u32>;
    /// Class of an address: longest prefix, 0 where none matches. With [`crate::policy::PORTS`] in the bank, of a port.
    fn class(&self, bank: u32, addr: &Addr) -> u32;
    /// One policy entry.
    fn policy(&self, key: &PolicyKey) -> Option<PolicyValue>;
    /// The workload that owns an address.
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint>;
    /// The enrolled workload of a network namespace.
    fn netns(&self, cookie: u64) -> Option<Netns>;
    /// Does an address without a workload belong to the mesh all the same (`--mesh-cidr`)?
    fn inside(&self, addr: &Addr) -> bool;
    /// Is this an address of the node itself?
    fn is_node_addr(&self, addr: &Addr) -> bool;
    /// The service behind an address and port.
    fn service(&self, key: &ServiceKey) -> Option<Service>;
    /// One backend of a service.
    fn backend(&self, service: &Service, slot: u32) -> Option<Backend>;
}
