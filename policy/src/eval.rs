//! The verdict on one flow, worked out slowly from the model, with its reason in words.
//!
//! This is the reference for [`crate::compile()`], the check of the tunnel's inbound side (where the source is whoever
//! its certificate names, known here or not), and the voice of `weft policy explain`. Order, as Istio's: a policy that
//! cannot be enforced, then STRICT, then DENY, then ALLOW.

use crate::error::ObjectRef;
use crate::model::{Identity, Model, Named, SpiffeId};
use crate::source::rule::{Facts, Match};
use crate::source::{Action, AuthorizationPolicy};
use crate::tables::{RuleAction, RuleRef};
use std::net::IpAddr;
use weft_datapath::policy::Mode;

/// Who opens the flow, and how that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer<'a> {
    /// In clear, from nobody that the kernel vouches for.
    Anonymous,
    /// A process of the node itself.
    Node,
    /// Proven by certificate, or by the kernel on one node.
    Workload(&'a SpiffeId),
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flow<'a> {
    pub source: Peer<'a>,
    pub source_addr: IpAddr,
    pub destination: &'a Identity,
    /// 0 for protocols without ports.
    pub port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Allow,
    Deny,
    /// Only HTTP can tell: refused unless the HTTP engine is in the path.
    Http,
}

/// A verdict and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub verdict: Verdict,
    /// The rule that decided; `None` for a default.
    pub rule: Option<RuleRef>,
    /// One sentence.
    pub reason: String,
    /// Where the flow is refused: one sentence on what would have allowed it.
    pub remedy: Option<String>,
}

impl Model {
    /// Decides one flow.
    pub fn eval(&self, flow: &Flow<'_>) -> Decision {
        let destination = flow.destination;
        if flow.source == Peer::Node && self.probe_ports(destination).contains(&flow.port) {
            return allow(None, "the node may reach declared probe ports".into());
        }
        if let Some(blocked) = self.blocked_by(destination) {
            let name = blocked
                .object
                .as_ref()
                .map_or_else(|| "a policy without a name".to_owned(), ObjectRef::to_string);
            let place = format!("{}:{}", blocked.origin.file, blocked.origin.line);
            let object = blocked_object(blocked.object.as_ref());
            let rule = RuleRef { object, action: RuleAction::Blocked, index: None };
            let remedy = format!("repair or remove {name} in {place}");
            return deny(
                Some(rule),
                format!("{name} selects the destination and cannot be enforced"),
                remedy,
            );
        }
        let id = match flow.source {
            Peer::Workload(id) => Some(id),
            Peer::Anonymous | Peer::Node => None,
        };
        let (mode, by) = self.modes(destination).at(flow.port);
        if id.is_none() && mode == Mode::Strict {
            let rule =
                by.map(|object| RuleRef { object: object.clone(), action: RuleAction::Strict, index: None });
            let by = by.map_or_else(|| "--default-deny".to_owned(), ObjectRef::to_string);
            let reason =
                format!("port {} is STRICT by {by}, and the source has no proven identity", flow.port);
            return deny(
                rule,
                reason,
                "enrol the source, or make the port PERMISSIVE in a PeerAuthentication".into(),
            );
        }
        let facts = Facts {
            source: id,
            trust_domain: &self.settings.trust_domain,
            source_in: &|cidr| cidr.contains(flow.source_addr),
            destination: self.addresses(destination),
            port: flow.port,
        };
        let (allow, deny): (Vec<_>, Vec<_>) =
            self.authorizations(destination).partition(|named| named.policy.action == Action::Allow);
        self.combine(flow, best(&deny, &facts), allow.first().copied(), best(&allow, &facts))
    }

    /// DENY first, then ALLOW.
    fn combine(
        &self,
        flow: &Flow<'_>,
        denied: Best,
        first: Option<&Named<AuthorizationPolicy>>,
        allowed: Best,
    ) -> Decision {
        if let (Match::Yes, Some(rule)) = denied {
            let remedy = format!(
                "change {} rules[{}] so that it does not match",
                rule.object,
                rule.index.unwrap_or(0)
            );
            return deny(Some(rule), "a DENY rule matches".into(), remedy);
        }
        let allowed = match first {
            None => ((!self.settings.default_deny).into(), None),
            Some(_) => allowed,
        };
        match (denied.0, allowed.0) {
            (_, Match::No) => {
                let wanted = format!(
                    "an ALLOW rule with {} and to.operation.ports [\"{}\"]",
                    describe(flow),
                    flow.port
                );
                match first {
                    None => deny(
                        None,
                        "no ALLOW policy selects the destination, and the default is to refuse".into(),
                        wanted,
                    ),
                    Some(named) => {
                        let object = named.object.clone();
                        let reason = format!(
                            "no rule of the destination's ALLOW policies matches; the first is {object}"
                        );
                        deny(
                            Some(RuleRef { object, action: RuleAction::NoneAllowed, index: None }),
                            reason,
                            wanted,
                        )
                    }
                }
            }
            (Match::Undecided, _) => http(denied.1),
            (_, Match::Undecided) => http(allowed.1),
            (_, Match::Yes) if first.is_none() => {
                allow(None, "no ALLOW policy selects the destination".into())
            }
            (_, Match::Yes) => allow(allowed.1, "an ALLOW rule matches".into()),
        }
    }
}

/// Stands for a policy whose name could not be read.
pub(crate) fn blocked_object(object: Option<&ObjectRef>) -> ObjectRef {
    let unknown = || ObjectRef { kind: "policy".into(), namespace: "".into(), name: "unreadable".into() };
    object.cloned().unwrap_or_else(unknown)
}

/// How well a set of rules matched, and the rule that did.
type Best = (Match, Option<RuleRef>);

/// The best match of any rule, and the first rule that has it.
fn best(policies: &[&Named<AuthorizationPolicy>], facts: &Facts<'_>) -> Best {
    let mut best = (Match::No, None);
    for named in policies {
        for (index, rule) in named.policy.rules.iter().enumerate() {
            let matched = rule.matches(facts);
            if matched > best.0 {
                let action = named.policy.action.into();
                best = (
                    matched,
                    Some(RuleRef { object: named.object.clone(), action, index: Some(index as u32) }),
                );
            }
        }
    }
    best
}

fn describe(flow: &Flow<'_>) -> String {
    match flow.source {
        Peer::Workload(id) => format!("from.source.principals [{:?}]", id.principal()),
        Peer::Anonymous | Peer::Node => {
            format!("from.source.ipBlocks [\"{}\"] (the source has no proven identity)", flow.source_addr)
        }
    }
}

fn allow(rule: Option<RuleRef>, reason: String) -> Decision {
    Decision { verdict: Verdict::Allow, rule, reason, remedy: None }
}

fn deny(rule: Option<RuleRef>, reason: String, remedy: String) -> Decision {
    Decision { verdict: Verdict::Deny, rule, reason, remedy: Some(remedy) }
}

fn http(rule: Option<RuleRef>) -> Decision {
    let remedy = "an ALLOW rule without HTTP attributes that matches, or the HTTP engine".to_owned();
    let reason =
        "the verdict depends on HTTP (or on which of its addresses the destination was reached by), and \
                  nothing in the path can tell"
            .to_owned();
    Decision { verdict: Verdict::Http, rule, reason, remedy: Some(remedy) }
}
