//! Any bytes as manifests: read, kept, resolved, compiled, decided, checked and explained without a panic, in bounded time
//! and memory; and where the manifests say something, the evaluator and the tables say the same.
#![no_main]

use std::collections::BTreeMap;
use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use weft_datapath::identity::{ANONYMOUS, FIRST_WORKLOAD, NODE};
use weft_datapath::policy::{self, Access};
use weft_policy::lint::lint;
use weft_policy::model::cidr::addr;
use weft_policy::{Flow, ObjectStore, Peer, Settings, Verdict, compile};

/// Protocols and ports that kept manifests name, and some that they do not.
const ASKED: &[(u8, u16)] = &[(6, 80), (6, 8080), (6, 9), (17, 53), (1, 9), (58, 129), (47, 0)];
/// Peers and addresses at most: what is asked grows with their square.
const ENDS: usize = 6;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    // The second half comes as a change of the file, so that former versions are kept.
    let middle = (0..=text.len() / 2).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let mut store = ObjectStore::new();
    store.apply("f.yaml", &text);
    run(&store);
    store.apply("f.yaml", &text[middle..]);
    run(&store);
});

fn run(store: &ObjectStore) {
    let settings = Settings::default();
    let model = store.model(settings.clone());
    for problem in store.check(settings).iter().chain(&lint(store, &model)) {
        assert!(!problem.message.is_empty() && !problem.message.ends_with('.'), "{problem}");
    }
    let numbers: BTreeMap<_, _> = model.identities().into_iter().zip(FIRST_WORKLOAD..).collect();
    let tables = compile(&model, &numbers);
    let known = numbers.iter().take(ENDS).map(|(identity, number)| (*number, Peer::Workload(identity)));
    let ends: Vec<_> = known.chain([(ANONYMOUS, Peer::Anonymous), (NODE, Peer::Node)]).collect();
    let own = model.workloads().iter().flat_map(|workload| &workload.addresses).copied().take(ENDS);
    let addrs: Vec<IpAddr> =
        own.chain(["10.1.2.3", "2001:db8::1"].map(|a| a.parse().expect("valid"))).collect();
    let mut explained = false;
    for (turn, (from, source)) in ends.iter().enumerate() {
        for (to, destination) in &ends {
            for (at, (protocol, port)) in ASKED.iter().enumerate() {
                let (source_addr, destination_addr) =
                    (addrs[(turn + at) % addrs.len()], addrs[(at * 3 + *to as usize) % addrs.len()]);
                let (source, destination, protocol, port) = (*source, *destination, *protocol, *port);
                let flow = Flow { source, source_addr, destination, destination_addr, protocol, port, request: None };
                let expected = model.eval(&flow);
                let access = Access {
                    source: *from,
                    source_addr: addr(source_addr),
                    destination: *to,
                    destination_addr: addr(destination_addr),
                    protocol,
                    port,
                };
                let got = policy::decide(&tables, &access);
                let verdict = match got.verdict {
                    policy::ALLOW => Verdict::Allow,
                    policy::HTTP => Verdict::Http,
                    _ => Verdict::Deny,
                };
                assert_eq!(verdict, expected.verdict, "{flow:?}: {expected:?}");
                assert_eq!(tables.rule(got.rule), expected.rule.as_ref(), "{flow:?}");
                // It tries many changes, each on a copy of the model: once is enough here.
                if verdict != Verdict::Allow && !explained {
                    explained = true;
                    assert_eq!(model.explain(&flow).decision, expected);
                }
            }
        }
    }
}
