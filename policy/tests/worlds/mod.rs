//! Random meshes, as manifests.
#![allow(dead_code, reason = "each test needs a part")]

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::fmt::Write;
use weft_policy::{Model, ObjectStore, Settings};

/// Tries so many cases, with another seed each time. What it finds stays where the test keeps it, if it does.
pub(crate) fn runner(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() })
}

const CIDRS: &[&str] = &[
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3",
    "192.168.0.0/16",
    "::/0",
    "2001:db8::/32",
    "2001:db8::1",
    "::ffff:10.1.0.0/112",
];
const NAMESPACES: &[&str] = &["default", "prod", "istio-system"];

fn list(values: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::sample::subsequence(values, 1..=values.len().min(2)).prop_map(|chosen| format!("{chosen:?}"))
}

/// A pair of fields, `x` and `notX`, of which any may be absent.
fn pair(
    any: &'static str,
    none: &'static str,
    values: &'static [&'static str],
) -> impl Strategy<Value = Vec<String>> {
    let field = |name: &'static str| {
        prop::option::weighted(0.35, list(values)).prop_map(move |v| v.map(|v| format!("{name}: {v}")))
    };
    (field(any), field(none)).prop_map(|(any, none)| any.into_iter().chain(none).collect())
}

fn source() -> impl Strategy<Value = String> {
    let principals = &[
        "*",
        "cluster.local/ns/default/sa/a",
        "spiffe://cluster.local/ns/prod/*",
        "*/sa/b",
        "other/ns/default/sa/a",
    ];
    let named = (
        pair("principals", "notPrincipals", principals),
        pair("namespaces", "notNamespaces", &["default", "pr*", "*system", "*"]),
    );
    let who = prop_oneof![
        3 => named.prop_map(|(a, b)| [a, b].concat()),
        1 => pair("serviceAccounts", "notServiceAccounts", &["a", "b", "prod/a", "default/b"]),
    ];
    let rest = (
        pair("ipBlocks", "notIpBlocks", CIDRS),
        prop::option::weighted(0.2, Just("remoteIpBlocks: [\"10.0.0.0/8\"]".to_owned())),
        prop::option::weighted(
            0.1,
            one(&[
                "requestPrincipals: [\"*\"]",
                "requestPrincipals: [\"i/me\"]",
                "notRequestPrincipals: [\"i/*\"]",
            ]),
        ),
    );
    (who, rest).prop_filter_map("empty", |(mut fields, (ip, remote, http))| {
        fields.extend(ip.into_iter().chain(remote).chain(http));
        (!fields.is_empty()).then(|| format!("{{source: {{{}}}}}", fields.join(", ")))
    })
}

fn operation() -> impl Strategy<Value = String> {
    let http = prop::option::weighted(0.3, asked_of_http());
    (pair("ports", "notPorts", &["80", "443", "8080"]), http).prop_filter_map(
        "empty",
        |(mut fields, http)| {
            fields.extend(http);
            (!fields.is_empty()).then(|| format!("{{operation: {{{}}}}}", fields.join(", ")))
        },
    )
}

fn asked_of_http() -> impl Strategy<Value = String> {
    one(&[
        "methods: [\"GET\"]",
        "notMethods: [\"POST\"]",
        "methods: [\"GET\", \"POST\"], paths: [\"/a*\"]",
        "paths: [\"/b/{*}\"]",
        "notPaths: [\"/a\"], hosts: [\"H\"]",
    ])
}

/// A policy that mostly asks for what only HTTP shows.
pub(crate) fn http_policy() -> impl Strategy<Value = String> {
    let rule =
        (asked_of_http(), prop::option::weighted(0.3, source()), prop::option::weighted(0.3, condition()));
    let rule = rule.prop_map(|(http, source, condition)| {
        let from = source.map_or(String::new(), |source| format!(", from: [{source}]"));
        let when = condition.map_or(String::new(), |condition| format!(", when: [{condition}]"));
        format!("{{to: [{{operation: {{{http}}}}}]{from}{when}}}")
    });
    let action = prop::sample::select(vec!["ALLOW", "ALLOW", "DENY"]);
    (namespace(), selector(), action, prop::collection::vec(rule, 1..4)).prop_map(
        |(namespace, selector, action, rules)| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: NAME, namespace: \
                 {namespace}}}\nspec: {{{selector}action: {action}, rules: [{}]}}\n",
                rules.join(", ")
            )
        },
    )
}

fn condition() -> impl Strategy<Value = String> {
    let with = |key: &'static str, values| {
        pair("values", "notValues", values).prop_filter_map("empty", move |fields| {
            (!fields.is_empty()).then(|| format!("{{key: \"{key}\", {}}}", fields.join(", ")))
        })
    };
    prop_oneof![
        with("source.ip", CIDRS),
        with("source.namespace", &["default", "prod"]),
        with("source.principal", &["*", "*/sa/a"]),
        with("source.serviceAccount", &["a", "prod/b"]),
        with("destination.ip", &["10.1.2.3", "10.1.0.0/16", "2001:db8::/32"]),
        with("destination.port", &["80", "8080"]),
        with("request.headers[x]", &["1", "2*"]),
        with("request.auth.claims[group]", &["admin"]),
        with("connection.sni", &["*.example"]),
    ]
}

fn rule() -> impl Strategy<Value = String> {
    let group = |name: &'static str, items: BoxedStrategy<String>| {
        prop::option::weighted(0.5, prop::collection::vec(items, 1..3))
            .prop_map(move |items| items.map(|items| format!("{name}: [{}]", items.join(", "))))
    };
    (group("from", source().boxed()), group("to", operation().boxed()), group("when", condition().boxed()))
        .prop_map(|(from, to, when)| {
            format!("{{{}}}", [from, to, when].into_iter().flatten().collect::<Vec<_>>().join(", "))
        })
}

fn selector() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "",
        "",
        "selector: {matchLabels: {app: x}}, ",
        "selector: {matchLabels: {app: y, v: \"1\"}}, ",
    ])
}

fn namespace() -> impl Strategy<Value = &'static str> {
    prop::sample::select(NAMESPACES)
}

/// `{name}` is filled in later, so that names differ.
fn policy() -> impl Strategy<Value = String> {
    let rules = prop_oneof![
        9 => prop::collection::vec(rule(), 0..3).prop_map(|rules| rules.join(", ")),
        1 => Just("{from: [{source: {ipBlocks: [nonsense]}}]}".to_owned()),
    ];
    let authorization = (namespace(), selector(), prop::bool::weighted(0.35), rules).prop_map(
        |(namespace, selector, deny, rules)| {
            // A policy that records decides nothing, whatever its rules say.
            let action = match (deny, rules.len() % 7) {
                (_, 3) => "AUDIT",
                (true, _) => "DENY",
                (false, _) => "ALLOW",
            };
            format!(
                "kind: AuthorizationPolicy\nmetadata: {{name: NAME, namespace: {namespace}}}\n\
             spec: {{{selector}action: {action}, rules: [{rules}]}}\n"
            )
        },
    );
    let mode = || prop::sample::select(vec!["STRICT", "PERMISSIVE", "DISABLE", "UNSET"]);
    let ports = prop::collection::btree_map(prop::sample::select(vec![80u16, 443]), mode(), 0..2);
    let created =
        prop::option::of(prop::sample::select(vec!["2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"]));
    let authentication = (namespace(), selector(), mode(), ports, created).prop_map(
        |(namespace, selector, mode, ports, created)| {
            let mut text =
                format!("kind: PeerAuthentication\nmetadata: {{name: NAME, namespace: {namespace}");
            if let Some(created) = created {
                let _ = write!(text, ", creationTimestamp: {created}");
            }
            let _ = write!(text, "}}\nspec: {{{selector}mtls: {{mode: {mode}}}");
            if !selector.is_empty() && !ports.is_empty() {
                let ports: Vec<_> =
                    ports.iter().map(|(port, mode)| format!("{port}: {{mode: {mode}}}")).collect();
                let _ = write!(text, ", portLevelMtls: {{{}}}", ports.join(", "));
            }
            text + "}\n"
        },
    );
    let tokens = (namespace(), selector()).prop_map(|(namespace, selector)| {
        format!(
            "kind: RequestAuthentication\nmetadata: {{name: NAME, namespace: {namespace}}}\n\
             spec: {{{selector}jwtRules: [{{issuer: i, jwksUri: \"file:///keys.json\"}}]}}\n"
        )
    });
    prop_oneof![12 => authorization, 4 => authentication, 1 => tokens]
        .prop_map(|text| format!("apiVersion: security.istio.io/v1\n{text}"))
}

/// One of these, by weight equal.
fn one(values: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::sample::select(values).prop_map(str::to_owned)
}

fn several(items: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    prop::collection::vec(items, 0..3).prop_map(|items| format!("[{}]", items.join(", ")))
}

fn label_selector() -> impl Strategy<Value = String> {
    one(&[
        "{}",
        "{matchLabels: {app: x}}",
        "{matchLabels: {app: y}}",
        "{matchExpressions: [{key: app, operator: In, values: [x, z]}]}",
        "{matchExpressions: [{key: app, operator: NotIn, values: [x]}]}",
        "{matchExpressions: [{key: v, operator: Exists}]}",
        "{matchLabels: {app: y}, matchExpressions: [{key: v, operator: DoesNotExist}]}",
    ])
}

fn namespace_selector() -> impl Strategy<Value = String> {
    one(&[
        "{}",
        "{matchLabels: {team: red}}",
        "{matchLabels: {kubernetes.io/metadata.name: prod}}",
        "{matchExpressions: [{key: team, operator: NotIn, values: [red]}]}",
    ])
}

fn block() -> impl Strategy<Value = String> {
    one(&[
        "{cidr: 0.0.0.0/0}",
        "{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}",
        "{cidr: 10.1.2.0/24}",
        "{cidr: \"::/0\", except: [\"2001:db8::/32\"]}",
        "{cidr: 0.0.0.0/0, except: [10.0.0.0/8, 192.168.0.0/16]}",
    ])
}

fn network_peer() -> impl Strategy<Value = String> {
    prop_oneof![
        label_selector().prop_map(|pods| format!("{{podSelector: {pods}}}")),
        namespace_selector().prop_map(|ns| format!("{{namespaceSelector: {ns}}}")),
        (label_selector(), namespace_selector())
            .prop_map(|(pods, ns)| format!("{{podSelector: {pods}, namespaceSelector: {ns}}}")),
        block().prop_map(|block| format!("{{ipBlock: {block}}}")),
    ]
}

fn network_port() -> impl Strategy<Value = String> {
    one(&[
        "{port: 80}",
        "{port: 53, protocol: UDP}",
        "{port: web}",
        "{port: dns, protocol: UDP}",
        "{protocol: SCTP}",
        "{protocol: TCP}",
        "{port: 80, endPort: 90}",
        "{port: 8000, endPort: 9000}",
        "{port: 8080, endPort: 20000}",
        "{port: 1, endPort: 65535, protocol: UDP}",
    ])
}

fn network_rule(peers: &'static str) -> impl Strategy<Value = String> {
    let list = |name: &'static str, items: BoxedStrategy<String>| {
        prop::option::weighted(0.7, several(items))
            .prop_map(move |items| items.map(|items| format!("{name}: {items}")))
    };
    (list(peers, network_peer().boxed()), list("ports", network_port().boxed())).prop_map(|(peers, ports)| {
        format!("{{{}}}", peers.into_iter().chain(ports).collect::<Vec<_>>().join(", "))
    })
}

pub(crate) fn network_policy() -> impl Strategy<Value = String> {
    let types = one(&["[Ingress]", "[Egress]", "[Ingress, Egress]"]);
    let rules = (several(network_rule("from")), several(network_rule("to")));
    (namespace(), label_selector(), types, rules).prop_map(|(namespace, pods, types, (ingress, egress))| {
        let ingress = if types.contains("Ingress") { format!(", ingress: {ingress}") } else { String::new() };
        let egress = if types.contains("Egress") { format!(", egress: {egress}") } else { String::new() };
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: NAME, namespace: {namespace}}}\n\
             spec: {{podSelector: {pods}, policyTypes: {types}{ingress}{egress}}}\n"
        )
    })
}

/// `from` or `to`.
fn cilium_rule(side: &'static str, deny: bool) -> impl Strategy<Value = String> {
    let peers = prop_oneof![
        several(label_selector()).prop_map(move |list| format!("{side}Endpoints: {list}, ")),
        one(&["world", "host", "cluster", "all"])
            .prop_map(move |entity| format!("{side}Entities: [{entity}], ")),
        one(&["10.0.0.0/8", "10.1.2.0/24", "\"::/0\""])
            .prop_map(move |cidr| format!("{side}CIDR: [{cidr}], ")),
        block().prop_map(move |block| format!("{side}CIDRSet: [{block}], ")),
        Just(String::new()),
    ];
    let http = move |rules: String| if deny { String::new() } else { format!(", rules: {{http: {rules}}}") };
    let asked =
        one(&["[{method: GET}]", "[{path: \"/a.*\", host: h}, {method: POST}]", "[{headers: [\"x: 1\"]}]"]);
    let ports = prop_oneof![
        one(&[
            "{port: \"80\", protocol: TCP}",
            "{port: \"53\", protocol: ANY}",
            "{port: \"8000\", endPort: 9000, protocol: TCP}"
        ])
        .prop_map(|port| format!("toPorts: [{{ports: [{port}]}}]")),
        asked.prop_map(move |rules| {
            format!("toPorts: [{{ports: [{{port: \"80\", protocol: TCP}}]{}}}]", http(rules))
        }),
        Just("icmps: [{fields: [{type: 8, family: IPv4}]}]".to_owned()),
        Just(String::new()),
    ];
    (peers, ports).prop_map(|(peers, ports)| format!("{{{peers}{ports}}}"))
}

pub(crate) fn cilium_policy() -> impl Strategy<Value = String> {
    let list = |name: &'static str, side: &'static str, deny: bool| {
        prop::option::weighted(0.4, several(cilium_rule(side, deny)))
            .prop_map(move |rules| rules.map_or(String::new(), |rules| format!(", {name}: {rules}")))
    };
    let allow = (list("ingress", "from", false), list("egress", "to", false));
    let deny = (list("ingressDeny", "from", true), list("egressDeny", "to", true));
    let wide = any::<bool>();
    let open = prop::bool::weighted(0.2);
    (namespace(), label_selector(), allow, deny, wide, open).prop_map(|(namespace, pods, allow, deny, wide, open)| {
        let (kind, namespace) = if wide {
            ("CiliumClusterwideNetworkPolicy", String::new())
        } else {
            ("CiliumNetworkPolicy", format!(", namespace: {namespace}"))
        };
        let ((ingress, egress), (ingress_deny, egress_deny)) = (allow, deny);
        let mut rules = format!("{ingress}{egress}{ingress_deny}{egress_deny}");
        if rules.is_empty() {
            rules = ", ingress: []".into();
        } else if open {
            rules += ", enableDefaultDeny: {ingress: false, egress: false}";
        }
        format!("apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{name: NAME{namespace}}}\nspec: {{endpointSelector: {pods}{rules}}}\n")
    })
}

fn admin_policy() -> impl Strategy<Value = String> {
    let set = || {
        prop_oneof![
            namespace_selector().prop_map(|ns| format!("{{namespaces: {ns}}}")),
            (namespace_selector(), label_selector())
                .prop_map(|(ns, pods)| format!("{{pods: {{namespaceSelector: {ns}, podSelector: {pods}}}}}")),
        ]
    };
    let ports = || {
        one(&[
            "",
            ", ports: [{portNumber: {protocol: TCP, port: 80}}]",
            ", ports: [{portNumber: {protocol: TCP, port: 8500}}]",
            ", ports: [{portRange: {protocol: TCP, start: 8000, end: 9000}}]",
            ", ports: [{namedPort: web}]",
            ", ports: [{portNumber: {protocol: UDP, port: 53}}]",
        ])
    };
    let rule = move |side: &'static str, baseline: bool| {
        let actions: &'static [&'static str] =
            if baseline { &["Allow", "Deny"] } else { &["Allow", "Deny", "Pass"] };
        (one(actions), set(), ports())
            .prop_map(move |(action, peer, ports)| format!("{{action: {action}, {side}: [{peer}]{ports}}}"))
    };
    any::<bool>().prop_flat_map(move |baseline| {
        let rules = (several(rule("from", baseline)), several(rule("to", baseline)));
        (set(), 0..3, rules).prop_map(move |(subject, priority, (ingress, egress))| {
            let (kind, name, priority) = if baseline {
                ("BaselineAdminNetworkPolicy", "default", String::new())
            } else {
                ("AdminNetworkPolicy", "NAME", format!("priority: {priority}, "))
            };
            format!(
                "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}}}\n\
                 spec: {{{priority}subject: {subject}, ingress: {ingress}, egress: {egress}}}\n"
            )
        })
    })
}

pub(crate) fn pod() -> impl Strategy<Value = String> {
    let labels = prop::sample::select(vec!["{}", "{app: x}", "{app: y, v: \"1\"}", "{app: y}"]);
    let probe = prop::option::weighted(0.4, prop::sample::select(vec![80u16, 9999]));
    let addrs = prop::sample::subsequence(&["10.1.2.3", "10.1.2.9", "10.7.0.1", "2001:db8::9"][..], 0..=1);
    let ports = one(&[
        "[]",
        "[{name: web, containerPort: 80}]",
        "[{name: web, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]",
    ]);
    let who = (namespace(), prop::sample::select(vec!["a", "b"]));
    (who, labels, probe, addrs, ports).prop_map(|((namespace, account), labels, probe, addrs, ports)| {
        let probe = probe
            .map(|port| format!(", readinessProbe: {{tcpSocket: {{port: {port}}}}}"))
            .unwrap_or_default();
        let addrs: Vec<_> = addrs.iter().map(|addr| format!("{{ip: \"{addr}\"}}")).collect();
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: NAME, namespace: {namespace}, labels: {labels}}}\n\
             spec: {{serviceAccountName: {account}, containers: [{{name: c, ports: {ports}{probe}}}]}}\n\
             status: {{podIPs: [{}]}}\n",
            addrs.join(", ")
        )
    })
}

pub(crate) fn any_policy() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => policy(),
        4 => network_policy(),
        3 => cilium_policy(),
        2 => admin_policy(),
    ]
}

pub(crate) fn world() -> impl Strategy<Value = (Vec<String>, bool)> {
    world_of(prop::collection::vec(any_policy(), 0..6))
}

/// A world with these policies.
pub(crate) fn world_of(
    policies: impl Strategy<Value = Vec<String>>,
) -> impl Strategy<Value = (Vec<String>, bool)> {
    let objects = (prop::collection::vec(pod(), 1..5), policies);
    (objects, prop::bool::weighted(0.3)).prop_map(|((pods, policies), default_deny)| {
        let labelled =
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: prod, labels: {team: red}}\n".to_owned();
        let named = pods.iter().chain(&policies).enumerate();
        let mut objects: Vec<String> =
            named.map(|(index, object)| object.replace("NAME", &format!("o{index}"))).collect();
        objects.push(labelled);
        (objects, default_deny)
    })
}

pub(crate) fn model_of(objects: &[String], default_deny: bool) -> Model {
    let mut store = ObjectStore::new();
    store.apply("world.yaml", &objects.join("---\n"));
    store.model(Settings { default_deny, ..Settings::default() })
}
