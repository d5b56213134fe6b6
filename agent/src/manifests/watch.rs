//! Tells when a directory of manifests may have changed.
//!
//! inotify says so at once, a periodic look catches what it cannot see (network file systems, an overflowed queue).
//! A wake-up is a hint: the reader compares contents.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout, timeout_at};

/// Events closer together than this are one change: editors and `kubectl`-like tools write several files in a row.
pub const SETTLE: Duration = Duration::from_millis(15);
/// A stream of events is cut into changes after this time, so that a busy directory cannot hold up a revocation.
pub const SETTLE_MAX: Duration = Duration::from_millis(40);
/// Time between looks without an event.
pub const RESCAN: Duration = Duration::from_secs(10);

/// The event queue, as tokio wants to see it.
struct Queue(Inotify);

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Directories under watch.
pub struct Watch {
    inotify: AsyncFd<Queue>,
    watched: HashMap<PathBuf, WatchDescriptor>,
}

impl Watch {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Watch> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        // Deprecated because a foreign `as_raw_fd` may name a descriptor that is closed early; `Queue` owns its own.
        #[allow(deprecated)]
        let inotify = AsyncFd::with_interest(Queue(inotify), Interest::READABLE)?;
        Ok(Watch { inotify, watched: HashMap::new() })
    }

    /// Watches exactly `directories`. Call before reading them, so that no change falls between.
    pub fn cover(&mut self, directories: &[PathBuf]) {
        self.watched.retain(|path, descriptor| {
            let keep = directories.contains(path);
            if !keep {
                // Fails when the directory is gone, and then the kernel removed the watch itself.
                let _ = self.inotify.get_ref().0.rm_watch(*descriptor);
            }
            keep
        });
        for directory in directories {
            // Adding a watch again is free and follows a directory that was replaced by another of its name.
            match self.add(directory) {
                Ok(descriptor) => drop(self.watched.insert(directory.clone(), descriptor)),
                Err(error) => tracing::warn!(
                    "changes in {} are seen only every {} s: {error}",
                    directory.display(),
                    RESCAN.as_secs()
                ),
            }
        }
    }

    /// Resolves when something may have changed and has settled, at the latest after [`RESCAN`].
    pub async fn changed(&mut self) -> io::Result<()> {
        let Ok(first) = timeout(RESCAN, self.event()).await else { return Ok(()) };
        first?;
        let deadline = Instant::now() + SETTLE_MAX;
        while Instant::now() < deadline {
            match timeout_at(deadline.min(Instant::now() + SETTLE), self.event()).await {
                Ok(event) => event?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn add(&self, directory: &Path) -> io::Result<WatchDescriptor> {
        let events = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        Ok(self.inotify.get_ref().0.add_watch(directory, events)?)
    }

    /// Resolves after one or more events were taken from the queue.
    async fn event(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match self.inotify.get_ref().0.read_events() {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sees_what_editors_do() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let mut watch = Watch::new().expect("inotify is there");
        watch.cover(&[dir.path().to_owned()]);
        std::fs::create_dir(at("later")).expect("made");
        let steps: [(&str, &dyn Fn()); 5] = [
            ("a directory appears", &|| ()),
            ("written in place", &|| std::fs::write(at("a.yaml"), "1").expect("written")),
            ("renamed over", &|| {
                std::fs::write(at(".a.new"), "2").expect("written");
                std::fs::rename(at(".a.new"), at("a.yaml")).expect("renamed");
            }),
            ("removed", &|| std::fs::remove_file(at("a.yaml")).expect("removed")),
            ("linked", &|| std::os::unix::fs::symlink("x", at("b.yaml")).expect("linked")),
        ];
        for (what, step) in steps {
            let start = Instant::now();
            step();
            watch.changed().await.expect("inotify can be read");
            assert!(start.elapsed() < Duration::from_millis(80), "{what}: {:?}", start.elapsed());
        }
    }

    #[tokio::test]
    async fn a_busy_directory_does_not_hold_up_a_change() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut watch = Watch::new().expect("inotify is there");
        watch.cover(&[dir.path().to_owned()]);
        let path = dir.path().join("busy.yaml");
        let writer = tokio::spawn(async move {
            loop {
                std::fs::write(&path, "x").expect("written");
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        });
        let start = Instant::now();
        watch.changed().await.expect("inotify can be read");
        assert!(start.elapsed() < Duration::from_millis(90), "{:?}", start.elapsed());
        writer.abort();
    }
}
