//! The cookie of a network namespace, on kernels whose sockets do not tell it (`SO_NETNS_COOKIE` is of 5.14).
//!
//! Programs can ask since 5.7. So a program of a dozen instructions sits on the agent's own cgroup and notes, for each
//! internet socket that is created there, the cookie of its namespace under the socket's own cookie (`SO_COOKIE`). It
//! lives as long as this process, decides nothing, and notes what it forgets again: the map is an LRU because only the
//! socket just made is ever asked for. INVARIANT: a socket that was not seen is an error, never a guess.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::sys;

/// The program's attachment and what it writes.
struct Recorder {
    map: OwnedFd,
    _link: OwnedFd,
}

/// The cookie of the calling thread's namespace.
pub(crate) fn own() -> io::Result<u64> {
    static RECORDER: OnceLock<Recorder> = OnceLock::new();
    let recorder = match RECORDER.get() {
        Some(recorder) => recorder,
        // Two threads may both attach one; the loser's goes away at once.
        None => {
            let attached = Recorder::attach()?;
            RECORDER.get_or_init(|| attached)
        }
    };
    let probe = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let id = sys::socket_option(probe.as_raw_fd(), libc::SO_COOKIE)?;
    let mut cookie = [0; 8];
    if !sys::lookup(recorder.map.as_fd(), &id, &mut cookie)? {
        return Err(io::Error::other(
            "the kernel cannot tell its cookie: programs on the agent's cgroup do not run (a net_cls classid in a \
             cgroup v1 hierarchy does that before Linux 5.15)",
        ));
    }
    sys::delete(recorder.map.as_fd(), &id)?;
    Ok(u64::from_ne_bytes(cookie))
}

impl Recorder {
    fn attach() -> io::Result<Recorder> {
        let map = sys::create_cookie_map()?;
        let program = sys::load_cookie_recorder(map.as_fd())?;
        let cgroup = File::open(own_cgroup()?)?;
        let link =
            sys::link_create(program.as_fd(), cgroup.as_raw_fd() as u32, sys::attach::INET_SOCK_CREATE)?;
        Ok(Recorder { map, _link: link })
    }
}

/// The directory of this process's cgroup in the v2 hierarchy.
fn own_cgroup() -> io::Result<PathBuf> {
    let missing = || io::Error::other("no cgroup v2 hierarchy is mounted");
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let own = fs::read_to_string("/proc/self/cgroup")?;
    directory(&mounts, &own).ok_or_else(missing)
}

fn directory(mounts: &str, own: &str) -> Option<PathBuf> {
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|fields| fields.get(2) == Some(&"cgroup2"))?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(mount.get(1)?).join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_beside_the_first_hierarchy() {
        let mounts = "none /sys/fs/cgroup/cpu cgroup rw 0 0\nnone /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let found = directory(mounts, "4:cpu:/x\n0::/weft/agent\n");
        assert_eq!(found.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/weft/agent")));
        assert_eq!(directory("", "0::/"), None);
    }
}
