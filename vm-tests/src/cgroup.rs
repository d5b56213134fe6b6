//! Child cgroups: where the connect hooks attach, and how a test ends every process that it started.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where cgroup v2 is mounted; on a hybrid host that is beside the v1 hierarchies.
pub fn mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// A cgroup below the mount (never the root), removed with everything in it on drop.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Creates it under the v2 mount.
    pub fn create(name: &str) -> Cgroup {
        let root = mount().expect("no cgroup2 in /proc/mounts: mount one");
        let cgroup = Cgroup(root.join(name));
        cgroup.child(".");
        cgroup
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A cgroup below this one, removed with it.
    pub fn child(&self, name: &str) -> PathBuf {
        let path = if name == "." { self.0.clone() } else { self.0.join(name) };
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("create cgroup {}: {e}", path.display()));
        path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Kills every process below `path` and removes the cgroups, deepest first.
pub(crate) fn remove(path: &Path) {
    if let Ok(entries) = fs::read_dir(path) {
        for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            remove(&entry.path());
        }
    }
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if fs::remove_dir(path).is_ok() || !path.exists() || Instant::now() > end {
            return;
        }
        sleep(Duration::from_millis(5));
    }
}
