//! Figures side by side: the same load over a bare veth and through the mesh, in turns.
//!
//! Each round measures raw, then mesh; what counts is the ratio within a round, and of those the median. Latencies run
//! with client, server and agents on one processor (unpinned, a ping-pong flips between 6 and 65 us); throughput runs
//! unpinned. Build it, and the agent, with `--release`: a debug agent says nothing.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};
use vm_tests::process::load;
use vm_tests::{Mesh, Node, Pod, Process};

#[derive(Parser)]
#[command(about = "Raw veth against the mesh, interleaved")]
struct Args {
    #[arg(long, value_enum, default_value = "both")]
    path: Path,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Path {
    /// Two pods of one node.
    Same,
    /// Two pods of two nodes.
    Cross,
    /// Both.
    Both,
}

/// One figure: how it is measured, and which ratio to raw is good enough.
struct Figure {
    name: &'static str,
    words: &'static str,
    field: &'static str,
    pinned: bool,
    limit: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
    /// Reported, not judged.
    None,
}

const BULK: &str = "bulk ADDR:8082 --millis 1500";
const RTT: &str = "--cpu 0 rtt ADDR:8081 --rounds 5000";
const CRR: &str = "--cpu 0 crr ADDR:8081 --rounds 1500";

const SAME: [Figure; 3] = [
    Figure { name: "throughput", words: BULK, field: "mb_per_s", pinned: false, limit: Limit::AtLeast(0.9) },
    Figure { name: "64 B round trip", words: RTT, field: "p50_us", pinned: true, limit: Limit::AtMost(1.1) },
    Figure {
        name: "connect+1 B+close",
        words: CRR,
        field: "p50_us",
        pinned: true,
        limit: Limit::AtMost(1.15),
    },
];

const CROSS: [Figure; 3] = [
    Figure { name: "throughput", words: BULK, field: "mb_per_s", pinned: false, limit: Limit::AtLeast(0.16) },
    Figure { name: "64 B round trip", words: RTT, field: "p50_us", pinned: true, limit: Limit::AtMost(6.0) },
    Figure { name: "connect+1 B+close", words: CRR, field: "p50_us", pinned: true, limit: Limit::None },
];

/// Two pods with servers in the second.
struct Scene {
    from: Pod,
    to: Pod,
    agents: Vec<u32>,
    _servers: [Process; 2],
}

impl Scene {
    fn new(from: Pod, to: Pod, agents: Vec<u32>) -> Scene {
        let servers = [
            Process::serve(&to.place, "--cpu 0 echo=[::]:8081"),
            Process::serve(&to.place, "sink=[::]:8082"),
        ];
        Scene { from, to, agents, _servers: servers }
    }

    fn measure(&self, figure: &Figure) -> Result<f64, Value> {
        for agent in &self.agents {
            pin(*agent, figure.pinned);
        }
        let result = load(&self.from.place, &figure.words.replace("ADDR", &self.to.v4.to_string()));
        let failed = result.get("error").is_some() || result.get("errors").is_some_and(|errors| *errors != 0);
        result[figure.field].as_f64().filter(|_| !failed).ok_or(result)
    }
}

/// Ties all threads of a process to processor 0, or frees them.
fn pin(pid: u32, pinned: bool) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    for processor in 0..if pinned { 1 } else { processors } {
        set.set(processor).expect("a small number");
    }
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running agent has tasks");
    for task in tasks.flatten().filter_map(|task| task.file_name().to_string_lossy().parse().ok()) {
        // A thread may have ended meanwhile.
        let _ = sched_setaffinity(Pid::from_raw(task), &set);
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures one figure; `Err` names what failed.
fn compare(path: &str, figure: &Figure, raw: &Scene, mesh: &Scene, rounds: usize) -> Result<Value, String> {
    let (mut raws, mut meshes, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let one = raw.measure(figure).map_err(|e| format!("{path} {} raw: {e}", figure.name))?;
        let other = mesh.measure(figure).map_err(|e| format!("{path} {} mesh: {e}", figure.name))?;
        raws.push(one);
        meshes.push(other);
        ratios.push(other / one);
    }
    let ratio = median(&mut ratios);
    let (held, limit) = match figure.limit {
        Limit::AtLeast(limit) => (ratio >= limit, json!(format!(">= {limit}"))),
        Limit::AtMost(limit) => (ratio <= limit, json!(format!("<= {limit}"))),
        Limit::None => (true, Value::Null),
    };
    Ok(json!({
        "path": path,
        "figure": figure.name,
        "unit": if figure.field == "p50_us" { "us" } else { "MB/s" },
        "raw": median(&mut raws),
        "mesh": median(&mut meshes),
        "ratio": ratio,
        "ratio_min": ratios.first(),
        "ratio_max": ratios.last(),
        "limit": limit,
        "held": held,
    }))
}

fn same(rounds: usize) -> Vec<Result<Value, String>> {
    let node = Node::create(1);
    let raw = Scene::new(node.pod("a"), node.pod("b"), Vec::new());
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let agents = mesh.agents.iter().map(|agent| agent.pid()).collect();
    let meshed = Scene::new(a, b, agents);
    SAME.iter().map(|figure| compare("same node", figure, &raw, &meshed, rounds)).collect()
}

fn cross(rounds: usize) -> Vec<Result<Value, String>> {
    let (one, two) = Node::pair();
    let raw = Scene::new(one.pod("a"), two.pod("b"), Vec::new());
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let agents = mesh.agents.iter().map(|agent| agent.pid()).collect();
    let meshed = Scene::new(a, b, agents);
    CROSS.iter().map(|figure| compare("cross node", figure, &raw, &meshed, rounds)).collect()
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut results = Vec::new();
    if args.path != Path::Cross {
        results.extend(same(args.rounds));
    }
    if args.path != Path::Same {
        results.extend(cross(args.rounds));
    }
    let held = results.iter().all(|result| result.as_ref().is_ok_and(|row| row["held"] == true));
    let (rows, failures): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    let rows: Vec<Value> = rows.into_iter().flatten().collect();
    let failures: Vec<String> = failures.into_iter().filter_map(Result::err).collect();
    if args.json {
        println!("{}", json!({"rounds": args.rounds, "figures": rows, "failures": failures, "held": held}));
    } else {
        println!(
            "{:11}{:19}{:>10}{:>10}  {:>6}  {:13}limit",
            "path", "figure", "raw", "mesh", "ratio", "(min-max)"
        );
        for row in &rows {
            let number = |field: &str| row[field].as_f64().unwrap_or(0.0);
            println!(
                "{:11}{:19}{:>10.1}{:>10.1}  {:>6.2}  ({:.2}-{:.2})  {}{}",
                row["path"].as_str().unwrap_or_default(),
                row["figure"].as_str().unwrap_or_default(),
                number("raw"),
                number("mesh"),
                number("ratio"),
                number("ratio_min"),
                number("ratio_max"),
                row["limit"].as_str().unwrap_or("-"),
                if row["held"] == true { "" } else { "  MISSED" },
            );
        }
        failures.iter().for_each(|failure| println!("FAILED {failure}"));
    }
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
