//! The examples that `cargo xtask demo` applies are accepted without a remark and mean what their comments say.

use std::path::Path;

use weft_policy::{Flow, Model, ObjectStore, Peer, Settings, Verdict};

fn demo() -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/demo");
    let mut store = ObjectStore::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        store.apply(&name, &std::fs::read_to_string(&path).unwrap());
    }
    let problems: Vec<String> = store.check(Settings::default()).iter().map(|p| p.to_string()).collect();
    assert_eq!(problems, [] as [String; 0]);
    store.model(Settings::default())
}

#[test]
fn demo_allows_three_pairs_and_no_other() {
    let model = demo();
    let pods = ["frontend", "catalog", "cache", "batch"];
    assert_eq!(model.workloads().len(), pods.len());
    assert_eq!(model.services().len(), 2);
    for (to, port, allowed) in [("catalog", 8080, &["frontend", "batch"][..]), ("cache", 6379, &["frontend"])]
    {
        let destination = model.workload("shop", to).unwrap();
        for from in pods.into_iter().filter(|from| *from != to) {
            let source = model.workload("shop", from).unwrap();
            let flow = Flow {
                source: Peer::Workload(&source.identity),
                source_addr: source.addresses[0],
                destination: Peer::Workload(&destination.identity),
                destination_addr: destination.addresses[0],
                protocol: 6,
                port,
                request: None,
            };
            let expected = if allowed.contains(&from) { Verdict::Allow } else { Verdict::Deny };
            assert_eq!(model.eval(&flow).verdict, expected, "{from} -> {to}:{port}");
            let elsewhere = model.eval(&Flow { port: port + 1, ..flow }).verdict;
            assert_eq!(elsewhere, Verdict::Deny, "{from} -> {to}, another port");
        }
    }
}
