//! `cargo xtask test`: every test, on the host, on the running kernel and on those of the matrix.
//!
//! Everything is built once; then each test program runs by itself, under a deadline. Programs that change kernel state
//! (namespaces, cgroups, BPF) run one test at a time, the pure ones in parallel. One line at the end has the sum.

use std::io::{BufRead, BufReader};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::setup::Group;
use crate::{build_ebpf, fuzz, setup, tree, vm};

/// Packages whose tests touch no kernel state.
const PURE: &[&str] = &["weft-datapath", "weft-policy", "xtask"];
/// No test program takes this long unless it hangs.
const DEADLINE: Duration = Duration::from_secs(15 * 60);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u32,
    failed: u32,
    ignored: u32,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// `cargo xtask test [FILTER]`.
pub(crate) fn run(filter: Option<&str>) -> Result<ExitCode> {
    if !setup::root() {
        bail!("the tests make network namespaces, cgroups and BPF programs: run as root");
    }
    setup::ensure(&[Group::Build, Group::Test, Group::Vm])?;
    build_ebpf::run()?;
    let begun = Instant::now();
    let skips = tree::target().join(format!("skips.{}", std::process::id()));
    let mut sum = Count::default();
    let mut failures = Vec::new();
    let programs = build()?;
    for program in &programs {
        println!("\ntest: {} {}", program.package, program.name);
        let (count, problem) = program.run(filter, &skips)?;
        sum += count;
        if let Some(problem) = problem {
            // A program that dies without saying which test failed still fails the run.
            sum.failed += u32::from(count.failed == 0);
            failures.push(format!("{} {}: {problem}", program.package, program.name));
        }
    }
    let skipped = std::fs::read_to_string(&skips).unwrap_or_default();
    let _ = std::fs::remove_file(&skips);
    println!("\ntest: {} s on kernel {}", begun.elapsed().as_secs(), kernel());
    skipped.lines().for_each(|line| println!("{line}"));
    failures.iter().for_each(|failure| println!("FAILED {failure}"));
    let ignored = if sum.ignored > 0 { format!(", {} ignored", sum.ignored) } else { String::new() };
    let skips = skipped.lines().count();
    let skipped = if skips > 0 { format!(", {skips} skipped") } else { String::new() };
    println!("{} passed, {} failed{ignored}{skipped}", sum.passed, sum.failed);
    let mut good = sum.failed == 0 && sum.passed > 0;
    // A part of the tests is asked for by somebody who waits; the matrix takes its time.
    if filter.is_none() {
        if let Err(error) = fuzz::run(&fuzz::Args::default()) {
            println!("FAILED fuzz: {error:#}");
            good = false;
        }
        let scenarios: Vec<PathBuf> =
            programs.into_iter().filter(Program::scenario).map(|program| program.executable).collect();
        good &= vm::matrix(&scenarios)?;
        println!("test: {} s in all", begun.elapsed().as_secs());
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Release of the running kernel.
fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// One test executable.
struct Program {
    package: String,
    name: String,
    directory: PathBuf,
    executable: PathBuf,
}

/// Builds all programs (so that the commands which tests start exist too), and returns the tests among them.
fn build() -> Result<Vec<Program>> {
    let cargo = || {
        let mut command = Command::new("cargo");
        command.current_dir(tree::root());
        command
    };
    tree::run(cargo().args(["build", "--bins"]))?;
    let mut child = cargo()
        .args(["test", "--no-run", "--message-format=json-render-diagnostics"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut programs = Vec::new();
    for line in BufReader::new(child.stdout.take().expect("piped above")).lines() {
        let message: Value =
            serde_json::from_str(&line?).context("cargo printed something that is not JSON")?;
        programs.extend(program(&message));
    }
    if !child.wait()?.success() {
        bail!("the tests do not build");
    }
    // Quick ones first: what is broken in a pure function also breaks everything behind it.
    programs.sort_by_key(|program| (!program.pure(), program.package.clone(), program.name.clone()));
    Ok(programs)
}

/// Builds everything; the test programs of `vm-tests`, which run on every kernel.
pub(crate) fn scenarios() -> Result<Vec<PathBuf>> {
    Ok(build()?.into_iter().filter(Program::scenario).map(|program| program.executable).collect())
}

/// The test program that a message of cargo is about.
fn program(message: &Value) -> Option<Program> {
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?;
    let manifest = std::fs::read_to_string(directory.join("Cargo.toml")).ok()?;
    let package = manifest.lines().find_map(|line| line.strip_prefix("name = \""))?.trim_end_matches('"');
    Some(Program {
        package: package.to_owned(),
        name: format!("{} {}", message["target"]["kind"][0].as_str()?, message["target"]["name"].as_str()?),
        directory: directory.to_owned(),
        executable: message["executable"].as_str()?.into(),
    })
}

impl Program {
    fn pure(&self) -> bool {
        PURE.contains(&self.package.as_str())
    }

    /// Is it about the behaviour of a kernel?
    fn scenario(&self) -> bool {
        self.package == "vm-tests" && self.name.starts_with("test ")
    }

    /// Runs it; what it counted, and what is wrong with how it ended.
    fn run(&self, filter: Option<&str>, skips: &Path) -> Result<(Count, Option<String>)> {
        let mut command = Command::new(&self.executable);
        command
            .current_dir(&self.directory)
            .env("CARGO_MANIFEST_DIR", &self.directory)
            .env("WEFT_SKIPS", skips);
        command.args(filter).stdout(Stdio::piped());
        if !self.pure() {
            command.arg("--test-threads=1");
        }
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.executable.display()))?;
        let stdout = child.stdout.take().expect("piped above");
        let ended = Arc::new(AtomicBool::new(false));
        let watchdog = watch(child.id(), ended.clone());
        let mut count = Count::default();
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            println!("{line}");
            count += result(&line).unwrap_or_default();
        }
        let status = child.wait()?;
        ended.store(true, Ordering::Relaxed);
        watchdog.thread().unpark();
        let killed = watchdog.join().expect("the watchdog does not panic");
        let problem = match (killed, status.success()) {
            (true, _) => Some(format!("not done after {} s, killed", DEADLINE.as_secs())),
            (false, false) => Some(status.to_string()),
            (false, true) => None,
        };
        Ok((count, problem))
    }
}

/// Kills the process at the deadline; says whether it had to.
fn watch(pid: u32, ended: Arc<AtomicBool>) -> std::thread::JoinHandle<bool> {
    std::thread::spawn(move || {
        let deadline = Instant::now() + DEADLINE;
        while !ended.load(Ordering::Relaxed) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let pid = nix::unistd::Pid::from_raw(pid.try_into().expect("a pid fits"));
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                return true;
            }
            std::thread::park_timeout(left);
        }
        false
    })
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
fn result(line: &str) -> Option<Count> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut count = Count::default();
    for part in numbers.split("; ") {
        match part.split_once(' ') {
            Some((number, "passed")) => count.passed = number.parse().ok()?,
            Some((number, "failed")) => count.failed = number.parse().ok()?,
            Some((number, "ignored")) => count.ignored = number.parse().ok()?,
            _ => {}
        }
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted() {
        let line = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(result(line), Some(Count { passed: 3, failed: 1, ignored: 2 }));
        assert_eq!(result("test x ... ok"), None);
    }
}
