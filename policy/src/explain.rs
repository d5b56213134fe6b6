//! A verdict with the line that decided, and for a refusal the change of the manifests that would allow the flow.
//!
//! A change is found by trying: each candidate is made on a copy of the model, and counts only if [`Model::eval`] then
//! gets further. So what is proposed is true, whatever else stands in the way. Candidates are tried from the narrowest on:
//! a value added to a list of a rule that names both peers and ports, then a rule for this flow alone, then the
//! removal of a rule that denies.

use crate::error::Origin;
use crate::eval::{Decision, Flow, Peer, Verdict};
use crate::model::layer::{NetworkRule, PeerMatch, PodSet, PortMatch, Ports, RuleList, RuleVerdict};
use crate::model::{Cidr, Direction, LabelSelector, Model, NetworkPolicy};
use crate::source::rule::{Alternative, Clause, Pattern, Rule, Test};
use crate::source::{Action, MtlsMode};
use crate::tables::{RuleAction, RuleRef};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Most changes of one explanation: each layer may ask for one.
const MAX_CHANGES: usize = 8;
/// Most candidates tried for one change.
const MAX_CANDIDATES: usize = 128;

/// See [`Model::explain`].
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    pub decision: Decision,
    /// Where the rule that decided begins; its object's begin where it decided as a whole.
    pub place: Option<Origin>,
    /// Where the flow does not pass: all these together allow it. Empty if none of those tried does.
    pub changes: Vec<Change>,
}

/// One edit of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What to write, in one sentence without a full stop.
    pub what: String,
    /// Where.
    pub place: Option<Origin>,
}

/// What stands after a change: the model, and the source, which a change may have enrolled.
#[derive(Clone)]
struct State<'a> {
    model: Model,
    flow: Flow<'a>,
}

type Candidate<'a> = (Change, State<'a>);

impl Model {
    /// Decides a flow, says which line did, and what would allow it.
    pub fn explain(&self, flow: &Flow<'_>) -> Explanation {
        let decision = self.eval(flow);
        let place = decision.rule.as_ref().and_then(|rule| self.place(rule));
        let changes = if decision.verdict == Verdict::Allow { Vec::new() } else { self.changes(flow) };
        Explanation { decision, place, changes }
    }

    /// Where a rule stands.
    pub fn place(&self, rule: &RuleRef) -> Option<Origin> {
        let at = |origin: &Origin, line: Option<u32>| Origin {
            line: line.unwrap_or(origin.line),
            ..origin.clone()
        };
        if rule.action == RuleAction::Blocked {
            let mut blocked = self.blocked.iter();
            return blocked.find(|b| b.object.as_ref() == Some(&rule.object)).map(|b| b.origin.clone());
        }
        let index = rule.index.map(|index| index as usize);
        if let Some(named) = self.authorization.iter().find(|named| named.object == rule.object) {
            return Some(at(&named.origin, index.and_then(|index| named.policy.lines.get(index).copied())));
        }
        if let Some(named) = self.request_authentications().find(|named| named.object == rule.object) {
            return Some(named.origin.clone());
        }
        if let Some(named) = self.peer_authentications().find(|named| named.object == rule.object) {
            return Some(named.origin.clone());
        }
        let mut specs = self.network.iter().filter(|named| named.object == rule.object).peekable();
        let origin = specs.peek()?.origin.clone();
        let mut rules = specs.flat_map(|named| &named.policy.rules);
        let line =
            rules.find(|own| own.list == rule.list && Some(own.index) == rule.index).map(|own| own.line);
        Some(at(&origin, line))
    }

    fn changes<'a>(&'a self, flow: &Flow<'a>) -> Vec<Change> {
        let mut state = State { model: self.clone(), flow: *flow };
        let mut changes = Vec::new();
        for _ in 0..MAX_CHANGES {
            let before = state.model.eval(&state.flow);
            if before.verdict == Verdict::Allow {
                return changes;
            }
            let found = self.candidates(&state, &before);
            let further = |(_, next): &&Candidate<'a>| {
                let after = next.model.eval(&next.flow);
                after.verdict == Verdict::Allow || after.rule != before.rule || after.reason != before.reason
            };
            let best = found.iter().find(|(_, next)| next.model.eval(&next.flow).verdict == Verdict::Allow);
            let Some((change, next)) = best.or_else(|| found.iter().find(further)) else { return Vec::new() };
            changes.push(change.clone());
            state = next.clone();
        }
        Vec::new()
    }

    fn candidates<'a>(&'a self, state: &State<'a>, decision: &Decision) -> Vec<Candidate<'a>> {
        let Some(rule) = &decision.rule else { return self.enrolled(state).into_iter().collect() };
        let istio = state.model.authorization.iter().any(|named| named.object == rule.object);
        match rule.action {
            RuleAction::Blocked => {
                let mut next = state.clone();
                next.model.blocked.retain(|blocked| blocked.object.as_ref() != Some(&rule.object));
                vec![(self.change(format!("repair or remove {}", rule.object), rule), next)]
            }
            RuleAction::Strict => {
                let mut found: Vec<_> = self.enrolled(state).into_iter().collect();
                found.extend(self.permissive(state, rule));
                found
            }
            RuleAction::Deny if istio => self.deny_less(state, rule),
            RuleAction::Allow | RuleAction::NoneAllowed if istio => self.allow_more(state, rule),
            _ => self.network_changes(state, rule),
        }
    }

    fn change(&self, what: String, rule: &RuleRef) -> Change {
        Change { what, place: self.place(rule) }
    }

    /// The source takes part in the mesh.
    fn enrolled<'a>(&'a self, state: &State<'a>) -> Option<Candidate<'a>> {
        let workload = self.workload_at(state.flow.source_addr)?;
        if state.flow.source != Peer::Anonymous || workload.host_network || workload.enrolled {
            return None;
        }
        let source = Peer::Workload(&workload.identity);
        let what = format!(
            "enrol Pod {}/{}: remove its label istio.io/dataplane-mode: none",
            workload.namespace, workload.name
        );
        let next = State { flow: Flow { source, ..state.flow }, model: state.model.clone() };
        Some((Change { what, place: Some(workload.origin.clone()) }, next))
    }

    /// The port asks for no proven identity.
    fn permissive<'a>(&self, state: &State<'a>, rule: &RuleRef) -> Option<Candidate<'a>> {
        let mut next = state.clone();
        let mut all = next.model.authentication.values_mut().flatten();
        let named = Arc::make_mut(all.find(|named| named.object == rule.object)?);
        let port = state.flow.port;
        let what = if named.policy.selector.is_empty() {
            named.policy.mode = MtlsMode::Permissive;
            format!("set spec.mtls.mode of {} to PERMISSIVE", rule.object)
        } else {
            named.policy.ports.insert(port, MtlsMode::Permissive);
            format!("add {port}: {{mode: PERMISSIVE}} to spec.portLevelMtls of {}", rule.object)
        };
        Some((self.change(what, rule), next))
    }

    /// A DENY rule of Istio spares the source, else goes.
    fn deny_less<'a>(&self, state: &State<'a>, rule: &RuleRef) -> Vec<Candidate<'a>> {
        let at = state.model.authorization.iter().position(|named| named.object == rule.object);
        let (Some(at), Some(index)) = (at, rule.index.map(|index| index as usize)) else { return Vec::new() };
        let mut found = Vec::new();
        if let Some(principal) = principal(&state.flow) {
            let mut next = state.clone();
            let test = Test::Principal(Pattern::Exact(principal.clone()));
            let spared = Alternative { clauses: vec![Clause { any: Vec::new(), none: vec![test] }] };
            Arc::make_mut(&mut next.model.authorization[at]).policy.rules[index].groups.push(vec![spared]);
            let what = format!(
                "add `{{key: source.principal, notValues: [{principal:?}]}}` to `when` of {} rules[{index}]",
                rule.object
            );
            found.push((self.change(what, rule), next));
        }
        let mut next = state.clone();
        // Matches nothing, and leaves the others their positions.
        Arc::make_mut(&mut next.model.authorization[at]).policy.rules[index] =
            Rule { groups: vec![Vec::new()] };
        found.push((self.change(format!("remove {} rules[{index}]", rule.object), rule), next));
        found
    }

    /// A rule of an ALLOW policy takes in the flow, or a new rule does.
    fn allow_more<'a>(&self, state: &State<'a>, rule: &RuleRef) -> Vec<Candidate<'a>> {
        let Peer::Workload(destination) = state.flow.destination else { return Vec::new() };
        let (principal, port) = (principal(&state.flow), state.flow.port);
        let mut found = Vec::new();
        let indexes: Vec<_> = state.model.authorization_indexes(destination).collect();
        for at in indexes {
            let named = &state.model.authorization[at];
            if named.policy.action != Action::Allow {
                continue;
            }
            for (index, own) in named.policy.rules.iter().enumerate() {
                let has = |wanted: fn(&Test) -> bool| own.tests().any(wanted);
                if !has(is_port) || !has(is_principal) || found.len() >= MAX_CANDIDATES {
                    continue;
                }
                let by = RuleRef::rule(&named.object, RuleAction::Allow, index);
                let mut add = |wanted: fn(&Test) -> bool, test: Test, what: String| {
                    let mut next = state.clone();
                    let rule = &mut Arc::make_mut(&mut next.model.authorization[at]).policy.rules[index];
                    let mut clauses = rule.groups.iter_mut().flatten().flat_map(|a| &mut a.clauses);
                    if let Some(clause) = clauses.find(|clause| clause.any.iter().any(wanted)) {
                        clause.any.push(test);
                        found.push((
                            self.change(format!("{what} of {} rules[{index}]", by.object), &by),
                            next,
                        ));
                    }
                };
                if let Some(principal) = &principal {
                    let test = Test::Principal(Pattern::Exact(principal.clone()));
                    add(is_principal, test, format!("add {principal:?} to the principals"));
                }
                add(is_port, Test::Port(port), format!("add \"{port}\" to the ports"));
            }
        }
        let mut next = state.clone();
        let mut all = next.model.authorization.iter_mut();
        let Some(named) = all.find(|named| named.object == rule.object) else { return found };
        let named = Arc::make_mut(named);
        let (test, source) = match &principal {
            Some(name) => (Test::Principal(Pattern::Exact(name.clone())), format!("principals: [{name:?}]")),
            None => {
                let addr = state.flow.source_addr;
                (Test::SourceIp(host(addr)), format!("ipBlocks: [\"{addr}\"]"))
            }
        };
        let one = |test| {
            let clauses = vec![Clause { any: vec![test], none: Vec::new() }];
            vec![Alternative { clauses }]
        };
        let mut groups = vec![one(test)];
        let mut text = format!("from: [{{source: {{{source}}}}}]");
        if port != 0 {
            groups.push(one(Test::Port(port)));
            text += &format!(", to: [{{operation: {{ports: [\"{port}\"]}}}}]");
        }
        named.policy.rules.push(Rule { groups });
        let whole = RuleRef::whole(&rule.object, rule.action);
        found.push((self.change(format!("add a rule `{{{text}}}` to {}", rule.object), &whole), next));
        found
    }

    fn network_changes<'a>(&self, state: &State<'a>, rule: &RuleRef) -> Vec<Candidate<'a>> {
        let outward = state.model.eval_egress(&state.flow).verdict != Verdict::Allow;
        let direction = if outward { Direction::Egress } else { Direction::Ingress };
        let (subject, peer, addr) = if outward {
            (state.flow.source, state.flow.destination, state.flow.destination_addr)
        } else {
            (state.flow.destination, state.flow.source, state.flow.source_addr)
        };
        let Peer::Workload(subject) = subject else { return Vec::new() };
        let policies = &state.model.network;
        let decides = |policy: &NetworkPolicy| policy.subject.selects(&state.model.namespaces, subject);
        let by_name = |(_, named): &(usize, &Arc<crate::model::Named<NetworkPolicy>>)| {
            named.object == rule.object && decides(&named.policy)
        };
        let Some((at, named)) = policies.iter().enumerate().find(by_name) else { return Vec::new() };
        let cilium = named.object.kind.starts_with("Cilium");
        let (peers, who) = peer_match(peer, addr, cilium, direction);
        let ports = port_match(&state.flow);
        let mut found = Vec::new();
        // An administrator's ingress rules name workloads only.
        let nameable = !named.object.kind.ends_with("AdminNetworkPolicy")
            && &*named.object.kind != "ClusterNetworkPolicy"
            || matches!(peer, Peer::Workload(_));
        for (at, named) in policies.iter().enumerate() {
            if named.object != rule.object || !decides(&named.policy) {
                continue;
            }
            for (index, own) in named.policy.rules.iter().enumerate() {
                let narrow =
                    nameable && !own.peers.contains(&PeerMatch::Any) && !own.ports.contains(&PortMatch::ALL);
                let fits =
                    own.direction == direction && own.action == RuleVerdict::Allow && own.http.is_empty();
                if !narrow || !fits || found.len() >= MAX_CANDIDATES {
                    continue;
                }
                let by = RuleRef::network(&named.object, own);
                let place = format!("of {} {}[{}]", by.object, own.list.name(), own.index);
                let mut next = state.clone();
                Arc::make_mut(&mut next.model.network[at]).policy.rules[index].peers.push(peers.clone());
                found.push((self.change(format!("add `{who}` to the peers {place}"), &by), next));
                let mut next = state.clone();
                Arc::make_mut(&mut next.model.network[at]).policy.rules[index].ports.push(ports.clone());
                found.push((
                    self.change(format!("add {} to the ports {place}", port_text(&state.flow)), &by),
                    next,
                ));
            }
        }
        let list = match (rule.list, outward) {
            (RuleList::Rules, true) => RuleList::Egress,
            (RuleList::Rules, false) => RuleList::Ingress,
            (RuleList::EgressDeny, _) => RuleList::Egress,
            (RuleList::IngressDeny, _) => RuleList::Ingress,
            (list, _) => list,
        };
        // In ordered tiers the first match decides: the new rule goes first.
        let position = if rule.action == RuleAction::Deny { "at the top of" } else { "to" };
        let own = NetworkRule {
            direction,
            action: RuleVerdict::Allow,
            peers: vec![peers],
            ports: vec![ports],
            http: Vec::new(),
            list,
            index: u32::MAX,
            line: 0,
        };
        if nameable {
            let mut next = state.clone();
            Arc::make_mut(&mut next.model.network[at]).policy.rules.insert(0, own);
            let what = format!(
                "add a rule that allows `{who}` and {} {position} {} of {}",
                port_text(&state.flow),
                list.name(),
                rule.object
            );
            found.push((self.change(what, &RuleRef::whole(&rule.object, rule.action)), next));
        }
        if let (RuleAction::Deny, Some(index)) = (rule.action, rule.index) {
            let mut next = state.clone();
            for named in next.model.network.iter_mut().filter(|named| named.object == rule.object) {
                Arc::make_mut(named).policy.rules.retain(|own| own.list != rule.list || own.index != index);
            }
            let what = format!("remove {} {}[{index}]", rule.object, rule.list.name());
            found.push((self.change(what, rule), next));
        }
        found
    }
}

fn is_port(test: &Test) -> bool {
    matches!(test, Test::Port(_))
}

fn is_principal(test: &Test) -> bool {
    matches!(test, Test::Principal(_))
}

fn principal(flow: &Flow<'_>) -> Option<String> {
    match flow.source {
        Peer::Workload(identity) => Some(identity.spiffe.principal()),
        Peer::Certified(id) => Some(id.principal()),
        Peer::Anonymous | Peer::Node => None,
    }
}

fn host(addr: IpAddr) -> Cidr {
    addr.to_string().parse().unwrap_or_else(|_| unreachable!("an address is a range of one"))
}

fn port_match(flow: &Flow<'_>) -> PortMatch {
    let ports = if flow.port == 0 { Ports::All } else { Ports::Range(flow.port, flow.port) };
    PortMatch { protocol: Some(flow.protocol), ports }
}

fn port_text(flow: &Flow<'_>) -> String {
    match flow.protocol {
        1 | 58 => format!("ICMP type {}", flow.port.saturating_sub(1)),
        6 => format!("TCP port {}", flow.port),
        17 => format!("UDP port {}", flow.port),
        132 => format!("SCTP port {}", flow.port),
        other => format!("protocol {other}"),
    }
}

/// A match for exactly this peer, and how the object's language writes it.
fn peer_match(peer: Peer<'_>, addr: IpAddr, cilium: bool, direction: Direction) -> (PeerMatch, String) {
    let side = if direction == Direction::Ingress { "from" } else { "to" };
    let (namespace, labels) = match peer {
        Peer::Workload(identity) => (&*identity.spiffe.namespace, identity.labels.as_ref().clone()),
        Peer::Certified(id) => (&*id.namespace, BTreeMap::new()),
        Peer::Node if cilium => return (PeerMatch::Node, format!("{side}Entities: [host]")),
        Peer::Anonymous | Peer::Node => {
            let peers = PeerMatch::Addresses { range: host(addr), except: Vec::new(), inside: !cilium };
            let length = if addr.is_ipv4() { 32 } else { 128 };
            let text = match cilium {
                true => format!("{side}CIDR: [{addr}/{length}]"),
                false => format!("ipBlock: {{cidr: {addr}/{length}}}"),
            };
            return (peers, text);
        }
    };
    // Labels that change with every rollout say nothing about who the pod is.
    let labels: BTreeMap<String, String> =
        labels.into_iter().filter(|(key, _)| !key.ends_with("-hash")).collect();
    let list: Vec<_> = labels.iter().map(|(key, value)| format!("{key}: {value:?}")).collect();
    let list = list.join(", ");
    let text = match cilium {
        true => {
            let comma = if list.is_empty() { "" } else { ", " };
            format!(
                "{side}Endpoints: [{{matchLabels: {{k8s:io.kubernetes.pod.namespace: {namespace}{comma}{list}}}}}]"
            )
        }
        false => format!(
            "namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {namespace}}}}}, podSelector: \
             {{matchLabels: {{{list}}}}}"
        ),
    };
    let selector = LabelSelector { equal: labels, expressions: Vec::new() };
    (PeerMatch::Pods(PodSet::in_namespace(namespace, selector)), text)
}
