//! Which ports and messages a rule of Cilium is about, and whether HTTP must be seen on them.

use crate::model::layer::{HttpMatch, PortMatch, Ports, icmp_port};
use crate::request::anchored;
use crate::source::core::{SCTP, TCP, UDP};
use crate::source::fields::{At, Fields, Findings};
use crate::source::selector;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Types of ICMP by the names that Cilium gives them (IANA, "ICMP Parameters" and "ICMPv6 Parameters").
const TYPES: &[(&str, u8, u8)] = &[
    ("EchoReply", ICMP, 0),
    ("DestinationUnreachable", ICMP, 3),
    ("Redirect", ICMP, 5),
    ("Echo", ICMP, 8),
    ("EchoRequest", ICMP, 8),
    ("RouterAdvertisement", ICMP, 9),
    ("RouterSelection", ICMP, 10),
    ("TimeExceeded", ICMP, 11),
    ("ParameterProblem", ICMP, 12),
    ("Timestamp", ICMP, 13),
    ("TimestampReply", ICMP, 14),
    ("DestinationUnreachable", ICMPV6, 1),
    ("PacketTooBig", ICMPV6, 2),
    ("TimeExceeded", ICMPV6, 3),
    ("ParameterProblem", ICMPV6, 4),
    ("EchoRequest", ICMPV6, 128),
    ("EchoReply", ICMPV6, 129),
    ("MulticastListenerQuery", ICMPV6, 130),
    ("MulticastListenerReport", ICMPV6, 131),
    ("MulticastListenerDone", ICMPV6, 132),
    ("RouterSolicitation", ICMPV6, 133),
    ("RouterAdvertisement", ICMPV6, 134),
    ("NeighborSolicitation", ICMPV6, 135),
    ("NeighborAdvertisement", ICMPV6, 136),
    ("RedirectMessage", ICMPV6, 137),
];

/// Ports, each list with the requests that may be made on it. `None`: the rule names none.
pub(super) fn read(
    fields: &mut Fields<'_>,
    denies: bool,
    out: &mut Findings,
) -> Option<Vec<(Vec<PortMatch>, Vec<HttpMatch>)>> {
    let lists = fields.items("toPorts", out);
    let icmps = fields.take("icmps").filter(|at| !at.items(&mut Findings::default()).is_empty());
    if let Some(at) = &icmps {
        if !lists.is_empty() {
            out.error(at, "cannot be combined with toPorts; write two rules");
        }
        let mut messages = Vec::new();
        for at in at.items(out) {
            let mut fields = at.fields(out);
            messages.extend(fields.items("fields", out).iter().filter_map(|at| message(at, out)));
            fields.finish(out);
        }
        return Some(vec![(messages, Vec::new())]);
    }
    if lists.is_empty() {
        return None;
    }
    Some(lists.iter().map(|at| port_rule(at, denies, out)).collect())
}

fn message(at: &At<'_>, out: &mut Findings) -> Option<PortMatch> {
    let mut fields = at.fields(out);
    let protocol = match fields.take("family") {
        None => Some(ICMP),
        Some(at) => match at.text(out).as_deref() {
            Some("IPv4") => Some(ICMP),
            Some("IPv6") => Some(ICMPV6),
            Some(other) => {
                out.error(&at, format!("no family {other:?}; use IPv4 or IPv6"));
                None
            }
            None => None,
        },
    };
    let kind = fields.take("type");
    fields.finish(out);
    let (protocol, Some(at)) = (protocol?, kind) else {
        out.error(at, "`type` is missing; name the ICMP type");
        return None;
    };
    let text = at.text(out)?;
    let by_name =
        TYPES.iter().find(|(name, of, _)| *name == text && *of == protocol).map(|(_, _, kind)| *kind);
    let kind = match by_name {
        Some(kind) => kind,
        None if text.parse::<u64>().is_ok() => at.number(0, 255, out)? as u8,
        None => {
            let names: Vec<_> =
                TYPES.iter().filter(|(_, of, _)| *of == protocol).map(|(name, ..)| *name).collect();
            out.error(&at, format!("no ICMP type {text:?}; use 0 to 255, or {}", names.join(", ")));
            return None;
        }
    };
    Some(selector::range(protocol, icmp_port(kind), icmp_port(kind)))
}

/// One item of `toPorts`.
fn port_rule(at: &At<'_>, denies: bool, out: &mut Findings) -> (Vec<PortMatch>, Vec<HttpMatch>) {
    let mut fields = at.fields(out);
    let items = fields.items("ports", out);
    if items.is_empty() {
        out.error(at, "`ports` is missing; write port \"0\" for all");
    }
    let ports: Vec<PortMatch> = items.iter().flat_map(|at| port(at, out)).collect();
    let mut http = Vec::new();
    if !denies {
        for (name, message) in [
            ("terminatingTLS", "TLS of workloads is not opened here; remove it"),
            ("originatingTLS", "TLS of workloads is not opened here; remove it"),
            ("serverNames", "names inside TLS are not enforceable; use endpoints or CIDRs"),
            ("listener", "an Envoy listener is not known here; remove it"),
        ] {
            if let Some(at) = fields.take(name) {
                out.error(&at, message);
            }
        }
        if let Some(rules) = fields.take("rules") {
            http = l7(&rules, out);
            let plain = |port: &PortMatch| port.protocol == Some(TCP) && port.ports != Ports::All;
            if !http.is_empty() && !ports.iter().all(plain) {
                out.error(
                    &rules,
                    "HTTP is looked for on TCP only; give each port a number or a name and protocol TCP",
                );
            }
        }
    }
    fields.finish(out);
    (ports, http)
}

fn l7(at: &At<'_>, out: &mut Findings) -> Vec<HttpMatch> {
    let mut fields = at.fields(out);
    for (name, message) in [
        ("kafka", "Kafka is not enforceable; allow the port, or remove the rule"),
        ("dns", "DNS is not enforceable; allow port 53, or remove the rule"),
        ("l7proto", "parsers of other protocols are not known here; allow the port, or remove the rule"),
        ("l7", "parsers of other protocols are not known here; allow the port, or remove the rule"),
    ] {
        if let Some(at) = fields.take(name) {
            out.error(&at, message);
        }
    }
    let list = fields.take("http");
    fields.finish(out);
    let Some(list) = list else { return Vec::new() };
    let items = list.items(out);
    if items.is_empty() {
        out.error(&list, "an empty list is ambiguous; write `{}` for any request, or leave it out");
    }
    items.iter().map(|at| request(at, out)).collect()
}

fn request(at: &At<'_>, out: &mut Findings) -> HttpMatch {
    let mut fields = at.fields(out);
    let mut request = HttpMatch {
        method: expression(&mut fields, "method", out),
        path: expression(&mut fields, "path", out),
        host: expression(&mut fields, "host", out),
        headers: Vec::new(),
    };
    for text in fields.texts("headers", out) {
        let (name, value) = text.split_once(':').map_or((&*text, None), |(name, value)| (name, Some(value)));
        request.headers.push((name.trim().to_owned(), value.map(|value| value.trim().to_owned())));
    }
    for at in fields.items("headerMatches", out) {
        let mut header = at.fields(out);
        let name = header.text("name", out).filter(|name| !name.is_empty());
        if name.is_none() {
            out.error(&at, "`name` is missing");
        }
        let value = header.text("value", out);
        request.headers.extend(name.map(|name| (name, value)));
        for (name, message) in [
            ("mismatch", "requests are not changed here; leave it out, so that a mismatch is refused"),
            ("secret", "secrets are not read here; use value"),
        ] {
            if let Some(at) = header.take(name) {
                out.error(&at, message);
            }
        }
        header.finish(out);
    }
    fields.finish(out);
    request
}

/// A regular expression; the empty one asks for nothing.
fn expression(fields: &mut Fields<'_>, name: &'static str, out: &mut Findings) -> Option<String> {
    let at = fields.take(name)?;
    let text = at.text(out).filter(|text| !text.is_empty())?;
    if anchored(&text).is_err() {
        out.error(
            &at,
            format!(
                "{text:?} is no regular expression; close every bracket, and escape what is meant as text"
            ),
        );
    }
    Some(text)
}

/// One item of `ports`: port 0 is any, and no protocol is any with ports.
fn port(at: &At<'_>, out: &mut Findings) -> Vec<PortMatch> {
    let mut fields = at.fields(out);
    let protocols = match fields.take("protocol") {
        None => Some(None),
        Some(at) => protocol(&at, out),
    };
    let (port, end) = (fields.take("port"), fields.take("endPort"));
    fields.finish(out);
    let Some(port) = port else {
        out.error(at, "`port` is missing; write \"0\" for all");
        return Vec::new();
    };
    let (Some(protocol), Some(text)) = (protocols, port.text(out)) else { return Vec::new() };
    let each = |one: &dyn Fn(u8) -> PortMatch| match protocol {
        Some(protocol) => vec![one(protocol)],
        None => [TCP, UDP, SCTP].map(one).to_vec(),
    };
    if text.parse::<u64>().is_err() {
        if let Some(end) = end {
            out.error(&end, "a range cannot begin at the name of a port; use numbers");
        }
        let name = selector::port_name(&text.to_ascii_lowercase(), &port, out);
        return name.map(|name| each(&|protocol| selector::named(protocol, &name))).unwrap_or_default();
    }
    match (port.number(0, 65535, out).map(|number| number as u16), end) {
        (None, _) => Vec::new(),
        (Some(0), None) => match protocol {
            Some(protocol) => vec![selector::all_of(protocol)],
            None => vec![PortMatch::ALL],
        },
        (Some(0), Some(end)) => {
            out.error(&end, "a range cannot begin at port 0; begin at 1");
            Vec::new()
        }
        (Some(first), None) => each(&|protocol| selector::range(protocol, first, first)),
        (Some(first), Some(end)) => {
            let last = end.number(0, 65535, out).map(|last| last as u16);
            match last {
                Some(0) => each(&|protocol| selector::range(protocol, first, first)),
                Some(last) if last >= first => each(&|protocol| selector::range(protocol, first, last)),
                Some(_) => {
                    out.error(&end, format!("the range ends before it begins, at {first}"));
                    Vec::new()
                }
                None => Vec::new(),
            }
        }
    }
}

/// `Some(None)`: any protocol with ports. Cilium takes small letters too.
fn protocol(at: &At<'_>, out: &mut Findings) -> Option<Option<u8>> {
    let text = at.text(out)?.to_ascii_uppercase();
    match text.as_str() {
        "" | "ANY" => Some(None),
        "ICMP" | "ICMPV6" => {
            out.error(at, "messages have no ports; use icmps");
            None
        }
        name => match selector::named_protocol(name) {
            Some(protocol) => Some(Some(protocol)),
            None => {
                out.error(at, format!("no protocol {text:?}; use TCP, UDP, SCTP or ANY"));
                None
            }
        },
    }
}
