//! The guest's only file system: an archive with the agent, the scenarios, iproute2 and the modules of one kernel.
//!
//! Programs are the dynamic ones that cargo has built for the host, with the libraries that `ldd` names for them: no
//! second target, and what runs in the guest is what ran on the host. Symbols stay behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Cpio;
use super::modules;
use crate::{build_ebpf, tree};

/// Where the scenarios are in the guest; `weft` and `wt-load` are one directory above, as cargo lays them out.
const SCENARIOS: &str = "/tests/deps";
/// Programs of the host that scenarios start.
const TOOLS: &[&str] = &["ip", "openssl", "tc", "timeout"];

/// What is the same in the image of every kernel.
pub(crate) struct Programs {
    files: Vec<(String, Vec<u8>)>,
}

impl Programs {
    /// Reads the programs of cargo, stripped, and the tools with their libraries. `scenarios` are test programs.
    pub(crate) fn read(scenarios: &[PathBuf], work: &Path) -> Result<Programs> {
        let debug = tree::target().join("debug");
        let mut files = Vec::new();
        let mut libraries = Vec::new();
        for (name, place) in [("wt-guest", "/init"), ("weft", "/tests/weft"), ("wt-load", "/tests/wt-load")] {
            libraries.extend(needs(&debug.join(name))?);
            files.push((place.to_owned(), stripped(&debug.join(name), work)?));
        }
        for scenario in scenarios {
            let name = scenario.file_name().context("a test program has a name")?.to_string_lossy();
            // Cargo's hash tells nobody anything.
            let name = name.rsplit_once('-').map_or(&*name, |(name, _)| name);
            libraries.extend(needs(scenario)?);
            files.push((format!("{SCENARIOS}/{name}"), stripped(scenario, work)?));
        }
        for tool in TOOLS {
            let path = tree::program(tool).with_context(|| format!("{tool} is missing"))?;
            libraries.extend(needs(&path)?);
            files.push((format!("/bin/{tool}"), fs::read(&path)?));
        }
        libraries.sort();
        libraries.dedup();
        for library in libraries {
            let bytes = fs::read(&library).with_context(|| format!("cannot read {}", library.display()))?;
            files.push((library.display().to_string(), bytes));
        }
        // One scenario loads the objects from where they were built.
        for name in build_ebpf::OBJECTS {
            let place = tree::root().join("target/bpf").join(name);
            files.push((place.display().to_string(), fs::read(tree::target().join("bpf").join(name))?));
        }
        Ok(Programs { files })
    }

    /// The archive for a kernel whose modules are in `dir`.
    pub(crate) fn image(&self, dir: &Path) -> Result<Vec<u8>> {
        let mut cpio = Cpio::new();
        for dir in ["/proc", "/sys", "/dev", "/run/netns", "/tmp", "/var/lib", "/root"] {
            cpio.dir(dir);
        }
        cpio.link("/var/run", "/run");
        cpio.device("/dev/console", 5, 1);
        cpio.device("/dev/null", 1, 3);
        cpio.file("/usr/lib/ssl/openssl.cnf", b"[req]\ndistinguished_name = dn\n[dn]\n");
        // The scenario that loads the object reaches it by way of its package's directory.
        cpio.dir(&tree::root().join("vm-tests").display().to_string());
        for (path, bytes) in &self.files {
            if !cpio.has(path) {
                cpio.file(path, bytes);
            }
        }
        for (number, module) in modules::order(dir, modules::NEEDED)?.iter().enumerate() {
            let name = modules::module(&module.display().to_string());
            cpio.file(&format!("/modules/{number:02}-{name}.ko"), &modules::content(module)?);
        }
        Ok(cpio.finish())
    }
}

/// The libraries that a program is linked with, and its loader.
fn needs(program: &Path) -> Result<Vec<PathBuf>> {
    let text = tree::output(Command::new("ldd").arg(program))?;
    let libraries = libraries(&text);
    if libraries.is_empty() && !text.contains("statically linked") {
        bail!("ldd says nothing of use about {}: {text}", program.display());
    }
    Ok(libraries)
}

/// Reads `ldd`: `libc.so.6 => /lib/libc.so.6 (0x7f)` and `/lib64/ld-linux-x86-64.so.2 (0x7f)`.
fn libraries(text: &str) -> Vec<PathBuf> {
    let paths = text.lines().filter_map(|line| {
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        path.split_whitespace().next().filter(|path| path.starts_with('/'))
    });
    paths.map(PathBuf::from).collect()
}

fn stripped(program: &Path, work: &Path) -> Result<Vec<u8>> {
    let copy = work.join("stripped");
    tree::run(Command::new("strip").arg("-o").arg(&copy).arg(program))?;
    fs::read(&copy).with_context(|| format!("cannot read {}", copy.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let paths = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(text), paths.map(PathBuf::from));
    }
}
