//! The command line from outside: exit codes, one sentence on stderr, JSON on stdout.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn weft(args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_weft")).args(args).output().expect("weft starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn failures_are_one_sentence_with_the_right_code() {
    for (args, code, words) in [
        (&["agent", "--node", "n1"][..], 2, "--manifests"),
        (&["agent", "--node", "N 1", "--manifests", "/tmp", "--ca-dir", "/tmp"], 2, "--node"),
        (&["agent", "--node", "n1", "--manifests", "/tmp"], 2, "--ca-dir"),
        (&["agent", "--node", "n1", "--manifests", "/nowhere", "--ca-dir", "/tmp"], 2, "/nowhere"),
        (
            &["agent", "--node", "n1", "--manifests", "/tmp", "--ca-dir", "/tmp", "--cgroup", "/proc"],
            2,
            "--cgroup",
        ),
        (&["status", "--admin-socket", "/nowhere/agent.sock"], 1, "no agent is listening"),
        (&["observe", "--from", "web", "--admin-socket", "/nowhere/agent.sock"], 2, "namespace/name"),
        (&["policy", "check", "/nowhere"], 2, "/nowhere"),
        (&["ca", "token", "--dir", "/nowhere", "--node", "n1"], 1, "/nowhere"),
    ] {
        let (found, stdout, stderr) = weft(args);
        assert_eq!(found, Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(words), "{args:?}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: {stderr}");
        assert_eq!(stdout, "", "{args:?}");
    }
}

#[test]
fn explain_answers_about_single_requests() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().to_str().expect("a plain name");
    let manifests = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
status: {podIP: 10.0.0.2}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules:
  - to: [{operation: {methods: [GET], paths: ['/api/*'], hosts: [db.example]}}]
    when:
    - {key: 'request.headers[x-team]', values: [red]}
    - {key: 'request.auth.claims[realm][roles]', values: [reader]}
";
    fs::write(dir.path().join("mesh.yaml"), manifests).expect("written");
    let explain = |more: &[&str]| {
        let words = ["policy", "explain", path, "--from", "shop/web", "--to", "shop/db", "--port", "80"];
        weft(&[&words, more].concat())
    };
    let good = ["--path", "/api/x?y=1", "--host", "DB.example", "--header", "X-Team: red"];
    let claim = ["--claim", "realm[roles]=writer", "--claim", "realm[roles]=reader"];
    for (more, verdict) in [(&claim[..], "allow"), (&claim[..2], "deny"), (&["--method", "PUT"], "deny")] {
        let (code, stdout, stderr) = explain(&[&good[..], more, &["-o", "json"]].concat());
        // The connection is refused as long as nothing looks into it.
        assert_eq!(code, Some(1), "{stderr}");
        let answer: Value = serde_json::from_str(&stdout).expect("JSON");
        assert_eq!(
            (&answer["verdict"], &answer["request"]["verdict"]),
            (&"http".into(), &verdict.into()),
            "{answer}"
        );
        assert!(answer["request"]["rule"].as_str().is_some_and(|rule| rule.contains("shop/db")), "{answer}");
    }
    let (_, stdout, _) = explain(&[&good[..], &claim].concat());
    assert!(stdout.contains("of the request: policy allows it"), "{stdout}");
    let (_, stdout, _) = explain(&["-o", "json"]);
    let answer: Value = serde_json::from_str(&stdout).expect("JSON");
    assert!(answer["request"].is_null(), "nobody asked: {answer}");
    for wrong in [
        &["--header", "x"][..],
        &["--claim", "x"],
        &["--claim", "=x"],
        &["--method", "GET", "--protocol", "udp"],
    ] {
        let (code, _, stderr) = explain(wrong);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{wrong:?}: {stderr}");
    }
}

#[test]
fn check_and_explain_answer_by_exit_code() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().to_str().expect("a plain name");
    let manifests = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, serviceAccountName: web}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: n1, serviceAccountName: db}
status: {podIP: 10.0.0.2}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
    to: [{operation: {ports: ['5432']}}]
";
    fs::write(dir.path().join("mesh.yaml"), manifests).expect("written");
    let (code, stdout, _) = weft(&["policy", "check", path]);
    assert_eq!(code, Some(0), "{stdout}");
    let explain = |port: &str| {
        weft(&[
            "policy", "explain", path, "--from", "shop/web", "--to", "shop/db", "--port", port, "-o", "json",
        ])
    };
    for (port, code, allowed, line) in [("5432", 0, true, 20), ("5433", 1, false, 14)] {
        let (found, stdout, stderr) = explain(port);
        assert_eq!(found, Some(code), "{stderr}");
        let answer: Value = serde_json::from_str(&stdout).expect("JSON");
        assert_eq!(answer["allowed"], allowed);
        assert_eq!(answer["line"], line, "the rule that allows, or the policy that asks for one: {answer}");
        let changes = answer["changes"].as_array().map(Vec::len);
        assert_eq!(changes, Some(usize::from(!allowed)), "{answer}");
        assert_eq!(
            answer["remedy"].is_string(),
            !allowed,
            "a denial says what would have allowed it: {answer}"
        );
    }
    let (code, _, stderr) =
        weft(&["policy", "explain", path, "--from", "shop/nobody", "--to", "shop/db", "--port", "1"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("shop/nobody"), "{stderr}");

    let idle = manifests.replace("app: db}}\n  rules", "app: bd}}\n  rules");
    fs::write(dir.path().join("mesh.yaml"), idle).expect("written");
    let (code, stdout, _) = weft(&["policy", "check", path]);
    assert_eq!(code, Some(0), "a warning is no refusal: {stdout}");
    assert!(stdout.contains("selects no workload"), "{stdout}");

    fs::write(dir.path().join("typo.yaml"), manifests.replace("selector:", "selectr:")).expect("written");
    let (code, stdout, _) = weft(&["policy", "check", path]);
    assert_eq!(code, Some(1));
    assert!(stdout.contains("typo.yaml") && stdout.contains("spec.selectr"), "{stdout}");
    let (_, stdout, _) = weft(&["policy", "check", path, "-o", "json"]);
    let problems: Value = serde_json::from_str(&stdout).expect("JSON");
    assert!(problems.as_array().is_some_and(|rows| rows.iter().any(|row| row["field"] == "spec.selectr")));
}
