//! `cargo xtask demo`: the mesh at its main job, on this machine, with real servers.
//!
//! Two processes: the outer one builds, starts the inner one, and waits; the inner one does the work. When the inner
//! one is interrupted, killed or panics, the outer one still removes everything it made, because all of it carries the
//! inner one's process id (as in [`vm_tests::leftovers`]).

mod change;
mod flow;
mod ground;
mod report;
mod server;
mod wire;

use std::env;
use std::process::{Child, Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::setup::Group;
use crate::{build_ebpf, setup, tree};
use ground::Ground;
use report::{Format, Report};

/// Options of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave it running at the end, and say how to look around, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// How the summary is printed
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// This is the inner process
    #[arg(long, hide = true)]
    inner: bool,
}

/// `cargo xtask demo`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !setup::root() {
        bail!("the demo makes network namespaces, cgroups and BPF programs: run as root");
    }
    if args.inner {
        return work(args);
    }
    setup::ensure(&[Group::Build, Group::Demo])?;
    build_ebpf::run()?;
    let mut build = Command::new("cargo");
    tree::run(build.current_dir(tree::root()).args([
        "build",
        "--package",
        "weft",
        "--package",
        "vm-tests",
        "--bins",
    ]))?;
    supervise(args)
}

/// Runs the inner process to its end, whatever that is, and sweeps behind it.
fn supervise(args: &Args) -> Result<ExitCode> {
    let bin = tree::target().join("debug");
    let mut command = Command::new(env::current_exe().context("cannot find this program")?);
    command.args(["demo", "--inner", "--output", args.output.name()]).args(args.keep.then_some("--keep"));
    command.env("WEFT_BIN", bin.join("weft")).env("WT_LOAD", bin.join("wt-load"));
    // Its own group: Ctrl-C on the terminal comes to us alone, and we pass it on.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut inner = command.spawn().context("cannot start the inner process")?;
    let code = wait(&mut inner);
    vm_tests::leftovers::sweep();
    code
}

/// Waits for the inner process; SIGINT and SIGTERM go on to it as SIGTERM.
fn wait(inner: &mut Child) -> Result<ExitCode> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block()?;
    let pid = Pid::from_raw(inner.id().try_into().expect("process ids fit"));
    loop {
        // Asked after the signals were blocked, so the end of the inner process cannot slip between.
        if let Some(status) = inner.try_wait()? {
            // A signal has no code: the demo was cut short.
            return Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(130).into());
        }
        if signals.wait()? != Signal::SIGCHLD {
            eprintln!("demo: cleaning up");
            kill(pid, Signal::SIGTERM)?;
        }
    }
}

/// The inner process.
fn work(args: &Args) -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut report = Report::default();
    // The harness panics where a machine does not do what machines do; its drops run on the way out. What it says is
    // for people, and where it said so is not.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("demo: {}", panic.payload_as_str().unwrap_or("stopped without a message"));
    }));
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| play(&mut report, args)));
    if ended.is_err() {
        report.check("the demo ran to its end", false, "see the message above");
        report.print(args.output);
    }
    Ok(if report.held() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All steps, in order.
fn play(report: &mut Report, args: &Args) {
    report.step("two nodes, four pods, a link");
    let mut ground = Ground::build();
    report.step("nginx and redis in their pods");
    let _servers = ground.serve();
    report.step("before weft: everybody reaches everybody, in clear");
    wire::before(&ground, report);
    report.step("certificate authority and two agents");
    ground.enrol();
    report.step("who may reach whom");
    flow::pairs(&ground, report);
    report.step("what is on the wire between the nodes");
    wire::after(&ground, report);
    report.step("a policy change meets living connections");
    change::cut(&ground, report);
    report.step("why was that denied?");
    change::explain(&ground, report);
    report.step("Prometheus");
    let _prometheus = server::prometheus(&ground, report);
    report.print(args.output);
    if args.keep {
        keep(&ground);
    }
}

/// Leaves everything as it is until a signal comes.
fn keep(ground: &Ground) {
    eprintln!("\n{}\nCtrl-C ends and removes it.", ground.guide());
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    if signals.thread_block().is_ok() {
        let _ = signals.wait();
    }
}
