//! One connection from one pod to another, and which pairs may have one.

use std::net::IpAddr;
use std::process::Output;
use std::time::{Duration, Instant};

use vm_tests::Pod;
use vm_tests::agent::wait_until;

use super::ground::{Ground, exec};
use super::report::Report;
use super::server::{NGINX, REDIS, SECRET};

/// Addresses of the services in the examples.
const CATALOG_VIP: [&str; 2] = ["10.96.0.10", "fd96::10"];
const CACHE_VIP: [&str; 2] = ["10.96.0.11", "fd96::11"];
const CATALOG_PORT: u16 = 80;

/// What the client of an HTTP or redis request got, if the request got through.
pub(super) struct Answer {
    pub(super) passed: bool,
    pub(super) text: String,
    pub(super) took: Duration,
}

/// GET with curl.
pub(super) fn http(from: &Pod, host: IpAddr, port: u16) -> Answer {
    let url = match host {
        IpAddr::V4(v4) => format!("http://{v4}:{port}/"),
        IpAddr::V6(v6) => format!("http://[{v6}]:{port}/"),
    };
    request(from, "curl", &["-sS", "--max-time", "3", &url])
}

/// GET with redis-cli.
pub(super) fn redis(from: &Pod, host: IpAddr, port: u16) -> Answer {
    request(
        from,
        "timeout",
        &["3", "redis-cli", "-h", &host.to_string(), "-p", &port.to_string(), "GET", "secret"],
    )
}

fn request(from: &Pod, program: &str, args: &[&str]) -> Answer {
    let begun = Instant::now();
    let output = exec(&from.place, program, args);
    let text = text_of(&output);
    let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let passed = text.contains(SECRET);
    Answer { passed, text: if passed || error.is_empty() { text } else { error }, took: begun.elapsed() }
}

/// What a program printed.
pub(super) fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Every pair of the examples, over both IP versions and by way of both services.
pub(super) fn pairs(ground: &Ground, report: &mut Report) {
    let Ground { frontend, catalog, cache, batch, .. } = ground;
    for v in 0..2 {
        let (web, store) = (catalog.addrs()[v], cache.addrs()[v]);
        let name = ["IPv4", "IPv6"][v];
        allowed(
            report,
            &format!("frontend -> catalog, same node, {name}"),
            (ground, frontend),
            "kernel",
            || http(frontend, web, NGINX),
        );
        allowed(
            report,
            &format!("frontend -> cache, other node, {name}"),
            (ground, frontend),
            "mutual_tls",
            || redis(frontend, store, REDIS),
        );
        allowed(
            report,
            &format!("batch -> catalog, other node, {name}"),
            (ground, batch),
            "mutual_tls",
            || http(batch, web, NGINX),
        );
        denied(report, &format!("batch -> cache, same node, {name}"), redis(batch, store, REDIS));
        denied(report, &format!("catalog -> cache, other node, {name}"), redis(catalog, store, REDIS));
        denied(report, &format!("cache -> catalog, other node, {name}"), http(cache, web, NGINX));
        let vip = |vips: [&str; 2]| vips[v].parse().expect("an address");
        let answer = http(frontend, vip(CATALOG_VIP), CATALOG_PORT);
        report.check(&format!("frontend -> service catalog:80, {name}"), answer.passed, &answer.text);
        let answer = redis(frontend, vip(CACHE_VIP), REDIS);
        report.check(&format!("frontend -> service cache, {name}"), answer.passed, &took(&answer));
    }
    let client = frontend.v4.to_string();
    let seen = http(frontend, catalog.v4.into(), NGINX).text;
    report.check("nginx sees the client's own address, same node", seen.ends_with(&client), &seen);
    let client = batch.v4.to_string();
    let seen = http(batch, catalog.v4.into(), NGINX).text;
    report.check("nginx sees the client's own address, other node", seen.ends_with(&client), &seen);
}

/// The request passes, and the agent of the caller's node counts it under `path`.
fn allowed(
    report: &mut Report,
    what: &str,
    (ground, from): (&Ground, &Pod),
    path: &str,
    request: impl Fn() -> Answer,
) {
    let label = format!("connection_security_policy=\"{path}\"");
    let workload = format!("source_workload=\"{}\"", from.name);
    let (agent, node) = ground.agent_of(from);
    let count = || {
        let labels = ["reporter=\"source\"", workload.as_str(), label.as_str()];
        agent.metric(node.netns(), "istio_tcp_connections_opened_total", &labels)
    };
    let before = count();
    let answer = request();
    let counted = wait_until(Duration::from_secs(5), || count() > before);
    let path = match (answer.passed, counted) {
        (true, true) => format!("{path}, {}", took(&answer)),
        (true, false) => format!("passed, but not counted as {path}"),
        (false, _) => answer.text,
    };
    report.check(what, answer.passed && counted, &path);
}

fn denied(report: &mut Report, what: &str, answer: Answer) {
    let seen = if answer.passed { "passed".to_owned() } else { format!("refused: {}", answer.text) };
    report.check(&format!("{what} is denied"), !answer.passed, &seen);
}

fn took(answer: &Answer) -> String {
    format!("{:.0} ms", answer.took.as_secs_f32() * 1e3)
}
