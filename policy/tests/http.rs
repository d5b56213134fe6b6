//! For random meshes, connections and requests: what the HTTP engine asks and what the evaluator says are the same verdict by
//! the same rule; a connection that is settled is settled for every request, and as the kernel sees it.

mod worlds;

use proptest::prelude::*;
use std::cell::Cell;
use std::net::IpAddr;
use weft_datapath::identity::{ANONYMOUS, FIRST_WORKLOAD, NODE};
use weft_datapath::policy::{self, Access};
use weft_policy::model::cidr;
use weft_policy::request::{Claim, Claims};
use weft_policy::{Flow, HttpRules, Peer, Request, SpiffeId, Verdict, compile};

const ADDRS: &[&str] = &["10.1.2.3", "10.1.2.4", "10.200.0.1", "192.168.1.1", "2001:db8::1"];
const PORTS: &[u16] = &[80, 443, 8080, 8500];

fn requests() -> Vec<Request> {
    let claims = |list: &[(&str, &str)]| -> Claims {
        list.iter().map(|(name, value)| ((*name).into(), Claim::Text((*value).into()))).collect()
    };
    let mut all = Vec::new();
    for (method, path) in [("GET", "/a"), ("GET", "/ab?x"), ("POST", "/b/1"), ("POST", "/a"), ("PUT", "/")] {
        for (host, header) in [("h", None), ("H", Some("1")), ("g", Some("21"))] {
            for own in
                [None, Some(claims(&[])), Some(claims(&[("iss", "i"), ("sub", "me"), ("group", "admin")]))]
            {
                all.push(Request {
                    method: method.into(),
                    host: host.into(),
                    path: path.into(),
                    headers: header.into_iter().map(|value| ("X".into(), value.into())).collect(),
                    claims: own,
                });
            }
        }
    }
    all
}

struct Tried {
    answers: Cell<usize>,
    asked: Cell<usize>,
}

fn agree(objects: &[String], default_deny: bool, tried: &Tried) -> Result<(), TestCaseError> {
    let model = worlds::model_of(objects, default_deny);
    let identities = model.identities();
    let numbers: compile::Numbers = identities.iter().cloned().zip(FIRST_WORKLOAD..).collect();
    let tables = compile(&model, &numbers);
    let certified = SpiffeId::new("cluster.local", "prod", "a");
    let known = numbers.iter().map(|(identity, number)| (Some(*number), Peer::Workload(identity)));
    let others =
        [(Some(ANONYMOUS), Peer::Anonymous), (Some(NODE), Peer::Node), (None, Peer::Certified(&certified))];
    let ends: Vec<_> = known.chain(others).collect();
    let requests = requests();
    let addrs: Vec<IpAddr> = ADDRS.iter().map(|addr| addr.parse().unwrap()).collect();
    for (to, (to_number, destination)) in ends.iter().enumerate() {
        for (from, (from_number, source)) in ends.iter().enumerate() {
            let port = PORTS[(from + to) % PORTS.len()];
            let own = match destination {
                Peer::Workload(identity) => model.addresses(identity).first().copied(),
                _ => None,
            };
            let (source_addr, destination_addr) =
                (addrs[(from + to) % addrs.len()], own.unwrap_or(addrs[to % addrs.len()]));
            let (source, destination, protocol) = (*source, *destination, 6);
            let flow =
                Flow { source, source_addr, destination, destination_addr, protocol, port, request: None };
            let rules = HttpRules::new(&model, &flow);
            let settled = rules.settled();
            tried.asked.set(tried.asked.get() + usize::from(settled.is_none()));
            // Of one address, what no request changes is what the evaluator says without one.
            let single =
                matches!(destination, Peer::Workload(own) if model.addresses(own) == [destination_addr]);
            if single {
                let plain = model.eval(&flow);
                let expected =
                    Some((plain.verdict, plain.rule)).filter(|(verdict, _)| *verdict != Verdict::Http);
                prop_assert_eq!(&settled, &expected, "{:?} {:?}", flow, rules);
            }
            for request in &requests {
                tried.answers.set(tried.answers.get() + 1);
                let expected = model.eval(&Flow { request: Some(request), ..flow });
                let got = rules.decide(request);
                prop_assert_eq!(
                    &got,
                    &(expected.verdict, expected.rule),
                    "{:?} {:?} {:?}",
                    flow,
                    request,
                    rules
                );
                if let Some((verdict, _)) = &settled {
                    prop_assert_eq!(got.0, *verdict, "settled: {:?} {:?}", flow, request);
                }
            }
            // The kernel looks at the addresses that the destination has.
            let (Some(source), Some(destination), Some(_)) = (*from_number, *to_number, own) else {
                continue;
            };
            let (source_addr, destination_addr) = (cidr::addr(source_addr), cidr::addr(destination_addr));
            let access = Access { source, source_addr, destination, destination_addr, protocol, port };
            let kernel = match policy::decide(&tables, &access).verdict {
                policy::ALLOW => Some(Verdict::Allow),
                policy::HTTP => None,
                _ => Some(Verdict::Deny),
            };
            // The kernel may leave to HTTP what can be told without, not the other way round.
            prop_assert!(kernel.is_none() || kernel == settled.map(|(verdict, _)| verdict), "{:?}", flow);
        }
    }
    Ok(())
}

#[test]
fn the_evaluator_and_the_http_rules_agree() {
    let mut runner = worlds::runner(1_000);
    let tried = Tried { answers: Cell::new(0), asked: Cell::new(0) };
    let policies = (
        prop::collection::vec(worlds::http_policy(), 1..4),
        prop::collection::vec(worlds::cilium_policy(), 0..2),
        prop::option::weighted(0.4, worlds::any_policy()),
    );
    let policies =
        policies.prop_map(|(http, cilium, other)| [http, cilium, other.into_iter().collect()].concat());
    let result = runner
        .run(&worlds::world_of(policies), |(objects, default_deny)| agree(&objects, default_deny, &tried));
    if let Err(error) = result {
        panic!("{error}");
    }
    println!("{} answers, {} connections with questions", tried.answers.get(), tried.asked.get());
    assert!(tried.answers.get() > 500_000, "{} answers", tried.answers.get());
    assert!(tried.asked.get() > 2_000, "{} connections with questions", tried.asked.get());
}
