//! Every map: key, value, who writes, who reads, and what happens when it is full.
//!
//! "Agent" writes from user space, "hooks" are the cgroup and TC programs. Sizes are the defaults; the agent may
//! override them at load. A full map refuses the flow and counts the reason, unless said otherwise here.

use aya_ebpf::bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::LpmTrie;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use weft_datapath::abi::*;
use weft_datapath::traffic::Work;
use weft_datapath::{names, reason};

/// Slot -> u32, see `names::config`. Written by the agent, read by all.
#[map(name = "weft_config")]
pub static CONFIG: Array<u32> = Array::with_max_entries(names::config::LEN, 0);
/// Identity -> what is known about it. Agent; an insert that fails keeps the former revision.
#[map(name = "weft_subject")]
pub static SUBJECT: HashMap<SubjectKey, Subject> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
/// Destination identity and port -> mTLS mode. Agent; as above.
#[map(name = "weft_mode")]
pub static MODE: HashMap<ModeKey, u32> = HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
/// Policy rows. Agent; as above.
#[map(name = "weft_policy")]
pub static POLICY: HashMap<PolicyKey, PolicyValue> = HashMap::with_max_entries(524_288, BPF_F_NO_PREALLOC);
/// Bank and address -> class; bank and port -> range. Agent; as above.
#[map(name = "weft_cidr")]
pub static CIDR: LpmTrie<CidrKey, u32> = LpmTrie::with_max_entries(65_536, 0);
/// Addresses that belong to the mesh even without a workload. Agent.
#[map(name = "weft_inside")]
pub static INSIDE: LpmTrie<Addr, u32> = LpmTrie::with_max_entries(1_024, 0);
/// SHA-256 of an identity -> its number. Agent only; keeps numbers stable across restarts.
#[map(name = "weft_identity")]
pub static IDENTITY: HashMap<[u8; 32], u32> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
/// Address -> workload. Agent; an address that does not fit is reported and its workload refused.
#[map(name = "weft_endpoint")]
pub static ENDPOINT: HashMap<Addr, Endpoint> = HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
/// Netns cookie -> workload of this node. Agent.
#[map(name = "weft_netns")]
pub static NETNS: HashMap<u64, Netns> = HashMap::with_max_entries(4_096, 0);
/// Host-side ifindex -> workload of this node. Agent.
#[map(name = "weft_iface")]
pub static IFACE: HashMap<u32, Iface> = HashMap::with_max_entries(4_096, 0);
/// Interface and address -> 1. Agent.
#[map(name = "weft_iface_addr")]
pub static IFACE_ADDR: HashMap<IfaceAddr, u32> = HashMap::with_max_entries(16_384, 0);
/// Addresses of the node -> 1. Agent.
#[map(name = "weft_node_addr")]
pub static NODE_ADDR: HashMap<Addr, u32> = HashMap::with_max_entries(1_024, 0);
/// Service address and port -> service. Agent.
#[map(name = "weft_service")]
pub static SERVICE: HashMap<ServiceKey, Service> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Service, epoch and slot -> backend. Agent.
#[map(name = "weft_backend")]
pub static BACKEND: HashMap<BackendKey, Backend> = HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
/// Backend -> connections open from this node. Hooks; when full a backend counts as idle, which only balances worse.
#[map(name = "weft_active")]
pub static ACTIVE: HashMap<Backend, u64> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Service -> next slot in turn. Hooks; when full a slot is picked at random.
#[map(name = "weft_round")]
pub static ROUND: HashMap<u32, u32> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Local end of a captured connection -> where it wanted to go. Written by sockops, taken by the agent. When full the
/// agent finds nothing and resets the connection.
#[map(name = "weft_orig_dst")]
pub static ORIG_DST: HashMap<LocalEnd, OrigDst> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Local end of a connection that the agent opened to an application -> the client it stands for. Agent; when full
/// the agent refuses the client.
#[map(name = "weft_leg")]
pub static LEG: HashMap<LocalEnd, Client> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Flows at workload interfaces. TC hooks. LRU: what falls out is decided again.
#[map(name = "weft_conntrack")]
pub static CONNTRACK: LruHashMap<FlowKey, FlowState> = LruHashMap::with_max_entries(131_072, 0);
/// UDP datagrams whose first fragment passed. TC hooks. LRU: the fragments of what falls out are dropped.
#[map(name = "weft_fragment")]
pub static FRAGMENT: LruHashMap<FragmentKey, u32> = LruHashMap::with_max_entries(4_096, 0);
/// Bytes and packets by identity pair and direction. TC hooks write, agent reads.
#[map(name = "weft_meter")]
pub static METER: PerCpuHashMap<MeterKey, Meter> = PerCpuHashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// TCP connections of the direct path. Sockops writes, agent reads. When full the connection is not counted, which is.
#[map(name = "weft_tcp")]
pub static TCP: PerCpuHashMap<TcpKey, TcpStats> = PerCpuHashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Refusals by `reason::Reason`. Hooks write, agent reads.
#[map(name = "weft_drops")]
pub static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(reason::COUNT, 0);
/// What happened, for `weft observe`. When full the event is lost; the counters still tell.
#[map(name = "weft_events")]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Token buckets of the events, by reason (0: accepted flows).
#[map(name = "weft_rate")]
pub static RATE: PerCpuArray<Rate> = PerCpuArray::with_max_entries(reason::COUNT, 0);

/// What a TC program works on. TC hooks only.
#[map(name = "weft_work")]
pub static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// A socket storage map. aya's own type has no room for `BPF_F_CLONE`.
#[repr(C)]
pub struct SkStorage<T, const FLAGS: usize> {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: the fields are placeholders that describe the map to the loader; nothing dereferences them.
unsafe impl<T, const FLAGS: usize> Sync for SkStorage<T, FLAGS> {}

impl<T, const FLAGS: usize> SkStorage<T, FLAGS> {
    const fn new() -> Self {
        use core::ptr::null;
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }

    /// The map, as helpers want it.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut core::ffi::c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Sockets of the agent hold 1. Accepted sockets inherit it. Agent writes, all hooks read.
#[btf_map(name = "weft_agent_sk")]
pub static AGENT_SK: SkStorage<u32, { (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize }> = SkStorage::new();
/// Where a redirected application socket wanted to go. Connect hooks write; getpeername and sockops read.
#[btf_map(name = "weft_orig_sk")]
pub static ORIG_SK: SkStorage<OrigDst, { BPF_F_NO_PREALLOC as usize }> = SkStorage::new();
/// Which row of `weft_tcp` a connection is counted in. Sockops.
#[btf_map(name = "weft_tcp_sk")]
pub static TCP_SK: SkStorage<TcpKey, { BPF_F_NO_PREALLOC as usize }> = SkStorage::new();
/// Services that a UDP socket spoke to. Sendmsg and connect hooks write; recvmsg reads.
#[btf_map(name = "weft_udp_sk")]
pub static UDP_SK: SkStorage<UdpPeers, { BPF_F_NO_PREALLOC as usize }> = SkStorage::new();
