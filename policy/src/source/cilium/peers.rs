//! Whom a rule of Cilium is about: endpoints by labels, entities, addresses.

use super::scoped;
use crate::error::Severity;
use crate::model::cidr::Cidr;
use crate::model::layer::{Direction, PeerMatch, PodSet};
use crate::model::selector::{LabelSelector, NAMESPACE_NAME, Operator, Requirement};
use crate::source::fields::{At, Fields, Findings};
use crate::source::selector;
use std::collections::BTreeSet;

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const CLUSTER: &str = "io.cilium.k8s.policy.cluster";

/// The fields that name peers, ingress and egress; of each rule only one may be given.
const FIELDS: [[&str; 8]; 2] = [
    [
        "fromEndpoints",
        "fromEntities",
        "fromCIDR",
        "fromCIDRSet",
        "fromRequires",
        "fromNodes",
        "fromGroups",
        "",
    ],
    ["toEndpoints", "toEntities", "toCIDR", "toCIDRSet", "toRequires", "toNodes", "toGroups", "toServices"],
];

/// `None`: the rule names nobody. An empty list names nobody too, and is meant to.
pub(super) fn read(
    fields: &mut Fields<'_>,
    direction: Direction,
    denies: bool,
    namespace: Option<&str>,
    out: &mut Findings,
) -> Option<Vec<PeerMatch>> {
    let [endpoints, entities, cidr, cidr_set, requires, nodes, groups, services] = FIELDS[direction as usize];
    let mut unknown = vec![
        (requires, "is no longer part of Cilium; add the requirement to each rule"),
        (nodes, "the labels and addresses of nodes are not known here; use CIDRs"),
        (groups, "the groups of a cloud are not known here; use CIDRs"),
    ];
    if direction == Direction::Egress {
        unknown
            .push((services, "a service is not a peer here; select the endpoints behind it, or their CIDRs"));
        unknown.push(("toFQDNs", "names are not enforceable, only addresses are; use toCIDR"));
    }
    let mut refused = false;
    for (name, message) in unknown {
        if let Some(at) = fields.take(name) {
            out.error(&at, message);
            refused = true;
        }
    }
    let mut given: Option<(&str, Vec<PeerMatch>)> = None;
    for (index, name) in [endpoints, entities, cidr, cidr_set].into_iter().enumerate() {
        let Some(list) = fields.take(name) else { continue };
        let items = list.items(out);
        if items.is_empty() {
            out.add(Severity::Warning, list.node.line, &list.path, "an empty list names nobody");
        }
        let one = |at: &At<'_>, out: &mut Findings| match index {
            0 => endpoint(at, namespace, out),
            1 => entity(&at.text(out)?, at, denies, out),
            2 => {
                Some(addresses(at.text(out)?.parse().map_err(|message: String| out.error(at, message)).ok()?))
            }
            _ => cidr_rule(at, out),
        };
        let peers = items.iter().filter_map(|at| one(at, out)).collect();
        match &given {
            Some((first, found)) if !found.is_empty() && !items.is_empty() => {
                out.error(&list, format!("cannot be combined with {first}; write two rules"));
            }
            // An empty list beside another one adds nothing to it.
            Some((_, found)) if !found.is_empty() => {}
            _ => given = Some((name, peers)),
        }
    }
    let nobody = refused.then(Vec::new);
    given.map(|(_, peers)| peers).or(nobody)
}

fn addresses(range: Cidr) -> PeerMatch {
    PeerMatch::Addresses { range, except: Vec::new(), inside: false }
}

fn cidr_rule(at: &At<'_>, out: &mut Findings) -> Option<PeerMatch> {
    let mut fields = at.fields(out);
    for name in ["cidrGroupRef", "cidrGroupSelector"] {
        if let Some(at) = fields.take(name) {
            out.error(&at, "a CiliumCIDRGroup is not known here; write its ranges");
        }
    }
    let range = fields.take("cidr");
    if range.is_none() {
        out.error(at, "`cidr` is missing");
    }
    let range = range.and_then(|at| selector::cidr(&at, out));
    let except = selector::except(&mut fields, range, out);
    fields.finish(out);
    // Only who is no endpoint is known by address (cilium:Documentation, "CIDR based").
    Some(PeerMatch::Addresses { range: range?, except, inside: false })
}

fn entity(name: &str, at: &At<'_>, denies: bool, out: &mut Findings) -> Option<PeerMatch> {
    let every = |text: &str| text.parse().ok().map(addresses);
    match name {
        "all" => Some(PeerMatch::Any),
        "world" => Some(PeerMatch::World),
        "world-ipv4" => every("0.0.0.0/0"),
        "world-ipv6" => every("::/0"),
        "host" => Some(PeerMatch::Node),
        "cluster" if denies => {
            let message =
                "it holds for other nodes too, whose addresses are not known here; deny endpoints and CIDRs";
            out.error(at, message);
            None
        }
        "cluster" => Some(PeerMatch::Cluster),
        "none" => None,
        "remote-node" | "kube-apiserver" | "health" | "init" | "ingress" | "unmanaged" => {
            out.error(at, format!("who is {name:?} is not known here; use CIDRs"));
            None
        }
        other => {
            let known = "all, world, world-ipv4, world-ipv6, cluster, host or none";
            out.error(at, format!("no entity {other:?}; use {known}"));
            None
        }
    }
}

/// Endpoints, in the policy's own namespace unless they are chosen by namespace.
fn endpoint(at: &At<'_>, namespace: Option<&str>, out: &mut Findings) -> Option<PeerMatch> {
    let Chosen { pods, reserved, names_namespaces, .. } = chosen(at, out);
    match reserved {
        None => Some(PeerMatch::Pods(scoped(pods, namespace.filter(|_| !names_namespaces)))),
        Some(name) if matches!(name.as_str(), "all" | "cluster") => {
            out.error(at, format!("no label reserved:{name}; write the entity {name:?}"));
            None
        }
        Some(name) if pods.is_all() => entity(&name, at, false, out),
        Some(name) => {
            out.error(at, format!("reserved:{name} has no other labels; write two selectors"));
            None
        }
    }
}

/// Whom a policy is about: always of its own namespace, if it has one.
pub(super) fn subject(at: &At<'_>, namespace: Option<&str>, out: &mut Findings) -> Option<PodSet> {
    let Chosen { pods, reserved, named, .. } = chosen(at, out);
    if let Some(name) = reserved {
        out.error(at, format!("there are no workloads of reserved:{name}; select by other labels"));
        return None;
    }
    if let Some(own) = namespace
        && named.iter().any(|names| *names != BTreeSet::from([own.to_owned()]))
    {
        let message =
            format!("the policy is about its own namespace {own:?}; use no other in endpointSelector");
        out.error(at, message);
        return None;
    }
    Some(scoped(pods, namespace))
}

#[derive(Default)]
struct Chosen {
    pods: PodSet,
    /// `host` of `reserved:host`.
    reserved: Option<String>,
    /// It says itself of which namespaces.
    names_namespaces: bool,
    /// The namespaces that each of its requirements names; empty where one speaks of them otherwise.
    named: Vec<BTreeSet<String>>,
}

/// Cilium's labels have a source before a colon, and what is known of a pod besides its labels has a label too
/// (cilium:pkg/k8s/apis/cilium.io/utils/utils.go, getEndpointSelector).
fn chosen(at: &At<'_>, out: &mut Findings) -> Chosen {
    let LabelSelector { equal, expressions } = selector::labels(at, out);
    let equal = equal.into_iter().map(|(key, value)| {
        let place = format!("{}.matchLabels.{key}", at.path);
        (place, Requirement { key, operator: Operator::In(BTreeSet::from([value])) })
    });
    let expressions = expressions.into_iter().enumerate();
    let expressions = expressions.map(|(index, it)| (format!("{}.matchExpressions[{index}]", at.path), it));
    let mut chosen = Chosen::default();
    for (place, Requirement { key, operator }) in equal.chain(expressions) {
        let mut refuse = |message: &str| out.add(Severity::Error, at.node.line, &place, message);
        match about(&key) {
            Some(About::Pod(label)) => push(&mut chosen.pods.pods, label, operator),
            Some(About::Namespace) => {
                chosen.names_namespaces = true;
                chosen.named.push(match &operator {
                    Operator::In(names) => names.clone(),
                    _ => BTreeSet::new(),
                });
                push(&mut chosen.pods.namespaces, NAMESPACE_NAME, operator);
            }
            Some(About::NamespaceLabel(label)) => {
                chosen.names_namespaces = true;
                push(&mut chosen.pods.namespaces, label, operator);
            }
            Some(About::Reserved(name)) => match operator {
                Operator::In(_) | Operator::Exists if chosen.reserved.is_none() => {
                    chosen.reserved = Some(name.to_owned());
                }
                _ => refuse("a reserved label is only asked for, once"),
            },
            Some(About::Cluster) => {
                refuse("the name of the cluster is not known here; leave it out, it holds for every workload")
            }
            None => refuse("only labels of Kubernetes are known here; their source is k8s or any"),
        }
    }
    chosen
}

/// What a label of Cilium is about.
pub(super) enum About<'k> {
    /// A label of the pod, or its service account.
    Pod(&'k str),
    Namespace,
    NamespaceLabel(&'k str),
    Cluster,
    Reserved(&'k str),
}

/// `None`: a label of a source that is not known here.
pub(super) fn about(key: &str) -> Option<About<'_>> {
    if let Some(name) = key.strip_prefix("reserved:") {
        return Some(About::Reserved(name));
    }
    let plain = key.strip_prefix("k8s:").or(key.strip_prefix("any:")).unwrap_or(key);
    match plain {
        NAMESPACE => Some(About::Namespace),
        CLUSTER => Some(About::Cluster),
        _ if plain.contains(':') => None,
        _ => Some(plain.strip_prefix(NAMESPACE_LABELS).map_or(About::Pod(plain), About::NamespaceLabel)),
    }
}

fn push(to: &mut LabelSelector, key: &str, operator: Operator) {
    match operator {
        Operator::In(values) if values.len() == 1 && !to.equal.contains_key(key) => {
            to.equal.extend(values.into_iter().map(|value| (key.to_owned(), value)));
        }
        operator => to.expressions.push(Requirement { key: key.to_owned(), operator }),
    }
}
