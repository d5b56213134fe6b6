//! `cargo xtask vm-test`: the scenarios of `vm-tests`, on Debian's kernels under QEMU.
//!
//! [`kernel`] has the kernel, [`image`] what it boots into, [`boot`] runs it, [`verdict`] judges. Every kernel's result is in
//! one table before the command fails. The scenarios are the very programs that `cargo xtask test` runs on the host.

mod apt;
mod boot;
mod cpio;
mod image;
mod kernel;
mod modules;
mod support;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub(crate) use self::apt::{Apt, QEMU as QEMU_SUITES};
use self::boot::{Accelerator, Machine};
use self::image::Programs;
use self::kernel::{Kernel, Unpacked};
use self::verdict::{Line, Verdict};
use crate::setup::Group;
use crate::{build_ebpf, setup, test, tree};

/// A guest that says nothing for so long is lost; its own limit for a scenario is below.
const SILENCE: Duration = Duration::from_secs(300);
/// No kernel takes this long unless it hangs.
const DEADLINE: Duration = Duration::from_secs(20 * 60);
/// Guests at a time.
const GUESTS: usize = 2;
/// For the control that hangs on purpose.
const CONTROL_SILENCE: Duration = Duration::from_secs(15);
/// Where KVM works, a guest says its first word long before.
const KVM_DEADLINE: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Series of the kernel, such as 6.12, or `all`
    #[arg(long, default_value = "all")]
    kernel: String,
    /// Only scenarios whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Put the results into the table of README.md; for all kernels and scenarios only
    #[arg(long, conflicts_with_all = ["kernel", "filter"])]
    write: bool,
}

/// The oldest QEMU that emulates every instruction which these kernels use.
pub(crate) const QEMU: u32 = 10;

/// Is there a QEMU that is new enough?
pub(crate) fn has_qemu() -> bool {
    let version = tree::program("qemu-system-x86_64")
        .and_then(|qemu| tree::output(Command::new(qemu).arg("--version")).ok());
    version.and_then(|text| major(&text)).is_some_and(|major| major >= QEMU)
}

/// Reads `QEMU emulator version 10.0.2 (Debian ...)`.
fn major(version: &str) -> Option<u32> {
    version.split("version ").nth(1)?.split('.').next()?.parse().ok()
}

/// `cargo xtask vm-test`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure(&[Group::Build, Group::Test, Group::Vm])?;
    build_ebpf::run()?;
    let results = results(&args.kernel, args.filter.as_deref(), &test::scenarios()?)?;
    if args.write {
        support::write(&results)?;
    }
    let good = results.iter().all(|(_, _, verdict)| verdict.good());
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs these test programs on all kernels; true if all is well.
pub(crate) fn matrix(scenarios: &[PathBuf]) -> Result<bool> {
    Ok(results("all", None, scenarios)?.iter().all(|(_, _, verdict)| verdict.good()))
}

/// Runs these test programs on the chosen kernels and prints the table.
fn results(choice: &str, filter: Option<&str>, scenarios: &[PathBuf]) -> Result<Vec<Tested>> {
    let kernels: Vec<Kernel> =
        kernel::all().into_iter().filter(|kernel| choice == "all" || kernel.series == choice).collect();
    if kernels.is_empty() {
        let series: Vec<String> = kernel::all().into_iter().map(|kernel| kernel.series).collect();
        bail!("no kernel {choice}; there are {} and all", series.join(", "));
    }
    // Several runs may share a target directory; each has its own images.
    let work = tree::target().join("vm");
    let own = work.join(std::process::id().to_string());
    fs::create_dir_all(&own).with_context(|| format!("cannot make {}", own.display()))?;
    let result = Matrix { work: &work, own: &own, filter }.run(&kernels, scenarios);
    let _ = fs::remove_dir_all(&own);
    let results = result?;
    println!("\n{}", table(&results));
    Ok(results)
}

/// Kernel series, Debian's version, and how it did.
type Tested = (String, String, Verdict);

struct Matrix<'a> {
    work: &'a Path,
    own: &'a Path,
    filter: Option<&'a str>,
}

impl Matrix<'_> {
    fn run(&self, kernels: &[Kernel], scenarios: &[PathBuf]) -> Result<Vec<Tested>> {
        let programs = Programs::read(scenarios, self.own)?;
        // One after the other: they share the cache and apt.
        let ready: Vec<Result<(Unpacked, PathBuf)>> =
            kernels.iter().map(|kernel| self.prepare(kernel, &programs)).collect();
        drop(programs);
        let Some((unpacked, image)) = ready.iter().find_map(|ready| ready.as_ref().ok()) else {
            return Ok(kernels
                .iter()
                .zip(ready)
                .map(|(kernel, ready)| failed(kernel, ready.err()))
                .collect());
        };
        let accelerator = accelerate(unpacked, image);
        controls(unpacked, image, accelerator)?;

        // Scenarios wait as long as they work, so guests share the processors well. Old kernels take longer: last, they begin
        // one after the other and end together.
        let queue = Mutex::new(kernels.iter().zip(ready).enumerate().rev());
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..GUESTS {
                scope.spawn(|| {
                    loop {
                        let next = queue.lock().expect("no holder panics").next();
                        let Some((place, (kernel, ready))) = next else { break };
                        let tested = ready.and_then(|(unpacked, image)| {
                            let verdict = self.test(kernel, &unpacked, &image, accelerator)?;
                            fs::remove_file(&image)?;
                            Ok((kernel.series.clone(), unpacked.version, verdict))
                        });
                        // What cannot be had or run is that kernel's failure; the others still run.
                        let tested = tested.unwrap_or_else(|error| failed(kernel, Some(error)));
                        results.lock().expect("no holder panics").push((place, tested));
                    }
                });
            }
        });
        let mut results = results.into_inner().expect("no holder panics");
        results.sort_by_key(|(place, _)| *place);
        Ok(results.into_iter().map(|(_, tested)| tested).collect())
    }

    fn prepare(&self, kernel: &Kernel, programs: &Programs) -> Result<(Unpacked, PathBuf)> {
        let unpacked = kernel.fetch(self.work)?;
        let image = self.own.join(format!("{}.cpio", kernel.series));
        fs::write(&image, programs.image(&unpacked.modules)?)?;
        Ok((unpacked, image))
    }

    fn test(
        &self,
        kernel: &Kernel,
        from: &Unpacked,
        image: &Path,
        accelerator: Accelerator,
    ) -> Result<Verdict> {
        let series = &kernel.series;
        println!("vm {series}: kernel {}", from.version);
        let words: Vec<String> =
            self.filter.map(|filter| format!("weft.filter={filter}")).into_iter().collect();
        let machine = Machine {
            kernel: &from.image,
            image,
            accelerator,
            words: &words,
            silence: SILENCE,
            deadline: DEADLINE,
        };
        let run = machine.run(|text| match verdict::line(text) {
            Some(Line::Pass(name)) => println!("vm {series}: {name} ... ok"),
            Some(Line::Fail(name)) => println!("vm {series}: {name} ... FAILED"),
            Some(Line::Skip(text)) => println!("vm {series}: {text}"),
            Some(Line::Text(text)) => println!("vm {series}:     {text}"),
            Some(Line::Begin(_) | Line::Done(..)) | None => {}
        })?;
        let verdict = verdict::judge(&run);
        if !verdict.trouble.is_empty() {
            println!("vm {series}: the end of the kernel's console:");
            let lines: Vec<&str> = run.console.lines().collect();
            lines
                .iter()
                .skip(lines.len().saturating_sub(40))
                .for_each(|line| println!("vm {series}:     {line}"));
        }
        Ok(verdict)
    }
}

fn failed(kernel: &Kernel, error: Option<anyhow::Error>) -> Tested {
    let trouble = error.map(|error| format!("{error:#}")).into_iter().collect();
    (kernel.series.clone(), String::new(), Verdict { trouble, ..Verdict::default() })
}

/// KVM if a guest comes up under it in time; it may be present and broken.
fn accelerate(kernel: &Unpacked, image: &Path) -> Accelerator {
    let works = Path::new("/dev/kvm").exists() && {
        let machine = Machine {
            kernel: &kernel.image,
            image,
            accelerator: Accelerator::Kvm,
            words: &["weft.mode=hello".to_owned()],
            silence: KVM_DEADLINE,
            deadline: KVM_DEADLINE,
        };
        let run = machine.run(|_| ());
        run.is_ok_and(|run| run.lines.iter().any(|text| matches!(verdict::line(text), Some(Line::Done(..)))))
    };
    if !works {
        println!("vm-test: KVM does not work here; QEMU translates every instruction (slow)");
        return Accelerator::Tcg;
    }
    Accelerator::Kvm
}

/// The controls: a guest that panics, one whose kernel warns and one that hangs must be told from a good one, or no verdict
/// means anything.
fn controls(kernel: &Unpacked, image: &Path, accelerator: Accelerator) -> Result<()> {
    for (mode, silence, wanted) in [
        ("panic", SILENCE, "Kernel panic"),
        ("warn", SILENCE, "WARNING: "),
        ("hang", CONTROL_SILENCE, "silent for"),
    ] {
        let words = [format!("weft.mode={mode}")];
        let machine =
            Machine { kernel: &kernel.image, image, accelerator, words: &words, silence, deadline: DEADLINE };
        let verdict = verdict::judge(&machine.run(|_| ())?);
        let named = verdict.trouble.iter().any(|what| what.contains(wanted));
        if verdict.good() || !named {
            bail!("a guest told to {mode} is judged as {verdict:?}");
        }
        println!("vm-test: control: a guest that was told to {mode} fails ({})", verdict.trouble.join("; "));
    }
    Ok(())
}

fn table(results: &[Tested]) -> String {
    let mut text = format!(
        "{:<8}{:<22}{:>7}{:>8}{:>9}{:>9}\n",
        "KERNEL", "DEBIAN", "PASSED", "FAILED", "SKIPPED", "SECONDS"
    );
    for (series, version, verdict) in results {
        let (passed, failed, skipped) = (verdict.passed.len(), verdict.failed.len(), verdict.skipped.len());
        let seconds = verdict.took.as_secs();
        text += &format!("{series:<8}{version:<22}{passed:>7}{failed:>8}{skipped:>9}{seconds:>9}\n");
    }
    for (series, _, verdict) in results {
        verdict.failed.iter().for_each(|name| text += &format!("FAILED {series}: {name}\n"));
        verdict.trouble.iter().for_each(|what| text += &format!("FAILED {series}: {what}\n"));
        if verdict.passed.is_empty() && verdict.trouble.is_empty() {
            text += &format!("FAILED {series}: nothing passed\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu_are_read() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2)\n"), Some(10));
        assert_eq!(major("nonsense"), None);
    }

    #[test]
    fn failures_stand_below_the_table() {
        let bad = Verdict { passed: vec!["a".into()], failed: vec!["b".into()], ..Verdict::default() };
        let text = table(&[("6.12".into(), "6.12.95-1".into(), bad)]);
        assert!(text.contains("FAILED 6.12: b"), "{text}");
    }
}
