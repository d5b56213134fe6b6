//! Brings the embedded programs into the kernel, on fresh maps or on those that a former agent left.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};
use nix::libc;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use weft_datapath::abi::ABI;
use weft_datapath::identity::FIRST_WORKLOAD;
use weft_datapath::names::{config, map};

use super::error::{Error, Result};
use super::maps::{Maps, Table};
use super::netlink::Netlink;
use super::pins::Pins;
use super::sys::{self, attach};
use crate::netns;

/// Built by `cargo xtask build-ebpf`; `build.rs` sees to it that it is there and fresh.
static OBJECT: &[u8] = include_bytes_aligned!(env!("WEFT_EBPF_OBJECT"));

/// The cgroup hooks: program, attach type.
const HOOKS: &[(&str, u32)] = &[
    ("weft_sockops", attach::SOCK_OPS),
    ("weft_getpeer4", attach::GETPEERNAME4),
    ("weft_getpeer6", attach::GETPEERNAME6),
    ("weft_recvmsg4", attach::RECVMSG4),
    ("weft_recvmsg6", attach::RECVMSG6),
    ("weft_sendmsg4", attach::SENDMSG4),
    ("weft_sendmsg6", attach::SENDMSG6),
    ("weft_bind4", attach::BIND4),
    ("weft_bind6", attach::BIND6),
    // Last: a redirected connect needs what the hooks above do.
    ("weft_connect4", attach::CONNECT4),
    ("weft_connect6", attach::CONNECT6),
];
/// TC on the host side of a workload's veth, packets from the workload.
pub(crate) const FROM_WORKLOAD: &str = "weft_from_wl";
/// As above, packets to the workload.
pub(crate) const TO_WORKLOAD: &str = "weft_to_wl";

/// A loaded program.
#[derive(Debug)]
pub struct Loaded {
    pub name: &'static str,
    /// The kernel's number for it.
    pub id: u32,
    pub(crate) fd: OwnedFd,
}

/// How often and how long a program ran; zero unless [`count_run_time`] is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunTime {
    pub program: &'static str,
    pub runs: u64,
    pub time: Duration,
}

/// The programs and maps of weft in this kernel.
#[derive(Debug)]
pub struct Kernel {
    pub maps: Maps,
    /// Bits of `weft_datapath::names::config`.
    pub features: u32,
    /// By descriptor of a socket of the agent: its mark.
    pub(crate) agent_sk: Table<u32, u32>,
    pub(crate) pins: Pins,
    programs: Vec<Loaded>,
}

impl Kernel {
    /// Loads the programs and opens the maps below `bpffs`: those of a former agent, whose entries stay in force, or
    /// new ones. Nothing is attached yet.
    pub fn load(bpffs: &Path) -> Result<Kernel> {
        Kernel::load_sized(bpffs, &[])
    }

    /// As [`Kernel::load`], with other capacities for maps that are created.
    pub fn load_sized(bpffs: &Path, capacities: &[(&'static str, u32)]) -> Result<Kernel> {
        // Before 5.11 maps count against this limit. Where raising it is refused, creating a map says so.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
        let destroys = Netlink::sock_diag().and_then(|mut diag| diag.destroys());
        if !destroys
            .map_err(|source| Error::Netlink { action: "ask about destroying connections", source })?
        {
            return Err(Error::NoDestroy);
        }
        let pins = Pins::open(bpffs)?;
        let directory = pins.maps();
        let features = [(sys::SET_RETVAL, config::SET_RETVAL), (sys::SOCKOPS_NETNS, config::SOCKOPS_NETNS)]
            .into_iter()
            .filter(|(probe, _)| sys::has_helper(*probe))
            .fold(0, |features, (_, bit)| features | bit);
        let sockets_tell = netns::sockets_tell_cookies()
            .map_err(|source| Error::Netns { path: netns::OWN.into(), source })?;
        let features = features | if sockets_tell { config::SO_NETNS_COOKIE } else { 0 };

        let names = map_names()?;
        let mut loader = EbpfLoader::new();
        for name in &names {
            loader.map_pin_path(name, directory.join(name));
        }
        for (name, entries) in capacities {
            loader.map_max_entries(name, *entries);
        }
        loader.override_global(config::GLOBAL, &features, true);
        let mut object = loader.load(OBJECT).map_err(object_error)?;
        let maps = Maps::open(&directory)?;
        adopt(&maps, &directory)?;

        let names = HOOKS.iter().map(|(name, _)| *name).chain([FROM_WORKLOAD, TO_WORKLOAD]);
        let programs: Vec<Loaded> =
            names.map(|name| load_program(&mut object, name)).collect::<Result<_>>()?;
        let tcx = programs.iter().any(|loaded| loaded.name == TO_WORKLOAD && sys::has_tcx(loaded.fd.as_fd()));
        let features = features | if tcx { config::TCX } else { 0 };
        let agent_sk = Table::open(&directory, map::AGENT_SK)?;
        Ok(Kernel { maps, features, agent_sk, pins, programs })
    }

    /// Attaches the cgroup hooks to `cgroup`, or puts the programs just loaded in place of those of a former agent.
    pub fn attach_hooks(&self, cgroup: &Path) -> Result<()> {
        let cgroup_error = |source| Error::Cgroup { path: cgroup.into(), source };
        let directory = File::open(cgroup).map_err(cgroup_error)?;
        let id = sys::cgroup_id(&directory).map_err(cgroup_error)?;
        for (name, attach) in HOOKS {
            self.attach(name, name, directory.as_raw_fd() as u32, id, *attach)?;
        }
        Ok(())
    }

    /// Attaches `program` by a link pinned as `pin`, or updates that link. `target` is what the kernel is asked for,
    /// `identity` what it reports for that target: a pinned link elsewhere is replaced. `false` when the link was
    /// there and current.
    pub(crate) fn attach(
        &self,
        program: &str,
        pin: &str,
        target: u32,
        identity: u64,
        kind: u32,
    ) -> Result<bool> {
        let program = self.program(program);
        let error = |source| Error::attach(pin, source);
        if let Some(link) = self.pins.link(pin)? {
            let info = sys::link_info(link.as_fd()).map_err(error)?;
            if info.target == identity && info.program == program.id {
                return Ok(false);
            }
            // A link whose target is gone has no program and cannot be updated.
            if info.target == identity && sys::link_update(link.as_fd(), program.fd.as_fd()).is_ok() {
                return Ok(true);
            }
        }
        let link = sys::link_create(program.fd.as_fd(), target, kind).map_err(error)?;
        self.pins.pin_link(link, pin)?;
        Ok(true)
    }

    /// What this agent loaded.
    pub fn programs(&self) -> &[Loaded] {
        &self.programs
    }

    /// Runs and run time of each program.
    pub fn run_times(&self) -> Result<Vec<RunTime>> {
        self.programs
            .iter()
            .map(|loaded| {
                let (runs, time) = sys::run_time(loaded.fd.as_fd()).map_err(|error| Error::Program {
                    program: loaded.name,
                    reason: format!("to tell its run time: {error}"),
                })?;
                Ok(RunTime { program: loaded.name, runs, time })
            })
            .collect()
    }

    /// The names of the links in place, and whether each runs a program of this agent.
    pub fn links(&self) -> Result<Vec<(String, bool)>> {
        let mut names = self.pins.link_names()?;
        names.sort();
        let mut links = Vec::new();
        for name in names {
            if let Some(link) = self.pins.link(&name)? {
                let info = sys::link_info(link.as_fd()).map_err(|source| Error::attach(&name, source))?;
                links.push((name, self.programs.iter().any(|loaded| loaded.id == info.program)));
            }
        }
        links.extend(self.filters()?);
        Ok(links)
    }

    /// The events' ring buffer. One reader at a time gets each event once.
    pub(crate) fn ring(&self) -> Result<RingBuf<MapData>> {
        let path = self.pins.maps().join(map::EVENTS);
        MapData::from_pin(&path)
            .and_then(|data| RingBuf::try_from(Map::RingBuf(data)))
            .map_err(|error| Error::Object(format!("{}: {error}", path.display())))
    }

    pub(crate) fn program(&self, name: &str) -> &Loaded {
        self.programs
            .iter()
            .find(|loaded| loaded.name == name)
            .expect("`load` loads every program that is attached")
    }
}

/// Makes the kernel count run times while the value lives. Costs two clock reads per program run.
pub fn count_run_time() -> Result<OwnedFd> {
    sys::enable_stats().map_err(|error| Error::attach("run time statistics", error))
}

/// The maps in the object that are to be pinned: all but those of the compiler's making.
fn map_names() -> Result<Vec<String>> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| Error::Object(error.to_string()))?;
    Ok(object.maps.into_keys().filter(|name| name.starts_with("weft_")).collect())
}

/// Checks the number on maps that were there, and writes it on new ones.
fn adopt(maps: &Maps, directory: &Path) -> Result<()> {
    match maps.config.lookup(&config::ABI)? {
        Some(0) | None => maps.config.insert(&config::NEXT_IDENTITY, &FIRST_WORKLOAD)?,
        Some(ABI) => {}
        Some(found) => return Err(Error::Abi { path: directory.into(), found }),
    }
    // Last, so that an agent killed in between starts over.
    maps.config.insert(&config::ABI, &ABI)
}

fn load_program(object: &mut Ebpf, name: &'static str) -> Result<Loaded> {
    let missing = || Error::Object(format!("it has no program {name}"));
    let program = object.program_mut(name).ok_or_else(missing)?;
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    let failed = |error: ProgramError| program_error(name, error);
    loaded.map_err(failed)?;
    let fd = program.fd().and_then(|fd| Ok(fd.as_fd().try_clone_to_owned()?)).map_err(failed)?;
    Ok(Loaded { name, id: program.info().map_err(failed)?.id(), fd })
}

fn program_error(program: &'static str, error: ProgramError) -> Error {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => match io_error.raw_os_error() {
            Some(libc::EPERM) => Error::Permission { what: format!("program {program}") },
            Some(libc::ENOMEM) => Error::Memory,
            // The last lines of the log say what the verifier disliked; behind them come figures.
            _ => {
                let log = verifier_log.to_string();
                let figures = |line: &str| {
                    ["verification time ", "stack depth ", "processed "]
                        .iter()
                        .any(|word| line.starts_with(word))
                };
                let lines: Vec<&str> =
                    log.lines().filter(|line| !line.trim().is_empty() && !figures(line)).collect();
                let reason = lines[lines.len().saturating_sub(3)..].join("; ");
                Error::Program { program, reason: format!("{io_error}: {reason}") }
            }
        },
        error => Error::Program { program, reason: error.to_string() },
    }
}

fn object_error(error: EbpfError) -> Error {
    // The errno hides in the chain of causes.
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut text = error.to_string();
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            match io.raw_os_error() {
                Some(libc::EPERM) => return Error::Permission { what: "to create BPF maps".into() },
                Some(libc::ENOMEM) => return Error::Memory,
                _ => {}
            }
        }
        cause = current.source();
        if let Some(cause) = cause {
            text = format!("{text}: {cause}");
        }
    }
    Error::Object(text)
}
