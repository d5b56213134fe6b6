//! apt with sources and state of our own: what the matrix takes from other suites never touches the system's settings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::tree;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const ARCHIVE: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";

/// Suites that have the kernels.
pub(crate) const KERNELS: &[(&str, &str)] = &[
    (ARCHIVE, "bullseye"),
    (SECURITY, "bullseye-security"),
    (ARCHIVE, "bookworm"),
    (SECURITY, "bookworm-security"),
    (ARCHIVE, "bookworm-backports"),
    (ARCHIVE, "sid"),
];
/// Suites that have an emulator which works, for Debian 12.
pub(crate) const QEMU: &[(&str, &str)] =
    &[(ARCHIVE, "bookworm"), (SECURITY, "bookworm-security"), (ARCHIVE, "bookworm-backports")];

/// A list of sources with a folder for its state.
pub(crate) struct Apt(PathBuf);

impl Apt {
    /// Fetches the lists of these suites into `dir`.
    pub(crate) fn update(dir: &Path, suites: &[(&str, &str)]) -> Result<Apt> {
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(folder)).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let line = |(url, suite): &(&str, &str)| format!("deb [signed-by={KEYRING}] {url} {suite} main\n");
        fs::write(dir.join("sources.list"), suites.iter().map(line).collect::<String>())?;
        fs::write(dir.join("status"), "")?;
        let apt = Apt(dir.to_owned());
        tree::run(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    /// A command that sees these sources only; installed packages remain the system's.
    pub(crate) fn command(&self, program: &str) -> Command {
        let at = |name: &str| self.0.join(name).display().to_string();
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "Dpkg::Use-Pty=0"]);
        for (option, value) in [
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "-".to_owned()),
            ("Dir::State::lists", at("lists")),
            ("Dir::Cache", at("cache")),
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command
    }

    /// As [`Apt::command`], as if nothing were installed.
    pub(crate) fn apart(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command.arg("-o").arg(format!("Dir::State::status={}", self.0.join("status").display()));
        command
    }
}
