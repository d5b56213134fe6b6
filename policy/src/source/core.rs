//! Kubernetes' own objects, as far as a mesh needs them, and Istio's `DestinationRule`.

use super::Meta;
use super::fields::{At, Fields, Findings};
use crate::error::Severity;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// IP protocol numbers (IANA).
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pod {
    pub node: Option<String>,
    pub service_account: String,
    pub host_network: bool,
    /// `istio.io/dataplane-mode: none`: known, and no workload of the mesh.
    pub left_out: bool,
    /// Its containers have ended for good; its address may be somebody else's by now.
    pub finished: bool,
    /// Takes connections for its services: no `Ready` condition says otherwise.
    pub ready: bool,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ContainerPort>,
    /// Ports that the node's own processes probe.
    pub probe_ports: BTreeSet<u16>,
    /// Path of its network namespace on its node.
    pub netns: Option<String>,
    /// Path of its cgroup on its node.
    pub cgroup: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ContainerPort {
    pub name: Option<String>,
    pub port: u16,
    pub protocol: u8,
}

#[derive(Clone, Debug, PartialEq)]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {
    /// Empty when headless or external.
    pub addresses: Vec<IpAddr>,
    /// Without a selector the backends are those of its endpoint slices.
    pub selector: BTreeMap<String, String>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    pub name: String,
    pub port: u16,
    pub protocol: u8,
    pub target: TargetPort,
    pub app_protocol: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndpointSlice {
    /// The service it belongs to, by label `kubernetes.io/service-name`.
    pub service: String,
    /// Addresses that are ready.
    pub addresses: Vec<IpAddr>,
    /// Name, port, protocol; the name links it to the service's port.
    pub ports: Vec<(String, u16, u8)>,
}

/// `trafficPolicy.loadBalancer.simple`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Balance {
    #[default]
    RoundRobin,
    LeastConnections,
    Random,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct DestinationRule {
    pub host: String,
    pub balance: Option<Balance>,
}

const POD_SPEC: &[&str] = &[
    "activeDeadlineSeconds",
    "affinity",
    "automountServiceAccountToken",
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "ephemeralContainers",
    "hostAliases",
    "hostIPC",
    "hostPID",
    "hostUsers",
    "hostname",
    "imagePullSecrets",
    "os",
    "nodeSelector",
    "overhead",
    "preemptionPolicy",
    "priority",
    "priorityClassName",
    "readinessGates",
    "resourceClaims",
    "resources",
    "restartPolicy",
    "runtimeClassName",
    "schedulerName",
    "schedulingGates",
    "securityContext",
    "serviceAccount",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "subdomain",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
];
const CONTAINER: &[&str] = &[
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "name",
    "resizePolicy",
    "resources",
    "restartPolicy",
    "securityContext",
    "stdin",
    "stdinOnce",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "tty",
    "volumeDevices",
    "volumeMounts",
    "workingDir",
];

pub(super) fn pod(meta: &Meta, spec: Option<At<'_>>, status: Option<At<'_>>, out: &mut Findings) -> Pod {
    let mut pod = Pod { service_account: "default".into(), ready: true, ..Pod::default() };
    pod.left_out = meta.labels.get("istio.io/dataplane-mode").is_some_and(|mode| mode == "none");
    pod.netns = path(meta, "weft.dev/netns", out);
    pod.cgroup = path(meta, "weft.dev/cgroup", out);
    let mut containers = Vec::new();
    if let Some(spec) = spec {
        let mut spec = spec.fields(out);
        pod.node = spec.text("nodeName", out);
        let old_name =
            spec.at.node.get("serviceAccount").is_some().then(|| spec.text("serviceAccount", out)).flatten();
        pod.service_account =
            spec.text("serviceAccountName", out).or(old_name).unwrap_or(pod.service_account);
        if pod.service_account.contains(['/', '?', '#']) || pod.service_account.is_empty() {
            let message = format!("{:?} is no name of a service account", pod.service_account);
            out.add(Severity::Error, spec.at.node.line, "spec.serviceAccountName", message);
        }
        pod.host_network = spec.boolean("hostNetwork", out);
        containers = spec.items("initContainers", out);
        containers.extend(spec.items("containers", out));
        spec.ignore(POD_SPEC);
        spec.finish(out);
    }
    pod.node = pod.node.or_else(|| meta.annotations.get("weft.dev/node").cloned());
    containers.iter().for_each(|at| container(at, &mut pod, out));
    if let Some(status) = status {
        let mut status = status.fields(out);
        let first = status.take("podIP").and_then(|at| address(&at, out));
        pod.addresses.extend(first);
        for at in status.items("podIPs", out) {
            let addr = at.fields(out).take("ip").and_then(|at| address(&at, out));
            pod.addresses.extend(addr.filter(|addr| Some(*addr) != first));
        }
        let phase = status.take("phase").and_then(|at| at.text(out));
        pod.finished = phase.is_some_and(|phase| matches!(phase.as_str(), "Succeeded" | "Failed"));
        for at in status.items("conditions", out) {
            let is = |name, value| at.node.get(name).and_then(super::yaml::Node::text) == Some(value);
            pod.ready &= !(is("type", "Ready") && is("status", "False"));
        }
    }
    if pod.addresses.is_empty() && !pod.finished && !out.refused() {
        let message = "the pod has no address, so nothing can reach it through the mesh; set status.podIP";
        out.add(Severity::Warning, meta.origin.line, "status.podIP", message);
    }
    pod
}

/// An annotation that holds an absolute path.
fn path(meta: &Meta, name: &str, out: &mut Findings) -> Option<String> {
    let path = meta.annotations.get(name)?;
    let plain = path.starts_with('/')
        && path.len() > 1
        && !path.contains('\0')
        && !path.split('/').any(|part| part == "..");
    if !plain {
        let message = format!("{path:?} is no path; write an absolute one, as /run/netns/NAME");
        out.add(Severity::Error, meta.origin.line, &format!("metadata.annotations[{name}]"), message);
        return None;
    }
    Some(path.clone())
}

fn container(at: &At<'_>, pod: &mut Pod, out: &mut Findings) {
    let mut fields = at.fields(out);
    let first = pod.ports.len();
    for at in fields.items("ports", out) {
        let mut fields = at.fields(out);
        let name = fields.text("name", out);
        let port = match fields.take("containerPort") {
            Some(at) => at.port(out),
            None => {
                out.error(&at, "`containerPort` is missing");
                None
            }
        };
        let protocol = protocol(&mut fields, out);
        fields.ignore(&["hostPort", "hostIP"]);
        fields.finish(out);
        pod.ports.extend(port.map(|port| ContainerPort { name, port, protocol }));
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(at) = fields.take(probe) else { continue };
        let mut fields = at.fields(out);
        for handler in ["httpGet", "tcpSocket", "grpc"] {
            let Some(port) = fields.take(handler).and_then(|at| at.fields(out).take("port")) else {
                continue;
            };
            let named = |name: &str| {
                pod.ports[first..].iter().find(|p| p.name.as_deref() == Some(name)).map(|p| p.port)
            };
            match port.node.text().map(|text| (text.parse::<u16>(), text)) {
                Some((Ok(number @ 1..), _)) => drop(pod.probe_ports.insert(number)),
                Some((_, name)) if named(name).is_some() => pod.probe_ports.extend(named(name)),
                _ => out.error(&port, "neither a port nor the name of a port of this container"),
            }
        }
        fields.ignore(&[
            "exec",
            "initialDelaySeconds",
            "timeoutSeconds",
            "periodSeconds",
            "successThreshold",
        ]);
        fields.ignore(&["failureThreshold", "terminationGracePeriodSeconds"]);
        fields.finish(out);
    }
    fields.ignore(CONTAINER);
    fields.finish(out);
}

fn protocol(fields: &mut Fields<'_>, out: &mut Findings) -> u8 {
    let Some(at) = fields.take("protocol") else { return TCP };
    match at.text(out).as_deref() {
        Some("TCP") | None => TCP,
        Some("UDP") => UDP,
        Some("SCTP") => SCTP,
        Some(other) => {
            out.error(&at, format!("no protocol {other:?}; use TCP, UDP or SCTP"));
            TCP
        }
    }
}

fn address(at: &At<'_>, out: &mut Findings) -> Option<IpAddr> {
    let text = at.text(out)?;
    let parsed = text.parse::<IpAddr>().map(|addr| addr.to_canonical()).ok();
    let usable = parsed.filter(|addr| !addr.is_unspecified() && !addr.is_multicast() && !addr.is_loopback());
    if usable.is_none() {
        out.error(at, format!("{text:?} is no address of a workload; write one IPv4 or IPv6 address"));
    }
    usable
}

const SERVICE_SPEC: &[&str] = &[
    "allocateLoadBalancerNodePorts",
    "externalIPs",
    "externalName",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "internalTrafficPolicy",
    "ipFamilies",
    "ipFamilyPolicy",
    "loadBalancerClass",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "publishNotReadyAddresses",
    "sessionAffinity",
    "sessionAffinityConfig",
    "type",
    "trafficDistribution",
];

pub(super) fn service(spec: Option<At<'_>>, out: &mut Findings) -> Service {
    let mut service = Service::default();
    let Some(spec) = spec else { return service };
    let mut spec = spec.fields(out);
    service.selector = spec.labels("selector", out);
    let mut addresses: Vec<At<'_>> = spec.take("clusterIP").into_iter().collect();
    addresses.extend(spec.items("clusterIPs", out));
    for at in addresses.iter().filter(|at| !matches!(at.node.text(), Some("None" | ""))) {
        let addr = address(at, out);
        service.addresses.extend(addr.filter(|addr| !service.addresses.contains(addr)));
    }
    for at in spec.items("ports", out) {
        let mut fields = at.fields(out);
        let name = fields.text("name", out).unwrap_or_default();
        let port = fields.take("port");
        if port.is_none() {
            out.error(&at, "`port` is missing");
        }
        let port = port.and_then(|at| at.port(out));
        let protocol = protocol(&mut fields, out);
        let target = fields.take("targetPort").and_then(|at| target(&at, out));
        let app_protocol = fields.text("appProtocol", out);
        fields.ignore(&["nodePort"]);
        fields.finish(out);
        if let Some(port) = port {
            let target = target.unwrap_or(TargetPort::Number(port));
            service.ports.push(ServicePort { name, port, protocol, target, app_protocol });
        }
    }
    spec.ignore(SERVICE_SPEC);
    spec.finish(out);
    service
}

fn target(at: &At<'_>, out: &mut Findings) -> Option<TargetPort> {
    let text = at.text(out)?;
    match text.parse::<u64>() {
        Ok(_) => at.port(out).map(TargetPort::Number),
        Err(_) => Some(TargetPort::Name(text)),
    }
}

pub(super) fn endpoint_slice(meta: &Meta, top: &mut Fields<'_>, out: &mut Findings) -> EndpointSlice {
    let service = meta.labels.get("kubernetes.io/service-name").cloned().unwrap_or_default();
    if service.is_empty() {
        let message = "without the label kubernetes.io/service-name it belongs to no service";
        out.add(Severity::Warning, meta.origin.line, "metadata.labels", message);
    }
    let mut slice = EndpointSlice { service, ..EndpointSlice::default() };
    let fqdn = top.text("addressType", out).is_some_and(|kind| kind == "FQDN");
    for at in top.items("endpoints", out) {
        let mut fields = at.fields(out);
        let ready = match fields.take("conditions").and_then(|at| at.fields(out).take("ready")) {
            Some(at) => at.boolean(out).unwrap_or_default(),
            None => true, // Absent means ready (Kubernetes API, EndpointConditions).
        };
        let addresses = fields.items("addresses", out);
        if ready && !fqdn {
            slice.addresses.extend(addresses.iter().filter_map(|at| address(at, out)));
        }
        fields.ignore(&[
            "targetRef",
            "hostname",
            "nodeName",
            "zone",
            "hints",
            "deprecatedTopology",
            "topology",
        ]);
        fields.finish(out);
    }
    for at in top.items("ports", out) {
        let mut fields = at.fields(out);
        let name = fields.text("name", out).unwrap_or_default();
        let port = fields.take("port").and_then(|at| at.port(out));
        let protocol = protocol(&mut fields, out);
        fields.ignore(&["appProtocol"]);
        fields.finish(out);
        slice.ports.extend(port.map(|port| (name, port, protocol)));
    }
    slice
}

pub(super) fn destination_rule(spec: Option<At<'_>>, out: &mut Findings) -> DestinationRule {
    let mut rule = DestinationRule::default();
    let Some(spec) = spec else { return rule };
    let mut spec = spec.fields(out);
    rule.host = spec.text("host", out).unwrap_or_default();
    if rule.host.is_empty() {
        out.error(&spec.at.clone(), "`host` is missing");
    }
    let mut later = Vec::new();
    if let Some(at) = spec.take("trafficPolicy") {
        let mut policy = at.fields(out);
        if let Some(at) = policy.take("loadBalancer") {
            let mut balancer = at.fields(out);
            if let Some(at) = balancer.take("simple") {
                rule.balance = balance(&at, out);
            }
            later.extend(
                ["consistentHash", "localityLbSetting", "warmup", "warmupDurationSecs"]
                    .map(|n| balancer.take(n)),
            );
            balancer.finish(out);
        }
        let others =
            ["connectionPool", "outlierDetection", "tls", "portLevelSettings", "tunnel", "proxyProtocol"];
        later.extend(others.map(|name| policy.take(name)));
        later.push(policy.take("retryBudget"));
        policy.finish(out);
    }
    later.extend(["subsets", "exportTo", "workloadSelector"].map(|name| spec.take(name)));
    spec.finish(out);
    for at in later.into_iter().flatten() {
        out.add(Severity::Warning, at.node.line, &at.path, "recognised, not carried out yet");
    }
    rule
}

fn balance(at: &At<'_>, out: &mut Findings) -> Option<Balance> {
    match at.text(out)?.as_str() {
        "UNSPECIFIED" => None,
        "ROUND_ROBIN" => Some(Balance::RoundRobin),
        "LEAST_REQUEST" | "LEAST_CONN" => Some(Balance::LeastConnections),
        "RANDOM" => Some(Balance::Random),
        "PASSTHROUGH" => {
            out.add(
                Severity::Warning,
                at.node.line,
                &at.path,
                "PASSTHROUGH is recognised, not carried out yet",
            );
            None
        }
        other => {
            out.error(at, format!("no load balancer {other:?}; use ROUND_ROBIN, LEAST_REQUEST or RANDOM"));
            None
        }
    }
}
