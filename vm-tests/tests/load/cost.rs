//! What it costs a kernel to verify a program: instructions that its verifier walked through, and how long its log gets.
//!
//! aya keeps the log of refused programs only, and kernels before 5.16 tell the instructions nowhere else. So what aya loaded
//! is loaded once more here, onto the same maps, with the log on.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::generated::bpf_attach_type;
use aya_obj::generated::bpf_prog_type::{
    self, BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_SCHED_CLS, BPF_PROG_TYPE_SOCK_OPS,
};
use aya_obj::{Object, ProgramSection};
use nix::libc;
use vm_tests::verifier::Cost;

/// `BPF_PROG_LOAD` of `enum bpf_cmd`.
const PROG_LOAD: u32 = 5;
/// Every step of every path, and the sums (`BPF_LOG_LEVEL2 | BPF_LOG_STATS`; kernel: include/linux/bpf_verifier.h).
const LOG_LEVEL: u32 = 2 | 4;
/// The longest takes a quarter of it. Kernels write up to `UINT_MAX >> 2` since 5.2 (kernel/bpf/verifier.c).
const LOG_SIZE: usize = 128 << 20;

/// The part of `union bpf_attr` (include/uapi/linux/bpf.h) that all kernels know for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// For each program of `object`, which `loaded` was made of.
pub(crate) fn of_programs(object: &[u8], loaded: &Ebpf) -> BTreeMap<String, Cost> {
    let mut object = Object::parse(object).expect("aya has read it");
    assert!(!object.has_btf_relocations(), "these would have to be followed as aya does");
    let fds: HashMap<&str, RawFd> = loaded.maps().map(|(name, map)| (name, descriptor(map))).collect();
    let maps = std::mem::take(&mut object.maps);
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    let placed = maps.iter().map(|(name, map)| (name.as_str(), fds[name.as_str()], map));
    object.relocate_maps(placed, &sections).expect("as aya has done");
    object.relocate_calls(&sections).expect("as aya has done");
    let mut log = vec![0; LOG_SIZE];
    let mut costs = BTreeMap::new();
    for (name, program) in &object.programs {
        let instructions = &object.functions[&program.function_key()].instructions;
        let (kind, attach) = hook(&program.section);
        let attr = ProgLoad {
            prog_type: kind as u32,
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr() as u64,
            license: program.license.as_ptr() as u64,
            expected_attach_type: attach,
            ..ProgLoad::default()
        };
        // SAFETY: what it points to is part of `object`.
        let steps = unsafe { verified(attr, &mut log) }.unwrap_or_else(|e| panic!("{name}: {e}"));
        let count = |line: &str| line.strip_prefix("processed ")?.split(' ').next()?.parse().ok();
        let instructions = steps.lines().rev().find_map(count).expect("the kernel tells the sums");
        costs.insert(name.clone(), Cost { instructions, log: steps.len() as u32 });
    }
    costs
}

/// The verifier's log of one program that it lets pass.
///
/// # Safety
/// Instructions and licence in `attr` are alive.
unsafe fn verified(attr: ProgLoad, log: &mut [u8]) -> io::Result<&str> {
    log[0] = 0;
    let (log_size, log_buf) = (log.len() as u32, log.as_mut_ptr() as u64);
    let mut attr = ProgLoad { log_level: LOG_LEVEL, log_size, log_buf, ..attr };
    // SAFETY: the attribute has the kernel's layout, the log is ours alone, and the caller vouches for the rest.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw mut attr, size_of::<ProgLoad>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us and nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    let text = CStr::from_bytes_until_nul(log).expect("the kernel ends it");
    Ok(text.to_str().expect("names and numbers"))
}

fn descriptor(map: &Map) -> RawFd {
    use Map::*;
    let (Array(data) | HashMap(data) | LruHashMap(data) | LpmTrie(data) | PerCpuArray(data)
    | PerCpuHashMap(data) | RingBuf(data) | SkStorage(data) | PerfEventArray(data)) = map
    else {
        panic!("a kind of map that was not among weft's: {map:?}")
    };
    MapData::fd(data).as_fd().as_raw_fd()
}

/// Type and expected attach type.
fn hook(section: &ProgramSection) -> (bpf_prog_type, u32) {
    match section {
        ProgramSection::SockOps => (BPF_PROG_TYPE_SOCK_OPS, 0),
        ProgramSection::SchedClassifier => (BPF_PROG_TYPE_SCHED_CLS, 0),
        ProgramSection::CgroupSockAddr { attach_type } => {
            (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, bpf_attach_type::from(*attach_type) as u32)
        }
        other => panic!("a hook that was not among weft's: {other:?}"),
    }
}
