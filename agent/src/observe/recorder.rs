//! Turns what proxy and datapath tell into flow events and counters, with names in place of numbers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use weft_datapath::abi::Event;
use weft_datapath::connect::TCP;
use weft_datapath::event;
use weft_datapath::identity::{ANONYMOUS, NODE};
use weft_datapath::reason::Reason as Drop;
use weft_policy::model::cidr::ip;
use weft_policy::model::layer::icmp_port;
use weft_policy::{Decision, Flow, Peer, RuleRef};

use super::events::{Bytes, EventLog, FlowEvent, Party, rfc3339};
use super::metrics::{Metrics, Security, TcpLabels, TcpTotals};
use crate::kernel::destroy::Cut;
use crate::proxy::{self, Access, ConnectionEvent, Happening, ReasonKind, Reporter};
use crate::snapshot::{Snapshot, end_of_peer};

/// See the module.
pub struct Recorder {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    metrics: Arc<Metrics>,
    events: Arc<EventLog>,
}

impl Recorder {
    /// Names come from the snapshot that is current when something happens.
    pub fn new(
        snapshot: watch::Receiver<Arc<Snapshot>>,
        metrics: Arc<Metrics>,
        events: Arc<EventLog>,
    ) -> Recorder {
        Recorder { snapshot, metrics, events }
    }

    /// An event of the datapath.
    pub fn datapath(&self, event: &Event) {
        let snapshot = self.snapshot.borrow().clone();
        let flow = describe(&snapshot, event);
        if !flow.policy.is_empty() {
            self.metrics.policy_denial(&flow.policy, 1 + u64::from(event.suppressed));
        }
        self.events.push(flow);
    }

    /// A connection of the direct path that a policy change cut.
    pub fn cut(&self, cut: &Cut) {
        let snapshot = self.snapshot.borrow().clone();
        let mut flow = FlowEvent {
            time: rfc3339(SystemTime::now()),
            verdict: "denied".into(),
            what: "cut".into(),
            from: party(&snapshot, cut.client, cut.source),
            to: party(&snapshot, cut.server, cut.destination),
            protocol: "tcp".into(),
            path: "direct".into(),
            seen_by: "agent".into(),
            reason: Drop::Policy.name().into(),
            ..FlowEvent::default()
        };
        name_rule(&snapshot, &mut flow, cut.rule);
        let ends = ((cut.source, cut.client.ip()), (cut.destination, cut.server.ip()));
        flow.detail = explain(&snapshot, ends, TCP, cut.server.port());
        if !flow.policy.is_empty() {
            self.metrics.policy_denial(&flow.policy, 1);
        }
        self.events.push(flow);
    }
}

impl proxy::Recorder for Recorder {
    fn connection(&self, event: &ConnectionEvent) {
        let snapshot = self.snapshot.borrow().clone();
        let totals = match &event.happening {
            Happening::Opened => TcpTotals { opened: 1, ..TcpTotals::default() },
            Happening::Closed(_) => {
                let (sent, received) = (event.to_server, event.to_client);
                TcpTotals { closed: 1, sent, received, opened: 0 }
            }
            Happening::Refused(_) => TcpTotals::default(),
        };
        if totals != TcpTotals::default() {
            self.metrics.tcp(&labels(&snapshot, event), totals);
        }
        let (what, reason) = match &event.happening {
            Happening::Opened => ("opened", None),
            Happening::Closed(reason) if reason.kind == ReasonKind::Policy => ("cut", Some(reason)),
            Happening::Closed(reason) => ("closed", Some(reason)),
            Happening::Refused(reason) => ("refused", Some(reason)),
        };
        let denied = matches!(what, "cut" | "refused");
        if denied && let Some(reason) = reason {
            self.metrics.refusal(reason.kind.name());
        }
        let client = event.source_workload.as_ref().map(|w| w.full_name().to_string());
        let end = |name: String, identity: String, at: SocketAddr| Party {
            workload: name,
            identity,
            address: at.ip().to_string(),
            port: at.port(),
        };
        let mut flow = FlowEvent {
            time: rfc3339(SystemTime::now()),
            verdict: if denied { "denied" } else { "allowed" }.into(),
            what: what.into(),
            from: end(client.unwrap_or_default(), event.source.to_string(), event.client),
            to: end(
                event.destination.full_name().to_string(),
                event.destination.identity.to_string(),
                event.target,
            ),
            protocol: "tcp".into(),
            path: "tunnel".into(),
            seen_by: "proxy".into(),
            reason: reason.map_or_else(String::new, |reason| reason.kind.name().into()),
            detail: reason.map_or_else(String::new, |reason| reason.detail.to_string()),
            bytes: matches!(event.happening, Happening::Closed(_))
                .then_some(Bytes { to_server: event.to_server, to_client: event.to_client }),
            ..FlowEvent::default()
        };
        // Policy is the business of the server's side; the client's side only hears of it.
        if denied && event.reporter == Reporter::Destination && flow.reason == ReasonKind::Policy.name() {
            let access = Access {
                source: &event.source,
                source_addr: event.client.ip(),
                destination: &event.destination,
                destination_addr: event.target.ip(),
                port: event.target.port(),
            };
            if let Ok(Decision { rule: Some(rule), .. }) = snapshot.decide(&access) {
                set_rule(&mut flow, &rule);
                self.metrics.policy_denial(&flow.policy, 1);
            }
        }
        self.events.push(flow);
    }

    fn problem(&self, problem: proxy::Problem) {
        self.metrics.trouble(problem.kind.name());
        tracing::warn!("{}: {}: {}", problem.workload, problem.kind.name(), problem.text);
    }

    fn handshake(&self, took: Duration) {
        self.metrics.handshake(took);
    }

    fn dial(&self, took: Duration) {
        self.metrics.dial(took);
    }
}

fn labels(snapshot: &Snapshot, event: &ConnectionEvent) -> TcpLabels {
    let names = &snapshot.names;
    let source = event.source_workload.as_ref().and_then(|workload| names.end_of(&workload.full_name()));
    let destination = names.end_of(&event.destination.full_name());
    TcpLabels {
        reporter: event.reporter.name(),
        source: source.unwrap_or_else(|| Arc::new(end_of_peer(&event.source))),
        destination: destination.unwrap_or_else(|| Arc::new(end_of_peer(&event.destination.identity))),
        service: names.service_behind(event.target.ip(), event.target.port()),
        security: Security::MutualTls,
    }
}

fn describe(snapshot: &Snapshot, event: &Event) -> FlowEvent {
    let src = SocketAddr::new(ip(&event.src), event.src_port);
    let dst = SocketAddr::new(ip(&event.dst), event.dst_port);
    let mut flow = FlowEvent {
        // The record carries monotonic time; it is read within milliseconds, so the wall clock now is close enough.
        time: rfc3339(SystemTime::now()),
        verdict: if event.reason == 0 { "allowed" } else { "denied" }.into(),
        what: match (event.reason, event.hook) {
            (0, _) => "opened",
            (_, event::FROM_WORKLOAD | event::TO_WORKLOAD) => "dropped",
            _ => "refused",
        }
        .into(),
        from: party(snapshot, src, event.source),
        to: party(snapshot, dst, event.destination),
        protocol: protocol(event.protocol),
        path: "direct".into(),
        seen_by: hook(event.hook).into(),
        suppressed: event.suppressed,
        ..FlowEvent::default()
    };
    if event.reason == 0 {
        return flow;
    }
    let Some(reason) = Drop::from_number(event.reason) else {
        flow.reason = event.reason.to_string();
        return flow;
    };
    flow.reason = reason.name().into();
    if matches!(reason, Drop::Policy | Drop::NeedsHttp) {
        name_rule(snapshot, &mut flow, event.rule);
        let ends = ((event.source, src.ip()), (event.destination, dst.ip()));
        flow.detail = explain(snapshot, ends, event.protocol, event.dst_port);
    } else {
        flow.detail = advice(reason).into();
    }
    flow
}

fn name_rule(snapshot: &Snapshot, flow: &mut FlowEvent, rule: u32) {
    if let Some(rule) = snapshot.tables.rule(rule) {
        set_rule(flow, rule);
    }
}

fn set_rule(flow: &mut FlowEvent, rule: &RuleRef) {
    flow.policy = rule.object.to_string();
    flow.rule = match rule.index {
        Some(index) => format!("{}[{index}] ({})", rule.list.name(), rule.action.name()),
        None => rule.action.name().into(),
    };
}

/// What the policy says, and what would have allowed it.
fn explain(snapshot: &Snapshot, ends: ((u32, IpAddr), (u32, IpAddr)), protocol: u8, port: u16) -> String {
    let ((source, source_addr), (destination, destination_addr)) = ends;
    let peer = |number: u32| match number {
        NODE => Some(Peer::Node),
        ANONYMOUS => Some(Peer::Anonymous),
        number => snapshot.names.identity(number).map(|identity| Peer::Workload(identity)),
    };
    let (Some(source), Some(destination)) = (peer(source), peer(destination)) else {
        return "no workload of the manifests has this identity any more".into();
    };
    // Of ICMP only echo requests begin flows.
    let (protocol, port) = match (protocol, destination_addr) {
        (1, IpAddr::V4(_)) => (1, icmp_port(8)),
        (1, IpAddr::V6(_)) => (58, icmp_port(128)),
        _ => (protocol, port),
    };
    let decision = snapshot.model.eval(&Flow {
        source,
        source_addr,
        destination,
        destination_addr,
        protocol,
        port,
        request: None,
    });
    match (decision.verdict, decision.remedy) {
        // The tables were older than the manifests by now are.
        (weft_policy::Verdict::Allow, _) => {
            "it was refused before the last change, and is allowed now".into()
        }
        (_, Some(remedy)) => format!("{}; {remedy}", decision.reason),
        (_, None) => decision.reason,
    }
}

fn party(snapshot: &Snapshot, at: SocketAddr, number: u32) -> Party {
    let known = snapshot.names.identity(number);
    // The address is a hint: it names a workload only where that has the identity that was verified. A hook that is
    // called before the socket has an address knows the identity alone, which is enough where one workload has it.
    let is_it = |workload: &&weft_policy::Workload| known == Some(&workload.identity);
    let workload = if at.ip().is_unspecified() {
        let mut local = snapshot.local.iter().filter(|local| local.number == number);
        let only = local.next().filter(|_| local.next().is_none());
        only.and_then(|only| snapshot.model.workload(&only.workload.namespace, &only.workload.name))
    } else {
        snapshot.model.workload_at(at.ip()).filter(is_it)
    };
    Party {
        workload: workload.map_or_else(String::new, |w| format!("{}/{}", w.namespace, w.name)),
        identity: match number {
            NODE => "node".into(),
            _ => known.map_or_else(String::new, |identity| identity.spiffe.to_string()),
        },
        address: at.ip().to_string(),
        port: at.port(),
    }
}

fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        other => other.to_string(),
    }
}

fn hook(number: u8) -> &'static str {
    match number {
        event::CONNECT => "connect",
        event::SENDMSG => "sendmsg",
        event::BIND => "bind",
        event::FROM_WORKLOAD => "from-workload",
        event::TO_WORKLOAD => "to-workload",
        event::SOCKOPS => "sockops",
        _ => "datapath",
    }
}

/// What to do about a refusal that no policy decided.
fn advice(reason: Drop) -> &'static str {
    match reason {
        Drop::Policy => "a policy refused it",
        Drop::NeedsHttp => {
            "the policy asks about HTTP, and no HTTP engine is in the path; use port rules here"
        }
        Drop::SourceAddress => {
            "the sender's interface does not own this address; list it in the pod's status.podIPs"
        }
        Drop::ClearToStrict => {
            "the other side is on another node and accepts mTLS only; TCP goes through the tunnel by itself, anything \
             else needs DISABLE in its PeerAuthentication"
        }
        Drop::TunnelPort => "port 15008 is the agent's own; the application must use another port",
        Drop::UnknownInside => {
            "the address is inside the mesh and no single workload owns it; check the manifests"
        }
        Drop::NotEnrolled => "the interface belongs to no enrolled workload; see `weft status`",
        Drop::Malformed => "the packet's headers are incomplete",
        Drop::IpOptions => "IP options and unknown extension headers do not pass; send without them",
        Drop::Fragment => {
            "fragments of TCP, and UDP fragments without their first, do not pass; lower the MTU"
        }
        Drop::EtherType => "only ARP, IPv4 and IPv6 pass",
        Drop::Arp => "ARP for an address that is not the sender's own",
        Drop::Icmp => "ICMP passes when policy allows it or when it is about a known flow",
        Drop::Protocol => "only TCP, UDP and ICMP pass",
        Drop::ConntrackFull => "the table of connections is full; see `weft status`",
        Drop::MeterFull => "the metering table is full; see `weft status`",
        Drop::NoBackend => "the service has no ready backend; see `weft services`",
        Drop::StorageFull => "the kernel had no memory for the connection's destination; see `weft status`",
        Drop::ReservedPort => {
            "ports 15001, 15006 and 15008 are the agent's own; the application must use another port"
        }
        Drop::AgentPort => "the agent's ports cannot be dialled; use the service's own port",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::{MESH, snapshot};
    use weft_policy::model::cidr::addr;

    #[test]
    fn a_refused_flow_is_named_and_explained() {
        let snapshot = snapshot(MESH);
        let at = |text: &str| addr(text.parse().expect("an address"));
        let number = |text: &str| snapshot.tables.endpoints[&at(text)].identity;
        let event = Event {
            src: at("10.0.0.2"),
            dst: at("10.0.1.1"),
            source: number("10.0.0.2"),
            destination: number("10.0.1.1"),
            dst_port: 5433,
            protocol: 6,
            hook: event::TO_WORKLOAD,
            reason: Drop::Policy as u8,
            rule: *snapshot.tables.rules.keys().next().expect("the policy's rule"),
            ..Event::default()
        };
        let flow = describe(&snapshot, &event);
        assert_eq!((flow.from.workload.as_str(), flow.to.workload.as_str()), ("shop/lost", "shop/db"));
        assert_eq!(flow.from.identity, "spiffe://cluster.local/ns/shop/sa/lost");
        assert_eq!((flow.verdict.as_str(), flow.what.as_str()), ("denied", "dropped"));
        assert!(flow.policy.contains("shop/db"), "{flow:?}");
        assert!(flow.detail.contains(';'), "what would have allowed it is missing: {}", flow.detail);
        // A connect hook knows no source address yet.
        let web = number("10.0.0.1");
        let early = describe(
            &snapshot,
            &Event { src: addr("::".parse().expect("an address")), source: web, ..event },
        );
        assert_eq!(early.from.workload, "shop/web");
        // A packet that merely carries the address of a workload is not from it.
        let forged = describe(&snapshot, &Event { source: ANONYMOUS, ..event });
        assert_eq!((forged.from.workload.as_str(), forged.from.identity.as_str()), ("", ""));
    }
}
