//! Debian's kernels: which ones, checked by checksum, kept outside of the tree, unpacked without being installed.
//!
//! `kernels.txt` pins each. Debian's archive forgets a version as it publishes the next, so when a pinned one is gone
//! the newest of the same series is taken instead, aloud; apt has checked its signature.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{self, Apt};
use crate::tree;

const LIST: &str = include_str!("kernels.txt");

/// A package file to be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
    sha256: String,
}

/// One kernel of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// `6.12`.
    pub(crate) series: String,
    /// What `uname -r` says.
    release: String,
    packages: Vec<Package>,
}

/// A kernel on disk.
pub(crate) struct Unpacked {
    /// What QEMU boots.
    pub(crate) image: PathBuf,
    /// `lib/modules/RELEASE`, with `modules.dep`.
    pub(crate) modules: PathBuf,
    /// Debian's version.
    pub(crate) version: String,
}

/// The kernels of the list, oldest first.
pub(crate) fn all() -> Vec<Kernel> {
    parse(LIST)
}

fn parse(list: &str) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [series, release, name, version, sha256] = words[..] else { continue };
        let package =
            Package { name: name.to_owned(), version: version.to_owned(), sha256: sha256.to_owned() };
        match kernels.last_mut().filter(|last| last.series == series) {
            Some(last) => last.packages.push(package),
            None => kernels.push(Kernel {
                series: series.to_owned(),
                release: release.to_owned(),
                packages: vec![package],
            }),
        }
    }
    kernels
}

/// Where packages are kept: `$XDG_CACHE_HOME/weft`, else `~/.cache/weft`.
pub(crate) fn cache() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(|| tree::target().join("cache"))
        .join("weft")
}

impl Kernel {
    /// Downloads what is not in the cache, and unpacks it below `work`.
    pub(crate) fn fetch(&self, work: &Path) -> Result<Unpacked> {
        let store = cache().join("kernels");
        fs::create_dir_all(&store).with_context(|| format!("cannot make {}", store.display()))?;
        let files = self.packages.iter().map(|package| package.file(&store)).collect::<Option<Vec<_>>>();
        let (release, version, files) = match files {
            Some(files) => (self.release.clone(), self.packages[0].version.clone(), files),
            None => self.download(&store)?,
        };
        let root = work.join(&release);
        unpack(&root, &release, &files)?;
        let found =
            |paths: [&str; 2]| paths.map(|path| root.join(path)).into_iter().find(|path| path.exists());
        let image = format!("boot/vmlinuz-{release}");
        let inner = format!("usr/lib/modules/{release}/vmlinuz");
        let image = found([&image, &inner]).with_context(|| format!("no vmlinuz in {}", root.display()))?;
        Ok(Unpacked { image, modules: root.join("lib/modules").join(&release), version })
    }

    /// Release, version and package files, after a download.
    fn download(&self, store: &Path) -> Result<(String, String, Vec<PathBuf>)> {
        eprintln!("vm-test: downloading kernel {} to {}", self.series, store.display());
        let apt = Apt::update(&cache().join("apt"), apt::KERNELS)?;
        let get = |name: &str, version: &str| {
            let mut command = apt.apart("apt-get");
            command.current_dir(store).arg("download").arg(format!("{name}={version}"));
            tree::output(&mut command)
        };
        if self.packages.iter().all(|package| get(&package.name, &package.version).is_ok()) {
            let files = self.packages.iter().map(|package| {
                package.file(store).with_context(|| format!("{} has another checksum", package.name))
            });
            return Ok((
                self.release.clone(),
                self.packages[0].version.clone(),
                files.collect::<Result<_>>()?,
            ));
        }
        let (release, version) = newest(&apt, &self.series)?;
        eprintln!(
            "vm-test: the archive has kernel {version} in place of the pinned {}",
            self.packages[0].version
        );
        let mut files = Vec::new();
        for kind in ["image", "base", "binary", "modules"] {
            let name = format!("linux-{kind}-{release}");
            if get(&name, &version).is_err() {
                // Only newer kernels are split into more packages.
                if kind == "image" {
                    bail!("{name} {version} cannot be downloaded");
                }
                continue;
            }
            let file = store.join(file_name(&name, &version));
            eprintln!(
                "vm-test: for kernels.txt: {} {release} {name} {version} {}",
                self.series,
                sha256(&file)?
            );
            files.push(file);
        }
        Ok((release, version, files))
    }
}

impl Package {
    /// Its file, if it is there and is what the list says.
    fn file(&self, store: &Path) -> Option<PathBuf> {
        let file = store.join(file_name(&self.name, &self.version));
        (file.is_file() && sha256(&file).ok()? == self.sha256).then_some(file)
    }
}

/// As apt names it: an epoch's colon is escaped.
fn file_name(name: &str, version: &str) -> String {
    format!("{name}_{}_amd64.deb", version.replace(':', "%3a"))
}

fn sha256(file: &Path) -> Result<String> {
    let output = tree::output(Command::new("sha256sum").arg(file))?;
    Ok(output.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Release and version of the newest cloud kernel of a series.
fn newest(apt: &Apt, series: &str) -> Result<(String, String)> {
    let text = tree::output(apt.apart("apt-cache").args(["show", "linux-image-cloud-amd64"]))?;
    newest_in(&text, series)
        .with_context(|| format!("Debian has no kernel {series} any more; see kernels.txt"))
}

/// Reads `apt-cache show`, which has the newest first.
fn newest_in(text: &str, series: &str) -> Option<(String, String)> {
    text.split("\n\n").find_map(|entry| {
        let field = |name: &str| entry.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let version = field("Version")?;
        version.strip_prefix(series)?.strip_prefix('.')?;
        let words = field("Depends")?.split([' ', ',']);
        let release = words.filter_map(|word| word.strip_prefix("linux-image-")).next()?;
        Some((release.to_owned(), version.to_owned()))
    })
}

/// Unpacks packages and lists the dependencies of the modules, once.
fn unpack(root: &Path, release: &str, files: &[PathBuf]) -> Result<()> {
    let marker = root.join("unpacked");
    let wanted: String = files.iter().map(|file| format!("{}\n", file.display())).collect();
    if fs::read_to_string(&marker).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    fs::create_dir_all(root)?;
    for file in files {
        tree::run(Command::new("dpkg").arg("-x").arg(file).arg(root))?;
    }
    // A merged-usr package has everything below usr/lib; depmod looks below lib.
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib"))?;
    }
    let depmod = tree::program("depmod").context("depmod is missing; run `cargo xtask setup`")?;
    tree::run(Command::new(depmod).arg("-b").arg(root).arg(release))?;
    fs::write(marker, wanted)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_four_kernels_with_checksums() {
        let series: Vec<String> = all().into_iter().map(|kernel| kernel.series).collect();
        assert_eq!(series, ["5.10", "6.1", "6.12", "7.2"]);
        for package in all().iter().flat_map(|kernel| &kernel.packages) {
            assert_eq!(package.sha256.len(), 64, "{}", package.name);
        }
        assert_eq!(all()[3].packages.len(), 3);
    }

    #[test]
    fn the_newest_of_a_series_is_found() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 7.2.14-1\nDepends: linux-base (= 7.2.14-1), linux-image-7.2.14+deb14-cloud-amd64 (= 7.2.14-1)\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.12.95-1\nDepends: linux-image-6.12.95-cloud-amd64 (= 6.12.95-1)\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        assert_eq!(newest_in(text, "6.1"), Some(("6.1.0-56-cloud-amd64".into(), "6.1.192-2".into())));
        assert_eq!(newest_in(text, "7.2"), Some(("7.2.14+deb14-cloud-amd64".into(), "7.2.14-1".into())));
        assert_eq!(newest_in(text, "6.6"), None);
    }
}
