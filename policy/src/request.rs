//! What HTTP shows of a request, and the tests that policies make of it.
//!
//! Texts are compared as they are: whoever fills in a [`Request`] has resolved `.` and `..`, merged slashes and decoded what
//! need not be escaped, as Istio's proxies do by default (`meshConfig.pathNormalization: NORMALIZE`), or a rule about a path
//! can be walked around.

use crate::source::rule::Pattern;
use regex::{Regex, RegexBuilder};
use std::collections::BTreeMap;

/// A request whose token, if it has one, was verified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// `Host` or `:authority`, with the port if it was given.
    pub host: String,
    /// With the query, if any.
    pub path: String,
    /// Name and value, in order; a name may come twice.
    pub headers: Vec<(String, String)>,
    /// Claims of a JSON Web Token that was verified.
    pub claims: Option<Claims>,
}

/// The claims of a token, by name.
pub type Claims = BTreeMap<String, Claim>;

/// A claim. Others than texts cannot be matched (Istio's Authorization Policy Conditions).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    Text(String),
    Texts(Vec<String>),
    Nested(Claims),
}

/// One value of a field about a request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequestTest {
    /// In small letters: hosts are compared without regard to case. A port is part of the text.
    Host(Pattern),
    Method(Pattern),
    /// Of the client's own TLS. Of bytes that nobody reads it cannot be told; a request that can be read came without.
    ServerName(Pattern),
    Path(Pattern),
    Template(PathTemplate),
    /// `<issuer>/<subject>` of the token.
    Principal(Pattern),
    /// Any of the token's audiences.
    Audience(Pattern),
    /// The token's `azp`.
    Presenter(Pattern),
    /// Any of the texts of a claim, named by its way through nested ones.
    Claim(Vec<String>, Pattern),
    /// A header in small letters; several of one name count as one list with commas, as RFC 9110 section 5.3 has it.
    Header(String, Pattern),
}

/// Claims whose text is a list with spaces between, as RFC 8693 section 4.2 has it of the first
/// (istio:pilot/pkg/security/authn/policy_applier.go).
const SPACED: &[&str] = &["scope", "permission"];

impl RequestTest {
    pub fn matches(&self, request: &Request) -> bool {
        let claim = |name: &str| request.claims.as_ref().and_then(|claims| claims.get(name));
        let any = |claim: Option<&Claim>, pattern: &Pattern| {
            claim.is_some_and(|claim| claim.texts().iter().any(|text| pattern.matches(text)))
        };
        match self {
            // Of hosts and headers `*` asks whether they are there, with a value or not
            // (istio:pilot/pkg/security/authz/matcher/header.go).
            RequestTest::Host(Pattern::Present) => true,
            RequestTest::Host(pattern) => pattern.matches(&request.host.to_ascii_lowercase()),
            RequestTest::Method(pattern) => pattern.matches(&request.method),
            RequestTest::ServerName(_) => false,
            RequestTest::Path(pattern) => pattern.matches(request.path_only()),
            RequestTest::Template(template) => template.matches(request.path_only()),
            RequestTest::Principal(pattern) => match (claim("iss"), claim("sub")) {
                (Some(Claim::Text(issuer)), Some(Claim::Text(subject))) => {
                    pattern.matches(&format!("{issuer}/{subject}"))
                }
                _ => false,
            },
            RequestTest::Audience(pattern) => any(claim("aud"), pattern),
            RequestTest::Presenter(pattern) => any(claim("azp"), pattern),
            RequestTest::Claim(names, pattern) => {
                let (last, outer) = names.split_last().expect("the reader wants a name");
                let mut claims = request.claims.as_ref();
                for name in outer {
                    claims = match claims.and_then(|claims| claims.get(name)) {
                        Some(Claim::Nested(inner)) => Some(inner),
                        _ => None,
                    };
                }
                let claim = claims.and_then(|claims| claims.get(last));
                match claim {
                    Some(Claim::Text(text)) if outer.is_empty() && SPACED.contains(&last.as_str()) => {
                        text.split(' ').any(|word| pattern.matches(word))
                    }
                    _ => any(claim, pattern),
                }
            }
            RequestTest::Header(name, Pattern::Present) => request.header(name).is_some(),
            RequestTest::Header(name, pattern) => {
                request.header(name).is_some_and(|value| pattern.matches(&value))
            }
        }
    }
}

impl Claim {
    fn texts(&self) -> &[String] {
        match self {
            Claim::Text(text) => std::slice::from_ref(text),
            Claim::Texts(texts) => texts,
            Claim::Nested(_) => &[],
        }
    }
}

impl Request {
    /// The path without query and fragment, as Istio's rules see it.
    fn path_only(&self) -> &str {
        self.path.split(['?', '#']).next().unwrap_or_default()
    }

    /// All values of a header, joined. As in Envoy, which Istio's rules are written for, the request line is among them and
    /// `host` is the authority.
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        match name.to_ascii_lowercase().as_str() {
            ":method" => return Some(self.method.clone()),
            ":path" => return Some(self.path.clone()),
            ":authority" | "host" => return Some(self.host.clone()),
            _ => {}
        }
        let own = self.headers.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name));
        let values: Vec<&str> = own.map(|(_, value)| value.as_str()).collect();
        (!values.is_empty()).then(|| values.join(","))
    }
}

/// A path with `{*}` for one segment and at most one `{**}`, behind which no `{*}` follows, for any number of them
/// (istio:pkg/config/security/security.go, CheckValidPathTemplate).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathTemplate(Vec<Segment>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Segment {
    Text(String),
    One,
    Any,
}

impl PathTemplate {
    /// Is this text a template, and not a [`Pattern`]?
    pub fn is_one(text: &str) -> bool {
        text.contains("{*}") || text.contains("{**}")
    }

    /// Reads a template, or says what is wrong with it.
    pub fn new(text: &str) -> Result<PathTemplate, String> {
        let mut segments = Vec::new();
        for part in text.split('/') {
            let ended = segments.contains(&Segment::Any);
            segments.push(match part {
                "{*}" | "{**}" if ended => return Err("nothing but text may follow `{**}`".to_owned()),
                "{*}" => Segment::One,
                "{**}" => Segment::Any,
                _ if part.contains(['{', '}', '*']) => {
                    return Err(format!(
                        "{part:?} is neither text nor `{{*}}` nor `{{**}}`, between slashes"
                    ));
                }
                _ => Segment::Text(part.to_owned()),
            });
        }
        Ok(PathTemplate(segments))
    }

    pub fn matches(&self, path: &str) -> bool {
        let parts: Vec<&str> = path.split('/').collect();
        let fits = |segments: &[Segment], parts: &[&str]| {
            segments.iter().zip(parts).all(|(segment, part)| match segment {
                Segment::Text(text) => text == part,
                Segment::One => !part.is_empty(),
                Segment::Any => true,
            })
        };
        match self.0.iter().position(|segment| *segment == Segment::Any) {
            None => parts.len() == self.0.len() && fits(&self.0, &parts),
            // `/a/{**}` holds for `/a/` and not for `/a`: at least one part, which may be empty.
            Some(at) => {
                let behind = self.0.len() - at - 1;
                parts.len() >= self.0.len()
                    && fits(&self.0[..at], &parts)
                    && fits(&self.0[at + 1..], &parts[parts.len() - behind..])
            }
        }
    }
}

/// Does a regular expression hold for the whole text? One that is none holds for nothing; the reader refuses those.
pub(crate) fn whole(expression: &str, text: &str) -> bool {
    anchored(expression).is_ok_and(|regex| regex.is_match(text))
}

/// Most that one compiled expression takes, in bytes: a short text can stand for a large machine, as `(a{99}){99}` does.
const MAX_EXPRESSION: usize = 1 << 20;

/// The expression, for whole texts; linear in time, as RE2 is, which Cilium's and Istio's proxies use.
pub(crate) fn anchored(expression: &str) -> Result<Regex, regex::Error> {
    // By itself it must be one too: `a)|(?:b` would close the group that is put around it.
    RegexBuilder::new(expression).size_limit(MAX_EXPRESSION).build()?;
    RegexBuilder::new(&format!("^(?:{expression})$")).size_limit(MAX_EXPRESSION).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_match_by_segment() {
        let matches = |template: &str, path: &str| PathTemplate::new(template).unwrap().matches(path);
        assert!(
            matches("/a/{*}/c", "/a/b/c") && !matches("/a/{*}/c", "/a/b/b/c") && !matches("/a/{*}", "/a/")
        );
        assert!(matches("/a/{**}", "/a/b/c") && matches("/a/{**}", "/a/") && !matches("/a/{**}", "/a"));
        assert!(matches("/{**}/z", "/a/b/z") && !matches("/{**}/z", "/z") && !matches("/{**}/z", "/a/z/y"));
        assert!(matches("/{*}/x/{**}", "/a/x/b") && !matches("/{*}/x/{**}", "/a/y/b"));
        assert!(matches("{**}", "/anything"));
    }

    #[test]
    fn templates_are_checked() {
        for bad in ["/{**}/{*}", "/{**}/{**}", "/a{*}", "/{*}b", "/{a}/{*}", "/*/{*}"] {
            assert!(PathTemplate::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_expression_is_one_by_itself() {
        assert!(anchored("/public)|(?:.*").is_err());
        assert!(anchored("/public|/own").is_ok_and(|own| own.is_match("/own") && !own.is_match("/own/x")));
    }

    #[test]
    fn headers_of_one_name_are_one_list() {
        let headers =
            [("A", "1"), ("b", "2"), ("a", "3")].map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec();
        let request = Request { headers, ..Request::default() };
        assert_eq!(request.header("a").as_deref(), Some("1,3"));
        assert_eq!(request.header("c"), None);
    }

    #[test]
    fn claims_are_texts_lists_and_nested() {
        let text = |text: &str| Claim::Text(text.to_owned());
        let roles = Claim::Texts(vec!["a".to_owned(), "b".to_owned()]);
        let claims = Claims::from([
            ("iss".to_owned(), text("i")),
            ("sub".to_owned(), text("s")),
            ("realm".to_owned(), Claim::Nested(Claims::from([("roles".to_owned(), roles)]))),
        ]);
        let request = Request { claims: Some(claims), ..Request::default() };
        let claim = |names: &[&str], value: &str| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            RequestTest::Claim(names, Pattern::new(value)).matches(&request)
        };
        assert!(claim(&["realm", "roles"], "b") && !claim(&["realm", "roles"], "c"));
        assert!(!claim(&["realm"], "*") && !claim(&["roles"], "*") && !claim(&["iss", "roles"], "*"));
        assert!(RequestTest::Principal(Pattern::new("i/s")).matches(&request));
        assert!(!RequestTest::Audience(Pattern::Present).matches(&request));
    }

    #[test]
    fn expressions_hold_for_whole_texts() {
        assert!(whole("/a|/b", "/b") && !whole("/a|/b", "/bc") && !whole("(", "("));
    }
}
