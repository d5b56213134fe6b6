//! Network policy in the one form that all its languages have in common: Kubernetes `NetworkPolicy`, Cilium's policies, and
//! the administrator's `AdminNetworkPolicy`, `BaselineAdminNetworkPolicy` and `ClusterNetworkPolicy`.
//!
//! A policy has a subject and rules; a rule has a direction, an action, peers and ports. In each direction all policies
//! that select a subject are evaluated by [`Tier`]:
//!
//! | tier | verdict |
//! |---|---|
//! | [`Tier::Admin`] | lower priority number first, then rules in order: the first match decides; `Pass` goes on |
//! | [`Tier::Network`] | where a policy isolates the subject: allowed if any rule matches, else denied |
//! | [`Tier::Baseline`] | as admin, for subjects that no policy of the former tier isolates |
//! | [`Tier::Cilium`] | a layer of its own: a deny that matches, else an allow that matches, else denied if isolated |
//!
//! The first three are one layer, Cilium another, and a flow must pass all layers.

use super::selector::{LabelSelector, NAMESPACE_NAME, SERVICE_ACCOUNT};
use super::{Cidr, Identity, SpiffeId};
use crate::request::{Request, whole};
use crate::source::rule::Match;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Labels of the namespaces that have an object.
pub type Namespaces = BTreeMap<Arc<str>, BTreeMap<String, String>>;

/// Which of a subject's flows: those that come to it, or those that it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

/// One `spec` of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    pub tier: Tier,
    /// Position of the `spec` in its object.
    pub spec: u32,
    pub subject: PodSet,
    /// Where no rule allows, flows to the subject are denied. Only in [`Tier::Network`] and [`Tier::Cilium`].
    pub isolates_ingress: bool,
    /// Where no rule allows, flows from the subject are denied.
    pub isolates_egress: bool,
    /// In the order of the object, each direction by itself.
    pub rules: Vec<NetworkRule>,
}

/// Where a policy stands among others; ordered as evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// The lower number goes first; equal numbers go by name.
    Admin {
        priority: i32,
    },
    Network,
    Baseline {
        priority: i32,
    },
    Cilium,
}

impl Tier {
    /// Is the order of its policies said by a number?
    pub fn has_priority(&self) -> bool {
        matches!(self, Tier::Admin { .. } | Tier::Baseline { .. })
    }
}

/// Pods, by labels of their namespace and of their own. Empty selectors select all.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodSet {
    /// Every namespace has the label [`NAMESPACE_NAME`], with or without an object.
    pub namespaces: LabelSelector,
    /// Every pod has the label [`SERVICE_ACCOUNT`].
    pub pods: LabelSelector,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkRule {
    pub direction: Direction,
    pub action: RuleVerdict,
    /// One must match. Empty: the rule matches nobody.
    pub peers: Vec<PeerMatch>,
    /// One must match. Empty: the rule matches nothing.
    pub ports: Vec<PortMatch>,
    /// Where peers and ports match, one of these must hold too, which only the HTTP engine can tell. Empty: nothing is
    /// asked of HTTP.
    pub http: Vec<HttpMatch>,
    /// The list it stands in.
    pub list: RuleList,
    /// Position in that list, counted through all specs of the object.
    pub index: u32,
    /// Line of its begin.
    pub line: u32,
}

/// A request, as Cilium writes it: extended POSIX expressions over the whole text. What is absent asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HttpMatch {
    pub method: Option<String>,
    pub path: Option<String>,
    pub host: Option<String>,
    /// Names, each with its value or, without one, present with any.
    pub headers: Vec<(String, Option<String>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleVerdict {
    Allow,
    Deny,
    /// On to the next tier; in [`Tier::Admin`] only.
    Pass,
}

/// A list of rules in an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleList {
    Rules,
    Ingress,
    Egress,
    IngressDeny,
    EgressDeny,
}

impl RuleList {
    /// As the field is called.
    pub fn name(self) -> &'static str {
        match self {
            RuleList::Rules => "rules",
            RuleList::Ingress => "ingress",
            RuleList::Egress => "egress",
            RuleList::IngressDeny => "ingressDeny",
            RuleList::EgressDeny => "egressDeny",
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerMatch {
    /// Anybody, known or not.
    Any,
    /// Enrolled workloads.
    Pods(PodSet),
    /// Addresses in a range and in none of its exceptions.
    Addresses {
        range: Cidr,
        except: Vec<Cidr>,
        /// Workloads and the node too (Kubernetes `ipBlock`), or only who is neither (Cilium's CIDRs).
        inside: bool,
    },
    /// Whoever is neither a workload nor the node (Cilium's `world`).
    World,
    /// The node's own processes (Cilium's `host`).
    Node,
    /// Workloads and the node (Cilium's `cluster`).
    Cluster,
}

/// What is asked of the destination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortMatch {
    /// IP protocol number; `None` with [`Ports::All`] only.
    pub protocol: Option<u8>,
    pub ports: Ports,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ports {
    /// Every port, and protocols without ports.
    All,
    /// First and last of a range, 1 or more. For ICMP and ICMPv6 a type is the port [`icmp_port`].
    Range(u16, u16),
    /// A port of the destination pod's containers. Matches no destination that is not a workload.
    Named(String),
}

/// How an ICMP type stands where others have a port: 0 is "any".
pub const fn icmp_port(kind: u8) -> u16 {
    kind as u16 + 1
}

impl PortMatch {
    pub const ALL: PortMatch = PortMatch { protocol: None, ports: Ports::All };
}

impl PodSet {
    /// Pods of one namespace.
    pub fn in_namespace(namespace: &str, pods: LabelSelector) -> PodSet {
        PodSet { namespaces: LabelSelector::equal(NAMESPACE_NAME, namespace), pods }
    }

    /// Every workload there is, or could be.
    pub fn is_all(&self) -> bool {
        self.namespaces.is_empty() && self.pods.is_empty()
    }

    pub fn selects_namespace(&self, namespaces: &Namespaces, namespace: &str) -> bool {
        let labels = namespaces.get(namespace);
        self.namespaces.matches(|key| match key {
            NAMESPACE_NAME => Some(namespace),
            _ => labels?.get(key).map(String::as_str),
        })
    }

    pub fn selects(&self, namespaces: &Namespaces, identity: &Identity) -> bool {
        self.selects_namespace(namespaces, &identity.spiffe.namespace) && self.selects_labels(identity)
    }

    pub(crate) fn selects_labels(&self, identity: &Identity) -> bool {
        self.pods.matches(|key| match key {
            SERVICE_ACCOUNT => Some(&identity.spiffe.service_account),
            _ => identity.labels.get(key).map(String::as_str),
        })
    }
}

/// Who is at one end of a flow, as far as it is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer<'a> {
    /// Nobody that the kernel or a certificate vouches for: outside of the mesh.
    Anonymous,
    /// A process of the node itself.
    Node,
    /// Proven by the kernel, or by a certificate and the address of a known workload.
    Workload(&'a Identity),
    /// Named by a certificate alone, which says nothing of labels.
    Certified(&'a SpiffeId),
}

impl<'a> Peer<'a> {
    /// As whom it is proven.
    pub(crate) fn spiffe(self) -> Option<&'a SpiffeId> {
        match self {
            Peer::Workload(identity) => Some(&identity.spiffe),
            Peer::Certified(id) => Some(id),
            Peer::Anonymous | Peer::Node => None,
        }
    }
}

/// What a rule may ask about a flow.
pub struct NetworkFacts<'a> {
    pub peer: Peer<'a>,
    /// Is the peer's address in this range?
    pub address_in: &'a dyn Fn(&Cidr) -> bool,
    pub namespaces: &'a Namespaces,
    pub protocol: u8,
    /// Is the port in this range?
    pub port_in: &'a dyn Fn(u16, u16) -> bool,
    /// Is the port the one that the destination's pods call so? Undecided where they differ.
    pub port_named: &'a dyn Fn(&str) -> Match,
    /// What HTTP shows, if anybody looks.
    pub request: Option<&'a Request>,
}

impl HttpMatch {
    fn matches(&self, request: &Request) -> bool {
        let holds = |wanted: &Option<String>, text: &str| {
            wanted.as_ref().is_none_or(|expression| whole(expression, text))
        };
        holds(&self.method, &request.method)
            && holds(&self.path, &request.path)
            && holds(&self.host, &request.host)
            && self.headers.iter().all(|(name, wanted)| {
                let value = request.header(name);
                value.is_some_and(|value| wanted.as_ref().is_none_or(|wanted| *wanted == value))
            })
    }
}

impl NetworkPolicy {
    pub fn isolates(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.isolates_ingress,
            Direction::Egress => self.isolates_egress,
        }
    }
}

impl NetworkRule {
    pub fn matches(&self, facts: &NetworkFacts<'_>) -> Match {
        let http = match facts.request {
            _ if self.http.is_empty() => Match::Yes,
            None => Match::Undecided,
            Some(request) => self.http.iter().any(|http| http.matches(request)).into(),
        };
        self.matches_connection(facts).min(http)
    }

    /// Does it want HTTP to be asked about this connection? Then what it allows is all that is allowed there, whether the policy
    /// isolates or not ("EnableDefaultDeny does not apply to layer-7 policy": Cilium, Policy Enforcement Modes).
    pub(crate) fn asks_http(&self, facts: &NetworkFacts<'_>) -> bool {
        self.action == RuleVerdict::Allow
            && !self.http.is_empty()
            && self.matches_connection(facts) != Match::No
    }

    /// Does it match, as far as HTTP is not asked?
    pub(crate) fn matches_connection(&self, facts: &NetworkFacts<'_>) -> Match {
        let peers = self.peers.iter().map(|peer| peer.matches(facts)).max().unwrap_or(Match::No);
        let ports = self.ports.iter().map(|port| port.matches(facts)).max().unwrap_or(Match::No);
        peers.min(ports)
    }
}

impl PeerMatch {
    fn matches(&self, facts: &NetworkFacts<'_>) -> Match {
        let outside = facts.peer == Peer::Anonymous;
        let held = match self {
            PeerMatch::Any => true,
            PeerMatch::World => outside,
            PeerMatch::Node => facts.peer == Peer::Node,
            PeerMatch::Cluster => !outside,
            PeerMatch::Addresses { range, except, inside } => {
                let mut except = except.iter();
                (outside || *inside)
                    && (facts.address_in)(range)
                    && !except.any(|range| (facts.address_in)(range))
            }
            PeerMatch::Pods(pods) => match facts.peer {
                Peer::Anonymous | Peer::Node => false,
                Peer::Workload(identity) => pods.selects(facts.namespaces, identity),
                Peer::Certified(id) => {
                    if !pods.selects_namespace(facts.namespaces, &id.namespace) {
                        false
                    } else if pods.pods.is_empty() {
                        true
                    } else {
                        return Match::Undecided;
                    }
                }
            },
        };
        held.into()
    }
}

impl PortMatch {
    fn matches(&self, facts: &NetworkFacts<'_>) -> Match {
        if self.protocol.is_some_and(|protocol| protocol != facts.protocol) {
            return Match::No;
        }
        match &self.ports {
            Ports::All => Match::Yes,
            Ports::Range(first, last) => (facts.port_in)(*first, *last).into(),
            Ports::Named(name) => (facts.port_named)(name),
        }
    }
}
