//! The real servers: nginx and redis in pods, Prometheus on a node.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::process::Process;
use vm_tests::{Pod, agent::wait_until};

use super::flow::text_of;
use super::ground::{Ground, exec, start};
use super::report::Report;

/// In every answer of nginx and every value in redis; what a wire must not show.
pub(super) const SECRET: &str = "the-price-list-of-next-year";
pub(super) const NGINX: u16 = 8080;
pub(super) const REDIS: u16 = 6379;
const PROMETHEUS: &str = "127.0.0.1:9090";
const START: Duration = Duration::from_secs(30);

/// nginx in the catalog pod; each answer ends with the client's address as nginx sees it.
pub(super) fn nginx(ground: &Ground) -> Process {
    let dir = ground.dir().join("nginx");
    fs::create_dir_all(&dir).expect("a directory for nginx");
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("    {kind}_temp_path {}/{kind};\n", dir.display()))
        .concat();
    let config = format!(
        "daemon off;
worker_processes 1;
user root;
pid {dir}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off;
{temp}    server {{
        listen {NGINX};
        listen [::]:{NGINX} ipv6only=on;
        location / {{ return 200 \"{SECRET} for $remote_addr\\n\"; }}
    }}
}}
",
        dir = dir.display()
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config).expect("the configuration of nginx");
    let file = file.display().to_string();
    let process = start(&ground.catalog.place, "nginx", &["-e", "stderr", "-c", &file], &dir.join("log"));
    answers(&ground.catalog, "curl", &["-s", &format!("http://{}/", ground.catalog.at4(NGINX))], SECRET);
    process
}

/// redis in the cache pod.
pub(super) fn redis(ground: &Ground) -> Process {
    let dir = ground.nodes[1].dir().join("redis");
    fs::create_dir_all(&dir).expect("a directory for redis");
    let (port, path) = (REDIS.to_string(), dir.display().to_string());
    let args =
        ["--port", &port, "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir", &path];
    let process = start(&ground.cache.place, "redis-server", &args, &dir.join("log"));
    let address = ground.cache.v4.to_string();
    answers(&ground.cache, "redis-cli", &["-h", &address, "SET", "secret", SECRET], "OK");
    process
}

/// Waits until a server answers its own pod.
fn answers(pod: &Pod, program: &str, args: &[&str], expected: &str) {
    let up = wait_until(START, || text_of(&exec(&pod.place, program, args)).contains(expected));
    assert!(up, "the server in pod {} does not answer", pod.name);
}

/// A real Prometheus on node 1 scrapes both agents; what it knows is compared with what was done.
pub(super) fn prometheus(ground: &Ground, report: &mut Report) -> Process {
    let dir = ground.dir().join("prometheus");
    fs::create_dir_all(&dir).expect("a directory for Prometheus");
    let targets: Vec<_> =
        ground.agents.iter().map(|agent| format!("'{}'", agent.metrics_address())).collect();
    let config = format!(
        "global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: weft
    static_configs: [{{targets: [{}]}}]
",
        targets.join(", ")
    );
    let file = dir.join("prometheus.yml");
    fs::write(&file, config).expect("the configuration of Prometheus");
    let args = [
        format!("--config.file={}", file.display()),
        format!("--storage.tsdb.path={}/data", dir.display()),
        format!("--web.listen-address={PROMETHEUS}"),
    ];
    let place = ground.nodes[0].place("prometheus");
    let process = start(&place, "prometheus", &args.each_ref().map(String::as_str), &dir.join("log"));
    let ask = |query: &str| -> Option<Value> {
        let url = format!("http://{PROMETHEUS}/api/v1/query");
        let output = exec(&place, "curl", &["-sG", &url, "--data-urlencode", &format!("query={query}")]);
        let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
        answer["data"]["result"]
            .as_array()
            .filter(|samples| !samples.is_empty())
            .map(|_| answer["data"]["result"].clone())
    };
    let end = Instant::now() + START;
    let up = loop {
        let up = ask("sum(up)").and_then(|samples| samples[0]["value"][1].as_str()?.parse::<u32>().ok());
        if up == Some(2) || Instant::now() > end {
            break up.unwrap_or(0);
        }
        sleep(Duration::from_millis(200));
    };
    report.check("agents that Prometheus scrapes", up == 2, &format!("{up} of 2"));

    let opened = "sum by (connection_security_policy, source_workload, destination_workload) \
                  (istio_tcp_connections_opened_total{reporter=\"source\"})";
    let samples = ask(opened).unwrap_or_default();
    let mut policies = Vec::new();
    for sample in samples.as_array().into_iter().flatten() {
        let label = |name: &str| sample["metric"][name].as_str().unwrap_or("?").to_owned();
        let (policy, count) =
            (label("connection_security_policy"), sample["value"][1].as_str().unwrap_or("?"));
        report.note(&format!(
            "{} -> {} {policy}: {count} opened",
            label("source_workload"),
            label("destination_workload")
        ));
        policies.push(policy);
    }
    for policy in ["mutual_tls", "kernel"] {
        let seen = policies.iter().any(|found| found == policy);
        let said = if seen { "counted" } else { "no sample" };
        report.check(&format!("istio_tcp_connections_opened_total with {policy}"), seen, said);
    }
    process
}
