//! Policies that ask about HTTP on a port that nothing declares as HTTP, as Istio tells protocols: by `appProtocol`, else by
//! the prefix of the port's name; and policies that ask about tokens where nobody verifies any.

use super::warn;
use crate::error::{ObjectRef, Problem};
use crate::model::layer::{NetworkRule, Ports};
use crate::model::selector::carries;
use crate::model::{Direction, Identity, Model};
use crate::request::RequestTest;
use crate::source::core::{Pod, Service, ServicePort, TCP, TargetPort};
use crate::source::rule::{Rule, Test};
use crate::source::{Meta, Spec};
use crate::store::ObjectStore;
use std::collections::{BTreeMap, BTreeSet};

/// Services and pods by namespace, as written.
struct World<'a> {
    services: BTreeMap<&'a str, Vec<(&'a Meta, &'a Service)>>,
    pods: BTreeMap<(&'a str, &'a str), (&'a Meta, &'a Pod)>,
}

pub(super) fn undeclared(store: &ObjectStore, model: &Model, problems: &mut Vec<Problem>) {
    let mut world = World { services: BTreeMap::new(), pods: BTreeMap::new() };
    for object in store.objects() {
        let ObjectRef { namespace, name, .. } = &object.meta.object;
        match &object.spec {
            Spec::Service(service) => {
                world.services.entry(namespace).or_default().push((&object.meta, service));
            }
            Spec::Pod(pod) => drop(world.pods.insert((namespace, name), (&object.meta, pod))),
            _ => {}
        }
    }
    for named in model.authorization_policies() {
        let selects =
            |own: &Identity| model.selects(Some(&named.object.namespace), &named.policy.selector, own);
        for (index, rule) in named.policy.rules.iter().enumerate().filter(|(_, rule)| rule.needs_http()) {
            if let Some(message) = world.complaint(model, selects, &ports_of(rule)) {
                let line = named.policy.lines.get(index).copied().unwrap_or(named.origin.line);
                let field = format!("spec.rules[{index}]");
                problems.push(warn(&named.origin, line, &named.object, &field, message));
            }
        }
    }
    for named in model.network_policies() {
        let selects = |own: &Identity| named.policy.subject.selects(model.namespaces(), own);
        let asks = |rule: &&NetworkRule| !rule.http.is_empty() && rule.direction == Direction::Ingress;
        for rule in named.policy.rules.iter().filter(asks) {
            let ports = rule.ports.iter().filter_map(|port| match port.ports {
                Ports::Range(first, last) if first == last => Some(first),
                _ => None,
            });
            if let Some(message) = world.complaint(model, selects, &ports.collect()) {
                let field = format!("spec.{}[{}]", rule.list.name(), rule.index);
                problems.push(warn(&named.origin, rule.line, &named.object, &field, message));
            }
        }
    }
}

/// Claims come from verified tokens only: where no `RequestAuthentication` has them verified, no request ever has any
/// (Istio, "Authorization Policy Conditions": the `request.auth` attributes need one).
pub(super) fn unverified(model: &Model, problems: &mut Vec<Problem>) {
    let identities = model.identities();
    let without: Vec<_> = identities.iter().filter(|own| model.verifies_tokens(own).is_none()).collect();
    // One that is attached to several services stands there several times.
    let mut told = BTreeSet::new();
    for named in model.authorization_policies() {
        let asking = named.policy.rules.iter().position(|rule| rule.tests().any(about_token));
        let Some(index) = asking else { continue };
        let selects =
            |own: &Identity| model.selects(Some(&named.object.namespace), &named.policy.selector, own);
        let Some(identity) = without.iter().find(|own| selects(own)) else { continue };
        if told.insert(&named.object) {
            let line = named.policy.lines.get(index).copied().unwrap_or(named.origin.line);
            let message = format!(
                "asks about a JWT, and no RequestAuthentication with jwtRules selects {}: no request to it ever has one \
                 that is verified; add one with the issuer and its keys",
                identity.spiffe
            );
            problems.push(warn(&named.origin, line, &named.object, &format!("spec.rules[{index}]"), message));
        }
    }
}

fn about_token(test: &Test) -> bool {
    use RequestTest::{Audience, Claim, Presenter, Principal};
    matches!(test, Test::Request(Principal(_) | Audience(_) | Presenter(_) | Claim(..)))
}

/// Ports that the rule asks for by number; none: it asks for every port.
fn ports_of(rule: &Rule) -> BTreeSet<u16> {
    let clauses = rule.groups.iter().flatten().flat_map(|alternative| &alternative.clauses);
    let port = |test: &Test| if let Test::Port(port) = test { Some(*port) } else { None };
    clauses.flat_map(|clause| &clause.any).filter_map(port).collect()
}

impl World<'_> {
    /// What is wrong with a rule about HTTP for these workloads and ports; the first of them that is wrong.
    fn complaint(
        &self,
        model: &Model,
        selects: impl Fn(&Identity) -> bool,
        ports: &BTreeSet<u16>,
    ) -> Option<String> {
        for workload in model.workloads().iter().filter(|own| selects(&own.identity)) {
            let Some((meta, pod)) = self.pods.get(&(&*workload.namespace, &*workload.name)) else { continue };
            let served = self.served(meta, pod);
            let http = |port: u16| {
                let named = pod.ports.iter().filter(|own| own.port == port);
                served.iter().any(|(_, own, target)| *target == port && is_http(own))
                    || named.filter_map(|own| own.name.as_deref()).any(is_http_name)
            };
            let (all, one) = (served.iter().map(|(.., target)| *target).collect(), !ports.is_empty());
            let asked: &BTreeSet<u16> = if one { ports } else { &all };
            let wrong = asked.iter().find(|port| !http(**port));
            // Without ports the rule is about those that speak HTTP, if there are any.
            let Some(port) = wrong.filter(|_| one || !asked.iter().any(|port| http(*port))) else { continue };
            let by = served.iter().find(|(.., target)| target == port);
            let who = by.map_or_else(|| "nothing".to_owned(), |(object, ..)| object.to_string());
            let does = if by.is_some() { "does not declare" } else { "declares" };
            return Some(format!(
                "needs HTTP on port {port} of {}, which {who} {does} as HTTP; name the service's port http, http2 or \
                 grpc (with -SUFFIX), or set its appProtocol",
                meta.object
            ));
        }
        None
    }

    /// Services' TCP ports that lead to a pod, with the pod's own port.
    fn served<'a>(&'a self, meta: &Meta, pod: &Pod) -> Vec<(&'a ObjectRef, &'a ServicePort, u16)> {
        let services = self.services.get(&*meta.object.namespace).into_iter().flatten();
        let mut served = Vec::new();
        for (service, spec) in services {
            let selects = !spec.selector.is_empty() && carries(&meta.labels, &spec.selector);
            for port in spec.ports.iter().filter(|port| selects && port.protocol == TCP) {
                let target = match &port.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => {
                        let own = |own: &&crate::source::core::ContainerPort| own.name.as_ref() == Some(name);
                        pod.ports.iter().find(own).map(|own| own.port)
                    }
                };
                served.extend(target.map(|target| (&service.object, port, target)));
            }
        }
        served
    }
}

/// `appProtocol` counts before the name (Istio, Protocol Selection).
fn is_http(port: &ServicePort) -> bool {
    match &port.app_protocol {
        Some(protocol) => {
            let protocol = protocol.strip_prefix("kubernetes.io/").unwrap_or(protocol).to_lowercase();
            matches!(protocol.as_str(), "http" | "http2" | "h2c" | "grpc" | "grpc-web" | "ws")
        }
        None => is_http_name(&port.name),
    }
}

fn is_http_name(name: &str) -> bool {
    matches!(name.split('-').next(), Some("http" | "http2" | "grpc"))
}
