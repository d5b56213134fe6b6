//! The kernel's maps as the decisions see them, for the agent: what is asked here gets the answer that a packet would.

use weft_datapath::abi::{
    Addr, Backend, BackendKey, CidrKey, Endpoint, ModeKey, Netns, PolicyKey, PolicyValue, Service,
    ServiceKey, Subject, SubjectKey,
};
use weft_datapath::names::config;
use weft_datapath::tables::Tables;

use super::error::Result;
use super::maps::{Maps, Prefix};
use super::sync::BANK_BITS;

/// A system call per lookup. One that fails counts as a miss, so the answer to it is a refusal, as in the kernel.
#[derive(Clone, Copy, Debug)]
pub struct KernelTables<'a> {
    maps: &'a Maps,
    revision: u32,
}

impl<'a> KernelTables<'a> {
    /// The tables under the revision that is in force now.
    pub fn new(maps: &'a Maps) -> Result<KernelTables<'a>> {
        Ok(KernelTables { maps, revision: maps.config.lookup(&config::REVISION)?.unwrap_or(0) })
    }
}

impl Tables for KernelTables<'_> {
    fn revision(&self) -> u32 {
        self.revision
    }

    fn subject(&self, bank: u32, identity: u32) -> Option<Subject> {
        self.maps.subject.lookup(&SubjectKey { bank, identity }).ok()?
    }

    fn port_mode(&self, bank: u32, identity: u32, port: u16) -> Option<u32> {
        self.maps.mode.lookup(&ModeKey { bank, identity, port, pad: 0 }).ok()?
    }

    fn class(&self, bank: u32, addr: &Addr) -> u32 {
        let key =
            Prefix { bits: BANK_BITS + 128, data: CidrKey { bank_be: bank.to_be_bytes(), addr: *addr } };
        self.maps.cidr.lookup(&key).ok().flatten().unwrap_or(0)
    }

    fn policy(&self, key: &PolicyKey) -> Option<PolicyValue> {
        self.maps.policy.lookup(key).ok()?
    }

    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        self.maps.endpoint.lookup(addr).ok()?
    }

    fn netns(&self, cookie: u64) -> Option<Netns> {
        self.maps.netns.lookup(&cookie).ok()?
    }

    fn inside(&self, addr: &Addr) -> bool {
        // A lookup that fails must not turn an inside address into an outside one.
        self.maps.inside.lookup(&Prefix { bits: 128, data: *addr }).map_or(true, |found| found.is_some())
    }

    fn is_node_addr(&self, addr: &Addr) -> bool {
        self.maps.node_addr.lookup(addr).is_ok_and(|found| found.is_some())
    }

    fn service(&self, key: &ServiceKey) -> Option<Service> {
        self.maps.service.lookup(key).ok()?
    }

    fn backend(&self, service: &Service, slot: u32) -> Option<Backend> {
        let key = BackendKey { service: service.id, epoch: service.epoch, slot };
        self.maps.backend.lookup(&key).ok()?
    }
}
