//! Typed handles on the pinned maps.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use weft_datapath::abi::{self, Addr, Shared};
use weft_datapath::names::map;

use super::error::{Error, Result};
use super::sys;

/// A key of a longest-prefix map: how many bits of `data` count, then the data.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix<T> {
    /// In host order, as `struct bpf_lpm_trie_key` has it.
    pub bits: u32,
    pub data: T,
}

// SAFETY: repr(C); a u32 followed by a `Shared` type of alignment 4 or less (asserted for both uses), so no padding.
unsafe impl<T: Shared> Shared for Prefix<T> {}
const _: () = assert!(size_of::<Prefix<abi::CidrKey>>() == 4 + size_of::<abi::CidrKey>());
const _: () = assert!(size_of::<Prefix<Addr>>() == 4 + size_of::<Addr>());

/// The entries read at once when a map is walked.
const BATCH: usize = 1024;

/// What every map handle knows.
#[derive(Debug)]
struct Handle {
    fd: OwnedFd,
    name: &'static str,
    capacity: u32,
}

impl Handle {
    fn open(directory: &Path, name: &'static str, key_size: usize, value_size: usize) -> Result<Handle> {
        let path = directory.join(name);
        let fd = sys::open_pin(&path).map_err(Error::file("open", &path))?;
        let info = sys::map_info(fd.as_fd()).map_err(Error::file("inspect", &path))?;
        if info.key_size as usize != key_size || info.value_size as usize != value_size {
            return Err(Error::Layout { path });
        }
        Ok(Handle { fd, name, capacity: info.max_entries })
    }

    fn error(&self, action: &'static str) -> impl Fn(std::io::Error) -> Error {
        let Handle { name, capacity, .. } = *self;
        move |source| Error::map(name, action, capacity, source)
    }

    fn keys<K: Shared>(&self) -> Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        let mut next: K = sys::zeroed();
        while sys::next_key(self.fd.as_fd(), keys.last(), &mut next).map_err(self.error("walk"))? {
            keys.push(next);
            // A key deleted under the walk restarts it; more keys than fit means that it did.
            if keys.len() > self.capacity as usize {
                break;
            }
        }
        Ok(keys)
    }
}

/// A map with one value per key: hash, LRU hash, array, trie or socket storage.
#[derive(Debug)]
pub struct Table<K, V> {
    handle: Handle,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Shared, V: Shared> Table<K, V> {
    /// Opens the pin `name` below `directory`.
    pub fn open(directory: &Path, name: &'static str) -> Result<Table<K, V>> {
        let handle = Handle::open(directory, name, size_of::<K>(), size_of::<V>())?;
        Ok(Table { handle, types: PhantomData })
    }

    pub fn name(&self) -> &'static str {
        self.handle.name
    }

    /// The most entries it can hold.
    pub fn capacity(&self) -> u32 {
        self.handle.capacity
    }

    pub fn lookup(&self, key: &K) -> Result<Option<V>> {
        let mut value = sys::zeroed::<V>();
        let found =
            sys::lookup(self.fd(), key, sys::bytes_mut(&mut value)).map_err(self.handle.error("read"))?;
        Ok(found.then_some(value))
    }

    /// Creates or replaces.
    pub fn insert(&self, key: &K, value: &V) -> Result<()> {
        sys::update(self.fd(), key, sys::bytes(value)).map_err(self.handle.error("write"))
    }

    /// `false` when there was nothing to remove.
    pub fn remove(&self, key: &K) -> Result<bool> {
        sys::delete(self.fd(), key).map_err(self.handle.error("write"))
    }

    /// All entries, in no order. Entries that come or go meanwhile may or may not be among them.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut cursor = [0; 64];
        let mut keys = vec![sys::zeroed::<K>(); BATCH.min(self.handle.capacity as usize)];
        let mut values = vec![sys::zeroed::<V>(); keys.len()];
        let mut entries = Vec::new();
        let mut first = true;
        loop {
            match sys::lookup_batch(self.fd(), &mut cursor, first, &mut keys, &mut values) {
                Ok((read, more)) => {
                    entries.extend(keys[..read].iter().copied().zip(values[..read].iter().copied()));
                    if !more {
                        return Ok(entries);
                    }
                    first = false;
                }
                // Map kinds that cannot be read in batches on this kernel (tries before 5.16).
                Err(_) if first => return self.entries_one_by_one(),
                Err(error) => return Err(self.handle.error("walk")(error)),
            }
        }
    }

    fn entries_one_by_one(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        for key in self.handle.keys::<K>()? {
            if let Some(value) = self.lookup(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.handle.fd.as_fd()
    }
}

/// A map with one value per key and CPU.
#[derive(Debug)]
pub struct PerCpu<K, V> {
    handle: Handle,
    cpus: usize,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Shared, V: Shared> PerCpu<K, V> {
    /// Opens the pin `name` below `directory`.
    pub fn open(directory: &Path, name: &'static str) -> Result<PerCpu<K, V>> {
        let handle = Handle::open(directory, name, size_of::<K>(), size_of::<V>())?;
        let cpus = sys::possible_cpus().map_err(handle.error("count the values of"))?;
        Ok(PerCpu { handle, cpus, types: PhantomData })
    }

    /// The most keys it can hold.
    pub fn capacity(&self) -> u32 {
        self.handle.capacity
    }

    pub fn name(&self) -> &'static str {
        self.handle.name
    }

    /// The values of all CPUs.
    pub fn lookup(&self, key: &K) -> Result<Option<Vec<V>>> {
        // The kernel aligns each CPU's value to 8 bytes.
        let stride = size_of::<V>().next_multiple_of(8);
        let mut values = vec![0; stride * self.cpus];
        let found =
            sys::lookup(self.handle.fd.as_fd(), key, &mut values).map_err(self.handle.error("read"))?;
        Ok(found.then(|| values.chunks_exact(stride).map(sys::from_bytes).collect()))
    }

    pub fn remove(&self, key: &K) -> Result<bool> {
        sys::delete(self.handle.fd.as_fd(), key).map_err(self.handle.error("write"))
    }

    /// All keys with the values of all CPUs.
    pub fn entries(&self) -> Result<Vec<(K, Vec<V>)>> {
        let mut entries = Vec::new();
        for key in self.handle.keys::<K>()? {
            if let Some(values) = self.lookup(&key)? {
                entries.push((key, values));
            }
        }
        Ok(entries)
    }
}

macro_rules! maps {
    ($($(#[$meta:meta])* $field:ident : $kind:ident < $key:ty, $value:ty > = $name:expr;)+) => {
        /// Every map that the agent reads or writes. What each holds is said in `ebpf/src/maps.rs`.
        #[derive(Debug)]
        pub struct Maps { $($(#[$meta])* pub $field: $kind<$key, $value>),+ }

        impl Maps {
            /// Opens the pins below `directory`.
            pub fn open(directory: &Path) -> Result<Maps> {
                Ok(Maps { $($field: $kind::open(directory, $name)?),+ })
            }

            /// How full each map is; arrays, which always are, left out.
            pub fn fill(&self) -> Result<Vec<Fill>> {
                let mut fill = vec![$(Fill {
                    map: self.$field.name(),
                    entries: self.$field.entries()?.len() as u32,
                    capacity: self.$field.capacity(),
                }),+];
                fill.retain(|fill| ![map::CONFIG, map::DROPS].contains(&fill.map));
                Ok(fill)
            }
        }
    };
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    pub map: &'static str,
    pub entries: u32,
    pub capacity: u32,
}

maps! {
    config: Table<u32, u32> = map::CONFIG;
    subject: Table<abi::SubjectKey, abi::Subject> = map::SUBJECT;
    mode: Table<abi::ModeKey, u32> = map::MODE;
    policy: Table<abi::PolicyKey, abi::PolicyValue> = map::POLICY;
    cidr: Table<Prefix<abi::CidrKey>, u32> = map::CIDR;
    inside: Table<Prefix<Addr>, u32> = map::INSIDE;
    identity: Table<[u8; 32], u32> = map::IDENTITY;
    endpoint: Table<Addr, abi::Endpoint> = map::ENDPOINT;
    netns: Table<u64, abi::Netns> = map::NETNS;
    iface: Table<u32, abi::Iface> = map::IFACE;
    iface_addr: Table<abi::IfaceAddr, u32> = map::IFACE_ADDR;
    node_addr: Table<Addr, u32> = map::NODE_ADDR;
    service: Table<abi::ServiceKey, abi::Service> = map::SERVICE;
    active: Table<abi::Backend, u64> = map::ACTIVE;
    round: Table<u32, u32> = map::ROUND;
    backend: Table<abi::BackendKey, abi::Backend> = map::BACKEND;
    orig_dst: Table<abi::LocalEnd, abi::OrigDst> = map::ORIG_DST;
    leg: Table<abi::LocalEnd, abi::Client> = map::LEG;
    conntrack: Table<abi::FlowKey, abi::FlowState> = map::CONNTRACK;
    fragment: Table<abi::FragmentKey, u32> = map::FRAGMENT;
    meter: PerCpu<abi::MeterKey, abi::Meter> = map::METER;
    tcp: PerCpu<abi::TcpKey, abi::TcpStats> = map::TCP;
    drops: PerCpu<u32, u64> = map::DROPS;
}
