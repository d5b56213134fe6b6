//! The snapshot as the proxy sees it.

use std::net::IpAddr;
use std::sync::Arc;

use weft_datapath::connect::TCP;
use weft_policy::{Decision, Flow, Peer, SpiffeId};

use super::Snapshot;
use crate::proxy::{Access, Verdict, View, Workload};

impl View for Snapshot {
    fn workload(&self, addr: IpAddr) -> Option<Arc<Workload>> {
        self.by_address.get(&addr.to_canonical()).cloned()
    }

    fn check(&self, access: &Access<'_>) -> Verdict {
        verdict(self.decide(access))
    }

    fn check_egress(&self, access: &Access<'_>) -> Verdict {
        let own = self.by_address.get(&access.source_addr.to_canonical());
        if own.is_none_or(|own| own.identity != *access.source) {
            return verdict(Err(format!(
                "{} is not the address of {} any more",
                access.source_addr, access.source
            )));
        }
        verdict(self.flow(access, |flow| self.model.eval_egress(flow)))
    }
}

fn verdict(decision: Result<Decision, String>) -> Verdict {
    let decision = match decision {
        Ok(decision) => decision,
        Err(why) => return Verdict { allowed: false, by: why.into() },
    };
    let by = match decision.remedy {
        Some(remedy) => format!("{}; {remedy}", decision.reason),
        None => decision.reason,
    };
    Verdict { allowed: decision.verdict == weft_policy::Verdict::Allow, by: by.into() }
}

impl Snapshot {
    /// What the destination's policy says of an access through the tunnel; an error where the destination is not what
    /// was asked for.
    pub fn decide(&self, access: &Access<'_>) -> Result<Decision, String> {
        self.flow(access, |flow| self.model.eval_ingress(flow))
    }

    fn flow(&self, access: &Access<'_>, ask: impl FnOnce(&Flow<'_>) -> Decision) -> Result<Decision, String> {
        let destination = access.destination;
        let Some(known) = self.model.workload(&destination.namespace, &destination.name) else {
            return Err(format!("{} is no workload any more", destination.full_name()));
        };
        if !known.enrolled || known.identity.spiffe.to_string() != destination.identity.as_str() {
            return Err(format!("{} has another identity now", destination.full_name()));
        }
        let id = access.source;
        let source = SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account());
        Ok(ask(&Flow {
            source: Peer::Certified(&source),
            source_addr: access.source_addr,
            destination: Peer::Workload(&known.identity),
            destination_addr: access.destination_addr,
            protocol: TCP,
            port: access.port,
            request: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::{MESH, snapshot};

    #[test]
    fn policy_is_asked_with_the_certificates_identity() {
        let snapshot = snapshot(MESH);
        let db = snapshot.workload("::ffff:10.0.1.1".parse().expect("an address")).expect("known");
        let allowed = |source: &str, port: u16| {
            let source = source.parse().expect("a SPIFFE ID");
            let source_addr = "10.0.0.1".parse().expect("an address");
            let destination_addr = db.addresses[0];
            snapshot
                .check(&Access { source: &source, source_addr, destination: &db, destination_addr, port })
                .allowed
        };
        assert!(allowed("spiffe://cluster.local/ns/shop/sa/web", 5433));
        assert!(!allowed("spiffe://cluster.local/ns/shop/sa/web", 5432));
        assert!(!allowed("spiffe://cluster.local/ns/shop/sa/lost", 5433));
        assert!(!allowed("spiffe://other.domain/ns/shop/sa/web", 5433));
    }

    #[test]
    fn a_workload_that_is_gone_or_changed_is_denied() {
        let before = snapshot(MESH);
        let db = before.workload("10.0.1.1".parse().expect("an address")).expect("known");
        let source = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("a SPIFFE ID");
        let source_addr = "10.0.0.1".parse().expect("an address");
        let destination_addr = db.addresses[0];
        let access = Access { source: &source, source_addr, destination: &db, destination_addr, port: 5433 };
        assert!(before.check(&access).allowed);
        assert!(!Snapshot::empty().check(&access).allowed);
        let after = snapshot(&MESH.replace("serviceAccountName: db", "serviceAccountName: other"));
        assert!(!after.check(&access).allowed);
    }
}
