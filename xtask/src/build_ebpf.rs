//! `cargo xtask build-ebpf`: one BPF object for all kernels, at `target/bpf/weft-ebpf`, and beside it one of programs that
//! no kernel should take, for tests.
//!
//! `core` for the BPF target has to be built from source, which stable Rust refuses. Two compilers can: a rustup nightly
//! with the `rust-src` component, and Debian's own `rustc-web` with `RUSTC_BOOTSTRAP=1`. Whichever is found is named.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tree;

/// The target triple: BPF, little endian.
const TARGET: &str = "bpfel-unknown-none";
/// LLVM that bpf-linker is built on; it cannot read the bitcode of a newer one.
pub(crate) const LLVM: u32 = 22;

/// The objects: the programs of weft, and those that are meant to be refused.
pub(crate) const OBJECTS: [&str; 2] = ["weft-ebpf", "weft-broken"];

/// Builds the objects and puts them where the agent's build script looks for it.
pub(crate) fn run() -> Result<()> {
    let Some(linker) = tree::program("bpf-linker") else {
        bail!("bpf-linker is not installed; run `cargo xtask setup`");
    };
    let compiler = Compiler::find()?;
    eprintln!("build-ebpf: {}", compiler.name);
    let built = compile(&compiler, &linker)?;
    for name in OBJECTS {
        let object = tree::target().join("bpf").join(name);
        publish(&built.join(name), &object)?;
        eprintln!("build-ebpf: {} ({} bytes)", object.display(), fs::metadata(&object)?.len());
    }
    Ok(())
}

/// Is there a compiler for BPF?
pub(crate) fn has_compiler() -> bool {
    Compiler::find().is_ok()
}

/// A cargo and rustc that accept `-Z build-std`.
struct Compiler {
    name: String,
    cargo: Vec<PathBuf>,
    rustc: Option<PathBuf>,
}

impl Compiler {
    /// A rustup nightly with the sources of `core`, else Debian's.
    fn find() -> Result<Compiler> {
        match Self::nightly() {
            Some(found) => Ok(found),
            None => Self::debian(),
        }
    }

    /// A nightly without `rust-src` is common and no use, so the sources are looked for on disk.
    fn nightly() -> Option<Compiler> {
        let rustup = tree::program("rustup")?;
        let list = tree::output(Command::new(&rustup).args(["toolchain", "list"])).ok()?;
        list.lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| name.starts_with("nightly"))
            .find_map(|name| {
                let rustc = |arg: &str| {
                    let mut command = clean(Command::new(&rustup));
                    tree::output(command.args(["run", name, "rustc", arg])).ok()
                };
                let sysroot = PathBuf::from(rustc("--print=sysroot")?.trim());
                let version = rustc("-vV")?;
                let usable = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
                    && llvm(&version)? <= LLVM;
                usable.then(|| Compiler {
                    name: format!("rustup {name}, {}", version.lines().next().unwrap_or_default()),
                    cargo: vec![rustup.clone(), "run".into(), name.into(), "cargo".into()],
                    rustc: None,
                })
            })
    }

    fn debian() -> Result<Compiler> {
        let (cargo, rustc) = (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc"));
        if !cargo.is_file() || !rustc.is_file() {
            bail!(
                "no compiler for BPF: neither a rustup nightly with rust-src and LLVM {LLVM} or older, nor Debian's \
                 rustc-web; run `cargo xtask setup`"
            );
        }
        let version = tree::output(clean(Command::new(&rustc)).arg("-vV"))?;
        let sysroot = tree::output(clean(Command::new(&rustc)).arg("--print=sysroot"))?;
        if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists() {
            bail!(
                "Debian's compiler lacks the sources of core (package rust-web-src); run `cargo xtask setup`"
            );
        }
        let name = format!("Debian's {}", version.lines().next().unwrap_or_default());
        Ok(Compiler { name, cargo: vec![cargo], rustc: Some(rustc) })
    }

    fn cargo(&self) -> Command {
        let mut command = clean(Command::new(&self.cargo[0]));
        command.args(&self.cargo[1..]);
        if let Some(rustc) = &self.rustc {
            // Debian's compiler is a stable one; this is what lets it take -Z flags.
            command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }
}

/// The LLVM major version in the output of `rustc -vV`.
fn llvm(version: &str) -> Option<u32> {
    version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

/// Takes away what the outer cargo, rustup or the user's shell set for the host build.
pub(crate) fn clean(mut command: Command) -> Command {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let registry = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_"];
        let cargo = text.starts_with("CARGO") && !registry.iter().any(|keep| text.starts_with(keep));
        if cargo
            || text.starts_with("RUSTC")
            || text.contains("RUSTFLAGS")
            || text == "RUSTUP_TOOLCHAIN"
            || text == "LD_LIBRARY_PATH"
        {
            command.env_remove(&name);
        }
    }
    command
}

fn compile(compiler: &Compiler, linker: &Path) -> Result<PathBuf> {
    // BTF (for socket storage maps, and for anyone who dumps a map) comes from debug information by way of the linker.
    let flags =
        [&format!("-Clinker={}", linker.display()), "-Clink-arg=--btf", "-Cdebuginfo=2", "-Dwarnings"];
    let dir = tree::target().join("bpf-build");
    tree::run(
        compiler
            .cargo()
            .current_dir(tree::root())
            .args([
                "build",
                "--release",
                "--package",
                "weft-ebpf",
                "--target",
                TARGET,
                "-Zbuild-std=core",
                "--target-dir",
            ])
            .arg(&dir)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")),
    )?;
    Ok(dir.join(TARGET).join("release"))
}

/// Replaces the object in one step, and only if it changed or is older than its sources: the agent's build script
/// refuses an object older than those, and rebuilds the agent for one that is newer than last time.
fn publish(built: &Path, object: &Path) -> Result<()> {
    let bytes = fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    let root = tree::root();
    let sources = tree::newest(&[root.join("ebpf"), root.join("Cargo.toml"), root.join("Cargo.lock")])?;
    let same = fs::read(object).is_ok_and(|old| old == bytes);
    if same && fs::metadata(object)?.modified()? > sources {
        return Ok(());
    }
    let dir = object.parent().expect("the object has a directory");
    fs::create_dir_all(dir)?;
    let new = dir.join(format!(".new.{}", std::process::id()));
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, object))
        .with_context(|| format!("cannot write {}", object.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_is_read_from_verbose_output() {
        assert_eq!(llvm("rustc 1.96.0\nbinary: rustc\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm("rustc 1.96.0\n"), None);
    }
}
