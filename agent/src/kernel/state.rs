//! Everything the agent wants the kernel to know, and the one order in which it gets there.

use std::collections::BTreeMap;

use weft_datapath::abi::ServiceKey;
use weft_policy::tables::Tables;

use super::enrol::{Enrolled, Enrolment, Places, Workload};
use super::error::{Error, Result};
use super::load::Kernel;
use super::services::{DesiredService, ServiceSync};
use super::sync::{PolicySet, PolicySync};

/// The kernel's maps as they should be.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    pub policy: PolicySet,
    pub services: BTreeMap<ServiceKey, DesiredService>,
    pub places: Places,
}

impl Desired {
    /// What `tables` ask for, with `local` the workloads of this node. The caller adds what `--mesh-cidr` says.
    pub fn new(tables: &Tables, local: Vec<Workload>) -> Desired {
        Desired {
            policy: tables.into(),
            services: tables.services.iter().map(|(key, entry)| (*key, entry.into())).collect(),
            places: Places { local, endpoints: tables.endpoints.clone(), inside: tables.inside.clone() },
        }
    }
}

/// What an [`State::apply`] led to.
#[derive(Debug)]
pub struct Applied {
    /// The policy revision in force.
    pub revision: u32,
    /// The revision is new: living flows are to be looked at again.
    pub renewed: bool,
    pub enrolled: Vec<Enrolled>,
    /// What is not as it should be, and why. Everything else is.
    pub problems: Vec<(String, Error)>,
}

/// The kernel's maps as they are.
#[derive(Debug)]
pub struct State {
    policy: PolicySync,
    services: ServiceSync,
    enrolment: Enrolment,
}

impl State {
    /// Reads what a former agent left.
    pub fn read(kernel: &Kernel) -> Result<State> {
        let maps = &kernel.maps;
        Ok(State {
            policy: PolicySync::read(maps)?,
            services: ServiceSync::read(maps)?,
            enrolment: Enrolment::read(maps)?,
        })
    }

    /// Brings the kernel to the desired state; a call without a difference writes nothing. Blocks for as long as a
    /// grace period of the kernel, so it belongs on a thread of its own.
    ///
    /// Policy goes first: a workload that is enrolled without rows is refused everything. Whoever enters or leaves an
    /// address then renews the revision, because tracked flows trust the owner of an address until it moves.
    pub fn apply(&mut self, kernel: &Kernel, desired: &Desired) -> Applied {
        let maps = &kernel.maps;
        let mut problems = Vec::new();
        let before = self.policy.revision();
        if let Err(error) = self.policy.publish(maps, &desired.policy, false) {
            problems.push(("policy".into(), error));
        }
        if let Err(error) = self.services.follow(maps, &desired.services) {
            problems.push(("services".into(), error));
        }
        let mut enrolled = Vec::new();
        match self.enrolment.follow(kernel, &desired.places) {
            Ok(outcome) => {
                enrolled = outcome.enrolled;
                problems.extend(outcome.problems);
                // Nobody else may have looked between the two, so a policy just published does not make up for it.
                if outcome.moved
                    && let Err(error) = self.policy.publish(maps, &desired.policy, true)
                {
                    problems.push(("policy".into(), error));
                }
            }
            Err(error) => problems.push(("workloads".into(), error)),
        }
        let revision = self.policy.revision();
        Applied { revision, renewed: revision != before, enrolled, problems }
    }

    /// The policy revision in force.
    pub fn revision(&self) -> u32 {
        self.policy.revision()
    }

    /// The numbers by which the kernel counts connections of services.
    pub fn service_ids(&self) -> BTreeMap<ServiceKey, u32> {
        self.services.ids()
    }
}
