//! Which modules a guest loads, in which order.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What weft and its scenarios need of a kernel; what is built in needs no loading. IPv6 is part of all these kernels, and
/// no module of the newest.
pub(crate) const NEEDED: &[&str] =
    &["veth", "sch_ingress", "cls_bpf", "af_packet", "inet_diag", "tcp_diag", "udp_diag", "raw_diag"];

/// The files to load, dependencies first.
pub(crate) fn order(dir: &Path, needed: &[&str]) -> Result<Vec<PathBuf>> {
    let read = |name: &str| {
        fs::read_to_string(dir.join(name)).with_context(|| format!("cannot read {name} of {}", dir.display()))
    };
    let paths = resolve(&read("modules.dep")?, &read("modules.builtin")?, needed)?;
    Ok(paths.into_iter().map(|path| dir.join(path)).collect())
}

/// Pure part of [`order`]: `dep` has lines of `path: paths it needs`, the needs of needs included, nearest first.
fn resolve(dep: &str, builtin: &str, needed: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in needed {
        let line =
            dep.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| module(path) == *name);
        let Some((path, needs)) = line else {
            if builtin.lines().any(|path| module(path) == *name) {
                continue;
            }
            bail!("this kernel has no module {name}");
        };
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/net/sched/cls_bpf.ko.xz` is `cls_bpf`.
pub(crate) fn module(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// A module as the kernel takes it: uncompressed.
pub(crate) fn content(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output();
        let output = output.context("cannot start xz; run `cargo xtask setup`")?;
        if !output.status.success() {
            bail!("xz cannot unpack {}", path.display());
        }
        return Ok(output.stdout);
    }
    if path.extension().is_none_or(|extension| extension != "ko") {
        bail!("{} has a compression that nobody taught us", path.display());
    }
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/a/veth.ko:\nkernel/b/tcp_diag.ko.xz: kernel/b/inet_diag.ko.xz kernel/c/base.ko.xz\n\
                       kernel/b/inet_diag.ko.xz: kernel/c/base.ko.xz\nkernel/c/base.ko.xz:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let order = resolve(DEP, "kernel/d/ipv6.ko\n", &["ipv6", "tcp_diag", "inet_diag", "veth"]).unwrap();
        assert_eq!(
            order,
            [
                "kernel/c/base.ko.xz",
                "kernel/b/inet_diag.ko.xz",
                "kernel/b/tcp_diag.ko.xz",
                "kernel/a/veth.ko"
            ]
        );
    }

    #[test]
    fn a_missing_module_is_named() {
        assert!(resolve(DEP, "", &["ipv6"]).unwrap_err().to_string().contains("ipv6"));
    }
}
