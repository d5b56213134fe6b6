//! What the HTTP engine has to ask of each request on a connection: policy, with all that the connection shows worked in.
//!
//! Who the source is, addresses and ports are known before the first request; what is left of each rule are its tests of
//! methods, paths, hosts, headers and claims, with expressions compiled once. Rules that can no longer match are gone, and
//! those behind one that always matches. INVARIANT: for every request the same verdict by the same rule as
//! [`Model::eval`] (tests/http.rs).

use crate::error::ObjectRef;
use crate::eval::{Flow, TCP, Verdict, rank};
use crate::model::layer::{HttpMatch, Peer, RuleVerdict, Tier};
use crate::model::{Direction, Identity, Model};
use crate::request::{Request, RequestTest, anchored};
use crate::source::Action;
use crate::source::rule::{Alternative, Facts, Match, Rule, Test};
use crate::tables::{RuleAction, RuleRef};
use regex::Regex;

/// A verdict and the rule that decided; no rule for a default.
pub type Answer = (Verdict, Option<RuleRef>);

/// The rules of one connection; owns all it needs.
#[derive(Debug)]
pub struct HttpRules {
    egress: Side,
    ingress: Side,
}

/// Layers of one direction; a request must pass all.
type Side = Vec<Layer>;

#[derive(Debug)]
enum Layer {
    /// No request changes it.
    Settled(Answer),
    /// A token is to be verified: whoever asks about a request has done so, whoever sees none cannot tell.
    Token(RuleRef),
    /// A denial that matches, else a permission that does, else the last. Where a denial cannot be told, Istio still sees
    /// first whether anything allows.
    Rules { istio: bool, deny: Vec<Ruled>, allow: Vec<Ruled>, otherwise: Answer },
}

#[derive(Debug)]
struct Ruled {
    condition: Condition,
    rule: RuleRef,
}

/// What is left of a rule.
#[derive(Debug)]
enum Condition {
    Known(Match),
    Request(RequestTest),
    Http(HttpTest),
    Not(Box<Condition>),
    All(Vec<Condition>),
    Any(Vec<Condition>),
}

/// [`HttpMatch`] with its expressions compiled.
#[derive(Debug)]
struct HttpTest {
    /// Of method, path and host.
    expressions: [Option<Regex>; 3],
    headers: Vec<(String, Option<String>)>,
}

impl HttpRules {
    /// The rules of a connection; `flow.request` is not looked at.
    pub fn new(model: &Model, flow: &Flow<'_>) -> HttpRules {
        let flow = &Flow { request: None, source: model.known(flow.source, flow.source_addr), ..*flow };
        HttpRules { egress: egress(model, flow), ingress: ingress(model, flow) }
    }

    /// May this request go on? [`Verdict::Http`] where not even that can be told: refuse it.
    pub fn decide(&self, request: &Request) -> Answer {
        self.answer(Some(request))
    }

    /// The verdict on every request, if it is the same for all.
    pub fn settled(&self) -> Option<Answer> {
        Some(self.answer(None)).filter(|(verdict, _)| *verdict != Verdict::Http)
    }

    fn answer(&self, request: Option<&Request>) -> Answer {
        let outward = side(&self.egress, request);
        if outward.0 == Verdict::Deny {
            return outward;
        }
        let inward = side(&self.ingress, request);
        if outward.0 == Verdict::Http && inward.0 != Verdict::Deny { outward } else { inward }
    }
}

/// The first that denies, else the first that cannot tell, else the first that a rule allows.
fn side(layers: &Side, request: Option<&Request>) -> Answer {
    let answers = layers.iter().map(|layer| layer.answer(request));
    answers.min_by_key(|(verdict, rule)| rank(*verdict, rule.as_ref())).unwrap_or((Verdict::Allow, None))
}

fn egress(model: &Model, flow: &Flow<'_>) -> Side {
    let Peer::Workload(source) = flow.source else { return Side::new() };
    if let Some(refusal) = model.refused_by_blocked(source, Direction::Egress) {
        return vec![Layer::Settled((refusal.verdict, refusal.rule))];
    }
    network(model, flow, source, flow.destination, Direction::Egress)
}

fn ingress(model: &Model, flow: &Flow<'_>) -> Side {
    let Peer::Workload(destination) = flow.destination else { return Side::new() };
    if flow.source == Peer::Node && model.probe_ports(destination).contains(&flow.service_port()) {
        return Side::new();
    }
    let blocked = model.refused_by_blocked(destination, Direction::Ingress);
    if let Some(refusal) = blocked.or_else(|| model.refused_by_mode(flow, destination)) {
        return vec![Layer::Settled((refusal.verdict, refusal.rule))];
    }
    let mut layers = vec![authorization(model, flow, destination)];
    let verified = model.verifies_tokens(destination).filter(|_| flow.protocol == TCP);
    layers.extend(verified.map(|named| Layer::Token(RuleRef::whole(&named.object, RuleAction::Token))));
    layers.extend(network(model, flow, destination, flow.source, Direction::Ingress));
    layers
}

/// Istio's layer.
fn authorization(model: &Model, flow: &Flow<'_>, destination: &Identity) -> Layer {
    let facts = Facts {
        source: flow.source.spiffe(),
        trust_domain: &model.settings.trust_domain,
        source_in: &|cidr| cidr.contains(flow.source_addr),
        destination: std::slice::from_ref(&flow.destination_addr),
        port: flow.service_port(),
        request: None,
    };
    let (mut deny, mut allow) = (Vec::new(), Vec::new());
    let mut first: Option<&ObjectRef> = None;
    for named in model.authorizations(destination) {
        let list = match named.policy.action {
            Action::Deny => &mut deny,
            _ => &mut allow,
        };
        if named.policy.action == Action::Allow {
            first = first.or(Some(&named.object));
        }
        for (index, own) in named.policy.rules.iter().enumerate() {
            let rule = RuleRef::rule(&named.object, named.policy.action.into(), index);
            list.push(Ruled { condition: rule_left(own, &facts), rule });
        }
    }
    let otherwise = match first {
        Some(object) => (Verdict::Deny, Some(RuleRef::whole(object, RuleAction::NoneAllowed))),
        None if model.settings.default_deny => (Verdict::Deny, None),
        None => (Verdict::Allow, None),
    };
    Layer::new(true, deny, allow, otherwise)
}

/// The layers of Kubernetes, which asks nothing of HTTP, and of Cilium.
fn network(model: &Model, flow: &Flow<'_>, subject: &Identity, peer: Peer<'_>, direction: Direction) -> Side {
    let kubernetes = model.network(flow, subject, peer, direction, false);
    let policies = model.network_of(subject, |tier| *tier == Tier::Cilium);
    let (mut deny, mut allow) = (Vec::new(), Vec::new());
    let mut asks = None;
    model.with_facts(flow, subject, peer, direction, |facts| {
        for named in &policies {
            for own in named.policy.rules.iter().filter(|rule| rule.direction == direction) {
                let list = if own.action == RuleVerdict::Deny { &mut deny } else { &mut allow };
                // Expressions cost time to compile: only those that can matter.
                let connection = own.matches_connection(facts);
                if connection == Match::No {
                    continue;
                }
                asks = asks.or(own.asks_http(facts).then_some(named));
                let asked = match own.http.is_empty() {
                    true => Condition::Known(Match::Yes),
                    false => any(own.http.iter().map(HttpTest::condition)),
                };
                let condition = all([Condition::Known(connection), asked].into_iter());
                list.push(Ruled { condition, rule: RuleRef::network(&named.object, own) });
            }
        }
    });
    let isolating = policies.iter().find(|named| named.policy.isolates(direction)).or(asks);
    let free = peer == Peer::Node && direction == Direction::Ingress;
    let otherwise = match isolating.filter(|_| !free) {
        Some(named) => (Verdict::Deny, Some(RuleRef::whole(&named.object, RuleAction::NoneAllowed))),
        None => {
            allow.clear();
            (Verdict::Allow, None)
        }
    };
    vec![Layer::Settled((kubernetes.verdict, kubernetes.rule)), Layer::new(false, deny, allow, otherwise)]
}

impl Layer {
    fn new(istio: bool, deny: Vec<Ruled>, allow: Vec<Ruled>, otherwise: Answer) -> Layer {
        let (deny, allow) = (pruned(deny), pruned(allow));
        if deny.is_empty() && allow.is_empty() {
            return Layer::Settled(otherwise);
        }
        Layer::Rules { istio, deny, allow, otherwise }
    }

    fn answer(&self, request: Option<&Request>) -> Answer {
        let (istio, deny, allow, otherwise) = match self {
            Layer::Settled(answer) => return answer.clone(),
            Layer::Token(_) if request.is_some() => return (Verdict::Allow, None),
            Layer::Token(rule) => return (Verdict::Http, Some(rule.clone())),
            Layer::Rules { istio, deny, allow, otherwise } => (*istio, deny, allow, otherwise),
        };
        match (best(deny, request), best(allow, request)) {
            ((Match::Yes, rule), _) => (Verdict::Deny, rule),
            (_, (Match::No, _)) if istio && otherwise.0 == Verdict::Deny => otherwise.clone(),
            ((Match::Undecided, rule), _) => (Verdict::Http, rule),
            (_, (Match::Yes, rule)) => (Verdict::Allow, rule),
            (_, (Match::Undecided, rule)) => (Verdict::Http, rule),
            _ => otherwise.clone(),
        }
    }
}

/// Without rules that cannot match, and those behind one that always does.
fn pruned(rules: Vec<Ruled>) -> Vec<Ruled> {
    let mut left = Vec::new();
    for ruled in rules {
        match ruled.condition {
            Condition::Known(Match::No) => {}
            Condition::Known(Match::Yes) => {
                left.push(ruled);
                break;
            }
            _ => left.push(ruled),
        }
    }
    left
}

/// The best match, and the first rule that has it.
fn best(rules: &[Ruled], request: Option<&Request>) -> (Match, Option<RuleRef>) {
    let mut best = (Match::No, None);
    for Ruled { condition, rule } in rules {
        let matched = condition.holds(request);
        if matched > best.0 {
            best = (matched, Some(rule));
        }
    }
    (best.0, best.1.cloned())
}

fn rule_left(rule: &Rule, facts: &Facts<'_>) -> Condition {
    let group = |group: &Vec<Alternative>| any(group.iter().map(|own| alternative_left(own, facts)));
    all(rule.groups.iter().map(group))
}

fn alternative_left(alternative: &Alternative, facts: &Facts<'_>) -> Condition {
    let one = |test: &Test| match test {
        Test::Request(test) => Condition::Request(test.clone()),
        known => Condition::Known(known.matches(facts)),
    };
    let clauses = alternative.clauses.iter().flat_map(|clause| {
        let wanted = (!clause.any.is_empty()).then(|| any(clause.any.iter().map(one)));
        wanted.into_iter().chain([not(any(clause.none.iter().map(one)))])
    });
    all(clauses)
}

/// All of them; a known one counts at once.
fn all(conditions: impl Iterator<Item = Condition>) -> Condition {
    joined(conditions, Match::Yes, Match::No, Condition::All)
}

/// Any of them; a known one counts at once.
fn any(conditions: impl Iterator<Item = Condition>) -> Condition {
    joined(conditions, Match::No, Match::Yes, Condition::Any)
}

/// Leaves out what is `neutral`, and is what is `decisive`.
fn joined(
    conditions: impl Iterator<Item = Condition>,
    neutral: Match,
    decisive: Match,
    join: fn(Vec<Condition>) -> Condition,
) -> Condition {
    let mut left = Vec::new();
    for condition in conditions {
        match condition {
            Condition::Known(known) if known == neutral => {}
            Condition::Known(known) if known == decisive => return condition,
            _ => left.push(condition),
        }
    }
    match left.len() {
        0 => Condition::Known(neutral),
        1 => left.swap_remove(0),
        _ => join(left),
    }
}

fn not(condition: Condition) -> Condition {
    match condition {
        Condition::Known(known) => Condition::Known(known.not()),
        other => Condition::Not(Box::new(other)),
    }
}

impl Condition {
    fn holds(&self, request: Option<&Request>) -> Match {
        let ask = |test: &dyn Fn(&Request) -> bool| request.map_or(Match::Undecided, |own| test(own).into());
        match self {
            Condition::Known(known) => *known,
            Condition::Request(test) => ask(&|request| test.matches(request)),
            Condition::Http(test) => ask(&|request| test.matches(request)),
            Condition::Not(condition) => condition.holds(request).not(),
            Condition::All(all) => all.iter().map(|own| own.holds(request)).min().unwrap_or(Match::Yes),
            Condition::Any(any) => any.iter().map(|own| own.holds(request)).max().unwrap_or(Match::No),
        }
    }
}

impl HttpTest {
    /// An expression that is none holds for nothing; the reader refuses those.
    fn condition(http: &HttpMatch) -> Condition {
        let compiled = |expression: &Option<String>| expression.as_deref().map(anchored).transpose();
        match (compiled(&http.method), compiled(&http.path), compiled(&http.host)) {
            (Ok(method), Ok(path), Ok(host)) => {
                Condition::Http(HttpTest { expressions: [method, path, host], headers: http.headers.clone() })
            }
            _ => Condition::Known(Match::No),
        }
    }

    fn matches(&self, request: &Request) -> bool {
        let texts = [&request.method, &request.path, &request.host];
        let mut pairs = self.expressions.iter().zip(texts);
        pairs.all(|(expression, text)| expression.as_ref().is_none_or(|regex| regex.is_match(text)))
            && self.headers.iter().all(|(name, wanted)| {
                let value = request.header(name);
                value.is_some_and(|value| wanted.as_ref().is_none_or(|wanted| *wanted == value))
            })
    }
}
