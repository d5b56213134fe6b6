//! The project's own commands, one file each: `cargo xtask COMMAND`.
//!
//! Commands compose by calling each other's functions, and CI runs the same ones (`.ci/run`).

mod build_ebpf;
mod demo;
mod fuzz;
mod lint;
mod setup;
mod test;
mod tree;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own commands", max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the BPF object that the agent embeds
    BuildEbpf,
    /// Install what is missing
    Setup {
        /// What for; everything when none is named
        groups: Vec<setup::Group>,
    },
    /// Run every test: host, this kernel, the kernels of the matrix (needs root)
    Test {
        /// Only tests whose name contains this, and without the matrix
        filter: Option<String>,
    },
    /// Run the fuzz targets of policy/ on their kept corpus, for a while
    Fuzz(fuzz::Args),
    /// Run the scenarios on the kernels of the matrix, under QEMU
    VmTest(vm::Args),
    /// Show the mesh at work: two nodes, four pods, real servers (needs root)
    Demo(demo::Args),
    /// Check format, clippy, BPF warnings, dependencies, ABI number
    Lint,
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::BuildEbpf => build_ebpf::run().map(|()| ExitCode::SUCCESS),
        Command::Setup { groups } => setup::run(&groups).map(|()| ExitCode::SUCCESS),
        Command::Test { filter } => test::run(filter.as_deref()),
        Command::Fuzz(args) => fuzz::run(&args).map(|()| ExitCode::SUCCESS),
        Command::VmTest(args) => vm::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Lint => lint::run(),
    }
}
