//! What the proxy asks of the agent's current knowledge. `snapshot/` implements it.

use std::net::IpAddr;
use std::sync::Arc;

use crate::identity::SpiffeId;

/// A workload of the mesh, as far as a connection cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of the workload (pod) in its namespace.
    pub name: String,
    /// Canonical service: what metrics and the tunnel's headers call it.
    pub service: String,
    /// What its certificate must say.
    pub identity: SpiffeId,
    /// Its addresses; IPv4 in its own form.
    pub addresses: Vec<IpAddr>,
}

impl Workload {
    /// `namespace/name`.
    pub fn full_name(&self) -> Arc<str> {
        format!("{}/{}", self.namespace, self.name).into()
    }

    /// The first address of the same family as `other`.
    pub fn address_like(&self, other: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|addr| addr.is_ipv4() == other.is_ipv4())
    }
}

/// Who asks for what, with only verified facts about the source.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// Identity in the client's certificate.
    pub source: &'a SpiffeId,
    /// Source address of the tunnel's TCP connection.
    pub source_addr: IpAddr,
    /// The workload asked for.
    pub destination: &'a Workload,
    /// Its address, as asked for.
    pub destination_addr: IpAddr,
    /// Its port.
    pub port: u16,
}

/// The answer, and who gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// May it pass?
    pub allowed: bool,
    /// The policy and rule, or the default, in words.
    pub by: Arc<str>,
}

/// One immutable state of knowledge.
pub trait View: Send + Sync + 'static {
    /// The workload that owns an address.
    fn workload(&self, addr: IpAddr) -> Option<Arc<Workload>>;
    /// Does the destination's policy allow it? Unknown destinations are denied.
    fn check(&self, access: &Access<'_>) -> Verdict;
    /// Does the policy of the source, a workload of this node, let it begin this? Unknown sources are denied.
    fn check_egress(&self, access: &Access<'_>) -> Verdict;
}
