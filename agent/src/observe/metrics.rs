//! The metrics page: Istio's TCP metrics for both paths, and weft's own.
//!
//! INVARIANT: the number of series is bounded. Istio's metrics have at most [`MAX_SERIES`] label sets; a label set that
//! comes later is counted under `other`, so that sums stay right.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::tables::{CertRow, MapFill, Program};

/// Label sets of Istio's metrics. Four metrics each, about 1 kB per line on the page: 40 MB at the very worst.
pub const MAX_SERIES: usize = 10_000;
/// Policies that denials are counted for by name.
pub const MAX_POLICIES: usize = 1_000;

/// What Istio's labels say about one end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    pub workload: String,
    pub namespace: String,
    /// SPIFFE ID, or `unknown`.
    pub principal: String,
    pub app: String,
    pub version: String,
    pub canonical_service: String,
    pub canonical_revision: String,
}

impl End {
    /// All labels alike: `unknown`, as Istio has it, or `other`.
    pub fn all(text: &str) -> End {
        End {
            workload: text.into(),
            namespace: text.into(),
            principal: text.into(),
            app: text.into(),
            version: text.into(),
            canonical_service: text.into(),
            canonical_revision: text.into(),
        }
    }
}

/// What Istio's labels say about the service that was dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Service {
    /// Host name.
    pub host: String,
    pub name: String,
    pub namespace: String,
}

impl Service {
    /// All labels alike.
    pub fn all(text: &str) -> Service {
        Service { host: text.into(), name: text.into(), namespace: text.into() }
    }
}

/// How a connection was secured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Security {
    /// Through the tunnel.
    MutualTls,
    /// On one node, both ends verified by the kernel.
    Kernel,
    /// In clear.
    None,
}

impl Security {
    const fn name(self) -> &'static str {
        match self {
            Security::MutualTls => "mutual_tls",
            Security::Kernel => "kernel",
            Security::None => "none",
        }
    }
}

/// Istio's labels for one kind of TCP connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// `source` or `destination`.
    pub reporter: &'static str,
    pub source: Arc<End>,
    pub destination: Arc<End>,
    pub service: Arc<Service>,
    pub security: Security,
}

impl TcpLabels {
    fn other(&self) -> TcpLabels {
        let end = Arc::new(End::all("other"));
        TcpLabels {
            reporter: self.reporter,
            source: end.clone(),
            destination: end,
            service: Arc::new(Service::all("other")),
            security: self.security,
        }
    }
}

impl EncodeLabelSet for TcpLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let (from, to, service) = (&self.source, &self.destination, &self.service);
        for label in [
            ("reporter", self.reporter),
            ("source_workload", &from.workload),
            ("source_workload_namespace", &from.namespace),
            ("source_principal", &from.principal),
            ("source_app", &from.app),
            ("source_version", &from.version),
            ("source_canonical_service", &from.canonical_service),
            ("source_canonical_revision", &from.canonical_revision),
            ("destination_workload", &to.workload),
            ("destination_workload_namespace", &to.namespace),
            ("destination_principal", &to.principal),
            ("destination_app", &to.app),
            ("destination_version", &to.version),
            ("destination_canonical_service", &to.canonical_service),
            ("destination_canonical_revision", &to.canonical_revision),
            ("destination_service", &service.host),
            ("destination_service_name", &service.name),
            ("destination_service_namespace", &service.namespace),
            ("request_protocol", "tcp"),
            ("response_flags", "-"),
            ("connection_security_policy", self.security.name()),
        ] {
            label.encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

/// Connections and bytes, seen from the client: sent is client to server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpTotals {
    pub opened: u64,
    pub closed: u64,
    pub sent: u64,
    pub received: u64,
}

impl AddAssign for TcpTotals {
    fn add_assign(&mut self, more: TcpTotals) {
        self.opened += more.opened;
        self.closed += more.closed;
        self.sent += more.sent;
        self.received += more.received;
    }
}

/// Totals by label set, bounded in number.
#[derive(Debug)]
struct Book<K> {
    totals: HashMap<K, TcpTotals>,
    limit: usize,
}

impl<K: Hash + Eq + Clone> Book<K> {
    /// The totals of `key`, or of `other` when there is no room for one more.
    fn at(&mut self, key: &K, other: impl Fn(&K) -> K) -> &mut TcpTotals {
        let key = if self.totals.contains_key(key) || self.totals.len() < self.limit {
            key.clone()
        } else {
            other(key)
        };
        self.totals.entry(key).or_default()
    }
}

/// What is counted as it happens. Readings of the kernel and of the agent's state come with each scrape.
#[derive(Debug)]
pub struct Metrics {
    tcp: Mutex<Book<TcpLabels>>,
    refusals: Mutex<HashMap<&'static str, u64>>,
    policy_denials: Mutex<HashMap<String, u64>>,
    troubles: Mutex<HashMap<&'static str, u64>>,
    handshake: Histogram,
    dial: Histogram,
}

/// What is read at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// Connections of the direct path so far.
    pub direct: Vec<(TcpLabels, TcpTotals)>,
    /// Drops of the datapath so far, by reason.
    pub drops: Vec<(&'static str, u64)>,
    pub maps: Vec<MapFill>,
    pub programs: Vec<Program>,
    pub certs: Vec<CertRow>,
    pub policy_revision: u64,
    pub policy_age: Duration,
    /// Problems with manifests, by severity.
    pub manifest_problems: Vec<(&'static str, u64)>,
    pub workloads_local: u64,
    pub connections: u64,
    /// Smoothed round-trip times at close (seconds, added up), retransmits and their connections, by service.
    pub services: Vec<ServiceReading>,
}

/// Quality of the direct path's connections to one service.
#[derive(Clone, Debug)]
pub struct ServiceReading {
    pub service: String,
    pub retransmits: u64,
    pub rtt_seconds: f64,
    pub closed: u64,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::with_limit(MAX_SERIES)
    }
}

impl Metrics {
    fn with_limit(limit: usize) -> Metrics {
        // From a loopback's 50 us to a timeout's 10 s.
        let latency =
            || Histogram::new([5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.05, 0.25, 1.0, 10.0]);
        Metrics {
            tcp: Mutex::new(Book { totals: HashMap::new(), limit }),
            refusals: Mutex::default(),
            policy_denials: Mutex::default(),
            troubles: Mutex::default(),
            handshake: latency(),
            dial: latency(),
        }
    }

    /// A connection of the captured path opened or closed.
    pub fn tcp(&self, labels: &TcpLabels, more: TcpTotals) {
        *lock(&self.tcp).at(labels, TcpLabels::other) += more;
    }

    /// The proxy refused a connection, or ended one for a reason of its own.
    pub fn refusal(&self, reason: &'static str) {
        *lock(&self.refusals).entry(reason).or_default() += 1;
    }

    /// A policy denied flows.
    pub fn policy_denial(&self, policy: &str, flows: u64) {
        let mut denials = lock(&self.policy_denials);
        let room = denials.contains_key(policy) || denials.len() < MAX_POLICIES;
        *denials.entry(if room { policy } else { "other" }.to_owned()).or_default() += flows;
    }

    /// Something went wrong in the proxy that is not about one connection.
    pub fn trouble(&self, kind: &'static str) {
        *lock(&self.troubles).entry(kind).or_default() += 1;
    }

    /// A tunnel was opened.
    pub fn handshake(&self, took: Duration) {
        self.handshake.observe(took.as_secs_f64());
    }

    /// A local application was dialled.
    pub fn dial(&self, took: Duration) {
        self.dial.observe(took.as_secs_f64());
    }

    /// The page in OpenMetrics' text form.
    pub fn page(self: &Arc<Self>, readings: Readings) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Page { metrics: self.clone(), readings }));
        let mut page = String::new();
        text::encode(&mut page, &registry)?;
        Ok(page)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Page {
    metrics: Arc<Metrics>,
    readings: Readings,
}

impl Page {
    /// Both paths together. Label sets of the direct path are admitted to the same bounded book; their totals are not
    /// kept there, since the kernel has them.
    fn tcp(&self) -> Vec<(TcpLabels, TcpTotals)> {
        let mut book = lock(&self.metrics.tcp);
        let mut direct: HashMap<TcpLabels, TcpTotals> = HashMap::new();
        for (labels, totals) in &self.readings.direct {
            let room = book.totals.contains_key(labels) || book.totals.len() < book.limit;
            let labels = if room { labels.clone() } else { labels.other() };
            book.totals.entry(labels.clone()).or_default();
            *direct.entry(labels).or_default() += *totals;
        }
        book.totals
            .iter()
            .map(|(labels, captured)| {
                let mut totals = direct.get(labels).copied().unwrap_or_default();
                totals += *captured;
                (labels.clone(), totals)
            })
            .collect()
    }
}

impl Collector for Page {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> fmt::Result {
        let tcp = self.tcp();
        for (name, help, pick) in [
            (
                "istio_tcp_connections_opened",
                "TCP connections opened",
                (|t: &TcpTotals| t.opened) as fn(&TcpTotals) -> u64,
            ),
            ("istio_tcp_connections_closed", "TCP connections closed", |t| t.closed),
            ("istio_tcp_sent_bytes", "Bytes of applications from client to server", |t| t.sent),
            ("istio_tcp_received_bytes", "Bytes of applications from server to client", |t| t.received),
        ] {
            counters(
                &mut out,
                name,
                help,
                tcp.iter().map(|(labels, totals)| (labels.clone(), pick(totals))),
            )?;
        }
        let r = &self.readings;
        let drops =
            r.drops.iter().map(|(reason, count)| ([("reason", *reason), ("seen_by", "datapath")], *count));
        let refusals = lock(&self.metrics.refusals).clone();
        let refusals =
            refusals.iter().map(|(reason, count)| ([("reason", *reason), ("seen_by", "proxy")], *count));
        counters(&mut out, "weft_drops", "Packets and connections refused", drops.chain(refusals))?;
        let denials = lock(&self.metrics.policy_denials).clone();
        let help = "Denials that flow events told of, by the policy that decided";
        counters(
            &mut out,
            "weft_policy_denials",
            help,
            denials.iter().map(|(p, n)| ([("policy", p.as_str())], *n)),
        )?;
        let troubles = lock(&self.metrics.troubles).clone();
        let help = "Troubles of the proxy that are not about one connection";
        counters(&mut out, "weft_proxy_problems", help, troubles.iter().map(|(k, n)| ([("kind", *k)], *n)))?;
        let maps = |pick: fn(&MapFill) -> u64| {
            r.maps.iter().map(move |m| ([("map", m.name.as_str())], pick(m) as f64))
        };
        gauges(&mut out, "weft_map_entries", "Entries in a map of the datapath", maps(|m| m.entries))?;
        gauges(&mut out, "weft_map_capacity", "Entries that fit into it", maps(|m| m.capacity))?;
        let certs = r.certs.iter().filter(|cert| !cert.not_after.is_empty());
        let certs = certs.map(|c| ([("identity", c.identity.as_str())], c.expires_in_seconds as f64));
        gauges(&mut out, "weft_certificate_expiry_seconds", "Until the certificate expires", certs)?;
        gauge(&mut out, "weft_policy_revision", "Policy revision in force", r.policy_revision as f64)?;
        gauge(&mut out, "weft_policy_age_seconds", "Since it came into force", r.policy_age.as_secs_f64())?;
        gauge(&mut out, "weft_workloads_local", "Workloads enrolled on this node", r.workloads_local as f64)?;
        gauge(&mut out, "weft_connections", "Connections that the proxy carries", r.connections as f64)?;
        let problems = r.manifest_problems.iter().map(|(severity, n)| ([("severity", *severity)], *n as f64));
        gauges(&mut out, "weft_manifest_problems", "Problems with manifests", problems)?;
        let services = |pick: fn(&ServiceReading) -> f64| {
            r.services.iter().map(move |s| ([("service", s.service.as_str())], pick(s)))
        };
        let help = "Segments sent again on the direct path";
        counters(&mut out, "weft_tcp_retransmits", help, services(|s| s.retransmits as f64))?;
        let help = "Round-trip times at close on the direct path, added up";
        counters(&mut out, "weft_tcp_rtt_seconds", help, services(|s| s.rtt_seconds))?;
        let help = "Connections that weft_tcp_rtt_seconds adds up";
        counters(&mut out, "weft_tcp_rtt_connections", help, services(|s| s.closed as f64))?;
        let runs = r.programs.iter().map(|p| ([("program", p.name.as_str())], p.run_seconds));
        counters(
            &mut out,
            "weft_program_run_seconds",
            "CPU time of a BPF program; counted while kernel.bpf_stats_enabled is 1",
            runs,
        )?;
        for (name, help, histogram) in [
            (
                "weft_handshake_seconds",
                "Opening a tunnel: TCP connect and TLS handshake",
                &self.metrics.handshake,
            ),
            ("weft_dial_seconds", "Connecting to a local application", &self.metrics.dial),
        ] {
            histogram.encode(out.encode_descriptor(name, help, None, MetricType::Histogram)?)?;
        }
        Ok(())
    }
}

fn counters<L: EncodeLabelSet, N: EncodeCounterValue + fmt::Debug>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl Iterator<Item = (L, N)>,
) -> fmt::Result
where
    ConstCounter<N>: EncodeMetric,
{
    let mut family = out.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in series {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges<L: EncodeLabelSet>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl Iterator<Item = (L, f64)>,
) -> fmt::Result {
    let mut family = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in series {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    ConstGauge::new(value).encode(out.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(name: &str) -> TcpLabels {
        TcpLabels {
            reporter: "source",
            source: Arc::new(End::all(name)),
            destination: Arc::new(End::all("db")),
            service: Arc::new(Service::all("db")),
            security: Security::Kernel,
        }
    }

    fn one() -> TcpTotals {
        TcpTotals { opened: 1, closed: 1, sent: 10, received: 20 }
    }

    #[test]
    fn both_paths_add_up_under_istios_labels() {
        let metrics = Arc::new(Metrics::default());
        metrics.tcp(&labels("web"), one());
        let direct = vec![(labels("web"), one()), (labels("api"), one())];
        let page = metrics.page(Readings { direct, ..Readings::default() }).expect("written");
        let line = |name: &str, workload: &str| {
            let start = format!("{name}{{reporter=\"source\",source_workload=\"{workload}\"");
            let line = page.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{page}"));
            line.rsplit(' ').next().map(str::to_owned)
        };
        assert_eq!(line("istio_tcp_connections_opened_total", "web").as_deref(), Some("2"));
        assert_eq!(line("istio_tcp_sent_bytes_total", "web").as_deref(), Some("20"));
        assert_eq!(line("istio_tcp_received_bytes_total", "api").as_deref(), Some("20"));
        assert!(
            page.contains(
                "request_protocol=\"tcp\",response_flags=\"-\",connection_security_policy=\"kernel\""
            )
        );
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn series_are_bounded_and_sums_stay_right() {
        let metrics = Arc::new(Metrics::with_limit(5));
        for round in 0..2 {
            for index in 0..50 {
                metrics.tcp(&labels(&format!("captured-{index}")), one());
            }
            let direct = (0..50).map(|index| (labels(&format!("direct-{index}")), one())).collect();
            let page = metrics.page(Readings { direct, ..Readings::default() }).expect("written");
            let series: Vec<&str> =
                page.lines().filter(|line| line.starts_with("istio_tcp_connections_opened_total{")).collect();
            assert!(series.len() <= 6, "{} series", series.len());
            let sum: u64 = series
                .iter()
                .map(|line| line.rsplit(' ').next().expect("a value").parse::<u64>().expect("a number"))
                .sum();
            assert_eq!(sum, 50 * (round + 1) + 50);
        }
        for index in 0..MAX_POLICIES + 10 {
            metrics.policy_denial(&format!("p{index}"), 1);
        }
        assert_eq!(lock(&metrics.policy_denials).len(), MAX_POLICIES + 1);
    }
}
