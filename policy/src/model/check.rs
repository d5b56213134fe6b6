//! What reads well and still will not do what its author wants.

use super::layer::{NetworkRule, PeerMatch, RuleVerdict, Tier};
use super::{Cidr, Identity, Model, Pods, Workload};
use crate::error::Severity;
use crate::source::rule::Test;
use crate::source::{AuthorizationPolicy, Object, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

impl Model {
    /// Finds the problems of this sort anew. `objects` are those of the model, sorted by name.
    pub(crate) fn check<'a>(&mut self, objects: impl Iterator<Item = &'a Arc<Object>>) {
        self.problems.truncate(self.structural);
        let mut claims: BTreeMap<(IpAddr, u16, u8), &Object> = BTreeMap::new();
        let mut tiers: BTreeMap<Tier, &Object> = BTreeMap::new();
        let outside: Vec<Arc<Workload>> =
            self.workloads.iter().filter(|own| !own.enrolled && !own.host_network).cloned().collect();
        for object in objects {
            let mut found = Vec::new();
            let namespace = &object.meta.object.namespace;
            match &object.spec {
                Spec::Routing { hosts } => {
                    let missing = hosts.iter().filter(|host| self.service_index(host, namespace).is_none());
                    let missing: BTreeSet<_> = missing.collect();
                    found.extend(
                        missing.into_iter().map(|host| ("spec", format!("no Service is called {host:?}"))),
                    );
                }
                Spec::AuthorizationPolicy(policy) => self.check_policy(namespace, policy, &mut found),
                Spec::RequestAuthentication(policy) if !policy.rules.is_empty() => {
                    found.push(("spec.jwtRules", NEEDS_HTTP.into()));
                }
                Spec::PeerAuthentication(policy) => {
                    let mut same = self.authentication.get(namespace).into_iter().flatten();
                    let oldest = same.find(|named| named.policy.selector == policy.selector);
                    if let Some(oldest) = oldest.filter(|named| named.object != object.meta.object) {
                        let message = format!(
                            "never counts: {} selects the same and goes first, by age and then by name",
                            oldest.object
                        );
                        found.push(("spec", message));
                    }
                }
                Spec::Network(policies) => {
                    let rules = policies.iter().flat_map(|policy| &policy.rules);
                    if rules.clone().any(|rule| !rule.http.is_empty()) {
                        found.push(("spec", NEEDS_HTTP.into()));
                    }
                    found.extend(rules.clone().find_map(|rule| self.check_outside(rule, &outside)));
                    for tier in policies.iter().map(|policy| policy.tier).filter(Tier::has_priority) {
                        let first = tiers.entry(tier).or_insert(object);
                        if first.meta.object != object.meta.object {
                            let message = format!(
                                "the same priority as {}, which goes first because of its name; others may do it \
                                 differently, so give it one of its own",
                                first.meta.object
                            );
                            found.push(("spec.priority", message));
                        }
                    }
                }
                Spec::Service(service) => {
                    for (addr, port) in
                        service.addresses.iter().flat_map(|a| service.ports.iter().map(move |p| (a, p)))
                    {
                        let first = claims.entry((*addr, port.port, port.protocol)).or_insert(object);
                        if first.meta.object != object.meta.object {
                            let first = &first.meta.object;
                            let message =
                                format!("{addr} port {} already belongs to {first}, which counts", port.port);
                            found.push(("spec.clusterIP", message));
                        }
                    }
                }
                _ => {}
            }
            for (field, message) in found {
                self.problem(object, Severity::Warning, field, message);
            }
        }
    }

    /// Kubernetes and Cilium know labels of every pod; weft, those of its mesh. Where that makes a rule allow more, it is told.
    fn check_outside(&self, rule: &NetworkRule, outside: &[Arc<Workload>]) -> Option<(&'static str, String)> {
        let (pod, why) = rule.peers.iter().find_map(|peer| {
            let pod = match (peer, rule.action) {
                (PeerMatch::Pods(pods), RuleVerdict::Deny) => {
                    outside.iter().find(|pod| pods.selects(&self.namespaces, &pod.identity))?
                }
                (PeerMatch::Cluster, RuleVerdict::Deny) | (PeerMatch::World, RuleVerdict::Allow) => {
                    outside.first()?
                }
                _ => return None,
            };
            Some((pod, if rule.action == RuleVerdict::Deny { "does not hold for" } else { "holds for" }))
        })?;
        let (list, index) = (rule.list.name(), rule.index);
        let Workload { namespace, name, .. } = &**pod;
        let message = format!(
            "{list}[{index}] {why} {namespace}/{name}: a pod with the label istio.io/dataplane-mode: none is an address outside \
             to weft, without labels; remove that label, or write a range of addresses"
        );
        Some(("spec", message))
    }

    fn check_policy(
        &self,
        namespace: &Arc<str>,
        policy: &AuthorizationPolicy,
        found: &mut Vec<(&'static str, String)>,
    ) {
        if policy.rules.iter().any(|rule| rule.needs_http()) {
            found.push(("spec.rules", NEEDS_HTTP.into()));
        }
        if policy.dry_run {
            found.push(("metadata.annotations", "dry-run: recorded, not enforced".into()));
        }
        let tests = policy.rules.iter().flat_map(|rule| rule.tests());
        let ranges =
            tests.filter_map(|test| if let Test::DestinationIp(range) = test { Some(range) } else { None });
        for range in ranges {
            let selected = |identity: &Identity| self.selects(Some(namespace), &policy.selector, identity);
            let torn =
                self.by_identity.iter().find(|(identity, pods)| selected(identity) && splits(range, pods));
            if let Some((identity, _)) = torn {
                let message = format!(
                    "destination.ip {range} holds for some addresses of {identity} and not for others; where that \
                     decides, flows are refused: give these pods different labels or service accounts"
                );
                found.push(("spec.rules", message));
            }
        }
    }
}

fn splits(range: &Cidr, pods: &Pods) -> bool {
    let inside = pods.addresses.iter().filter(|addr| range.contains(**addr)).count();
    inside != 0 && inside != pods.addresses.len()
}

const NEEDS_HTTP: &str = "rules with HTTP attributes need the HTTP engine; until it runs, flows that they would decide are refused";
