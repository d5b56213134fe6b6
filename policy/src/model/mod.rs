//! Everything that a verdict depends on, with every reference resolved.
//!
//! Which policies select a workload is decided here and nowhere else; [`crate::eval`] and [`crate::compile()`] both ask.

mod blocked;
mod build;
mod change;
mod check;
pub mod cidr;
pub mod identity;
pub mod layer;
pub mod selector;

pub use change::Change;
pub use cidr::Cidr;
pub use identity::{Identity, SpiffeId};
pub use layer::{Direction, Namespaces, NetworkPolicy, Peer};
pub use selector::LabelSelector;
use selector::carries;

use crate::error::{ObjectRef, Origin, Problem};
use crate::source::core::{Balance, ContainerPort};
use crate::source::rule::Match;
use crate::source::{
    AuthorizationPolicy, MtlsMode, PeerAuthentication, Reach, RequestAuthentication, Selector,
};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use weft_datapath::policy::Mode;

/// What the operator decides once for the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub trust_domain: Arc<str>,
    /// Policies in this namespace hold for all.
    pub root_namespace: Arc<str>,
    /// Where no policy says otherwise: STRICT and refused, instead of PERMISSIVE and allowed.
    pub default_deny: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            trust_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            default_deny: false,
        }
    }
}

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub identity: Arc<Identity>,
    /// Without those that another workload claims too.
    pub addresses: Vec<IpAddr>,
    /// The node it runs on.
    pub node: Option<String>,
    pub netns: Option<String>,
    pub cgroup: Option<String>,
    /// Shares the node's network namespace.
    pub host_network: bool,
    /// Takes part in the mesh. Not so: labelled `istio.io/dataplane-mode: none`, or of the host's network.
    pub enrolled: bool,
    pub ready: bool,
    pub ports: Vec<ContainerPort>,
    pub probe_ports: BTreeSet<u16>,
    pub origin: Origin,
}

/// A service and where its connections may go.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub balance: Balance,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    pub name: String,
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Sorted, each once.
    pub backends: Vec<(IpAddr, u16)>,
}

/// A policy object in the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<T> {
    pub object: ObjectRef,
    pub origin: Origin,
    /// `metadata.creationTimestamp`.
    pub created: String,
    pub policy: T,
}

/// A policy that cannot be enforced: what it reaches is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocked {
    pub object: Option<ObjectRef>,
    pub origin: Origin,
    pub reach: Reach,
}

impl Blocked {
    /// Istio's policies speak of ingress only. One whose kind cannot be read may have spoken of both.
    pub fn concerns(&self, direction: Direction) -> bool {
        const INGRESS: &[&str] = &["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"];
        direction == Direction::Ingress
            || self.object.as_ref().is_none_or(|object| !INGRESS.contains(&&*object.kind))
    }
}

/// The mTLS modes of one workload, each with the policy that set it.
#[derive(Clone, Debug, PartialEq)]
pub struct Modes<'a> {
    pub mode: (Mode, Option<&'a ObjectRef>),
    /// Ports with a mode of their own.
    pub ports: BTreeMap<u16, (Mode, Option<&'a ObjectRef>)>,
}

impl<'a> Modes<'a> {
    pub fn at(&self, port: u16) -> (Mode, Option<&'a ObjectRef>) {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

/// What the enrolled pods of one identity have together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Pods {
    pub(crate) probe_ports: BTreeSet<u16>,
    pub(crate) addresses: Vec<IpAddr>,
    /// How many there are.
    pub(crate) count: usize,
    /// Container ports by name and protocol, each with how many pods declare it.
    pub(crate) named: NamedPorts,
}

/// See [`Pods::named`].
pub(crate) type NamedPorts = BTreeMap<(String, u8), BTreeMap<u16, usize>>;

/// The resolved mesh. Cheap to clone: what is large is shared.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    pub(crate) settings: Settings,
    pub(crate) workloads: Vec<Arc<Workload>>,
    pub(crate) services: Vec<Arc<Service>>,
    /// Sorted by namespace and name: the first that matches decides, and so names itself.
    pub(crate) authorization: Vec<Arc<Named<AuthorizationPolicy>>>,
    /// Sorted by namespace and name.
    pub(crate) tokens: Vec<Arc<Named<RequestAuthentication>>>,
    /// By namespace, oldest first.
    pub(crate) authentication: BTreeMap<Arc<str>, Vec<Arc<Named<PeerAuthentication>>>>,
    /// Each spec by itself, in order of tier, then of name.
    pub(crate) network: Vec<Arc<Named<NetworkPolicy>>>,
    pub(crate) namespaces: Namespaces,
    pub(crate) blocked: Vec<Blocked>,
    /// Addresses that belong to the mesh, and to nobody whom a policy could name.
    refused: BTreeSet<IpAddr>,
    by_identity: BTreeMap<Arc<Identity>, Arc<Pods>>,
    /// Every number that some pod calls so.
    named_ports: BTreeMap<(String, u8), BTreeSet<u16>>,
    by_address: BTreeMap<IpAddr, Arc<Workload>>,
    /// Those found while it was built, then those that [`Model::check`] finds.
    problems: Vec<Problem>,
    /// How many of the problems are of the first sort.
    structural: usize,
}

impl Model {
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Sorted by namespace and name.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    pub fn workload(&self, namespace: &str, name: &str) -> Option<&Workload> {
        let key = |w: &Arc<Workload>| (&*w.namespace, &*w.name).cmp(&(namespace, name));
        self.workloads.binary_search_by(key).ok().map(|index| &*self.workloads[index])
    }

    /// The workload that owns an address; host-network pods own none.
    pub fn workload_at(&self, addr: IpAddr) -> Option<&Workload> {
        self.by_address.get(&addr.to_canonical()).map(|workload| &**workload)
    }

    /// Sorted by namespace and name.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    pub fn authorization_policies(&self) -> impl ExactSizeIterator<Item = &Named<AuthorizationPolicy>> {
        self.authorization.iter().map(|named| &**named)
    }

    /// By namespace, oldest first.
    pub fn peer_authentications(&self) -> impl Iterator<Item = &Named<PeerAuthentication>> {
        self.authentication.values().flatten().map(|named| &**named)
    }

    pub fn request_authentications(&self) -> impl ExactSizeIterator<Item = &Named<RequestAuthentication>> {
        self.tokens.iter().map(|named| &**named)
    }

    /// The first policy that wants tokens of requests to a destination verified. All that select it hold together; whether
    /// there is one is all that can be asked without HTTP.
    pub fn verifies_tokens(&self, destination: &Identity) -> Option<&Named<RequestAuthentication>> {
        let mut selecting = self
            .tokens
            .iter()
            .filter(|named| self.selects(Some(&named.object.namespace), &named.policy.selector, destination));
        selecting.find(|named| !named.policy.rules.is_empty()).map(|named| &**named)
    }

    /// Policies of the network languages, each spec by itself, in order of tier, then of name.
    pub fn network_policies(&self) -> impl ExactSizeIterator<Item = &Named<NetworkPolicy>> {
        self.network.iter().map(|named| &**named)
    }

    /// Labels of the namespaces that have an object.
    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// Policies that cannot be enforced.
    pub fn blocked(&self) -> &[Blocked] {
        &self.blocked
    }

    /// What does not fit together.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Identities of all enrolled workloads, sorted, each once.
    pub fn identities(&self) -> Vec<Arc<Identity>> {
        self.by_identity.keys().cloned().collect()
    }

    /// Has it an enrolled workload?
    pub fn has(&self, identity: &Identity) -> bool {
        self.by_identity.contains_key(identity)
    }

    /// Addresses that must not be reached: claimed by two workloads, or of a pod or service that cannot be read.
    pub fn refused_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.refused
    }

    /// Authorization policies in force for a destination, in order.
    pub fn authorizations<'a>(
        &'a self,
        destination: &'a Identity,
    ) -> impl Iterator<Item = &'a Named<AuthorizationPolicy>> + 'a {
        self.authorization_indexes(destination).map(|index| &*self.authorization[index])
    }

    /// As [`Model::authorizations`], as positions.
    pub(crate) fn authorization_indexes<'a>(
        &'a self,
        destination: &'a Identity,
    ) -> impl Iterator<Item = usize> + 'a {
        let start = |namespace: &str| {
            self.authorization.partition_point(|named| *named.object.namespace < *namespace)
        };
        let range = |namespace: &str| {
            let first = start(namespace);
            let rest = &self.authorization[first..];
            first..first + rest.partition_point(|named| *named.object.namespace == *namespace)
        };
        let (own, root) = (&*destination.spiffe.namespace, &*self.settings.root_namespace);
        let ranges = match own.cmp(root) {
            Ordering::Less => [range(own), range(root)],
            Ordering::Equal => [range(own), 0..0],
            Ordering::Greater => [range(root), range(own)],
        };
        ranges.into_iter().flatten().filter(move |index| {
            let Named { object, policy, .. } = &*self.authorization[*index];
            policy.enforced() && self.selects(Some(&object.namespace), &policy.selector, destination)
        })
    }

    /// The first policy that cannot be enforced and would have had a say in these flows of a subject.
    pub fn blocked_by(&self, subject: &Identity, direction: Direction) -> Option<&Blocked> {
        let mut blocked = self.blocked.iter().filter(|blocked| blocked.concerns(direction));
        blocked.find(|blocked| {
            let namespace = blocked.reach.namespace.as_ref();
            namespace.is_none_or(|namespace| *namespace == subject.spiffe.namespace)
                && self.selects(None, &blocked.reach.selector, subject)
        })
    }

    /// Every port that pods of any identity call so.
    pub(crate) fn ports_named(&self, name: &str, protocol: u8) -> impl Iterator<Item = u16> {
        self.named_ports.get(&(name.to_owned(), protocol)).into_iter().flatten().copied()
    }

    /// Is this the port that the pods of an identity call so? Undecided where they differ.
    pub(crate) fn port_named(&self, destination: &Identity, name: &str, protocol: u8, port: u16) -> Match {
        let pods = self.pods(destination);
        let declared = pods.named.get(&(name.to_owned(), protocol)).and_then(|ports| ports.get(&port));
        match declared {
            None => Match::No,
            Some(count) if *count == pods.count => Match::Yes,
            Some(_) => Match::Undecided,
        }
    }

    /// A policy in the root namespace holds for all namespaces, with or without a selector.
    pub fn selects(&self, namespace: Option<&Arc<str>>, selector: &Selector, destination: &Identity) -> bool {
        let in_reach = match namespace {
            None => true,
            Some(namespace) => {
                *namespace == self.settings.root_namespace || *namespace == destination.spiffe.namespace
            }
        };
        in_reach && carries(&destination.labels, selector)
    }

    /// The mTLS modes of a destination: mesh, then namespace, then workload; the oldest of each; UNSET inherits
    /// (istio:pilot/pkg/security/authn/policy_applier.go, ComposePeerAuthentication).
    pub fn modes(&self, destination: &Identity) -> Modes<'_> {
        let first = |namespace: &Arc<str>, wanted: &dyn Fn(&Named<PeerAuthentication>) -> bool| {
            let mut own = self.authentication.get(namespace).into_iter().flatten().map(|named| &**named);
            own.find(|named| wanted(named))
        };
        let (own, root) = (&destination.spiffe.namespace, &self.settings.root_namespace);
        let wide = |named: &Named<PeerAuthentication>| named.policy.selector.is_empty();
        let mesh = first(root, &wide);
        let namespace = if own == root { None } else { first(own, &wide) };
        let workload =
            first(own, &|named| !wide(named) && self.selects(Some(own), &named.policy.selector, destination));
        let mut mode = (if self.settings.default_deny { Mode::Strict } else { Mode::Permissive }, None);
        for named in [mesh, namespace, workload].into_iter().flatten() {
            mode = effective(named.policy.mode, named, mode);
        }
        let ports = workload.into_iter().flat_map(|named| {
            named.policy.ports.iter().map(move |(port, own)| (*port, effective(*own, named, mode)))
        });
        Modes { mode, ports: ports.collect() }
    }

    /// Ports that the node may reach whatever policy says: those that any pod of this identity declares as probes.
    pub fn probe_ports(&self, destination: &Identity) -> &BTreeSet<u16> {
        &self.pods(destination).probe_ports
    }

    /// Addresses of all pods of this identity.
    pub fn addresses(&self, destination: &Identity) -> &[IpAddr] {
        &self.pods(destination).addresses
    }

    pub(crate) fn pods(&self, destination: &Identity) -> &Pods {
        static NONE: Pods =
            Pods { probe_ports: BTreeSet::new(), addresses: Vec::new(), count: 0, named: BTreeMap::new() };
        self.by_identity.get(destination).map_or(&NONE, |pods| &**pods)
    }
}

fn effective<'a>(
    own: MtlsMode,
    named: &'a Named<PeerAuthentication>,
    inherited: (Mode, Option<&'a ObjectRef>),
) -> (Mode, Option<&'a ObjectRef>) {
    let mode = match own {
        MtlsMode::Unset => return inherited,
        MtlsMode::Disable => Mode::Disable,
        MtlsMode::Permissive => Mode::Permissive,
        MtlsMode::Strict => Mode::Strict,
    };
    (mode, Some(&named.object))
}
