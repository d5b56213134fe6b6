//! A policy that changes under living connections, and the reasons for a refusal.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::agent::wait_until;
use vm_tests::process::{Process, binary};

use super::flow::{http, redis};
use super::ground::{Ground, start};
use super::report::Report;
use super::server::{NGINX, REDIS};

/// From the write of the manifest to the end of the connection at its client.
const CUT: Duration = Duration::from_millis(100);
const PRINCIPAL: &str = "sa/frontend";

/// Revokes frontend's rights one by one while it has an idle connection open, and gives them back.
pub(super) fn cut(ground: &Ground, report: &mut Report) {
    let Ground { frontend, catalog, cache, .. } = ground;
    let direct = hold(ground, &catalog.v4.to_string(), NGINX);
    revoke(ground, report, "policy-catalog", "idle direct connection (same node)", direct);
    let tunnel = hold(ground, &cache.v4.to_string(), REDIS);
    revoke(ground, report, "policy-cache", "idle tunnelled connection (other node)", tunnel);

    let again = wait_until(Duration::from_secs(2), || {
        http(frontend, catalog.v4.into(), NGINX).passed && redis(frontend, cache.v4.into(), REDIS).passed
    });
    report.check("with the rules back, frontend is served again", again, if again { "yes" } else { "no" });
}

/// An idle TCP connection from frontend; its process lives as long as the connection does.
fn hold(ground: &Ground, host: &str, port: u16) -> Process {
    let script = format!("exec 3<>/dev/tcp/{host}/{port} && exec cat <&3");
    let log = ground.dir().join("hold.log");
    start(&ground.frontend.place, "bash", &["-c", &script], &log)
}

fn revoke(ground: &Ground, report: &mut Report, manifest: &str, what: &str, mut held: Process) {
    // Long enough for the connection to be up, and for it to prove that it stays without a change.
    sleep(Duration::from_millis(1000));
    let alive = held.wait(Duration::ZERO).is_none();
    let text = ground.example(manifest);
    let less: String =
        text.lines().filter(|line| !line.ends_with(PRINCIPAL)).map(|line| format!("{line}\n")).collect();
    assert_ne!(text, less, "{manifest} names {PRINCIPAL}");
    ground.apply(manifest, &less);
    let begun = Instant::now();
    let ended = held.wait(Duration::from_secs(5));
    let took = begun.elapsed();
    let seen = match (alive, ended) {
        (false, _) => "it was not even open before".to_owned(),
        (true, None) => "still open after 5 s".to_owned(),
        (true, Some(_)) => format!("cut after {:.0} ms", took.as_secs_f32() * 1e3),
    };
    report.check(&format!("{what}, rule revoked"), alive && ended.is_some() && took <= CUT, &seen);
    ground.apply(manifest, &text);
}

/// A refusal is explained beforehand from the manifests, and afterwards by the event of the agent that refused.
pub(super) fn explain(ground: &Ground, report: &mut Report) {
    let mut weft = Command::new(binary("weft"));
    weft.args(["policy", "explain"]).arg(ground.manifests.path());
    weft.args(["--from", "shop/batch", "--to", "shop/cache", "--port", &REDIS.to_string()]);
    let output = weft.output().expect("start weft");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    report.note(&text);
    let denied = output.status.code() == Some(1) && text.contains("cache");
    report.check("weft policy explain: batch -> cache", denied, text.lines().next().unwrap_or("no answer"));

    let refused = !redis(&ground.batch, ground.cache.v4.into(), REDIS).passed;
    let mut event = None;
    wait_until(Duration::from_secs(3), || {
        let output = ground.agents[1].ask("observe --verdict denied -o json");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        event = text
            .lines()
            .rev()
            .find(|line| line.contains("batch") && line.contains("cache"))
            .map(str::to_owned);
        event.is_some()
    });
    if let Some(event) = &event {
        report.note(event);
    }
    let seen = event.as_deref().and_then(|line| serde_json::from_str::<Value>(line).ok());
    let reason = seen.as_ref().and_then(|event| event["reason"].as_str()).unwrap_or("no event");
    report.check("weft observe has the denied flow", refused && seen.is_some(), reason);
}
