//! The bpf(2) commands that the agent issues itself: map elements, links, pins, information.
//!
//! aya parses, relocates and loads the object; maps and links go through here, because one handle for every map kind
//! and one function for every link kind is less to know than a type for each, and because aya cannot update a pinned
//! sock_ops link. Layouts are those of `union bpf_attr` in `include/uapi/linux/bpf.h`, which only ever grows; the
//! kernel takes what is missing at the end for zero.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::libc;
use weft_datapath::abi::Shared;

const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const MAP_GET_NEXT_KEY: u32 = 4;
const PROG_LOAD: u32 = 5;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_LOOKUP_BATCH: u32 = 24;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;
const ENABLE_STATS: u32 = 32;
const LINK_DETACH: u32 = 34;

/// Attach types (`enum bpf_attach_type`) of the hooks that weft uses.
pub(crate) mod attach {
    pub(crate) const INET_SOCK_CREATE: u32 = 2;
    pub(crate) const SOCK_OPS: u32 = 3;
    pub(crate) const BIND4: u32 = 8;
    pub(crate) const BIND6: u32 = 9;
    pub(crate) const CONNECT4: u32 = 10;
    pub(crate) const CONNECT6: u32 = 11;
    pub(crate) const SENDMSG4: u32 = 14;
    pub(crate) const SENDMSG6: u32 = 15;
    pub(crate) const RECVMSG4: u32 = 19;
    pub(crate) const RECVMSG6: u32 = 20;
    pub(crate) const GETPEERNAME4: u32 = 29;
    pub(crate) const GETPEERNAME6: u32 = 30;
    pub(crate) const TCX_INGRESS: u32 = 46;
    pub(crate) const TCX_EGRESS: u32 = 47;
}

/// Issues one command. `A` is the command's part of `union bpf_attr`.
///
/// # Safety
/// `A` is `repr(C)` with the layout of `command`, and every pointer in it is valid for what the kernel does with it.
unsafe fn bpf<A>(command: u32, attr: &mut A) -> io::Result<i64> {
    // SAFETY: the caller vouches for layout and pointers; the size is that of the object behind the reference.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`bpf`], for commands that answer with a new file descriptor.
///
/// # Safety
/// As [`bpf`], and `command` returns a descriptor.
unsafe fn bpf_fd<A>(command: u32, attr: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: as the caller vouches.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel just opened this descriptor (close-on-exec) for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[repr(C)]
struct Elem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Elem {
    fn new(map: BorrowedFd<'_>, key: *const u8, value: *const u8, flags: u64) -> Elem {
        Elem { map_fd: map.as_raw_fd() as u32, pad: 0, key: key as u64, value: value as u64, flags }
    }
}

/// INVARIANT (all map functions): the caller opened `map` with keys of `size_of::<K>()` and values of the given size;
/// `maps::Table::open` checks it against the kernel once, so every access stays inside the buffers.
pub(crate) fn lookup<K: Shared>(map: BorrowedFd<'_>, key: &K, value: &mut [u8]) -> io::Result<bool> {
    let mut attr = Elem::new(map, std::ptr::from_ref(key).cast(), value.as_mut_ptr(), 0);
    // SAFETY: layout of MAP_LOOKUP_ELEM; key and value outlive the call and have the map's sizes (see above).
    found(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) })
}

/// Creates or replaces an entry.
pub(crate) fn update<K: Shared>(map: BorrowedFd<'_>, key: &K, value: &[u8]) -> io::Result<()> {
    let mut attr = Elem::new(map, std::ptr::from_ref(key).cast(), value.as_ptr(), 0);
    // SAFETY: layout of MAP_UPDATE_ELEM; key and value outlive the call and have the map's sizes (see `lookup`).
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Removes an entry; `false` when there was none.
pub(crate) fn delete<K: Shared>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = Elem::new(map, std::ptr::from_ref(key).cast(), std::ptr::null(), 0);
    // SAFETY: layout of MAP_DELETE_ELEM; the key outlives the call and has the map's size (see `lookup`).
    found(unsafe { bpf(MAP_DELETE_ELEM, &mut attr) })
}

/// The key after `key`, or the first one; `false` at the end. A key that is gone restarts from the beginning.
pub(crate) fn next_key<K: Shared>(map: BorrowedFd<'_>, key: Option<&K>, next: &mut K) -> io::Result<bool> {
    let key = key.map_or(std::ptr::null(), std::ptr::from_ref);
    let mut attr = Elem::new(map, key.cast(), std::ptr::from_mut(next).cast_const().cast(), 0);
    // SAFETY: layout of MAP_GET_NEXT_KEY; `next` is writable, has the map's key size and accepts any bytes (`Shared`).
    found(unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) })
}

fn found(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Reads the next entries of a hash map (5.6) into the buffers, which have the same length. `cursor` is 0-filled and
/// `first` set for the first call. Returns how many were read and whether more follow; `ENOSPC` asks for larger buffers.
pub(crate) fn lookup_batch<K: Shared, V: Shared>(
    map: BorrowedFd<'_>,
    cursor: &mut [u8; 64],
    first: bool,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, bool)> {
    assert_eq!(keys.len(), values.len());
    assert!(size_of::<K>() <= cursor.len(), "the kernel writes up to one key into the cursor");
    let position = cursor.as_mut_ptr() as u64;
    let mut attr = Batch {
        in_batch: if first { 0 } else { position },
        out_batch: position,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: layout of MAP_LOOKUP_BATCH; both buffers hold `count` elements of the map's sizes, which accept any bytes.
    let more = found(unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) })?;
    Ok((attr.count as usize, more))
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Pins a map or link.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: layout of OBJ_PIN; the path is NUL-terminated and outlives the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned map or link.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: layout of OBJ_GET; the path is NUL-terminated and outlives the call.
    unsafe { bpf_fd(OBJ_GET, &mut attr) }
}

#[repr(C)]
struct InfoQuery {
    fd: u32,
    len: u32,
    info: u64,
}

/// # Safety
/// `T` is a `repr(C)` prefix of the kernel's info structure for this kind of object, and accepts any bytes.
unsafe fn info<T: Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoQuery {
        fd: object.as_raw_fd() as u32,
        len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: layout of OBJ_GET_INFO_BY_FD; the kernel writes at most `len` bytes into `info`.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// The start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: six u32, as `struct bpf_map_info` begins.
    unsafe { info(map) }
}

/// The start of `struct bpf_link_info`; `target` is the cgroup id (8 bytes) or the ifindex (low 4 bytes).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    target: u64,
}

/// What a link connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    /// Program id; 0 when the target is gone.
    pub(crate) program: u32,
    pub(crate) target: u64,
}

const LINK_TYPE_TCX: u32 = 11;

pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: `struct bpf_link_info` begins with three u32, aligns its union to 8 bytes, and cgroup and tcx links
    // begin there with a u64 cgroup id or a u32 ifindex.
    let raw: RawLinkInfo = unsafe { info(link) }?;
    let target = if raw.kind == LINK_TYPE_TCX { raw.target & 0xffff_ffff } else { raw.target };
    Ok(LinkInfo { program: raw.program, target })
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
    /// Of TCX: relative to which program; none.
    relative: u32,
    pad: u32,
    revision: u64,
}

/// Attaches a program: `target` is a cgroup's descriptor or an interface index, as `attach` asks for.
pub(crate) fn link_create(program: BorrowedFd<'_>, target: u32, attach: u32) -> io::Result<OwnedFd> {
    let mut attr =
        LinkCreate { program: program.as_raw_fd() as u32, target, attach, ..LinkCreate::default() };
    // SAFETY: layout of LINK_CREATE with the TCX part, all of it zero; no pointers.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// Replaces the program behind a link: no packet and no connect sees neither.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdate { link: link.as_raw_fd() as u32, program: program.as_raw_fd() as u32, flags: 0, old: 0 };
    // SAFETY: layout of LINK_UPDATE; no pointers.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

#[repr(C)]
struct LinkDetach {
    link: u32,
}

/// Detaches a link at once (5.9). Without it the program runs on for some milliseconds after the last reference is gone.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetach { link: link.as_raw_fd() as u32 };
    // SAFETY: layout of LINK_DETACH; no pointers.
    unsafe { bpf(LINK_DETACH, &mut attr) }.map(drop)
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    attach: u32,
}

/// Helpers that older kernels lack: program type, attach type and helper number that are tried together.
#[derive(Clone, Copy)]
pub(crate) struct Probe(u32, u32, u32);

/// `bpf_set_retval` in BPF_PROG_TYPE_CGROUP_SOCK_ADDR.
pub(crate) const SET_RETVAL: Probe = Probe(18, attach::CONNECT4, 187);
/// `bpf_get_netns_cookie` in BPF_PROG_TYPE_SOCK_OPS.
pub(crate) const SOCKOPS_NETNS: Probe = Probe(13, attach::SOCK_OPS, 122);

/// Does this kernel have the helper there? Found by loading a program that calls it: version numbers lie on
/// distribution kernels.
pub(crate) fn has_helper(Probe(kind, attach, helper): Probe) -> bool {
    let instruction = |code: u8, registers: u8, immediate: u32| {
        u64::from(code) | u64::from(registers) << 8 | u64::from(immediate) << 32
    };
    // Both helpers take one scalar or the context in r1: `bpf_get_netns_cookie` the context that r1 holds already,
    // `bpf_set_retval` an errno.
    let argument = if helper == SET_RETVAL.2 { instruction(0xb7, 1, 0) } else { instruction(0xbf, 0x11, 0) };
    let instructions = [
        argument,                     // r1 = 0, or r1 = r1
        instruction(0x85, 0, helper), // call
        instruction(0xb7, 0, 1),      // r0 = 1
        instruction(0x95, 0, 0),      // exit
    ];
    let mut attr = ProgLoad {
        kind,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        attach,
        ..ProgLoad::default()
    };
    // SAFETY: layout of PROG_LOAD; instructions and licence outlive the call.
    unsafe { bpf_fd(PROG_LOAD, &mut attr) }.is_ok()
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// A map from socket cookies to cookies of network namespaces.
pub(crate) fn create_cookie_map() -> io::Result<OwnedFd> {
    const LRU_HASH: u32 = 9;
    let mut attr =
        MapCreate { kind: LRU_HASH, key_size: 8, value_size: 8, max_entries: 4096, ..MapCreate::default() };
    // SAFETY: layout of MAP_CREATE; no pointers.
    unsafe { bpf_fd(MAP_CREATE, &mut attr) }
}

/// A program for the creation of sockets that notes in `map`, by each socket's cookie, that of its network namespace.
pub(crate) fn load_cookie_recorder(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const CGROUP_SOCK: u32 = 9;
    const MAP_UPDATE: u32 = 2;
    const GET_SOCKET_COOKIE: u32 = 46;
    const GET_NETNS_COOKIE: u32 = 122;
    let code = |code: u8, dst: u8, src: u8, offset: i16, immediate: u32| {
        u64::from(code)
            | u64::from(src << 4 | dst) << 8
            | u64::from(offset as u16) << 16
            | u64::from(immediate) << 32
    };
    let call = |helper| code(0x85, 0, 0, 0, helper);
    let copy = |dst, src| code(0xbf, dst, src, 0, 0);
    let set = |dst, value: i32| code(0xb7, dst, 0, 0, value as u32);
    let add = |dst, value: i32| code(0x07, dst, 0, 0, value as u32);
    let store = |offset: i16, src| code(0x7b, 10, src, offset, 0);
    let instructions = [
        copy(6, 1),
        call(GET_SOCKET_COOKIE),
        store(-8, 0),
        copy(1, 6),
        call(GET_NETNS_COOKIE),
        store(-16, 0),
        code(0x18, 1, 1, 0, map.as_raw_fd() as u32), // r1 = the map, an instruction of two words
        0,
        copy(2, 10),
        add(2, -8),
        copy(3, 10),
        add(3, -16),
        set(4, 0),
        call(MAP_UPDATE),
        set(0, 1), // every socket may be created
        code(0x95, 0, 0, 0, 0),
    ];
    let mut attr = ProgLoad {
        kind: CGROUP_SOCK,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        attach: attach::INET_SOCK_CREATE,
        ..ProgLoad::default()
    };
    // SAFETY: layout of PROG_LOAD; instructions and licence outlive the call.
    unsafe { bpf_fd(PROG_LOAD, &mut attr) }
}

/// A socket option of 64 bits.
pub(crate) fn socket_option(socket: std::os::fd::RawFd, option: libc::c_int) -> io::Result<u64> {
    let mut value = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `value` and `len` are live and writable, and `len` says how large `value` is.
    let result =
        unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Does this kernel have TCX links (6.6)? Attaching to an interface that cannot exist is refused for the interface
/// where it does, for the kind of link where it does not.
pub(crate) fn has_tcx(program: BorrowedFd<'_>) -> bool {
    let refused = link_create(program, 0, attach::TCX_INGRESS);
    refused.is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
}

#[repr(C)]
struct EnableStats {
    kind: u32,
}

/// Makes the kernel count runs and run time of programs (5.8) for as long as the descriptor is open.
pub(crate) fn enable_stats() -> io::Result<OwnedFd> {
    let mut attr = EnableStats { kind: 0 };
    // SAFETY: layout of ENABLE_STATS; BPF_STATS_RUN_TIME is 0.
    unsafe { bpf_fd(ENABLE_STATS, &mut attr) }
}

/// A value as its bytes.
pub(crate) fn bytes<T: Shared>(value: &T) -> &[u8] {
    // SAFETY: `Shared` types have no padding, so all their bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A value out of its bytes.
pub(crate) fn from_bytes<T: Shared>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: long enough (asserted), and `Shared` types accept any bit pattern.
    unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
}

/// A value of zeroes.
pub(crate) fn zeroed<T: Shared>() -> T {
    // SAFETY: `Shared` types accept any bit pattern.
    unsafe { std::mem::zeroed() }
}

/// A value's bytes, to be written.
pub(crate) fn bytes_mut<T: Shared>(value: &mut T) -> &mut [u8] {
    let size = size_of::<T>();
    // SAFETY: `Shared` types have no padding and accept any bit pattern.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(value).cast(), size) }
}

/// The number of CPUs that per-CPU maps have values for: the kernel's possible CPUs, not those online.
pub(crate) fn possible_cpus() -> io::Result<usize> {
    aya::util::nr_cpus().map_err(|(path, error)| io::Error::new(error.kind(), format!("{path}: {error}")))
}

/// The kernel's id of a cgroup directory, as links report it: its inode number.
pub(crate) fn cgroup_id(cgroup: impl AsFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(cgroup)?.st_ino)
}

/// The start of `struct bpf_prog_info`, up to the run counters (5.1).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgInfo {
    before: [u64; 24],
    run_time_ns: u64,
    run_count: u64,
}

/// Runs of a program, and the time they took.
pub(crate) fn run_time(program: BorrowedFd<'_>) -> io::Result<(u64, std::time::Duration)> {
    // SAFETY: integers only, and a prefix of the kernel's structure.
    let info: ProgInfo = unsafe { info(program) }?;
    Ok((info.run_count, std::time::Duration::from_nanos(info.run_time_ns)))
}

/// Returns when every program that was running has ended: `MEMBARRIER_CMD_GLOBAL` is the kernel's
/// `synchronize_rcu()`, and programs run inside an RCU read section. Takes some 10 ms. Where the kernel lacks it
/// (`nohz_full`), a pause far longer than any program runs does as well.
pub(crate) fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no pointers; the call only waits.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
