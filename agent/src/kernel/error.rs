//! What can go wrong between agent and kernel, in sentences that say what to do.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use nix::libc;
use weft_datapath::abi::ABI;

/// An error of the kernel shell.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the kernel refuses {what}: run weft as root, or with CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_PERFMON"
    )]
    Permission { what: String },
    #[error("{} is not on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`, or point --bpffs at one", .path.display())]
    NotBpffs { path: PathBuf },
    #[error("another agent holds {}: stop it first, or start this one with another --bpffs", .path.display())]
    Locked { path: PathBuf },
    #[error(
        "{} holds kernel state with ABI {found}, and this weft speaks ABI {ABI}: run `weft detach` first (flows lose protection until the agent is back)",
        .path.display()
    )]
    Abi { path: PathBuf, found: u32 },
    #[error("{} does not fit this weft: run `weft detach`, then start the agent again", .path.display())]
    Layout { path: PathBuf },
    #[error(
        "the kernel has no memory for the BPF maps: raise the memlock limit (LimitMEMLOCK=infinity) or add memory"
    )]
    Memory,
    #[error("the BPF object is unusable: {0}")]
    Object(String),
    #[error("the kernel refuses program {program}: {reason}")]
    Program { program: &'static str, reason: String },
    #[error(
        "this kernel cannot end a living connection (it lacks CONFIG_INET_DIAG_DESTROY), and a revoked rule must: boot one \
         that can, as distributions ship"
    )]
    NoDestroy,
    #[error("cannot open the cgroup {}: {source}; --cgroup wants a directory of a mounted cgroup2 hierarchy", .path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot attach {hook}: {source}")]
    Attach { hook: String, source: io::Error },
    #[error("map {map} is full ({capacity} entries): nothing was switched, the former state stays in force")]
    Full { map: &'static str, capacity: u32 },
    #[error("cannot {action} map {map}: {source}")]
    Map { map: &'static str, action: &'static str, source: io::Error },
    #[error("cannot {action} {}: {source}", .path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot enter the network namespace {}: {source}", .path.display())]
    Netns { path: PathBuf, source: io::Error },
    #[error("no interface in {} carries the address {addr}", .path.display())]
    NoInterface { path: PathBuf, addr: IpAddr },
    #[error("interface {ifindex} in {} is not a veth whose other end is in the agent's network namespace", .path.display())]
    NotOurVeth { path: PathBuf, ifindex: u32 },
    #[error("the addresses of the workload in {} are on several interfaces; weft handles one", .path.display())]
    SeveralInterfaces { path: PathBuf },
    #[error("workload {workload} has no address")]
    NoAddress { workload: String },
    #[error("workloads {first} and {second} both claim {what}")]
    Twice { first: String, second: String, what: String },
    #[error("cannot {action} over netlink: {source}")]
    Netlink { action: &'static str, source: io::Error },
    #[error("identity numbers are used up: run `weft detach` and start the agent again")]
    NumbersUsedUp,
}

/// A result of the kernel shell.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of bpf(2) on a map, told apart where the user can do something about it.
    pub(crate) fn map(map: &'static str, action: &'static str, capacity: u32, source: io::Error) -> Error {
        match source.raw_os_error() {
            // Hash maps say E2BIG, tries ENOSPC.
            Some(libc::E2BIG | libc::ENOSPC) => Error::Full { map, capacity },
            Some(libc::ENOMEM) => Error::Memory,
            Some(libc::EPERM) => Error::Permission { what: format!("to {action} map {map}") },
            _ => Error::Map { map, action, source },
        }
    }

    /// An error of attaching to `hook`.
    pub(crate) fn attach(hook: impl Into<String>, source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                Error::Permission { what: format!("to attach {}", hook.into()) }
            }
            _ => Error::Attach { hook: hook.into(), source },
        }
    }

    /// An error of doing `action` to the file `path`.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                Error::Permission { what: format!("to {action} {}", path.display()) }
            }
            _ => Error::File { action, path, source },
        }
    }
}
