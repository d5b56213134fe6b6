//! Answers questions about the running agent: its tables, and the readings of the metrics page.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::watch;
use weft_datapath::abi::{ABI, ServiceKey, TcpStats};
use weft_datapath::names::config;
use weft_datapath::service::LEAST_CONNECTIONS;
use weft_policy::model::cidr::ip;
use weft_policy::model::{Direction, Named};
use weft_policy::{Identity, Model, ObjectRef, Origin, Severity};

use super::metrics::{Metrics, Readings, Security, ServiceReading, TcpLabels, TcpTotals};
use super::tables::*;
use crate::control::Standing;
use crate::identity::{CertStatus, CertStore};
use crate::kernel::{Kernel, events};
use crate::pods::Waiting;
use crate::proxy::{Connection, Proxy};
use crate::snapshot::Snapshot;
use crate::supervise::Ready;

/// Connections of the direct path by their labels.
type Direct = Vec<(TcpLabels, TcpTotals)>;

/// Everything that can be asked about.
pub struct Desk {
    pub node: String,
    pub trust_domain: String,
    pub started: Instant,
    pub ready: Ready,
    pub kernel: Arc<Kernel>,
    pub certs: Arc<CertStore>,
    pub proxy: Arc<Proxy>,
    pub metrics: Arc<Metrics>,
    pub waiting: Waiting,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub standing: watch::Receiver<Arc<Standing>>,
}

impl Desk {
    /// One table as JSON. Blocks on the kernel.
    pub fn show(&self, table: Table) -> anyhow::Result<Vec<u8>> {
        let snapshot = self.snapshot.borrow().clone();
        Ok(match table {
            Table::Status => serde_json::to_vec(&self.status(&snapshot)?)?,
            Table::Workloads => serde_json::to_vec(&self.workloads(&snapshot))?,
            Table::Services => serde_json::to_vec(&services(&snapshot))?,
            Table::Identities => serde_json::to_vec(&identities(&snapshot))?,
            Table::Policies => serde_json::to_vec(&policies(&snapshot))?,
            Table::Connections => serde_json::to_vec(&self.connections())?,
            Table::Certs => serde_json::to_vec(&self.certs())?,
        })
    }

    /// The metrics page. Blocks on the kernel.
    pub fn scrape(&self) -> anyhow::Result<String> {
        Ok(self.metrics.page(self.readings()?)?)
    }

    fn status(&self, snapshot: &Snapshot) -> anyhow::Result<Status> {
        let standing = self.standing.borrow().clone();
        let programs = self.kernel.run_times()?;
        let ids = self.kernel.programs();
        let id = |name: &str| ids.iter().find(|loaded| loaded.name == name).map_or(0, |loaded| loaded.id);
        let names = interface_names(&standing);
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.node.clone(),
            trust_domain: self.trust_domain.clone(),
            ready: self.ready.is_ready(),
            uptime_seconds: self.started.elapsed().as_secs(),
            kernel: kernel_release(),
            abi: ABI,
            policy_revision: standing.revision,
            policy_age_seconds: standing.since.elapsed().as_secs(),
            workloads_local: standing.enrolled.len(),
            workloads: snapshot.model.workloads().len(),
            connections: self.proxy.registry().list().len(),
            programs: programs
                .iter()
                .map(|p| Program {
                    name: p.program.into(),
                    id: id(p.program),
                    runs: p.runs,
                    run_seconds: p.time.as_secs_f64(),
                })
                .collect(),
            links: self
                .kernel
                .links()?
                .into_iter()
                .map(|(pin, current)| link(&pin, current, &names))
                .collect(),
            maps: self.maps()?,
            features: self.features(),
            certs: self.certs(),
            problems: self.problems(snapshot, &standing),
        })
    }

    fn problems(&self, snapshot: &Snapshot, standing: &Standing) -> Vec<ProblemRow> {
        let mut rows = standing.problems.clone();
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        rows.extend(waiting.iter().map(|(workload, why)| ProblemRow {
            severity: Severity::Error.name().into(),
            area: "workload".into(),
            place: workload.clone(),
            message: why.clone(),
        }));
        for cert in self.certs.status() {
            if let Some(error) = cert.error {
                rows.push(ProblemRow {
                    // As long as the present one is valid, this is only a warning.
                    severity: if cert.seconds_left.is_some_and(|left| left > 0) {
                        Severity::Warning.name()
                    } else {
                        Severity::Error.name()
                    }
                    .into(),
                    area: "certificates".into(),
                    place: cert.spiffe,
                    message: error,
                });
            }
        }
        for problem in &snapshot.problems {
            let Origin { file, document, line } = &problem.origin;
            let object = problem.object.as_ref().map_or_else(String::new, |object| format!(" {object}"));
            let field = if problem.field.is_empty() { String::new() } else { format!(" {}", problem.field) };
            rows.push(ProblemRow {
                severity: problem.severity.name().into(),
                area: "manifests".into(),
                place: format!("{file}:{line} document {document}{object}{field}"),
                message: problem.message.clone(),
            });
        }
        rows
    }

    fn maps(&self) -> anyhow::Result<Vec<MapFill>> {
        let fill = self.kernel.maps.fill()?;
        Ok(fill
            .into_iter()
            .map(|fill| MapFill {
                name: fill.map.into(),
                entries: fill.entries.into(),
                capacity: fill.capacity.into(),
            })
            .collect())
    }

    fn features(&self) -> Vec<Feature> {
        [
            (config::TCX, "TCX links (6.6)", "clsact filters hold the TC programs"),
            (config::SET_RETVAL, "bpf_set_retval (6.1)", "a refused connect() says EPERM, not ECONNREFUSED"),
            (
                config::SOCKOPS_NETNS,
                "netns cookie in sock_ops (5.15)",
                "the connect hook notes who calls, for sock_ops",
            ),
            (
                config::SO_NETNS_COOKIE,
                "netns cookie of a socket (5.14)",
                "a program on the agent's cgroup reads it",
            ),
        ]
        .into_iter()
        .map(|(bit, name, instead)| {
            let present = self.kernel.features & bit != 0;
            Feature { name: name.into(), present, instead: if present { "" } else { instead }.into() }
        })
        .collect()
    }

    fn workloads(&self, snapshot: &Snapshot) -> Vec<WorkloadRow> {
        let standing = self.standing.borrow().clone();
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = snapshot.model.workloads().iter().map(|workload| {
            let name = format!("{}/{}", workload.namespace, workload.name);
            let enrolled = standing.enrolled.iter().any(|enrolled| enrolled.name == name);
            let state = match (workload.enrolled, enrolled, workload.node.as_deref() == Some(&self.node)) {
                (false, ..) => "outside",
                (true, true, _) if !waiting.contains_key(&name) => "enrolled",
                (true, _, true) => "waiting",
                (true, ..) => "remote",
            };
            WorkloadRow {
                namespace: workload.namespace.to_string(),
                name: workload.name.to_string(),
                node: workload.node.clone().unwrap_or_default(),
                addresses: workload.addresses.iter().map(ToString::to_string).collect(),
                identity: workload.identity.spiffe.to_string(),
                number: snapshot.numbers.get(&workload.identity).copied().unwrap_or(0),
                state: state.into(),
            }
        });
        rows.collect()
    }

    fn connections(&self) -> Vec<ConnectionRow> {
        self.proxy.registry().list().iter().map(|connection| connection_row(connection)).collect()
    }

    fn certs(&self) -> Vec<CertRow> {
        self.certs.status().into_iter().map(cert_row).collect()
    }

    fn readings(&self) -> anyhow::Result<Readings> {
        let snapshot = self.snapshot.borrow().clone();
        let standing = self.standing.borrow().clone();
        let (direct, services) = self.direct(&snapshot, &standing)?;
        let programs = self.kernel.run_times()?.into_iter().map(|p| Program {
            name: p.program.into(),
            id: 0,
            runs: p.runs,
            run_seconds: p.time.as_secs_f64(),
        });
        // Notes ask for nothing, so they are not problems that an alert should see.
        let manifest_problems = [Severity::Error, Severity::Warning]
            .map(|severity| (severity.name(), snapshot.count(severity) as u64))
            .to_vec();
        Ok(Readings {
            direct,
            drops: events::drops(&self.kernel.maps)?.into_iter().map(|(r, n)| (r.name(), n)).collect(),
            maps: self.maps()?,
            programs: programs.collect(),
            certs: self.certs(),
            policy_revision: standing.revision.into(),
            policy_age: standing.since.elapsed(),
            manifest_problems,
            workloads_local: standing.enrolled.len() as u64,
            connections: self.proxy.registry().list().len() as u64,
            services,
        })
    }

    /// The kernel's counters of the direct path, with names.
    fn direct(
        &self,
        snapshot: &Snapshot,
        standing: &Standing,
    ) -> anyhow::Result<(Direct, Vec<ServiceReading>)> {
        let mut direct = Vec::new();
        let mut services: Vec<ServiceReading> = Vec::new();
        for (key, stats) in events::tcp(&self.kernel.maps)? {
            let names = &snapshot.names;
            let dialled = standing.services.get(&key.service).and_then(|key| names.service(key));
            let labels = TcpLabels {
                reporter: "source",
                source: names.end(key.source),
                destination: names.end(key.destination),
                service: dialled.unwrap_or_else(|| names.service_of(key.destination)),
                security: Security::Kernel,
            };
            let host = &labels.service.host;
            let quality = match services.iter_mut().find(|reading| reading.service == *host) {
                Some(reading) => reading,
                None => {
                    let service = host.clone();
                    services.push(ServiceReading { service, retransmits: 0, rtt_seconds: 0.0, closed: 0 });
                    services.last_mut().expect("just pushed")
                }
            };
            quality.retransmits += stats.retransmits;
            quality.rtt_seconds += stats.srtt_us as f64 / 1e6;
            quality.closed += stats.closed;
            let TcpStats { opened, closed, sent, received, .. } = stats;
            let totals = TcpTotals { opened, closed, sent, received };
            // Both ends are here and would report the same.
            direct.push((TcpLabels { reporter: "destination", ..labels.clone() }, totals));
            direct.push((labels, totals));
        }
        Ok((direct, services))
    }
}

fn services(snapshot: &Snapshot) -> Vec<ServiceRow> {
    let row = |(key, entry): (&ServiceKey, &weft_policy::tables::ServiceEntry)| ServiceRow {
        namespace: entry.service.0.clone(),
        name: entry.service.1.clone(),
        address: ip(&key.addr).to_string(),
        port: key.port,
        protocol: if key.protocol == 17 { "udp" } else { "tcp" }.into(),
        balance: if entry.balance == LEAST_CONNECTIONS { "least connections" } else { "round robin" }.into(),
        backends: entry
            .backends
            .iter()
            .map(|backend| std::net::SocketAddr::new(ip(&backend.addr), backend.port).to_string())
            .collect(),
    };
    snapshot.tables.services.iter().map(row).collect()
}

fn identities(snapshot: &Snapshot) -> Vec<IdentityRow> {
    let used = |identity: &Identity| {
        snapshot.model.workloads().iter().filter(|workload| *workload.identity == *identity).count()
    };
    let mut rows: Vec<IdentityRow> = snapshot
        .numbers
        .iter()
        .map(|(identity, number)| IdentityRow {
            number: *number,
            identity: identity.spiffe.to_string(),
            labels: identity.labels.iter().map(|(key, value)| format!("{key}={value}")).collect(),
            workloads: used(identity),
        })
        .collect();
    rows.sort_unstable_by_key(|row| row.number);
    rows
}

fn policies(snapshot: &Snapshot) -> Vec<PolicyRow> {
    let model = &snapshot.model;
    let identities: Vec<_> = model.workloads().iter().filter(|w| w.enrolled).map(|w| &w.identity).collect();
    let mut rows = Vec::new();
    for named in model.authorization_policies() {
        let decides = |identity: &Identity| model.authorizations(identity).any(|p| p.object == named.object);
        rows.push(PolicyRow {
            kind: named.object.kind.to_string(),
            namespace: named.object.namespace.to_string(),
            name: named.object.name.to_string(),
            action: if named.policy.dry_run {
                "dry run".into()
            } else {
                format!("{:?}", named.policy.action).to_uppercase()
            },
            rules: named.policy.rules.len(),
            selects: identities.iter().filter(|identity| decides(identity)).count(),
            file: format!("{}:{}", named.origin.file, named.origin.line),
        });
    }
    for named in model.request_authentications() {
        let decides = |identity: &Identity| {
            model.selects(Some(&named.object.namespace), &named.policy.selector, identity)
        };
        rows.push(PolicyRow {
            kind: named.object.kind.to_string(),
            namespace: named.object.namespace.to_string(),
            name: named.object.name.to_string(),
            action: "TOKENS".into(),
            rules: named.policy.rules.len(),
            selects: identities.iter().filter(|identity| decides(identity)).count(),
            file: format!("{}:{}", named.origin.file, named.origin.line),
        });
    }
    // One that is attached to several services stands there several times.
    rows.dedup_by(|a, b| (&a.kind, &a.namespace, &a.name) == (&b.kind, &b.namespace, &b.name));
    for named in model.peer_authentications() {
        let decides = |identity: &Identity| {
            let modes = model.modes(identity);
            let by = |decided: Option<&ObjectRef>| decided == Some(&named.object);
            by(modes.mode.1) || modes.ports.values().any(|(_, object)| by(*object))
        };
        rows.push(PolicyRow {
            kind: named.object.kind.to_string(),
            namespace: named.object.namespace.to_string(),
            name: named.object.name.to_string(),
            action: format!("{:?}", named.policy.mode).to_uppercase(),
            rules: named.policy.ports.len(),
            selects: identities.iter().filter(|identity| decides(identity)).count(),
            file: format!("{}:{}", named.origin.file, named.origin.line),
        });
    }
    rows.extend(network_policies(model));
    for blocked in model.blocked() {
        let (kind, namespace, name) = blocked.object.as_ref().map_or_else(Default::default, |object| {
            (object.kind.to_string(), object.namespace.to_string(), object.name.to_string())
        });
        rows.push(PolicyRow {
            kind,
            namespace,
            name,
            action: "REFUSES ALL".into(),
            rules: 0,
            selects: identities
                .iter()
                .filter(|identity| {
                    let by = model.blocked_by(identity, Direction::Ingress);
                    by.is_some_and(|b| b.origin == blocked.origin)
                })
                .count(),
            file: format!("{}:{}", blocked.origin.file, blocked.origin.line),
        });
    }
    rows
}

/// One row per object, however many specs it has.
fn network_policies(model: &Model) -> Vec<PolicyRow> {
    let workloads: Vec<_> = model.workloads().iter().filter(|w| w.enrolled).collect();
    let mut rows: BTreeMap<&ObjectRef, (PolicyRow, BTreeSet<usize>)> = BTreeMap::new();
    for Named { object, origin, policy, .. } in model.network_policies() {
        let row = || PolicyRow {
            kind: object.kind.to_string(),
            namespace: object.namespace.to_string(),
            name: object.name.to_string(),
            action: "NETWORK".into(),
            rules: 0,
            selects: 0,
            file: format!("{}:{}", origin.file, origin.line),
        };
        let (row, selected) = rows.entry(object).or_insert_with(|| (row(), BTreeSet::new()));
        row.rules += policy.rules.len();
        let selects = |at: &usize| policy.subject.selects(model.namespaces(), &workloads[*at].identity);
        selected.extend((0..workloads.len()).filter(selects));
        row.selects = selected.len();
    }
    rows.into_values().map(|(row, _)| row).collect()
}

fn connection_row(connection: &Connection) -> ConnectionRow {
    let from = connection.source_workload.as_ref().map(|workload| workload.full_name().to_string());
    ConnectionRow {
        id: connection.id,
        reporter: connection.reporter.name().into(),
        from: from.unwrap_or_default(),
        from_identity: connection.source.to_string(),
        client: connection.client.to_string(),
        to: connection.destination.full_name().to_string(),
        to_identity: connection.destination.identity.to_string(),
        server: connection.target.to_string(),
        // A clock that was set back since makes it new.
        age_seconds: SystemTime::now().duration_since(connection.since).map_or(0, |age| age.as_secs()),
        bytes_to_server: connection.to_server.load(Ordering::Relaxed),
        bytes_to_client: connection.to_client.load(Ordering::Relaxed),
    }
}

fn cert_row(cert: CertStatus) -> CertRow {
    CertRow {
        identity: cert.spiffe,
        serial: cert.serial.unwrap_or_default(),
        not_after: cert.not_after.unwrap_or_default(),
        expires_in_seconds: cert.seconds_left.unwrap_or(0),
        renews_at: cert.next_renewal,
        chain: cert.chain,
        problem: cert.error.unwrap_or_default(),
    }
}

/// `ifindex` to workload.
fn interface_names(standing: &Standing) -> Vec<(u32, &str)> {
    standing.enrolled.iter().map(|enrolled| (enrolled.ifindex, enrolled.name.as_str())).collect()
}

/// A link is pinned under its program's name, for interfaces with the number behind it.
fn link(pin: &str, current: bool, names: &[(u32, &str)]) -> Link {
    let number = pin.rsplit(['_', '-', '.']).next().and_then(|text| text.parse::<u32>().ok());
    let (program, target) = match number {
        Some(ifindex) => {
            let name = names.iter().find(|(number, _)| *number == ifindex).map(|(_, name)| *name);
            let program = pin.trim_end_matches(char::is_numeric).trim_end_matches(['_', '-', '.']);
            (program, format!("interface {ifindex} of {}", name.unwrap_or("nobody")))
        }
        None => (pin, "the cgroup".to_owned()),
    };
    let state = if current { "" } else { ", program of another agent" };
    Link { program: program.into(), target: format!("{target}{state}") }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".into(), |name| name.release().to_string_lossy().into_owned())
}
