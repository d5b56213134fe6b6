//! Network namespaces of workloads: hold one open, learn its cookie, make sockets inside it.
//!
//! A socket belongs for life to the namespace of the thread that created it, so [`Netns::run`] enters the namespace
//! only for the few microseconds that `socket()` takes, on the calling thread, and comes back before it returns. A
//! thread of its own would cost a wake-up per connection (tens of microseconds against one for the pair of setns).
//!
//! INVARIANT: no thread leaves `run` in another namespace than it entered from. The closure cannot await, the guard
//! also restores when the closure panics, and a failed restore aborts the process: a runtime worker that stayed behind
//! would open other workloads' sockets in the wrong place.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::kernel::{cookie, sys};

/// The namespace of the calling thread, whichever process forked it.
pub(crate) const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace. It cannot vanish while this lives, even when its name and processes are gone.
#[derive(Debug)]
pub struct Netns {
    file: File,
    cookie: u64,
}

impl Netns {
    /// Opens the namespace behind `path`, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> io::Result<Netns> {
        let file = File::open(path)?;
        let cookie = inside(&file, own_cookie)??;
        Ok(Netns { file, cookie })
    }

    /// The kernel's number of this namespace, never used again before the next boot: the key of what programs know
    /// about it.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Runs `work` with the calling thread inside this namespace. Meant for making sockets: `work` must not block.
    ///
    /// The error is that of entering; `work` did not run then.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        inside(&self.file, work)
    }
}

fn inside<T>(target: &File, work: impl FnOnce() -> T) -> io::Result<T> {
    struct Back(File);
    impl Drop for Back {
        fn drop(&mut self) {
            if setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!(
                    "weft: a thread cannot return to its network namespace; stopping, as it would do harm"
                );
                std::process::abort();
            }
        }
    }

    let own = File::open(OWN)?;
    setns(target.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let back = Back(own);
    let done = work();
    drop(back);
    Ok(done)
}

/// The cookie of the calling thread's namespace: asked of a socket (Linux 5.14), or of a program where sockets do not know.
pub fn own_cookie() -> io::Result<u64> {
    match socket_cookie()? {
        Some(cookie) => Ok(cookie),
        None => cookie::own(),
    }
}

/// Do sockets tell the cookie of their namespace on this kernel?
pub(crate) fn sockets_tell_cookies() -> io::Result<bool> {
    socket_cookie().map(|cookie| cookie.is_some())
}

fn socket_cookie() -> io::Result<Option<u64>> {
    let probe = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    match sys::socket_option(probe.as_raw_fd(), libc::SO_NETNS_COOKIE) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        asked => asked.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A namespace of its own thread; the thread is gone, the descriptor keeps the namespace.
    fn fresh() -> Netns {
        std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            Netns::open(Path::new(OWN)).unwrap()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn work_runs_inside_and_the_thread_comes_back() {
        let (own, other, third) = (own_cookie().unwrap(), fresh(), fresh());
        assert_ne!(own, other.cookie());
        assert_eq!(other.run(|| own_cookie().unwrap()).unwrap(), other.cookie());
        assert_eq!(own_cookie().unwrap(), own);
        // One inside the other comes back to the outer one.
        let nested =
            other.run(|| (third.run(|| own_cookie().unwrap()).unwrap(), own_cookie().unwrap())).unwrap();
        assert_eq!(nested, (third.cookie(), other.cookie()));
        assert_eq!(own_cookie().unwrap(), own);
    }

    #[test]
    fn a_panic_inside_comes_back_too() {
        let (own, other) = (own_cookie().unwrap(), fresh());
        let panicked =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| other.run(|| panic!("on purpose"))));
        assert!(panicked.is_err());
        assert_eq!(own_cookie().unwrap(), own);
    }

    #[test]
    fn what_is_no_namespace_is_refused() {
        assert!(Netns::open(Path::new("/proc/self/status")).is_err());
        assert!(Netns::open(Path::new("/run/netns/there-is-none")).is_err());
    }
}
