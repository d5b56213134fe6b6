//! Label selectors, and the ports and address ranges that the network policy languages share.

use super::core::{SCTP, TCP, UDP};
use super::fields::{At, Fields, Findings};
use crate::model::Cidr;
use crate::model::layer::{PortMatch, Ports};
use crate::model::selector::{LabelSelector, Operator, Requirement};
use std::collections::BTreeSet;

/// `matchLabels` and `matchExpressions`.
pub(super) fn labels(at: &At<'_>, out: &mut Findings) -> LabelSelector {
    let mut fields = at.fields(out);
    let equal = fields.labels("matchLabels", out);
    let items = fields.items("matchExpressions", out);
    let expressions = items.iter().filter_map(|at| expression(at, out)).collect();
    fields.finish(out);
    LabelSelector { equal, expressions }
}

fn expression(at: &At<'_>, out: &mut Findings) -> Option<Requirement> {
    let mut fields = at.fields(out);
    let name = fields.take("key");
    let operator = fields.take("operator");
    let list = fields.take("values");
    fields.finish(out);
    let values: BTreeSet<String> =
        list.as_ref().map(|at| at.texts(out)).unwrap_or_default().into_iter().collect();
    let Some(name) = name else {
        out.error(at, "`key` is missing");
        return None;
    };
    let text = name.text(out)?;
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        out.error(&name, format!("{text:?} is no name of a label"));
        return None;
    }
    let Some(operator) = operator else {
        out.error(at, "`operator` is missing; use In, NotIn, Exists or DoesNotExist");
        return None;
    };
    let word = operator.text(out)?;
    let some = !values.is_empty();
    let operator = match (word.as_str(), some) {
        ("In", true) => Operator::In(values),
        ("NotIn", true) => Operator::NotIn(values),
        ("Exists", false) => Operator::Exists,
        ("DoesNotExist", false) => Operator::DoesNotExist,
        ("In" | "NotIn", false) => {
            out.error(at, format!("`values` is missing; {word} compares with at least one"));
            return None;
        }
        ("Exists" | "DoesNotExist", true) => {
            out.error(list.as_ref().unwrap_or(at), format!("{word} takes no values; remove them"));
            return None;
        }
        _ => {
            out.error(&operator, format!("no operator {word:?}; use In, NotIn, Exists or DoesNotExist"));
            return None;
        }
    };
    Some(Requirement { key: text, operator })
}

/// An address range, which these languages never write as a single address.
pub(super) fn cidr(at: &At<'_>, out: &mut Findings) -> Option<Cidr> {
    let text = at.text(out)?;
    let parsed = match text.parse::<Cidr>() {
        Ok(_) if !text.contains('/') => {
            Err(format!("{text:?} is no address range; add the length of its prefix"))
        }
        parsed => parsed,
    };
    parsed.map_err(|message| out.error(at, message)).ok()
}

/// Ranges that a range leaves out; each must be a part of it.
pub(super) fn except(fields: &mut Fields<'_>, cidr: Option<Cidr>, out: &mut Findings) -> Vec<Cidr> {
    let mut except = Vec::new();
    for at in fields.items("except", out) {
        let Some(range) = self::cidr(&at, out) else { continue };
        match cidr {
            Some(cidr) if !cidr.covers(&range) || cidr == range => {
                out.error(
                    &at,
                    format!("{range} is no part of {cidr}; leave out what lies inside, and less than all"),
                );
            }
            _ => except.push(range),
        }
    }
    except
}

/// A protocol with ports. Kubernetes takes TCP where none is given.
pub(super) fn protocol(fields: &mut Fields<'_>, out: &mut Findings) -> Option<u8> {
    let Some(at) = fields.take("protocol") else { return Some(TCP) };
    let text = at.text(out)?;
    let number = named_protocol(&text);
    if number.is_none() {
        out.error(&at, format!("no protocol {text:?}; use TCP, UDP or SCTP"));
    }
    number
}

pub(super) fn named_protocol(text: &str) -> Option<u8> {
    match text {
        "TCP" => Some(TCP),
        "UDP" => Some(UDP),
        "SCTP" => Some(SCTP),
        _ => None,
    }
}

pub(super) fn all_of(protocol: u8) -> PortMatch {
    PortMatch { protocol: Some(protocol), ports: Ports::All }
}

pub(super) fn range(protocol: u8, first: u16, last: u16) -> PortMatch {
    PortMatch { protocol: Some(protocol), ports: Ports::Range(first, last) }
}

pub(super) fn named(protocol: u8, name: &str) -> PortMatch {
    PortMatch { protocol: Some(protocol), ports: Ports::Named(name.to_owned()) }
}

/// A port by its name only; a name belongs to one port of one protocol.
pub(super) fn named_of_any(name: &str) -> impl Iterator<Item = PortMatch> {
    [TCP, UDP, SCTP].into_iter().map(move |protocol| named(protocol, name))
}

/// The end of a range that begins at `first`.
pub(super) fn last(at: &At<'_>, first: u16, out: &mut Findings) -> Option<u16> {
    let last = at.port(out)?;
    if last < first {
        out.error(at, format!("the range ends before it begins, at {first}"));
        return None;
    }
    Some(last)
}

/// The name of a container port: a service name of IANA (RFC 6335, section 5.1), in small letters.
pub(super) fn port_name(text: &str, at: &At<'_>, out: &mut Findings) -> Option<String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let fits = (1..=15).contains(&text.len())
        && text.bytes().all(plain)
        && text.bytes().any(|b| b.is_ascii_lowercase())
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.contains("--");
    if !fits {
        let message = format!(
            "{text:?} is neither a port from 1 to 65535 nor the name of one (at most 15 small letters, digits and \
             single '-', one of them a letter)"
        );
        out.error(at, message);
        return None;
    }
    Some(text.to_owned())
}
