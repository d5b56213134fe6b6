//! Where kernel state lives: `<bpffs>/v<ABI>/maps/` and `<bpffs>/v<ABI>/links/`.
//!
//! What is pinned outlives the agent: programs go on enforcing with the last maps. INVARIANT: one agent at a time owns
//! the directory (an exclusive lock that dies with its process), and it holds the state of one ABI only, since two
//! generations of programs on one interface would both decide.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use weft_datapath::abi::ABI;

use super::error::{Error, Result};
use super::{attach, sys};

/// The pin directory, locked.
#[derive(Debug)]
pub struct Pins {
    root: PathBuf,
    /// Released when dropped, or when the process dies.
    _lock: Flock<File>,
}

impl Pins {
    /// Makes the directories and takes the lock. `root` must lie on a BPF file system.
    pub fn open(root: &Path) -> Result<Pins> {
        let existing = root.ancestors().find(|path| path.exists()).unwrap_or(root);
        let kind = statfs(existing).map_err(|errno| Error::file("inspect", existing)(errno.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            return Err(Error::NotBpffs { path: root.into() });
        }
        make_directory(root)?;
        let lock = lock(root)?;
        if let Some(found) = foreign_abi(root)? {
            return Err(Error::Abi { path: root.into(), found });
        }
        let pins = Pins { root: root.into(), _lock: lock };
        make_directory(&pins.maps())?;
        make_directory(&pins.links())?;
        Ok(pins)
    }

    pub fn maps(&self) -> PathBuf {
        version(&self.root, ABI).join("maps")
    }

    pub fn links(&self) -> PathBuf {
        version(&self.root, ABI).join("links")
    }

    /// The link pinned as `name`, if there is one.
    pub(crate) fn link(&self, name: &str) -> Result<Option<OwnedFd>> {
        let path = self.links().join(name);
        match sys::open_pin(&path) {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(Error::file("open", path)(error)),
        }
    }

    /// Pins a link, in place of whatever was pinned under the name.
    pub(crate) fn pin_link(&self, link: impl AsFd, name: &str) -> Result<()> {
        let path = self.links().join(name);
        remove_link(&path)?;
        sys::pin(link.as_fd(), &path).map_err(Error::file("pin", path))
    }

    /// Removes a link's pin, and with it the attachment; nothing happens when there is none.
    pub(crate) fn unpin_link(&self, name: &str) -> Result<()> {
        remove_link(&self.links().join(name))
    }

    /// The names of all pinned links.
    pub(crate) fn link_names(&self) -> Result<Vec<String>> {
        let name = |path: PathBuf| Some(path.file_name()?.to_string_lossy().into_owned());
        Ok(paths(&self.links())?.into_iter().filter_map(name).collect())
    }
}

/// Removes every link and map that weft pinned below `root`, of any ABI, and the directories. Links go first, so that
/// no program runs on while its maps disappear. Doing it twice, or on nothing, is not an error.
///
/// Clsact filters, which have no pin, are found by the interfaces in `weft_iface`.
pub fn detach(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let _lock = lock(root)?;
    for version in versions(root)? {
        for link in paths(&version.1.join("links"))? {
            remove_link(&link)?;
        }
        attach::detach_filters(&version.1.join("maps"))?;
        for part in ["links", "maps"] {
            let directory = version.1.join(part);
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", directory)(error));
                }
                _ => {}
            }
        }
        fs::remove_dir(&version.1).map_err(Error::file("remove", &version.1))?;
    }
    match fs::remove_dir(root) {
        // The directory may hold what is not ours, or be the mount point itself.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY)) => {
            Err(Error::file("remove", root)(error))
        }
        _ => Ok(()),
    }
}

fn version(root: &Path, abi: u32) -> PathBuf {
    root.join(format!("v{abi}"))
}

/// The version directories below `root`.
fn versions(root: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let mut versions = Vec::new();
    for path in paths(root)? {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(abi) = name.strip_prefix('v').and_then(|number| number.parse().ok()) {
            versions.push((abi, path));
        }
    }
    Ok(versions)
}

fn foreign_abi(root: &Path) -> Result<Option<u32>> {
    Ok(versions(root)?.into_iter().map(|(abi, _)| abi).find(|abi| *abi != ABI))
}

fn lock(root: &Path) -> Result<Flock<File>> {
    let directory = File::open(root).map_err(Error::file("open", root))?;
    Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => Error::Locked { path: root.into() },
        errno => Error::file("lock", root)(errno.into()),
    })
}

/// Only root may look at identities, flows and keys of maps.
fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::file("create", path))
}

/// Detaches a pinned link and removes the pin.
fn remove_link(path: &Path) -> Result<()> {
    if let Ok(link) = sys::open_pin(path) {
        // Where the kernel cannot, or the target is gone already, the last reference detaches a little later.
        let _ = sys::link_detach(link.as_fd());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The paths in a directory; none when there is no directory.
fn paths(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::file("read", directory))?,
    };
    entries.map(|entry| Ok(entry.map_err(Error::file("read", directory))?.path())).collect()
}
