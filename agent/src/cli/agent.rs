//! `weft agent` and `weft detach`.

use std::fs;

use anyhow::{Context, bail};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::{DONE, Failure};
use crate::args::{AgentArgs, DetachArgs, Output};
use crate::config::Config;
use crate::run;

pub(super) fn agent(args: &AgentArgs) -> Result<u8, Failure> {
    let config = Config::new(args).map_err(Failure::usage)?;
    log(&args.log)?;
    if !nix::unistd::geteuid().is_root() {
        return Err(anyhow::anyhow!(
            "the agent loads BPF programs and enters network namespaces; run it as root"
        )
        .into());
    }
    tracing::info!("weft {}: {config}", env!("CARGO_PKG_VERSION"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("weft")
        .build()
        .context("cannot start threads")?;
    let result = runtime.block_on(run::agent(config));
    // What still blocks (a turn that waits for the kernel) is not waited for.
    runtime.shutdown_background();
    result?;
    Ok(DONE)
}

/// Lines on stderr: journald and Kubernetes add what else they want to know.
pub(super) fn log(filter: &str) -> Result<(), Failure> {
    let filter: Targets = filter.parse().map_err(|_| {
        Failure::usage(anyhow::anyhow!("--log {filter}: write a level, or target=level pairs with commas"))
    })?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    // Fails only when a logger is there already, which then serves as well.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
    Ok(())
}

pub(super) fn detach(args: &DetachArgs) -> Result<u8, Failure> {
    if !nix::unistd::geteuid().is_root() {
        return Err(anyhow::anyhow!("only root may remove pinned programs; use sudo").into());
    }
    let pinned = |dir: &std::path::Path| -> anyhow::Result<bool> {
        match fs::read_dir(dir) {
            Ok(mut entries) => Ok(entries.next().is_some()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => bail!("{}: {error}", dir.display()),
        }
    };
    let there = pinned(&args.bpffs)?;
    crate::kernel::detach(&args.bpffs)?;
    let removed = there && !pinned(&args.bpffs)?;
    match args.output.output {
        Output::Json => println!("{}", serde_json::json!({ "bpffs": args.bpffs, "removed": removed })),
        Output::Table if removed => println!("removed everything below {}", args.bpffs.display()),
        Output::Table => println!("nothing of weft was pinned below {}", args.bpffs.display()),
    }
    Ok(DONE)
}
