//! `weft policy check -o json` and `explain -o json` say the same, in the same order, every time: programs read them.
//!
//! What they say is kept in `policy_json/`; `WEFT_BLESS=1` writes it anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const WORLD: &str = include_str!("policy_json/world.yaml");

fn weft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft")).args(args).output().expect("start weft")
}

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policy_json").join(name)
}

/// Runs it on the world, its documents written as files in both orders; the answer must be what is kept, both times.
fn golden(name: &str, code: i32, words: &[&str]) {
    let documents: Vec<(usize, &str)> = WORLD.split("---\n").enumerate().collect();
    for backwards in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut order = documents.clone();
        if backwards {
            order.reverse();
        }
        for (index, text) in order {
            fs::write(dir.path().join(format!("{index:02}.yaml")), text).expect("write a manifest");
        }
        let dir = dir.path().to_str().expect("UTF-8");
        let mut args = vec!["policy", words[0], dir];
        args.extend(&words[1..]);
        args.extend(["-o", "json"]);
        let output = weft(&args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        if std::env::var_os("WEFT_BLESS").is_some() {
            fs::write(kept(name), &text).expect("write what is kept");
        }
        let expected = fs::read_to_string(kept(name)).expect("what is kept");
        assert_eq!(text, expected, "{name} (WEFT_BLESS=1 takes what weft says now)");
    }
}

#[test]
fn check_is_sorted_and_stable() {
    golden("check.json", 1, &["check"]);
    let text = fs::read_to_string(kept("check.json")).expect("what is kept");
    let rows: Vec<serde_json::Value> = serde_json::from_str(&text).expect("a list");
    let place = |row: &serde_json::Value| (row["file"].to_string(), row["line"].as_u64());
    assert!(rows.len() > 5 && rows.is_sorted_by_key(place), "{text}");
}

#[test]
fn explain_is_stable() {
    let ask = |name: &str, code: i32, from: &str, to: &str, rest: &[&str]| {
        golden(name, code, &[&["explain", "--from", from, "--to", to, "--port"], rest].concat());
    };
    ask("allowed.json", 0, "shop/web", "shop/db", &["5432"]);
    ask("denied.json", 1, "shop/web", "shop/db", &["22"]);
    ask("default.json", 0, "shop/web", "shop/lone", &["80"]);
    ask("refused.json", 1, "shop/web", "shop/bad", &["80"]);
    ask("http.json", 1, "shop/db", "shop/web", &["80"]);
    ask("request.json", 1, "shop/db", "shop/web", &["80", "--path", "/items/7"]);
    ask("other_request.json", 1, "shop/db", "shop/web", &["80", "--path", "/items/7/parts"]);
}
