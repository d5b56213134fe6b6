//! Unique names, and the sweep of what a killed run left behind.
//!
//! Every namespace, cgroup and mount carries `wt-<pid>-<counter>`. What carries the pid of a dead process belongs to
//! nobody and is removed before the first new name is handed out.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};

use crate::cgroup;
use crate::netns;

/// Below it each run has its directories and bpffs mounts. Not in /tmp: a bpffs mount must survive tmp cleaners.
const RUN_DIR: &str = "/run/weft-tests";

static SWEPT: Once = Once::new();
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A name nobody else has: `wt-<pid>-<counter>-<what>`.
pub fn unique(what: &str) -> String {
    SWEPT.call_once(sweep);
    format!("wt-{}-{}-{what}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A directory of its own, removed on drop.
#[derive(Debug)]
pub struct Dir(PathBuf);

impl Dir {
    /// Creates it.
    pub fn create(what: &str) -> Dir {
        let path = Path::new(RUN_DIR).join(unique(what));
        fs::create_dir_all(&path)
            .unwrap_or_else(|e| panic!("create {}: {e} (are you root?)", path.display()));
        Dir(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if std::env::var_os("WEFT_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// The process that made something of this name, if it is one of ours.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("wt-")?.split('-').next()?.parse().ok()
}

fn orphaned(name: &str) -> bool {
    owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

fn orphans(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|e| orphaned(&e.file_name().to_string_lossy())).map(|e| e.path()).collect()
}

/// Removes what dead runs left: processes first (through their cgroups), then mounts, namespaces, directories.
pub fn sweep() {
    if let Some(root) = cgroup::mount() {
        for path in orphans(&root) {
            cgroup::remove(&path);
        }
    }
    for path in orphans(Path::new(RUN_DIR)) {
        let _ = umount2(&path.join("bpf"), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&path);
    }
    for path in orphans(Path::new(netns::DIR)) {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_read_from_names() {
        assert_eq!(owner("wt-17-0-node"), Some(17));
        assert_eq!(owner("wt-x"), None);
        assert_eq!(owner("other-17-0"), None);
        assert!(!orphaned(&unique("a")));
    }
}
