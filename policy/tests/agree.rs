//! For random meshes, policies and flows: the slow evaluator over the model and the kernel's decision over the compiled
//! tables give the same verdict, by the same rule.

mod worlds;

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use weft_datapath::abi::{PolicyKey, SubjectKey};
use weft_datapath::identity::{ANONYMOUS, FIRST_WORKLOAD, NODE};
use weft_datapath::policy::{self, Access, Mode};
use weft_policy::model::cidr;
use weft_policy::model::layer::icmp_port;
use weft_policy::{Flow, Model, Peer, RuleRef, Tables, Verdict, compile};
use worlds::{model_of, network_policy, world};

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
/// Protocol and port of every flow that is tried.
const ASKED: &[(u8, u16)] = &[
    (6, 0),
    (6, 80),
    (6, 443),
    (6, 8080),
    (6, 8500),
    (6, 9999),
    (17, 53),
    (17, 80),
    (17, 8500),
    (132, 80),
    (1, icmp_port(8)),
    // As a number this is port 80.
    (1, icmp_port(79)),
    (58, icmp_port(128)),
    (47, 0),
];
fn numbers(model: &Model) -> compile::Numbers {
    model.identities().into_iter().zip(FIRST_WORKLOAD..).collect::<BTreeMap<Arc<_>, _>>()
}

/// All flows between all ends of a small world; returns how many there were.
fn agree(model: &Model, tables: &Tables, numbers: &compile::Numbers) -> Result<usize, TestCaseError> {
    let mut flows = 0;
    let addrs: Vec<IpAddr> = ADDRS.iter().map(|addr| addr.parse().unwrap()).collect();
    let known = numbers.iter().map(|(identity, number)| (*number, Peer::Workload(identity)));
    let ends: Vec<_> = known.chain([(ANONYMOUS, Peer::Anonymous), (NODE, Peer::Node)]).collect();
    for (to, destination) in &ends {
        for (protocol, port) in ASKED {
            if let (Peer::Workload(identity), 6) = (destination, protocol) {
                let mode = policy::mode(tables, 0, *to, *port);
                prop_assert_eq!(
                    mode,
                    model.modes(identity).at(*port).0,
                    "mode of {} port {}",
                    identity,
                    port
                );
            }
            for (from, source) in &ends {
                // Every address of the source with one of the destination, and the other way round.
                let pairs = (0..addrs.len()).flat_map(|at| [(at, at + *from as usize + 1), ((at + 5), at)]);
                for (source_addr, destination_addr) in pairs {
                    let source_addr = addrs[source_addr % addrs.len()];
                    let destination_addr = addrs[destination_addr % addrs.len()];
                    let (source, destination) = (*source, *destination);
                    let (protocol, port) = (*protocol, *port);
                    let flow = Flow {
                        source,
                        source_addr,
                        destination,
                        destination_addr,
                        protocol,
                        port,
                        request: None,
                    };
                    same(model, tables, &flow, *from, *to)?;
                    flows += 1;
                }
            }
        }
    }
    Ok(flows)
}

fn same(
    model: &Model,
    tables: &Tables,
    flow: &Flow<'_>,
    source: u32,
    destination: u32,
) -> Result<(), TestCaseError> {
    let expected = model.eval(flow);
    let (source_addr, destination_addr) = (cidr::addr(flow.source_addr), cidr::addr(flow.destination_addr));
    let (protocol, port) = (flow.protocol, flow.port);
    let got = policy::decide(
        tables,
        &Access { source, source_addr, destination, destination_addr, protocol, port },
    );
    let verdict = match got.verdict {
        policy::ALLOW => Verdict::Allow,
        policy::HTTP => Verdict::Http,
        _ => Verdict::Deny,
    };
    prop_assert_eq!(verdict, expected.verdict, "{:?}: {:?}", flow, expected);
    prop_assert_eq!(tables.rule(got.rule), expected.rule.as_ref(), "{:?}", flow);
    prop_assert_eq!(expected.remedy.is_none(), verdict == Verdict::Allow);
    if source == ANONYMOUS && destination >= FIRST_WORKLOAD && protocol == 6 {
        let strict = policy::mode(tables, 0, destination, port) == Mode::Strict;
        prop_assert!(!strict || verdict == Verdict::Deny);
    }
    Ok(())
}

fn check(objects: &[String], default_deny: bool) -> Result<usize, TestCaseError> {
    let model = model_of(objects, default_deny);
    let numbers = numbers(&model);
    agree(&model, &compile(&model, &numbers), &numbers)
}

/// Worlds that are tried: a few million flows.
const CASES: u32 = 800;

/// Where counter-examples stay, shrunk, to be tried for ever.
fn kept() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/agree")
}

#[test]
fn the_evaluator_and_the_kernels_decision_agree() {
    let mut runner = worlds::runner(CASES);
    let (flows, refused, policies) =
        (std::cell::Cell::new(0), std::cell::Cell::new(0), std::cell::Cell::new(0));
    let result = runner.run(&world(), |(objects, default_deny)| {
        let model = model_of(&objects, default_deny);
        refused.set(refused.get() + model.blocked().len());
        policies.set(policies.get() + model.network_policies().len() + model.authorization_policies().len());
        flows.set(flows.get() + check(&objects, default_deny)?);
        Ok(())
    });
    if let Err(proptest::test_runner::TestError::Fail(why, (objects, default_deny))) = &result {
        let mode = if *default_deny { "# --default-deny\n" } else { "" };
        let text = format!("{mode}{}", objects.join("---\n"));
        let name = format!(
            "{:016x}.yaml",
            text.bytes().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()))
        );
        let path = kept().join(name);
        let stored = std::fs::create_dir_all(kept()).and_then(|()| std::fs::write(&path, &text));
        panic!(
            "{why}\n{text}\n{}",
            stored.map_or_else(|e| e.to_string(), |()| format!("kept in {}", path.display()))
        );
    }
    result.unwrap();
    println!("{} flows, {} policies, {} refused", flows.get(), policies.get(), refused.get());
    assert!(flows.get() > 1_000_000, "only {} flows were tried", flows.get());
    assert!(refused.get() * 5 < policies.get(), "the generator writes too much nonsense");
}

/// What the tables say of one subject, with rules by name.
fn rows(tables: &Tables, subject: u32) -> Vec<(PolicyKey, u32, Option<&RuleRef>)> {
    let own = tables.policies.iter().filter(|(key, _)| key.subject == subject);
    own.map(|(key, value)| (*key, value.verdict, tables.rule(value.rule))).collect()
}

/// A policy more changes the rows of those whom it selects, and moves no number of a rule.
#[test]
fn an_unrelated_policy_changes_nothing() {
    let mut runner = worlds::runner(400);
    let (alike, tried) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let result = runner.run(&(world(), network_policy()), |((objects, default_deny), policy)| {
        let mut more = objects.clone();
        more.push(policy.replace("NAME", "another"));
        let (before, after) = (model_of(&objects, default_deny), model_of(&more, default_deny));
        let numbers = numbers(&before);
        let (old, new) = (compile(&before, &numbers), compile(&after, &numbers));
        for (number, rule) in &old.rules {
            prop_assert!(
                new.rules.get(number).is_none_or(|now| now == rule),
                "{} is now {:?}",
                rule,
                new.rule(*number)
            );
        }
        let added = after.network_policies().find(|named| &*named.object.name == "another");
        for (identity, number) in &numbers {
            tried.set(tried.get() + 1);
            let selected =
                added.is_none_or(|named| named.policy.subject.selects(after.namespaces(), identity));
            // Ranges of the added policy may lie inside those of others, who then need rows for them.
            let flags = policy::BY_CLASS | policy::BY_RANGE;
            let ranges = flags | flags << policy::EGRESS_SHIFT;
            let key = SubjectKey { bank: 0, identity: *number };
            if selected || old.subjects[&key].flags & ranges != 0 {
                continue;
            }
            alike.set(alike.get() + 1);
            prop_assert_eq!(old.subjects[&key], new.subjects[&key]);
            prop_assert_eq!(rows(&old, *number), rows(&new, *number), "{}", identity);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(alike.get() * 4 > tried.get(), "{} of {} subjects were compared", alike.get(), tried.get());
}

#[test]
fn counter_examples_of_the_past_agree() {
    let Ok(entries) = std::fs::read_dir(kept()) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let result = check(std::slice::from_ref(&text), text.starts_with("# --default-deny"));
        assert!(result.is_ok(), "{}: {result:?}", path.display());
    }
}
