//! `cargo xtask fuzz`: libFuzzer on the way from manifests to verdicts, and on the kernel's decision.
//!
//! The targets are laid out for cargo-fuzz (`cargo +nightly fuzz run manifests`, in `policy/`). Here they are built by the
//! stable compiler with the flags that cargo-fuzz gives but the sanitizers', which safe code does not need and which ask
//! for a nightly. The kept corpus is read; what a run finds goes into `target/fuzz/`, and is kept by copying it into
//! `policy/fuzz/corpus/`, where it is tried for ever.

use std::fs::File;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::setup::Group;
use crate::{build_ebpf, setup, tree};

const TARGETS: &[&str] = &["manifests", "decide"];
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// As cargo-fuzz 0.13 with `--sanitizer none`.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// A manifest that takes this long is a bug: seconds for the slowest machine, of what takes milliseconds.
const TIMEOUT_S: u32 = 30;
/// Memory of one run, in MiB.
const MEMORY_MIB: u32 = 1024;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this target
    target: Option<String>,
    /// Inputs to try, per target
    #[arg(long, default_value_t = 20_000)]
    runs: u64,
    /// Seconds after which a target ends all the same
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

impl Default for Args {
    /// What `cargo xtask test` runs.
    fn default() -> Args {
        Args { target: None, runs: 20_000, seconds: 60 }
    }
}

/// `cargo xtask fuzz`.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::ensure(&[Group::Fuzz])?;
    let (fuzz, work) = (tree::root().join("policy/fuzz"), tree::target().join("fuzz"));
    if let Some(target) = args.target.as_deref().filter(|target| !TARGETS.contains(target)) {
        bail!("no target {target}; there are {}", TARGETS.join(" and "));
    }
    tree::run(
        build_ebpf::clean(Command::new("cargo"))
            .current_dir(&fuzz)
            .env("CARGO_TARGET_DIR", &work)
            .env("RUSTFLAGS", FLAGS)
            .args(["build", "--quiet", "--release", "--target", TRIPLE]),
    )?;
    for target in TARGETS.iter().filter(|target| args.target.as_deref().is_none_or(|only| only == **target)) {
        let found = work.join("found").join(target);
        std::fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
        let begun = Instant::now();
        let path = work.join(format!("{target}.log"));
        let log = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        // The first directory is written to, the second only read.
        let status = Command::new(work.join(TRIPLE).join("release").join(target))
            .args([&found, &fuzz.join("corpus").join(target)])
            .arg(format!("-runs={}", args.runs))
            .arg(format!("-max_total_time={}", args.seconds))
            .arg(format!("-timeout={TIMEOUT_S}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .arg(format!("-artifact_prefix={}/{target}-", work.display()))
            .args(["-max_len=8192", "-print_final_stats=1"])
            .stderr(log)
            .status()
            .with_context(|| format!("cannot start the target {target}"))?;
        let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
        let runs = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units: "));
        println!("fuzz: {target}: {} inputs in {} s", runs.unwrap_or("no").trim(), begun.elapsed().as_secs());
        if !status.success() {
            let lines: Vec<&str> = text.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            bail!(
                "{target} fails ({status}) on the input that is named above; when that is repaired, keep it in \
                 policy/fuzz/corpus/{target}"
            );
        }
    }
    Ok(())
}
