//! What the tests on a real kernel share: a BPF file system and a child cgroup of their own.
//!
//! Needs root. Everything made here bears the process id and goes away with the value, and nothing is attached
//! outside of it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted BPF file system, with state below `root`.
pub(crate) struct Bpffs {
    mount: PathBuf,
}

impl Bpffs {
    pub(crate) fn new(test: &str) -> Bpffs {
        let path = std::env::temp_dir().join(format!("weft-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("these tests need root");
        Bpffs { mount: path }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.mount.join("weft")
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // Unmounting drops all pins, and with them every link.
        let _ = umount2(&self.mount, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.mount);
    }
}

/// A child cgroup without processes.
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(crate) fn new(test: &str) -> Cgroup {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts
            .lines()
            .find_map(|line| {
                let mut fields = line.split(' ').skip(1);
                let path = fields.next()?;
                (fields.next()? == "cgroup2").then_some(path)
            })
            .expect("a cgroup2 hierarchy is mounted");
        let path = Path::new(root).join(format!("weft-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Cgroup { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// A named network namespace, with `lo` up.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    pub(crate) fn new(name: &str) -> Namespace {
        let name = format!("wk{}-{name}", std::process::id());
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Namespace { name }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Runs ip(8).
pub(crate) fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("ip(8) is installed");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}
