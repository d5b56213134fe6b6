//! `security.istio.io`: what may reach a workload, and whether it must prove who it is.
//!
//! What Istio's validation refuses is refused here too (istio:pkg/config/validation/validation.go).

use super::Meta;
use super::fields::{At, Fields, Findings};
use super::rule::{Alternative, Clause, Pattern, Rule, Test};
use crate::error::Severity;
use crate::model::cidr::Cidr;
use crate::request::{PathTemplate, RequestTest};
use std::collections::BTreeMap;

/// Labels that a workload must carry; empty selects all.
pub type Selector = BTreeMap<String, String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    Allow,
    /// Says what should be recorded, and decides nothing.
    Audit,
    Deny,
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Action::Allow => "ALLOW",
            Action::Audit => "AUDIT",
            Action::Deny => "DENY",
        }
    }
}

/// A service that a policy is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// In the policy's own namespace.
    pub service: String,
    /// The field that names it.
    pub field: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AuthorizationPolicy {
    pub selector: Selector,
    /// Instead of a selector: the workloads of these services.
    pub targets: Vec<Target>,
    pub action: Action,
    pub rules: Vec<Rule>,
    /// Line of each rule's begin.
    pub lines: Vec<u32>,
    /// `istio.io/dry-run: "true"`: recorded, never enforced.
    pub dry_run: bool,
}

impl AuthorizationPolicy {
    /// Does it decide about flows?
    pub fn enforced(&self) -> bool {
        !self.dry_run && self.action != Action::Audit
    }
}

/// `mtls.mode`; UNSET, or absent, inherits from the next wider policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MtlsMode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PeerAuthentication {
    pub selector: Selector,
    pub mode: MtlsMode,
    pub ports: BTreeMap<u16, MtlsMode>,
}

pub(super) fn authorization_policy(
    meta: &Meta,
    spec: Option<At<'_>>,
    out: &mut Findings,
) -> AuthorizationPolicy {
    let mut policy = AuthorizationPolicy {
        selector: Selector::new(),
        targets: Vec::new(),
        action: Action::Allow,
        rules: Vec::new(),
        lines: Vec::new(),
        dry_run: dry_run(meta, out),
    };
    let Some(spec) = spec else { return policy };
    let mut spec = spec.fields(out);
    policy.selector = selector(&mut spec, out);
    policy.targets = targets(&meta.object.namespace, &mut spec, &policy.selector, out);
    if let Some(at) = spec.take("provider") {
        out.error(&at, "external authorization is not enforceable yet; remove the provider");
    }
    if let Some(at) = spec.take("action") {
        match at.text(out).as_deref() {
            Some("ALLOW") | None => {}
            Some("DENY") => policy.action = Action::Deny,
            Some("AUDIT") => policy.action = Action::Audit,
            Some("CUSTOM") => {
                out.error(
                    &at,
                    "action CUSTOM asks an external authorizer, which weft cannot do yet; use ALLOW or DENY",
                );
            }
            Some(other) => out.error(&at, format!("no action {other:?}; use ALLOW, DENY or AUDIT")),
        }
    }
    let rules = spec.items("rules", out);
    if policy.action == Action::Deny && rules.is_empty() {
        let message = "a DENY policy without rules denies nothing; write `rules: [{}]` to deny everything";
        out.add(Severity::Warning, spec.at.node.line, "spec", message);
    }
    policy.lines = rules.iter().map(|at| at.node.line).collect();
    policy.rules = rules.iter().map(|at| rule(meta, at, out)).collect();
    spec.finish(out);
    policy
}

/// The values that Go takes for booleans, as Istio reads the annotation (istio:pilot/pkg/model/authorization.go); another
/// is no dry run.
fn dry_run(meta: &Meta, out: &mut Findings) -> bool {
    match meta.annotations.get("istio.io/dry-run").map(String::as_str) {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
        Some(other) => {
            let message =
                format!("istio.io/dry-run is {other:?}, neither true nor false: the policy is enforced");
            out.add(Severity::Warning, meta.origin.line, "metadata.annotations", message);
            false
        }
    }
}

/// `targetRefs`, and `targetRef` of old.
pub(super) fn targets(
    namespace: &str,
    spec: &mut Fields<'_>,
    selector: &Selector,
    out: &mut Findings,
) -> Vec<Target> {
    let mut list: Vec<At<'_>> = spec.take("targetRef").into_iter().collect();
    list.extend(spec.items("targetRefs", out));
    if let Some(at) = list.first().filter(|_| !selector.is_empty()) {
        out.error(at, "there is a selector too; use one of them");
    }
    let mut targets = Vec::new();
    for at in &list {
        let mut fields = at.fields(out);
        let mut text = |name| fields.take(name).and_then(|at| at.text(out)).unwrap_or_default();
        let (group, kind, name, space) = (text("group"), text("kind"), text("name"), text("namespace"));
        fields.finish(out);
        match (group.as_str(), kind.as_str()) {
            ("" | "core", "Service") if name.is_empty() => out.error(at, "`name` is missing"),
            ("" | "core", "Service") if !space.is_empty() && space != namespace => {
                out.error(at, "a policy is attached to services of its own namespace only");
            }
            ("" | "core", "Service") => targets.push(Target { service: name, field: at.path.clone() }),
            _ => out.error(
                at,
                format!("weft has no {kind:?} that a policy could be attached to; name a Service, or use a selector"),
            ),
        }
    }
    targets
}

pub(super) fn selector(spec: &mut Fields<'_>, out: &mut Findings) -> Selector {
    let Some(at) = spec.take("selector") else { return Selector::new() };
    let mut fields = at.fields(out);
    let labels = fields.labels("matchLabels", out);
    fields.finish(out);
    labels
}

fn rule(meta: &Meta, at: &At<'_>, out: &mut Findings) -> Rule {
    let mut fields = at.fields(out);
    let mut groups = Vec::new();
    for (name, inner) in [("from", "source"), ("to", "operation")] {
        let Some(list) = fields.take(name) else { continue };
        let items = list.items(out);
        if items.is_empty() {
            out.error(&list, format!("an empty `{name}` is ambiguous; leave it out to match any {inner}"));
        }
        let mut group = Vec::new();
        for item in items {
            let mut item_fields = item.fields(out);
            match item_fields.take(inner) {
                Some(at) if name == "from" => group.push(source(meta, &at, out)),
                Some(at) => group.push(operation(&at, out)),
                None => out.error(&item, format!("`{inner}` is missing")),
            }
            item_fields.finish(out);
        }
        groups.push(group);
    }
    for at in fields.items("when", out) {
        groups.push(vec![condition(meta, &at, out)]);
    }
    fields.finish(out);
    Rule { groups }
}

fn source(meta: &Meta, at: &At<'_>, out: &mut Findings) -> Alternative {
    let mut fields = at.fields(out);
    let account = |at: &At<'_>, out: &mut Findings| service_account(meta, at, out);
    let mut alternative = Alternative::default();
    let mut pair = |any, none, test: &Read<'_, Test>, out: &mut Findings| {
        let clause =
            Clause { any: tests(&mut fields, any, test, out), none: tests(&mut fields, none, test, out) };
        let given = clause != Clause::default();
        if given {
            alternative.clauses.push(clause);
        }
        given
    };
    let named = pair("principals", "notPrincipals", &principal, out)
        | pair("namespaces", "notNamespaces", &namespace, out);
    let accounts = pair("serviceAccounts", "notServiceAccounts", &account, out);
    pair("ipBlocks", "notIpBlocks", &source_ip, out);
    // Without a proxy in front the remote address is the source address: no header is believed at layer 4.
    pair("remoteIpBlocks", "notRemoteIpBlocks", &source_ip, out);
    pair("requestPrincipals", "notRequestPrincipals", &|at, out| text(at, RequestTest::Principal, out), out);
    if named && accounts {
        out.error(at, "serviceAccounts cannot be combined with principals or namespaces; use two sources");
    }
    finish(fields, at, &alternative, "source", out);
    alternative
}

fn operation(at: &At<'_>, out: &mut Findings) -> Alternative {
    let mut fields = at.fields(out);
    let mut alternative = Alternative::default();
    for (any, none, test) in [
        ("ports", "notPorts", &port as &Read<'_, Test>),
        ("hosts", "notHosts", &host),
        ("methods", "notMethods", &|at, out| text(at, RequestTest::Method, out)),
        ("paths", "notPaths", &path),
    ] {
        let clause =
            Clause { any: tests(&mut fields, any, test, out), none: tests(&mut fields, none, test, out) };
        if clause != Clause::default() {
            alternative.clauses.push(clause);
        }
    }
    finish(fields, at, &alternative, "operation", out);
    alternative
}

fn finish(fields: Fields<'_>, at: &At<'_>, alternative: &Alternative, what: &str, out: &mut Findings) {
    let before = out.0.len();
    fields.finish(out);
    if *alternative == Alternative::default() && out.0.len() == before {
        out.error(at, format!("an empty `{what}` is ambiguous; name what it must match, or leave it out"));
    }
}

fn condition(meta: &Meta, at: &At<'_>, out: &mut Findings) -> Alternative {
    let mut fields = at.fields(out);
    let mut alternative = Alternative::default();
    let key_at = fields.take("key");
    let key = key_at.as_ref().and_then(|at| at.text(out)).unwrap_or_default();
    let account = |at: &At<'_>, out: &mut Findings| service_account(meta, at, out);
    let names = bracketed(&key, "request.auth.claims");
    let header =
        bracketed(&key, "request.headers").and_then(|mut names| names.pop().filter(|_| names.is_empty()));
    let claim = |at: &At<'_>, out: &mut Findings| {
        text(at, |pattern| RequestTest::Claim(names.clone().unwrap_or_default(), pattern), out)
    };
    const REQUEST_LINE: &[&str] = &[":method", ":path", ":authority"];
    if let (Some(name), Some(at)) = (&header, &key_at)
        && name.starts_with(':')
        && !REQUEST_LINE.contains(&name.to_ascii_lowercase().as_str())
    {
        out.error(
            at,
            format!(
                "the header {name:?} is not known; of those with a colon, use {}",
                REQUEST_LINE.join(", ")
            ),
        );
    }
    let of_header = |at: &At<'_>, out: &mut Findings| {
        text(at, |pattern| RequestTest::Header(header.clone().unwrap_or_default(), pattern), out)
    };
    let test: Option<&Read<'_, Test>> = match key.as_str() {
        "source.ip" | "remote.ip" => Some(&source_ip),
        "source.namespace" => Some(&namespace),
        "source.principal" => Some(&principal),
        "source.serviceAccount" => Some(&account),
        "destination.ip" => Some(&destination_ip),
        "destination.port" => Some(&port),
        "connection.sni" => Some(&|at, out| text(at, RequestTest::ServerName, out)),
        "request.auth.principal" => Some(&|at, out| text(at, RequestTest::Principal, out)),
        "request.auth.audiences" => Some(&|at, out| text(at, RequestTest::Audience, out)),
        "request.auth.presenter" => Some(&|at, out| text(at, RequestTest::Presenter, out)),
        _ if names.is_some() => Some(&claim),
        _ if header.is_some() => Some(&of_header),
        _ => None,
    };
    if let Some(test) = test {
        let clause = Clause {
            any: tests(&mut fields, "values", test, out),
            none: tests(&mut fields, "notValues", test, out),
        };
        alternative.clauses.push(clause);
    } else {
        fields.ignore(&["values", "notValues"]);
        match key_at {
            Some(at) if key.starts_with("experimental.") => {
                out.error(&at, format!("condition {key:?} is not enforceable yet"));
            }
            Some(at) => out.error(&at, format!("no condition is called {key:?}")),
            None => out.error(at, "`key` is missing"),
        }
    }
    if at.node.get("values").is_none() && at.node.get("notValues").is_none() {
        out.error(at, "`values` or `notValues` is missing");
    }
    fields.finish(out);
    alternative
}

/// The names in `<prefix>[a][b]`, at least one and none of them empty.
fn bracketed(key: &str, prefix: &str) -> Option<Vec<String>> {
    let inner = key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')?;
    let names: Vec<String> = inner.split("][").map(str::to_owned).collect();
    let named = |name: &String| !name.is_empty() && !name.contains(['[', ']']);
    names.iter().all(named).then_some(names)
}

/// Reads one value of a list.
type Read<'r, T> = dyn Fn(&At<'_>, &mut Findings) -> Option<T> + 'r;

/// The values of one list field. A list that is given but empty is refused: it could mean "any" or "none".
fn tests<T>(fields: &mut Fields<'_>, name: &'static str, test: &Read<'_, T>, out: &mut Findings) -> Vec<T> {
    let Some(at) = fields.take(name) else { return Vec::new() };
    let items = at.items(out);
    if items.is_empty() {
        out.error(&at, "an empty list is ambiguous; name a value or leave the field out");
    }
    items.iter().filter_map(|item| test(item, out)).collect()
}

fn present(at: &At<'_>, out: &mut Findings) -> Option<String> {
    let text = at.text(out)?;
    if text.is_empty() {
        out.error(at, "an empty text matches nothing; remove it");
        return None;
    }
    Some(text)
}

/// A text pattern about a request.
fn text(at: &At<'_>, test: impl Fn(Pattern) -> RequestTest, out: &mut Findings) -> Option<Test> {
    Some(Test::Request(test(Pattern::new(&present(at, out)?))))
}

fn host(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    let host = present(at, out)?.to_ascii_lowercase();
    Some(Test::Request(RequestTest::Host(Pattern::new(&host))))
}

fn path(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    let path = present(at, out)?;
    if !PathTemplate::is_one(&path) {
        return Some(Test::Request(RequestTest::Path(Pattern::new(&path))));
    }
    let template = PathTemplate::new(&path).map_err(|why| out.error(at, format!("no path template: {why}")));
    Some(Test::Request(RequestTest::Template(template.ok()?)))
}

fn principal(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    let text = present(at, out)?;
    Some(Test::Principal(Pattern::new(text.strip_prefix("spiffe://").unwrap_or(&text))))
}

fn namespace(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    Some(Test::Namespace(Pattern::new(&present(at, out)?)))
}

/// `name`, in the policy's own namespace, or `namespace/name`.
fn service_account(meta: &Meta, at: &At<'_>, out: &mut Findings) -> Option<Test> {
    let text = present(at, out)?;
    let (namespace, name) = text.split_once('/').unwrap_or((&meta.object.namespace, &text));
    if namespace.is_empty() || name.is_empty() || name.contains('/') || text.contains('*') {
        out.error(
            at,
            format!("{text:?} is no service account; write `name` or `namespace/name`, without wildcards"),
        );
        return None;
    }
    Some(Test::ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
}

fn source_ip(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    cidr(at, out).map(Test::SourceIp)
}

fn destination_ip(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    cidr(at, out).map(Test::DestinationIp)
}

fn cidr(at: &At<'_>, out: &mut Findings) -> Option<Cidr> {
    let parsed: Result<Cidr, _> = at.text(out)?.parse();
    parsed.map_err(|message| out.error(at, message)).ok()
}

fn port(at: &At<'_>, out: &mut Findings) -> Option<Test> {
    at.port(out).map(Test::Port)
}

pub(super) fn peer_authentication(spec: Option<At<'_>>, out: &mut Findings) -> PeerAuthentication {
    let mut policy =
        PeerAuthentication { selector: Selector::new(), mode: MtlsMode::Unset, ports: BTreeMap::new() };
    let Some(spec) = spec else { return policy };
    let mut spec = spec.fields(out);
    policy.selector = selector(&mut spec, out);
    policy.mode = spec.take("mtls").map(|at| mode(&at, out)).unwrap_or_default();
    if let Some(ports) = spec.take("portLevelMtls") {
        if policy.selector.is_empty() {
            out.error(&ports, "modes of single ports need a selector that names the workload");
        }
        for (key, at) in ports.entries(out) {
            match key.parse::<u16>() {
                Ok(port @ 1..) => drop(policy.ports.insert(port, mode(&at, out))),
                _ => out.error(&at, format!("{key:?} is no port; use 1 to 65535")),
            }
        }
    }
    spec.finish(out);
    policy
}

fn mode(at: &At<'_>, out: &mut Findings) -> MtlsMode {
    let mut fields = at.fields(out);
    let mode = match fields.take("mode") {
        None => MtlsMode::Unset,
        Some(at) => match at.text(out).as_deref() {
            Some("UNSET") | None => MtlsMode::Unset,
            Some("DISABLE") => MtlsMode::Disable,
            Some("PERMISSIVE") => MtlsMode::Permissive,
            Some("STRICT") => MtlsMode::Strict,
            Some(other) => {
                out.error(&at, format!("no mode {other:?}; use STRICT, PERMISSIVE, DISABLE or UNSET"));
                MtlsMode::Unset
            }
        },
    };
    fields.finish(out);
    mode
}
