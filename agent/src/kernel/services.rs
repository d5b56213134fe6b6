//! Services into the kernel: a service's backends are an array under an epoch, and one write switches the epoch.

use std::collections::{BTreeMap, BTreeSet};

use weft_datapath::abi::{Backend, BackendKey, Service, ServiceKey};
use weft_policy::tables::ServiceEntry;

use super::error::Result;
use super::maps::Maps;
use super::mirror::Mirror;
use super::sys;

/// A service as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredService {
    /// One of the constants in `weft_datapath::service`.
    pub balance: u32,
    /// In the order of their slots; none refuses connections.
    pub backends: Vec<Backend>,
}

impl From<&ServiceEntry> for DesiredService {
    fn from(entry: &ServiceEntry) -> DesiredService {
        DesiredService { balance: entry.balance, backends: entry.backends.clone() }
    }
}

/// Services and backends, as they are in the kernel.
#[derive(Debug)]
pub struct ServiceSync {
    services: Mirror<ServiceKey, Service>,
    backends: Mirror<BackendKey, Backend>,
}

impl ServiceSync {
    /// Reads what a former agent left.
    pub fn read(maps: &Maps) -> Result<ServiceSync> {
        let services = Mirror::read(&maps.service)?;
        Ok(ServiceSync { services, backends: Mirror::read(&maps.backend)? })
    }

    /// Makes `want` the services in force and returns how many entries changed. On an error each service is as it was
    /// or as it should be.
    pub fn follow(&mut self, maps: &Maps, want: &BTreeMap<ServiceKey, DesiredService>) -> Result<usize> {
        let mut changes = 0;
        let mut used = BTreeSet::new();
        for (key, desired) in want {
            let current = self.services.have().get(key).copied();
            let service = match current {
                Some(service) if self.is(&service, desired) => service,
                _ => {
                    let id = current.map_or_else(|| self.new_id(), |service| service.id);
                    let service = self.next(id, desired);
                    for (slot, backend) in (0..).zip(&desired.backends) {
                        let key = BackendKey { service: service.id, epoch: service.epoch, slot };
                        changes += usize::from(self.backends.write(&maps.backend, key, *backend)?);
                    }
                    changes += usize::from(self.services.write(&maps.service, *key, service)?);
                    service
                }
            };
            used.insert((service.id, service.epoch));
        }
        let gone: Vec<_> =
            self.services.have().keys().filter(|key| !want.contains_key(key)).copied().collect();
        for key in &gone {
            changes += usize::from(self.services.remove(&maps.service, key)?);
        }
        let unused = |key: &&BackendKey| !used.contains(&(key.service, key.epoch));
        let unused: Vec<_> = self.backends.have().keys().filter(unused).copied().collect();
        if !unused.is_empty() {
            // A program may hold a service of the former epoch and be about to pick a backend of it.
            sys::wait_for_programs();
        }
        for key in &unused {
            changes += usize::from(self.backends.remove(&maps.backend, key)?);
        }
        Ok(changes)
    }

    /// The numbers of the services, by which the kernel counts connections.
    pub fn ids(&self) -> BTreeMap<ServiceKey, u32> {
        self.services.have().iter().map(|(key, service)| (*key, service.id)).collect()
    }

    /// Is the service in the kernel this one, backends included?
    fn is(&self, service: &Service, desired: &DesiredService) -> bool {
        service.balance == desired.balance
            && service.count as usize == desired.backends.len()
            && (0..).zip(&desired.backends).all(|(slot, backend)| {
                let key = BackendKey { service: service.id, epoch: service.epoch, slot };
                self.backends.have().get(&key) == Some(backend)
            })
    }

    /// A number that no service in the kernel has; never 0, which stands for "no service".
    fn new_id(&self) -> u32 {
        let taken: BTreeSet<u32> = self.services.have().values().map(|service| service.id).collect();
        let next = taken.last().copied().unwrap_or(0).checked_add(1);
        next.or_else(|| (1..u32::MAX).find(|id| !taken.contains(id)))
            .expect("the map holds fewer than 2^32 services")
    }

    /// The service under an epoch of which nothing is in the kernel.
    fn next(&self, id: u32, desired: &DesiredService) -> Service {
        let last = BackendKey { service: id, epoch: u32::MAX, slot: u32::MAX };
        let first = BackendKey { service: id, epoch: 0, slot: 0 };
        let newest = self.backends.have().range(first..=last).next_back().map_or(0, |(key, _)| key.epoch);
        Service {
            id,
            epoch: newest.wrapping_add(1),
            count: desired.backends.len() as u32,
            balance: desired.balance,
        }
    }
}
