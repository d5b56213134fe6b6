//! `cargo xtask setup`: installs what a bare Debian 12 with rustup and root lacks, and says each step.
//!
//! Other commands call [`ensure`] for the group of needs they have. A need is looked for by what it provides (a
//! program, a directory), not by package, so a machine that got it another way is left alone, and nothing is slow when
//! nothing is missing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{build_ebpf, tree, vm};

/// What a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Compilers for host and BPF
    Build,
    /// What tests on the running kernel use
    Test,
    /// What libFuzzer is compiled with
    Fuzz,
    /// QEMU, and what takes kernels apart
    Vm,
    /// Real servers and Prometheus
    Demo,
    /// rustfmt, clippy and cargo-deny
    Lint,
}

/// A program and the Debian package that has it.
type Program = (&'static str, &'static str);

const BUILD: &[Program] = &[("cc", "gcc")];
const TEST: &[Program] = &[
    ("ip", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("openssl", "openssl"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
];
const FUZZ: &[Program] = &[("c++", "g++")];
const VM: &[Program] = &[
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
    ("openssl", "openssl"),
    ("ip", "iproute2"),
];
const DEMO: &[Program] = &[
    ("ip", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("curl", "curl"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("prometheus", "prometheus"),
];
/// Services that these packages would start at boot; weft runs its own instances inside namespaces.
const SERVICES: &[&str] = &["nginx", "redis-server", "prometheus"];

/// Pinned with the LLVM of [`build_ebpf::LLVM`].
const BPF_LINKER: &str = "0.13.0";
const CARGO_DENY: &str = "0.20.2";

/// `cargo xtask setup`.
pub(crate) fn run(groups: &[Group]) -> Result<()> {
    let groups = if groups.is_empty() { Group::value_variants() } else { groups };
    ensure(groups)?;
    for group in groups {
        eprintln!(
            "setup: {} is complete",
            group.to_possible_value().expect("no variant is hidden").get_name()
        );
    }
    Ok(())
}

/// Installs what is missing for these groups.
pub(crate) fn ensure(groups: &[Group]) -> Result<()> {
    let has = |group| groups.contains(&group);
    let mut packages = Vec::new();
    for (group, programs) in [
        (Group::Build, BUILD),
        (Group::Test, TEST),
        (Group::Fuzz, FUZZ),
        (Group::Demo, DEMO),
        (Group::Vm, VM),
    ] {
        if has(group) {
            packages.extend(
                programs
                    .iter()
                    .filter(|(name, _)| tree::program(name).is_none())
                    .map(|(_, package)| *package),
            );
        }
    }
    let no_linker = has(Group::Build) && tree::program("bpf-linker").is_none();
    if has(Group::Build) && !build_ebpf::has_compiler() {
        packages.extend(["rustc-web", "cargo-web", "rust-web-src"]);
    }
    if no_linker && !Path::new(&llvm_prefix()).join("include/llvm-c/Core.h").exists() {
        packages.extend(["llvm-22-dev", "zlib1g-dev"]);
    }
    packages.sort_unstable();
    packages.dedup();
    install(&packages)?;

    if no_linker {
        eprintln!("setup: building bpf-linker {BPF_LINKER} (about a minute)");
        let features = format!("llvm-{}", build_ebpf::LLVM);
        cargo_install("bpf-linker", BPF_LINKER, &["--no-default-features", "--features", &features])?;
    }
    if has(Group::Vm) && !vm::has_qemu() {
        install_qemu()?;
    }
    if has(Group::Lint) {
        for (program, component) in [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")] {
            // rustup installs a stub for every component, so the program being there says nothing.
            let mut ask = Command::new("cargo");
            if tree::output(ask.args([program.trim_start_matches("cargo-"), "--version"])).is_err() {
                bail!("{component} is missing; run `rustup component add {component}`");
            }
        }
        if tree::program("cargo-deny").is_none() {
            eprintln!("setup: building cargo-deny {CARGO_DENY} (several minutes, once)");
            cargo_install("cargo-deny", CARGO_DENY, &[])?;
        }
    }
    Ok(())
}

/// True for the superuser, whom namespaces, BPF and apt need.
pub(crate) fn root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn llvm_prefix() -> String {
    format!("/usr/lib/llvm-{}", build_ebpf::LLVM)
}

/// Installs with `--locked`, outside of the workspace, with the host's own settings.
fn cargo_install(name: &str, version: &str, more: &[&str]) -> Result<()> {
    let mut command = build_ebpf::clean(Command::new("cargo"));
    command.args(["install", "--quiet", "--locked", name, "--version", version]).args(more);
    tree::run(command.env("LLVM_PREFIX", llvm_prefix()).current_dir("/"))
}

fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if tree::program("apt-get").is_none() {
        bail!("missing: {list} (Debian's names); this system has no apt-get, install them by its own means");
    }
    if !root() {
        bail!("missing: {list}; as root, run `apt-get install {list}` or this command");
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "Dpkg::Use-Pty=0"]);
        command
    };
    eprintln!("setup: apt-get update");
    // One broken foreign source must not stop us: if a package cannot be had, the next step says so.
    let _ = tree::run(apt().arg("update"));
    eprintln!("setup: apt-get install {list}");
    let started = Started::forbid()?;
    tree::run(apt().args(["install", "-y", "--no-install-recommends"]).args(packages))?;
    drop(started);
    let systemd = Path::new("/run/systemd/system").exists();
    for service in SERVICES.iter().filter(|service| systemd && list.contains(**service)) {
        eprintln!("setup: systemctl disable {service} (weft runs its own)");
        let _ = Command::new("systemctl").args(["--quiet", "disable", "--now", service]).status();
    }
    Ok(())
}

/// Debian 12's own QEMU 7.2 breaks cmpxchg16b; the one of its backports works. Sources and state are our own.
fn install_qemu() -> Result<()> {
    if tree::program("apt-get").is_none() || !root() {
        bail!(
            "missing: QEMU {} or newer (qemu-system-x86); as root on Debian this command installs it",
            vm::QEMU
        );
    }
    eprintln!("setup: installing qemu-system-x86 from bookworm-backports");
    let apt = vm::Apt::update(&tree::target().join("vm/apt-qemu"), vm::QEMU_SUITES)?;
    let packages = ["-t", "bookworm-backports", "qemu-system-x86"];
    tree::run(apt.command("apt-get").args(["install", "-y", "--no-install-recommends"]).args(packages))?;
    if !vm::has_qemu() {
        bail!("QEMU is still older than {}", vm::QEMU);
    }
    Ok(())
}

/// While it lives, packages do not start the services they install: Debian asks `policy-rc.d` first.
struct Started(Option<&'static Path>);

impl Started {
    fn forbid() -> Result<Started> {
        let file = Path::new("/usr/sbin/policy-rc.d");
        if file.exists() {
            return Ok(Started(None));
        }
        fs::write(file, "#!/bin/sh\nexit 101\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
        fs::set_permissions(file, fs::Permissions::from_mode(0o755))?;
        Ok(Started(Some(file)))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            let _ = fs::remove_file(file);
        }
    }
}
