//! Load, probes and captures for the scenarios: one small program that runs inside a pod, here or in a VM guest.
//!
//! Every subcommand prints lines of JSON and nothing else. Failures of the network are results, not exit codes; only
//! a wrong command line ends with an error.

mod flows;
mod measure;
mod patterns;
mod probe;
mod raw;
mod serve;
mod sniff;
mod stream;
mod talk;

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::{Parser, Subcommand};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

#[derive(Parser)]
#[command(about = "Load and probes for scenarios with real sockets")]
struct Args {
    /// Stay on one processor.
    #[arg(long, global = true)]
    cpu: Option<usize>,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Enter a network namespace and a cgroup, then become a program.
    Exec {
        netns: PathBuf,
        cgroup: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Listen; each argument is MODE=ADDR.
    Serve { listeners: Vec<serve::Listener> },
    /// Run checksummed connections of one pattern.
    Pattern(patterns::Args),
    /// Connect once, optionally send a text, read the answer to its end.
    Connect(probe::ConnectArgs),
    /// Keep a connection open and say when and how it ends.
    Hold(probe::HoldArgs),
    /// Write until the peer stops taking it.
    Flood { addr: SocketAddr },
    /// Try the flows that lines on stdin list.
    Flows,
    /// Ask a UDP server.
    Udp(probe::UdpArgs),
    /// Round trips of small messages.
    Rtt(measure::RttArgs),
    /// Connect, one byte each way, close; again and again.
    Crr(measure::CrrArgs),
    /// One stream in one direction.
    Bulk(measure::BulkArgs),
    /// Speak a known protocol with a known text.
    Talk(talk::Args),
    /// Send hand-made IP packets.
    Raw(raw::Args),
    /// Write what passes an interface to a pcap file.
    Capture { interface: String, file: PathBuf },
}

fn main() {
    let args = Args::parse();
    if let Some(cpu) = args.cpu {
        let mut set = CpuSet::new();
        set.set(cpu).expect("a processor number");
        sched_setaffinity(Pid::from_raw(0), &set).expect("stay on one processor");
    }
    match args.what {
        What::Exec { netns, cgroup, command } => exec(&netns, &cgroup, &command),
        What::Serve { listeners } => serve::run(&listeners),
        What::Pattern(args) => patterns::run(&args),
        What::Connect(args) => probe::connect(&args),
        What::Hold(args) => probe::hold(&args),
        What::Flood { addr } => probe::flood(addr),
        What::Flows => flows::run(),
        What::Udp(args) => probe::udp(&args),
        What::Rtt(args) => measure::rtt(&args),
        What::Crr(args) => measure::crr(&args),
        What::Bulk(args) => measure::bulk(&args),
        What::Talk(args) => talk::run(&args),
        What::Raw(args) => raw::run(&args),
        What::Capture { interface, file } => sniff::run(&interface, &file),
    }
}

/// The cgroup comes first: a socket belongs to the cgroup of its creation.
fn exec(netns: &PathBuf, cgroup: &std::path::Path, command: &[String]) -> ! {
    set_pdeathsig(Signal::SIGKILL).expect("die with the parent");
    std::fs::write(cgroup.join("cgroup.procs"), "0")
        .unwrap_or_else(|e| panic!("enter {}: {e}", cgroup.display()));
    let file = File::open(netns).unwrap_or_else(|e| panic!("open {}: {e}", netns.display()));
    setns(file, CloneFlags::CLONE_NEWNET).unwrap_or_else(|e| panic!("enter {}: {e}", netns.display()));
    let error = Command::new(&command[0]).args(&command[1..]).exec();
    panic!("start {}: {error}", command[0]);
}

/// Prints a result.
fn say(value: &serde_json::Value) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    // The harness may be gone; then nobody reads, and that is no error of ours.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// Milliseconds since the epoch: comparable between processes of one machine.
fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock after 1970");
    u64::try_from(now.as_millis()).expect("fits for long")
}

/// A short name for an error: the errno's, else the kind.
fn error_name(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => format!("{:?}", nix::errno::Errno::from_raw(code)),
        None => format!("{:?}", error.kind()),
    }
}
