//! The normal form of an authorization rule, and when it matches.
//!
//! A rule is an AND of groups (`from`, `to` and each `when`), a group an OR of alternatives (each `source` or
//! `operation`), an alternative an AND of clauses (each pair of field and `not` field). A rule without groups matches
//! everything; a policy without rules matches nothing (ztunnel's rbac.rs, Istio's AuthorizationPolicy reference).
//!
//! What the datapath cannot know, because only HTTP shows it, is [`Match::Undecided`]; the three values combine as in
//! Kleene's logic, so that an undecided part matters only where it decides.

use crate::model::cidr::Cidr;
use crate::model::identity::SpiffeId;
use crate::request::{Request, RequestTest};
use std::net::IpAddr;

/// Does it match? Ordered so that AND is the minimum and OR the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    No,
    /// Depends on HTTP, or on which of its addresses a workload was reached by.
    Undecided,
    Yes,
}

impl Match {
    pub(crate) fn not(self) -> Match {
        match self {
            Match::No => Match::Yes,
            Match::Undecided => Match::Undecided,
            Match::Yes => Match::No,
        }
    }
}

impl From<bool> for Match {
    fn from(holds: bool) -> Match {
        if holds { Match::Yes } else { Match::No }
    }
}

/// A text pattern of Istio: exact, `abc*`, `*abc`, or `*` for any text that is not empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Present,
}

impl Pattern {
    pub fn new(text: &str) -> Pattern {
        match (text.strip_suffix('*'), text.strip_prefix('*')) {
            (Some(""), _) => Pattern::Present,
            (Some(prefix), _) => Pattern::Prefix(prefix.to_owned()),
            (None, Some(suffix)) => Pattern::Suffix(suffix.to_owned()),
            (None, None) => Pattern::Exact(text.to_owned()),
        }
    }

    pub fn matches(&self, text: &str) -> bool {
        match self {
            Pattern::Exact(exact) => text == exact,
            Pattern::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Pattern::Suffix(suffix) => text.ends_with(suffix.as_str()),
            Pattern::Present => !text.is_empty(),
        }
    }
}

/// One value of a field, tested against a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Test {
    /// Against `<trust domain>/ns/<namespace>/sa/<service account>`.
    Principal(Pattern),
    Namespace(Pattern),
    ServiceAccount {
        namespace: String,
        name: String,
    },
    SourceIp(Cidr),
    DestinationIp(Cidr),
    Port(u16),
    /// Undecided where HTTP is not seen.
    Request(RequestTest),
}

/// A field and its negation: one of `any` must hold unless it is empty, and none of `none`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Clause {
    pub any: Vec<Test>,
    pub none: Vec<Test>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Alternative {
    pub clauses: Vec<Clause>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    pub groups: Vec<Vec<Alternative>>,
}

/// What a rule may ask about a flow.
pub struct Facts<'a> {
    /// Who the source was proven to be.
    pub source: Option<&'a SpiffeId>,
    /// The mesh's own trust domain, which policies may also call `cluster.local` (as Istio's trust domain alias).
    pub trust_domain: &'a str,
    /// Is the source address in this range?
    pub source_in: &'a dyn Fn(&Cidr) -> bool,
    /// Addresses of the destination; a test on them is undecided where they differ.
    pub destination: &'a [IpAddr],
    /// 0 for protocols without ports.
    pub port: u16,
    /// What HTTP shows, if anybody looks.
    pub request: Option<&'a Request>,
}

impl Rule {
    pub fn matches(&self, facts: &Facts<'_>) -> Match {
        let any =
            |group: &Vec<Alternative>| group.iter().map(|a| a.matches(facts)).max().unwrap_or(Match::No);
        self.groups.iter().map(any).min().unwrap_or(Match::Yes)
    }

    /// Every test of the rule.
    pub fn tests(&self) -> impl Iterator<Item = &Test> {
        let clauses = self.groups.iter().flatten().flat_map(|alternative| &alternative.clauses);
        clauses.flat_map(|clause| clause.any.iter().chain(&clause.none))
    }

    /// Does some part of it need HTTP?
    pub fn needs_http(&self) -> bool {
        self.tests().any(|test| matches!(test, Test::Request(_)))
    }
}

impl Alternative {
    fn matches(&self, facts: &Facts<'_>) -> Match {
        self.clauses.iter().map(|clause| clause.matches(facts)).min().unwrap_or(Match::Yes)
    }
}

impl Clause {
    fn matches(&self, facts: &Facts<'_>) -> Match {
        let one = |tests: &[Test]| tests.iter().map(|test| test.matches(facts)).max();
        let wanted = one(&self.any).unwrap_or(Match::Yes);
        let unwanted = one(&self.none).unwrap_or(Match::No);
        wanted.min(unwanted.not())
    }
}

impl Test {
    /// Does it hold for a source of this name? False for tests on anything else.
    pub(crate) fn names(&self, id: &SpiffeId, trust_domain: &str) -> bool {
        match self {
            Test::Principal(pattern) => {
                let alias = || format!("{ALIAS}/ns/{}/sa/{}", id.namespace, id.service_account);
                let own = *id.trust_domain == *trust_domain && trust_domain != ALIAS;
                pattern.matches(&id.principal()) || own && pattern.matches(&alias())
            }
            Test::Namespace(pattern) => pattern.matches(&id.namespace),
            Test::ServiceAccount { namespace, name } => {
                *id.namespace == **namespace && *id.service_account == **name
            }
            Test::SourceIp(_) | Test::DestinationIp(_) | Test::Port(_) | Test::Request(_) => false,
        }
    }

    /// A source that nobody vouches for has no principal, namespace or account: positive tests miss, and so negative
    /// ones hold.
    pub(crate) fn matches(&self, facts: &Facts<'_>) -> Match {
        match self {
            Test::Principal(_) | Test::Namespace(_) | Test::ServiceAccount { .. } => {
                facts.source.is_some_and(|id| self.names(id, facts.trust_domain)).into()
            }
            Test::SourceIp(cidr) => (facts.source_in)(cidr).into(),
            Test::DestinationIp(cidr) => {
                let inside = facts.destination.iter().filter(|addr| cidr.contains(**addr)).count();
                match inside {
                    0 => Match::No,
                    _ if inside == facts.destination.len() => Match::Yes,
                    _ => Match::Undecided,
                }
            }
            Test::Port(port) => (facts.port == *port).into(),
            Test::Request(test) => {
                facts.request.map_or(Match::Undecided, |request| test.matches(request).into())
            }
        }
    }
}

/// What Istio's policies may call the mesh's own trust domain.
const ALIAS: &str = "cluster.local";

#[cfg(test)]
mod tests {
    use super::*;

    fn with(source: Option<&SpiffeId>, port: u16, rule: &Rule) -> Match {
        let facts = Facts {
            source,
            trust_domain: "td",
            source_in: &|_| false,
            destination: &[],
            port,
            request: None,
        };
        rule.matches(&facts)
    }

    fn rule(any: Vec<Test>, none: Vec<Test>) -> Rule {
        Rule { groups: vec![vec![Alternative { clauses: vec![Clause { any, none }] }]] }
    }

    #[test]
    fn patterns_are_those_of_istio() {
        assert!(Pattern::new("*").matches("x") && !Pattern::new("*").matches(""));
        assert!(Pattern::new("a*").matches("abc") && !Pattern::new("a*").matches("ba"));
        assert!(Pattern::new("*/sa/x").matches("td/ns/a/sa/x") && !Pattern::new("*x").matches("xy"));
        assert!(Pattern::new("a").matches("a") && !Pattern::new("a").matches("ab"));
    }

    #[test]
    fn a_source_without_identity_matches_only_what_is_negated() {
        let id = SpiffeId::new("td", "a", "b");
        let present = Test::Principal(Pattern::Present);
        assert_eq!(with(None, 1, &rule(vec![present.clone()], vec![])), Match::No);
        assert_eq!(with(None, 1, &rule(vec![], vec![present.clone()])), Match::Yes);
        assert_eq!(with(Some(&id), 1, &rule(vec![], vec![present])), Match::No);
        assert_eq!(with(None, 1, &rule(vec![], vec![Test::Namespace(Pattern::new("a"))])), Match::Yes);
    }

    #[test]
    fn the_own_trust_domain_answers_to_its_alias_and_no_other_does() {
        let rule = rule(vec![Test::Principal(Pattern::new("cluster.local/ns/a/sa/b"))], vec![]);
        assert_eq!(with(Some(&SpiffeId::new("td", "a", "b")), 1, &rule), Match::Yes);
        assert_eq!(with(Some(&SpiffeId::new("other", "a", "b")), 1, &rule), Match::No);
    }

    #[test]
    fn http_is_undecided_only_where_it_decides() {
        let method = Test::Request(RequestTest::Method(Pattern::new("GET")));
        let clause = |test| Clause { any: vec![test], none: vec![] };
        let rule = Rule {
            groups: vec![vec![Alternative { clauses: vec![clause(Test::Port(80)), clause(method)] }]],
        };
        assert_eq!(with(None, 80, &rule), Match::Undecided);
        assert_eq!(with(None, 81, &rule), Match::No);
        assert_eq!(with(None, 81, &Rule::default()), Match::Yes);
    }

    #[test]
    fn addresses_of_one_identity_that_differ_leave_it_undecided() {
        let test = Test::DestinationIp("10.0.0.1".parse().unwrap());
        let addrs = ["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
        let at = |destination: &[IpAddr]| {
            test.matches(&Facts {
                source: None,
                trust_domain: "td",
                source_in: &|_| false,
                destination,
                port: 1,
                request: None,
            })
        };
        assert_eq!(at(&addrs), Match::Undecided);
        assert_eq!(at(&addrs[..1]), Match::Yes);
        assert_eq!(at(&addrs[1..]), Match::No);
    }
}
