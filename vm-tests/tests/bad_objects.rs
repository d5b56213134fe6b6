//! A bad object keeps its former version, or refuses what it would have selected if it had none; it takes no other object
//! with it, not even of its own file; and `weft status` and a metric tell of it until it is repaired.

use serde_json::Value;
use std::time::Duration;
use vm_tests::agent::wait_until;
use vm_tests::mesh::{dial, dial_until, worked};
use vm_tests::{Mesh, Pod, Process, manifests};

/// Messages of `weft status` about manifests, errors only: place and message.
fn errors(mesh: &Mesh) -> Vec<(String, String)> {
    let answer = mesh.agents[0].ask("status -o json");
    let status: Value = serde_json::from_slice(&answer.stdout).expect("status is JSON");
    let problems = status["problems"].as_array().expect("a list of problems").clone();
    let errors = problems.iter().filter(|p| p["severity"] == "error" && p["area"] == "manifests");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    errors.map(|problem| (text(&problem["place"]), text(&problem["message"]))).collect()
}

fn told(mesh: &Mesh, place: &str, message: &str) {
    let is = |(at, what): &(String, String)| at == place && what.contains(message);
    let found = wait_until(Duration::from_secs(30), || errors(mesh).iter().any(is));
    assert!(found, "{place}: {message}: {:#?}", errors(mesh));
    let metric = mesh.metric("weft_manifest_problems", &["severity=\"error\""]);
    assert_eq!(metric as usize, errors(mesh).len(), "the metric counts what status lists");
}

fn reaches(from: &Pod, to: &Pod) -> bool {
    worked(&dial(from, &format!("{} --timeout-ms 5000", to.at4(8080))))
}

fn comes_to_reach(from: &Pod, to: &Pod, wanted: bool) {
    let words = format!("{} --timeout-ms 5000", to.at4(8080));
    let last = dial_until(from, &words, |result| worked(result) == wanted);
    assert_eq!(worked(&last), wanted, "{} to {}: {last}", from.name, to.name);
}

#[test]
fn a_bad_object_keeps_its_former_version_and_takes_nobody_with_it() {
    let mut mesh = Mesh::one();
    let (a, b, c) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"));
    let policy = |to: &Pod, from: &[&Pod]| {
        let rule = manifests::from_pods(from, &[]);
        manifests::authorization(&format!("allow-{}", to.name), &to.name, "ALLOW", &[&rule])
    };
    mesh.manifests.put("policies", &format!("{}---\n{}", policy(&b, &[&a]), policy(&c, &[&a])));
    mesh.start();
    let _servers = [&a, &b, &c].map(|pod| Process::serve(&pod.place, "whoami=[::]:8080"));
    assert!(reaches(&a, &b) && reaches(&a, &c) && !reaches(&c, &b) && !reaches(&b, &c));
    assert_eq!(errors(&mesh), []);

    // The first object is misspelt, and would otherwise let c in place of a; the second changes at the same time.
    let bad = policy(&b, &[&c]).replace("from:", "form:");
    mesh.manifests.put("policies", &format!("{bad}---\n{}", policy(&c, &[&a, &b])));
    let line = 1 + bad.lines().position(|line| line.contains("form:")).expect("the misspelt line");
    let place =
        format!("policies.yaml:{line} document 1 AuthorizationPolicy default/allow-b spec.rules[0].form");
    told(&mesh, &place, "no such field");
    comes_to_reach(&b, &c, true);
    assert!(reaches(&a, &b), "the former version allows a");
    assert!(!reaches(&c, &b), "the former version refuses c");

    // One that never was good refuses what it selects, and that alone.
    let new = manifests::authorization("new", "a", "ALOW", &["{}"]);
    mesh.manifests.put("new", &new);
    let line = 1 + new.lines().position(|line| line.contains("ALOW")).expect("the misspelt line");
    told(&mesh, &format!("new.yaml:{line} document 1 AuthorizationPolicy default/new spec.action"), "ALOW");
    comes_to_reach(&b, &a, false);
    assert!(reaches(&a, &b) && reaches(&b, &c));
    let answer = mesh.agents[0].ask("policies -o json");
    let listed = String::from_utf8_lossy(&answer.stdout).into_owned();
    assert!(listed.contains("\"REFUSES ALL\""), "{listed}");

    // A file that is no YAML at all says nothing of what it was.
    mesh.manifests.put("noise", "apiVersion: v1\nkind: [\n");
    let noise = || {
        errors(&mesh)
            .iter()
            .any(|(place, what)| place.starts_with("noise.yaml:") && what.contains("not YAML"))
    };
    assert!(wait_until(Duration::from_secs(30), noise), "{:#?}", errors(&mesh));
    assert!(reaches(&a, &b) && reaches(&b, &c));

    // Repaired, or gone: nothing is left of it.
    mesh.manifests.put("policies", &format!("{}---\n{}", policy(&b, &[&c]), policy(&c, &[&a])));
    mesh.manifests.put("new", &new.replace("ALOW", "ALLOW"));
    mesh.manifests.remove("noise");
    comes_to_reach(&c, &b, true);
    comes_to_reach(&a, &b, false);
    comes_to_reach(&b, &a, true);
    assert!(wait_until(Duration::from_secs(30), || errors(&mesh).is_empty()), "{:#?}", errors(&mesh));
    assert_eq!(mesh.metric("weft_manifest_problems", &["severity=\"error\""]), 0.0);
}
