//! The road of a change: manifests, model, snapshot, kernel, proxy, living connections. One turn at a time.
//!
//! Order of a turn: the kernel's inactive bank is written and flipped; readers get the snapshot; the proxy asks its
//! connections again; sockets of direct connections that are refused now are destroyed. All of it blocks, so it runs on
//! a thread of its own and never on one that carries connections.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use weft_datapath::abi::ServiceKey;
use weft_policy::{Cidr, Engine, Identity, Severity};

use crate::config::Config;
use crate::kernel::destroy::cut_revoked;
use crate::kernel::enrol::Enrolled;
use crate::kernel::numbers::Numbers;
use crate::kernel::state::{Desired, State};
use crate::kernel::{Kernel, Result};
use crate::manifests::files::{Files, is_gone};
use crate::observe::recorder::Recorder;
use crate::observe::tables::ProblemRow;
use crate::proxy::{Registry, View};
use crate::snapshot::Snapshot;

/// How things stand after a turn.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Policy revision in force.
    pub revision: u32,
    /// Since when.
    pub since: Instant,
    pub enrolled: Vec<Enrolled>,
    /// What is not as it should be, other than in manifests.
    pub problems: Vec<ProblemRow>,
    /// The numbers by which the kernel counts connections of services.
    pub services: BTreeMap<u32, ServiceKey>,
}

/// Where a turn's results go.
pub struct Outlets {
    pub snapshot: watch::Sender<Arc<Snapshot>>,
    pub view: watch::Sender<Arc<dyn View>>,
    pub standing: watch::Sender<Arc<Standing>>,
    pub registry: Arc<Registry>,
    pub recorder: Arc<Recorder>,
}

/// See the module.
pub struct Control {
    node: String,
    mesh_cidrs: Vec<Cidr>,
    kernel: Arc<Kernel>,
    state: State,
    numbers: Numbers,
    engine: Engine,
    texts: BTreeMap<String, String>,
    unreadable: BTreeMap<String, String>,
    desired: Option<Desired>,
    unenrollable: Vec<(String, String)>,
    /// Identities without a number, and why.
    unnumbered: BTreeMap<Arc<Identity>, String>,
    told: BTreeSet<String>,
    outlets: Outlets,
}

impl Control {
    /// Reads what a former agent left in the kernel.
    pub fn new(config: &Config, kernel: Arc<Kernel>, outlets: Outlets) -> Result<Control> {
        Ok(Control {
            node: config.node.clone(),
            mesh_cidrs: config.mesh_cidrs.clone(),
            state: State::read(&kernel)?,
            numbers: Numbers::read(&kernel.maps)?,
            kernel,
            engine: Engine::new(settings(&config.trust_domain, config.default_deny)),
            texts: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            desired: None,
            unenrollable: Vec::new(),
            unnumbered: BTreeMap::new(),
            told: BTreeSet::new(),
            outlets,
        })
    }

    /// Takes the manifests as they are now and brings everything in line with them. Also to be called without a change,
    /// because interfaces and namespaces come and go by themselves.
    pub fn turn(&mut self, files: Files) {
        let start = Instant::now();
        let fresh = self.take(files) || self.desired.is_none();
        let next = fresh.then(|| self.resolve());
        if let Some(next) = &next {
            self.desired = Some(next.desired(&self.mesh_cidrs));
            self.unenrollable.clone_from(&next.unenrollable);
        }
        let desired = self.desired.as_ref().expect("the first turn is fresh");
        let applied = self.state.apply(&self.kernel, desired);
        if let Some(mut next) = next {
            next.problems = self.engine.problems();
            self.publish(Arc::new(next));
        }
        let mut problems: Vec<ProblemRow> =
            applied.problems.iter().map(|(place, error)| row("datapath", place, error)).collect();
        problems.extend(self.unenrollable.iter().map(|(place, why)| row("workload", place, why)));
        let unnumbered = self.unnumbered.iter();
        problems.extend(unnumbered.map(|(identity, why)| row("datapath", &identity.spiffe.to_string(), why)));
        problems.extend(self.unreadable.iter().map(|(place, why)| row("manifests", place, why)));
        let mut cut = 0;
        if applied.renewed {
            match cut_revoked(&self.kernel.maps, &applied.enrolled) {
                Ok(cuts) => {
                    cut = cuts.len();
                    cuts.iter().for_each(|cut| self.outlets.recorder.cut(cut));
                }
                Err(error) => problems.push(row("datapath", "living connections", &error)),
            }
        }
        self.tell(&problems);
        if fresh || applied.renewed {
            tracing::info!(
                "revision {} in force after {:.1} ms: {} workloads here, {cut} direct connections cut",
                applied.revision,
                start.elapsed().as_secs_f64() * 1e3,
                applied.enrolled.len(),
            );
        }
        let services = self.state.service_ids().into_iter().map(|(key, id)| (id, key)).collect();
        self.outlets.standing.send_modify(|standing| {
            let since = if applied.renewed { start } else { standing.since };
            *standing = Arc::new(Standing {
                revision: applied.revision,
                since,
                enrolled: applied.enrolled,
                problems,
                services,
            });
        });
    }

    /// Is something waiting for what no file event will tell, such as a namespace that appears?
    pub fn is_waiting(&self) -> bool {
        let enrolled = self.outlets.standing.borrow().enrolled.len();
        self.desired.as_ref().is_none_or(|desired| desired.places.local.len() > enrolled)
    }

    /// Feeds the files that changed to the store; false when none did. One that cannot be read keeps its objects.
    fn take(&mut self, files: Files) -> bool {
        let mut changed = false;
        let known = self.engine.store().files();
        let gone: Vec<String> = known.filter(|name| is_gone(&files, name)).map(str::to_owned).collect();
        for name in gone {
            self.engine.remove(&name);
            self.texts.remove(&name);
            changed = true;
        }
        self.unreadable.clear();
        for (name, text) in files {
            match text {
                Ok(text) if self.texts.get(&name) == Some(&text) => {}
                Ok(text) => {
                    self.engine.apply(&name, &text);
                    self.texts.insert(name, text);
                    changed = true;
                }
                Err(why) => drop(self.unreadable.insert(name, why)),
            }
        }
        changed
    }

    /// An identity without a number (the map is full) has no rows: flows to it are refused, and the others go on.
    fn resolve(&mut self) -> Snapshot {
        let Control { engine, kernel, numbers, unnumbered, .. } = self;
        let mut number = |identity: &Arc<Identity>| {
            let number = numbers.number(&kernel.maps, &identity.to_string());
            number.map_err(|error| unnumbered.insert(identity.clone(), error.to_string())).ok()
        };
        engine.update(&mut number);
        let (model, numbers) = (engine.model(), engine.numbers());
        unnumbered.retain(|identity, _| model.has(identity) && !numbers.contains_key(identity));
        Snapshot::new(&self.node, model.clone(), engine.tables().clone(), numbers.clone())
    }

    /// The proxy first: what the tables then show is in force everywhere.
    fn publish(&mut self, next: Arc<Snapshot>) {
        self.outlets.view.send_replace(next.clone());
        self.outlets.snapshot.send_replace(next.clone());
        let cut = self.outlets.registry.recheck(&*next);
        if cut > 0 {
            tracing::info!("{cut} tunnelled connections cut, which policy no longer allows");
        }
    }

    /// Logs each problem once, when it appears.
    fn tell(&mut self, problems: &[ProblemRow]) {
        let mut now = BTreeSet::new();
        for problem in problems {
            now.insert(format!("{} {}: {}", problem.area, problem.place, problem.message));
        }
        for problem in &self.outlets.snapshot.borrow().problems {
            if problem.severity != Severity::Note {
                now.insert(problem.to_string());
            }
        }
        for line in now.difference(&self.told) {
            tracing::warn!("{line}");
        }
        for line in self.told.difference(&now) {
            tracing::info!("no longer: {line}");
        }
        self.told = now;
    }
}

/// Settings of the policy compiler.
pub fn settings(trust_domain: &str, default_deny: bool) -> weft_policy::Settings {
    weft_policy::Settings {
        trust_domain: trust_domain.into(),
        default_deny,
        ..weft_policy::Settings::default()
    }
}

fn row(area: &str, place: &str, error: &dyn std::fmt::Display) -> ProblemRow {
    ProblemRow {
        severity: Severity::Error.name().into(),
        area: area.into(),
        place: place.into(),
        message: error.to_string(),
    }
}
