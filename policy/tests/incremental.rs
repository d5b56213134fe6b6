//! For random sequences of changes: following them gives the model and the tables that the objects give from nothing, and
//! the differences lead there.

mod worlds;

use proptest::prelude::*;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_datapath::identity::FIRST_WORKLOAD;
use weft_policy::{Engine, Identity, Settings, Tables, compile};

/// Files with one object each, that come, change and go.
const FILES: usize = 14;

/// What becomes of a file.
#[derive(Clone, Debug)]
enum Step {
    Write {
        file: usize,
        text: String,
    },
    Remove {
        file: usize,
    },
    /// Model and tables follow what was done so far.
    Update,
}

/// Objects of one name: that of the file, which may be one that another file has too.
fn object() -> impl Strategy<Value = String> {
    let sample = |texts: &'static [&'static str]| prop::sample::select(texts).prop_map(str::to_owned);
    prop_oneof![
        8 => worlds::pod(),
        8 => worlds::any_policy(),
        1 => sample(&[
            "apiVersion: v1\nkind: Service\nmetadata: {name: NAME, namespace: default}\nspec: {clusterIP: 10.96.0.1, selector: {app: x}, ports: [{port: 80, targetPort: web}]}\n",
            "apiVersion: v1\nkind: Service\nmetadata: {name: o3, namespace: prod}\nspec: {clusterIP: 10.96.0.3, selector: {app: y}, ports: [{port: 53, protocol: UDP}]}\n",
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: NAME}\nspec: {host: o3.prod.svc.cluster.local, trafficPolicy: {loadBalancer: {simple: LEAST_REQUEST}}}\n",
        ]),
        1 => sample(&[
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: NAME, namespace: prod, labels: {kubernetes.io/service-name: o3}}\naddressType: IPv4\nendpoints: [{addresses: [10.1.2.5]}]\nports: [{name: \"\", port: 53, protocol: UDP}]\n",
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: NAME, namespace: default, labels: {kubernetes.io/service-name: o2}}\naddressType: IPv4\nendpoints: [{addresses: [10.1.2.7]}]\nports: [{name: \"\", port: 8080}]\n",
        ]),
        1 => sample(&[
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: prod, labels: {team: red}}\n",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: prod}\n",
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: NAME}\nspec: {rulez: []}\n",
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: NAME, namespace: prod}\nspec: {podSelector: [}\n",
            "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: NAME, namespace: prod}\nspec: {}\n",
            "apiVersion: apps/v1\nkind: Pod\nmetadata: {name: NAME, namespace: prod}\n",
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: NAME,\n  namespace: prod}\nspec: {podSelector: [}\n",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: prod, zone: x}\n",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ServiceAccount, metadata: {name: NAME}}\n- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {generateName: n}, spec: {podSelector: {}}}\n",
        ]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let write = (0..FILES, prop::bool::weighted(0.03), object()).prop_map(|(file, twice, text)| {
        let name = if twice { (file + 1) % FILES } else { file };
        // Most pods have addresses of their own.
        let text = text.replace("10.1.2.3", &format!("10.1.2.{}", 3 + name % 7));
        let text = text.replace("10.7.0.1", &format!("10.7.0.{name}"));
        Step::Write { file, text: text.replace("NAME", &format!("o{name}")) }
    });
    prop_oneof![
        6 => write,
        2 => (0..FILES).prop_map(|file| Step::Remove { file }),
        5 => Just(Step::Update),
    ]
}

fn numbering(known: &mut BTreeMap<Arc<Identity>, u32>) -> impl FnMut(&Arc<Identity>) -> Option<u32> {
    |identity| {
        let next = FIRST_WORKLOAD + known.len() as u32;
        Some(*known.entry(identity.clone()).or_insert(next))
    }
}

/// Returns how many updates there were, and how many of them began from nothing.
fn follow(steps: &[Step], settings: Settings) -> Result<(u64, u64), TestCaseError> {
    let mut engine = Engine::new(settings.clone());
    let mut numbers: BTreeMap<Arc<Identity>, u32> = BTreeMap::new();
    let mut copy = Tables::default();
    let mut updates = 0;
    for step in steps.iter().chain([&Step::Update]) {
        match step {
            Step::Write { file, text } => drop(engine.apply(&format!("{file:02}.yaml"), text).len()),
            Step::Remove { file } => engine.remove(&format!("{file:02}.yaml")),
            Step::Update => {
                let diff = engine.update(&mut numbering(&mut numbers));
                updates += 1;
                diff.apply(&mut copy);
                let problems = engine.problems();
                let model = engine.store().model(settings.clone());
                prop_assert_eq!(engine.model(), &model);
                prop_assert_eq!(problems, engine.store().check(settings.clone()));
                let tables = compile(&model, &numbers);
                prop_assert_eq!(engine.tables(), &tables);
                prop_assert_eq!(&copy, &tables);
                prop_assert!(engine.update(&mut |_| None) == Default::default(), "nothing changed");
            }
        }
    }
    Ok((updates, engine.restarts()))
}

#[test]
fn following_changes_is_as_good_as_beginning_from_nothing() {
    let mut runner = worlds::runner(1_500);
    let (updates, restarts) = (Cell::new(0), Cell::new(0));
    let world = (prop::collection::vec(step(), 1..60), prop::bool::weighted(0.3));
    let result = runner.run(&world, |(steps, default_deny)| {
        let (more, again) = follow(&steps, Settings { default_deny, ..Settings::default() })?;
        updates.set(updates.get() + more);
        restarts.set(restarts.get() + again);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    println!("{} updates, {} from nothing", updates.get(), restarts.get());
    assert!(updates.get() > 10_000, "{} updates", updates.get());
    assert!(restarts.get() * 2 < updates.get(), "{} of {} began from nothing", restarts.get(), updates.get());
}

/// In the range all of account `a` may, who are most, and nobody else: whoever comes without being one of them is written down,
/// though before he came he was of no interest.
#[test]
fn a_newcomer_is_not_taken_for_most_others() {
    let pod = |name: &str, account: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{pod: {name}}}}}\nspec: {{serviceAccountName: {account}}}\n"
        )
    };
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {rules: [{from: \
                  [{source: {principals: [\"*/sa/a\"], ipBlocks: [10.0.0.0/8]}}]}]}\n";
    let write = |file: usize, text: String| Step::Write { file, text };
    let mut steps: Vec<Step> = (0..5).map(|n| write(n, pod(&format!("a{n}"), "a"))).collect();
    steps.extend([write(5, pod("b", "b")), write(6, policy.to_owned()), Step::Update]);
    steps.extend([write(7, pod("c", "c")), Step::Update, Step::Remove { file: 7 }]);
    let (updates, restarts) = follow(&steps, Settings::default()).unwrap();
    assert_eq!((updates, restarts), (3, 0));
}
