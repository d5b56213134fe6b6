//! `cargo xtask lint`: what must hold for every commit and needs no kernel.
//!
//! All checks run, so that one round shows everything that is wrong.

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::setup::Group;
use crate::{build_ebpf, setup, tree};

/// The kernel keeps 16 bytes of a map's name, the last of them zero.
const MAP_NAME: usize = 15;

/// `cargo xtask lint`.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure(&[Group::Build, Group::Lint])?;
    let cargo = |line: &str| {
        let mut command = Command::new("cargo");
        command.current_dir(tree::root()).args(line.split(' '));
        tree::run(&mut command)
    };
    type Check<'a> = (&'a str, &'a dyn Fn() -> Result<()>);
    let checks: &[Check<'_>] = &[
        ("abi number", &abi),
        ("map names", &map_names),
        ("format", &|| cargo("fmt --all --check")),
        // Warnings are errors there as well. Clippy has no `core` for the BPF target, so the compiler has to do.
        ("bpf build", &build_ebpf::run),
        ("clippy", &|| cargo("clippy --quiet --all-targets -- -D warnings")),
        // The advisory database is a git repository that a sealed build machine cannot fetch; `cargo deny check
        // advisories` is for where it can.
        ("deny", &|| cargo("deny --log-level error check licenses bans sources")),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        println!("lint: {name}");
        if let Err(error) = check() {
            println!("lint: {name}: {error:#}");
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        println!("lint: clean");
        return Ok(ExitCode::SUCCESS);
    }
    println!("lint: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// The number that the sum file records beside the hash: `ABI number sha256`.
fn abi() -> Result<()> {
    let source = tree::root().join("ebpf/datapath/src/abi.rs");
    let sum = tree::root().join("ebpf/datapath/abi.sum");
    let text = fs::read_to_string(&source).with_context(|| format!("cannot read {}", source.display()))?;
    let number = number(&text).context("abi.rs has no line `pub const ABI: u32 = N;`")?;
    let hash = tree::output(Command::new("sha256sum").arg("--").arg(&source))?;
    let hash = hash.split_whitespace().next().context("sha256sum printed nothing")?;
    let recorded = fs::read_to_string(&sum).with_context(|| format!("cannot read {}", sum.display()))?;
    check_abi(&recorded, number, hash)
}

fn number(source: &str) -> Option<u32> {
    source
        .lines()
        .find_map(|line| line.strip_prefix("pub const ABI: u32 = "))?
        .trim_end_matches(';')
        .parse()
        .ok()
}

fn check_abi(recorded: &str, number: u32, hash: &str) -> Result<()> {
    let line = format!("ABI {number} {hash}");
    let words: Vec<_> = recorded.split_whitespace().collect();
    let ["ABI", old, old_hash] = words[..] else {
        bail!("ebpf/datapath/abi.sum should be one line `ABI number sha256`")
    };
    match (old == number.to_string(), old_hash == hash) {
        (true, true) => Ok(()),
        (true, false) => bail!(
            "ebpf/datapath/src/abi.rs changed but ABI is still {number}: an agent would adopt maps of another layout; raise \
             ABI, then write `ABI {} SHA256` of the file to ebpf/datapath/abi.sum",
            number + 1
        ),
        (false, _) => bail!("write the new number and hash to ebpf/datapath/abi.sum: {line}"),
    }
}

/// A longer name would be refused by the kernel at load.
fn map_names() -> Result<()> {
    let text = fs::read_to_string(tree::root().join("ebpf/datapath/src/names.rs"))?;
    let names: Vec<_> = text.split("&str = \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    if names.is_empty() {
        bail!("no map name found in ebpf/datapath/src/names.rs");
    }
    match names.iter().find(|name| name.len() > MAP_NAME) {
        Some(name) => bail!("the map name {name} has {} bytes, the kernel takes {MAP_NAME}", name.len()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_needs_a_new_number() {
        assert!(check_abi("ABI 1 aa\n", 1, "aa").is_ok());
        assert!(check_abi("ABI 1 aa\n", 1, "bb").unwrap_err().to_string().contains("raise ABI"));
        assert!(check_abi("ABI 1 aa\n", 2, "bb").unwrap_err().to_string().contains("ABI 2 bb"));
        assert!(check_abi("", 1, "aa").is_err());
    }

    #[test]
    fn the_number_is_found_in_the_source() {
        assert_eq!(number("/// x\npub const ABI: u32 = 7;\n"), Some(7));
        assert_eq!(number("const ABI: u32 = 7;"), None);
    }
}
