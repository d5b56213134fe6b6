//! For random meshes, policies and flows: the slow evaluator over the model and the kernel's decision over the compiled
//! tables give the same verdict, by the same rule.

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;
use weft_datapath::identity::{ANONYMOUS, FIRST_WORKLOAD, NODE};
use weft_datapath::policy::{self, Access, Mode};
use weft_policy::model::cidr;
use weft_policy::{Flow, Model, ObjectStore, Peer, Settings, Tables, Verdict, compile};

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
const ADDRS: &[&str] = &[
    "10.1.2.3",
    "10.1.2.4",
    "10.1.9.9",
    "10.200.0.1",
    "192.168.1.1",
    "8.8.8.8",
    "2001:db8::1",
    "2001:db8::2",
    "fd00::1",
];
const PORTS: &[u16] = &[0, 80, 443, 8080, 9999];
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
        prop::option::weighted(0.1, Just("requestPrincipals: [\"*\"]".to_owned())),
    );
    (who, rest).prop_filter_map("empty", |(mut fields, (ip, remote, http))| {
        fields.extend(ip.into_iter().chain(remote).chain(http));
        (!fields.is_empty()).then(|| format!("{{source: {{{}}}}}", fields.join(", ")))
    })
}

fn operation() -> impl Strategy<Value = String> {
    let http = prop::option::weighted(0.3, Just("methods: [\"GET\"]".to_owned()));
    (pair("ports", "notPorts", &["80", "443", "8080"]), http).prop_filter_map(
        "empty",
        |(mut fields, http)| {
            fields.extend(http);
            (!fields.is_empty()).then(|| format!("{{operation: {{{}}}}}", fields.join(", ")))
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
        with("request.headers[x]", &["1"]),
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
            let action = if deny { "DENY" } else { "ALLOW" };
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
    prop_oneof![3 => authorization, 1 => authentication]
}

fn pod() -> impl Strategy<Value = String> {
    let labels = prop::sample::select(vec!["{}", "{app: x}", "{app: y, v: \"1\"}", "{app: y}"]);
    let probe = prop::option::weighted(0.4, prop::sample::select(vec![80u16, 9999]));
    let addrs = prop::sample::subsequence(&["10.1.2.3", "10.1.2.9", "10.7.0.1", "2001:db8::9"][..], 0..=1);
    (namespace(), prop::sample::select(vec!["a", "b"]), labels, probe, addrs).prop_map(|(namespace, account, labels, probe, addrs)| {
        let probe = probe.map(|port| format!(", readinessProbe: {{tcpSocket: {{port: {port}}}}}")).unwrap_or_default();
        let addrs: Vec<_> = addrs.iter().map(|addr| format!("{{ip: \"{addr}\"}}")).collect();
        format!(
            "kind: Pod\nmetadata: {{name: NAME, namespace: {namespace}, labels: {labels}}}\n\
             spec: {{serviceAccountName: {account}, containers: [{{name: c{probe}}}]}}\nstatus: {{podIPs: [{}]}}\n",
            addrs.join(", ")
        )
    })
}

fn world() -> impl Strategy<Value = (String, bool)> {
    let objects = (prop::collection::vec(pod(), 1..5), prop::collection::vec(policy(), 0..5));
    (objects, any::<bool>()).prop_map(|((pods, policies), default_deny)| {
        let mut text = String::new();
        for (index, object) in pods.iter().chain(&policies).enumerate() {
            let version = if object.starts_with("kind: Pod") { "v1" } else { "security.istio.io/v1" };
            let _ =
                write!(text, "---\napiVersion: {version}\n{}", object.replace("NAME", &format!("o{index}")));
        }
        (text, default_deny)
    })
}

/// All flows between all ends of a small world; returns how many there were.
fn agree(model: &Model, tables: &Tables, numbers: &compile::Numbers) -> Result<usize, TestCaseError> {
    let mut flows = 0;
    let known = numbers.iter().map(|(identity, number)| (*number, Peer::Workload(&identity.spiffe)));
    let sources: Vec<_> = known.chain([(ANONYMOUS, Peer::Anonymous), (NODE, Peer::Node)]).collect();
    for (destination, destination_number) in numbers {
        for port in PORTS {
            let mode = policy::mode(tables, 0, *destination_number, *port);
            prop_assert_eq!(
                mode,
                model.modes(destination).at(*port).0,
                "mode of {} port {}",
                destination,
                port
            );
            for (source_number, source) in &sources {
                for addr in ADDRS {
                    let source_addr: IpAddr = addr.parse().unwrap();
                    let flow = Flow { source: *source, source_addr, destination, port: *port };
                    let expected = model.eval(&flow);
                    let access = Access {
                        source: *source_number,
                        source_addr: cidr::addr(source_addr),
                        destination: *destination_number,
                        port: *port,
                    };
                    let got = policy::decide(tables, &access);
                    let verdict = match got.verdict {
                        policy::ALLOW => Verdict::Allow,
                        policy::HTTP => Verdict::Http,
                        _ => Verdict::Deny,
                    };
                    prop_assert_eq!(verdict, expected.verdict, "{:?}: {:?}", flow, expected);
                    prop_assert_eq!(tables.rule(got.rule), expected.rule.as_ref(), "{:?}", flow);
                    prop_assert_eq!(expected.remedy.is_none(), verdict == Verdict::Allow);
                    if mode == Mode::Strict && source_number == &ANONYMOUS {
                        prop_assert_eq!(verdict, Verdict::Deny);
                    }
                    flows += 1;
                }
            }
        }
    }
    Ok(flows)
}

fn numbers(model: &Model) -> compile::Numbers {
    let identities = model.identities();
    identities
        .into_iter()
        .enumerate()
        .map(|(index, identity)| (identity, FIRST_WORKLOAD + index as u32))
        .collect::<BTreeMap<Arc<_>, _>>()
}

#[test]
fn the_evaluator_and_the_kernels_decision_agree() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let flows = std::cell::Cell::new(0);
    let result = runner.run(&world(), |(text, default_deny)| {
        let mut store = ObjectStore::new();
        store.apply("world.yaml", &text);
        let model = store.model(Settings { default_deny, ..Settings::default() });
        let numbers = numbers(&model);
        let tables = compile(&model, &numbers);
        flows.set(flows.get() + agree(&model, &tables, &numbers)?);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    println!("{} flows", flows.get());
    assert!(flows.get() > 20_000, "only {} flows were tried", flows.get());
}
