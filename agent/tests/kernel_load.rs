//! Loading, adopting, policy publication and detaching on the running kernel. Needs root.

mod common;

use std::fs;

use common::{Bpffs, Cgroup};
use weft_agent::kernel::error::Error;
use weft_agent::kernel::maps::Prefix;
use weft_agent::kernel::numbers::Numbers;
use weft_agent::kernel::services::{DesiredService, ServiceSync};
use weft_agent::kernel::sync::{PolicySet, PolicySync};
use weft_agent::kernel::{Kernel, detach};
use weft_datapath::abi::{Backend, CidrKey, PolicyKey, PolicyValue, ServiceKey, Subject, SubjectKey};
use weft_datapath::names::config;
use weft_datapath::policy::{ALLOW, DENY};

#[test]
fn a_second_agent_adopts_what_the_first_left() {
    let (bpffs, cgroup) = (Bpffs::new("adopt"), Cgroup::new("adopt"));
    let first = Kernel::load(&bpffs.root()).unwrap();
    first.attach_hooks(cgroup.path()).unwrap();
    let links = first.links().unwrap();
    assert_eq!(links.len(), 11);
    assert!(links.iter().all(|(_, current)| *current));
    let number = Numbers::read(&first.maps).unwrap().number(&first.maps, "spiffe://td/ns/a/sa/b").unwrap();
    assert_eq!(number, 16);

    // One agent at a time.
    assert!(matches!(Kernel::load(&bpffs.root()), Err(Error::Locked { .. })));
    drop(first);

    let second = Kernel::load(&bpffs.root()).unwrap();
    // Still the first agent's programs, until they are replaced in place.
    assert!(second.links().unwrap().iter().all(|(_, current)| !current));
    second.attach_hooks(cgroup.path()).unwrap();
    let links = second.links().unwrap();
    assert_eq!(links.len(), 11);
    assert!(links.iter().all(|(_, current)| *current));
    let mut numbers = Numbers::read(&second.maps).unwrap();
    assert_eq!(numbers.number(&second.maps, "spiffe://td/ns/a/sa/b").unwrap(), number);
    assert_eq!(numbers.number(&second.maps, "spiffe://td/ns/a/sa/c").unwrap(), number + 1);

    // A hook elsewhere is moved, not doubled.
    let other = Cgroup::new("adopt-other");
    second.attach_hooks(other.path()).unwrap();
    assert_eq!(second.links().unwrap().len(), 11);
    for run in second.run_times().unwrap() {
        assert_eq!(run.runs, 0, "{run:?}");
    }

    drop(second);
    detach(&bpffs.root()).unwrap();
    assert!(!bpffs.root().exists());
    detach(&bpffs.root()).unwrap();
}

#[test]
fn unusable_places_are_refused_by_name() {
    let bpffs = Bpffs::new("refuse");
    let elsewhere = std::env::temp_dir().join("weft-no-bpffs");
    assert!(matches!(Kernel::load(&elsewhere), Err(Error::NotBpffs { .. })));
    assert!(!elsewhere.exists());

    fs::create_dir_all(bpffs.root().join("v9999")).unwrap();
    assert!(matches!(Kernel::load(&bpffs.root()), Err(Error::Abi { found: 9999, .. })));
    detach(&bpffs.root()).unwrap();

    let kernel = Kernel::load(&bpffs.root()).unwrap();
    assert!(matches!(kernel.attach_hooks("/proc/self".as_ref()), Err(Error::Attach { .. })));
    assert!(matches!(kernel.attach_hooks("/no/such/cgroup".as_ref()), Err(Error::Cgroup { .. })));
    kernel.maps.config.insert(&config::ABI, &4711).unwrap();
    drop(kernel);
    assert!(matches!(Kernel::load(&bpffs.root()), Err(Error::Abi { found: 4711, .. })));
}

fn subject(identity: u32) -> (SubjectKey, Subject) {
    (SubjectKey { bank: 0, identity }, Subject { flags: 0, mode: 1 })
}

fn row(source: u32, verdict: u32) -> (PolicyKey, PolicyValue) {
    let key = PolicyKey { subject: 20, peer: source, ..PolicyKey::default() };
    (key, PolicyValue { verdict, rule: 1 })
}

#[test]
fn policy_flips_whole_or_not_at_all() {
    let bpffs = Bpffs::new("policy");
    let kernel = Kernel::load_sized(&bpffs.root(), &[("weft_policy", 8)]).unwrap();
    let maps = &kernel.maps;
    let mut sync = PolicySync::read(maps).unwrap();
    assert_eq!(sync.revision(), 0);

    let mut want = PolicySet {
        subjects: [subject(20)].into(),
        policies: [row(u32::MAX, DENY), row(21, ALLOW)].into(),
        classes: [(Prefix { bits: 32 + 104, data: CidrKey { bank_be: [0; 4], addr: [10; 16] } }, 1)].into(),
        ..PolicySet::default()
    };
    let published = sync.publish(maps, &want, false).unwrap();
    assert_eq!((published.revision, published.changes), (1, 4));
    assert_eq!(maps.config.lookup(&config::REVISION).unwrap(), Some(1));
    let allowed = PolicyKey { bank: 1, ..row(21, ALLOW).0 };
    assert_eq!(maps.policy.lookup(&allowed).unwrap().unwrap().verdict, ALLOW);
    // The same again writes nothing, from memory or from the kernel's content.
    assert_eq!(sync.publish(maps, &want, false).unwrap().changes, 0);
    let mut sync = PolicySync::read(maps).unwrap();
    assert_eq!(sync.publish(maps, &want, false).unwrap().changes, 0);

    // A change goes to the other bank; the active one is not touched.
    want.policies = [row(u32::MAX, DENY)].into();
    let published = sync.publish(maps, &want, false).unwrap();
    assert_eq!(published.revision, 2);
    assert_eq!(maps.policy.lookup(&allowed).unwrap().unwrap().verdict, ALLOW);
    assert_eq!(maps.policy.lookup(&PolicyKey { bank: 0, ..allowed }).unwrap(), None);

    // More than fits: no flip, and what is in force stays whole.
    let small = want.clone();
    want.policies = (21..40).map(|source| row(source, ALLOW)).collect();
    assert!(matches!(sync.publish(maps, &want, false), Err(Error::Full { map: "weft_policy", capacity: 8 })));
    assert_eq!(maps.config.lookup(&config::REVISION).unwrap(), Some(2));
    let denied = PolicyKey { bank: 0, ..row(u32::MAX, DENY).0 };
    assert_eq!(maps.policy.lookup(&denied).unwrap().unwrap().verdict, DENY);
    assert_eq!(sync.publish(maps, &small, false).unwrap().changes, 0);
    // And what fits again, works again.
    want.policies = [row(30, ALLOW)].into();
    assert_eq!(sync.publish(maps, &want, false).unwrap().revision, 3);
    let bank1 = maps.policy.entries().unwrap().into_iter().filter(|(key, _)| key.bank == 1).count();
    assert_eq!(bank1, 1);
}

#[test]
fn services_switch_epochs() {
    let bpffs = Bpffs::new("services");
    let kernel = Kernel::load(&bpffs.root()).unwrap();
    let maps = &kernel.maps;
    let key = ServiceKey { addr: [1; 16], port: 80, protocol: 6, pad: 0 };
    let backend = |port| Backend { addr: [2; 16], port, pad: 0 };
    let mut want = [(key, DesiredService { balance: 1, backends: vec![backend(1), backend(2)] })].into();
    let mut sync = ServiceSync::read(maps).unwrap();
    assert_eq!(sync.follow(maps, &want).unwrap(), 3);
    assert_eq!(ServiceSync::read(maps).unwrap().follow(maps, &want).unwrap(), 0);
    let first = maps.service.lookup(&key).unwrap().unwrap();
    assert_eq!((first.id, first.count), (1, 2));

    want.get_mut(&key).unwrap().backends = vec![backend(3)];
    sync.follow(maps, &want).unwrap();
    let second = maps.service.lookup(&key).unwrap().unwrap();
    assert_eq!((second.id, second.count), (1, 1));
    assert_ne!(second.epoch, first.epoch);
    assert_eq!(maps.backend.entries().unwrap().len(), 1);

    sync.follow(maps, &Default::default()).unwrap();
    assert!(maps.service.entries().unwrap().is_empty() && maps.backend.entries().unwrap().is_empty());
}
