//! A small mesh in memory: the second implementor of the lookup traits, and builders for packets.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use weft_datapath::abi::*;
use weft_datapath::addr::v4;
use weft_datapath::identity::ANY;
use weft_datapath::packet::Packet;
use weft_datapath::policy::{ALLOW, DENY, EGRESS, Mode, OUTWARD};
use weft_datapath::reason::Reason;
use weft_datapath::tables::Tables;
use weft_datapath::traffic::{self, FROM, Flows, Hook, Passed, TO, Work};

pub const A: u32 = 16;
pub const B: u32 = 17;
pub const REMOTE: u32 = 18;
pub const IF_A: u32 = 101;
pub const IF_B: u32 = 102;
pub const UPLINK: u32 = 2;

pub fn addr_a() -> Addr {
    v4([10, 77, 1, 2])
}
pub fn addr_b() -> Addr {
    v4([10, 77, 1, 3])
}
pub fn addr_remote() -> Addr {
    v4([10, 77, 2, 2])
}
pub fn addr_node() -> Addr {
    v4([10, 77, 1, 1])
}
pub fn outside() -> Addr {
    v4([192, 0, 2, 7])
}

#[derive(Default)]
pub struct World {
    pub revision: Cell<u32>,
    pub subjects: RefCell<BTreeMap<SubjectKey, Subject>>,
    pub modes: RefCell<BTreeMap<ModeKey, u32>>,
    pub policy: RefCell<BTreeMap<PolicyKey, PolicyValue>>,
    pub endpoints: RefCell<BTreeMap<Addr, Endpoint>>,
    pub ifaces: RefCell<BTreeMap<u32, Iface>>,
    pub owned: RefCell<BTreeSet<IfaceAddr>>,
    pub node_addrs: RefCell<BTreeSet<Addr>>,
    pub inside: RefCell<BTreeSet<Addr>>,
    pub services: RefCell<BTreeMap<ServiceKey, Service>>,
    pub backends: RefCell<BTreeMap<BackendKey, Backend>>,
    pub flows: RefCell<BTreeMap<FlowKey, FlowState>>,
    pub fragments: RefCell<BTreeSet<FragmentKey>>,
    pub meters: RefCell<BTreeMap<MeterKey, u64>>,
    /// Faults to inject.
    pub conntrack_full: Cell<bool>,
    pub meter_full: Cell<bool>,
}

impl World {
    /// A and B live here, REMOTE elsewhere; everybody is STRICT and refuses everybody.
    pub fn new() -> World {
        let world = World::default();
        for (identity, ifindex, addr) in [(A, IF_A, addr_a()), (B, IF_B, addr_b())] {
            world.endpoints.borrow_mut().insert(addr, Endpoint { identity, ifindex, ..Endpoint::default() });
            world.ifaces.borrow_mut().insert(ifindex, Iface { identity, ..Iface::default() });
            world.owned.borrow_mut().insert(IfaceAddr { ifindex, addr });
        }
        world
            .endpoints
            .borrow_mut()
            .insert(addr_remote(), Endpoint { identity: REMOTE, ..Endpoint::default() });
        world.node_addrs.borrow_mut().insert(addr_node());
        for identity in [A, B, REMOTE] {
            world.mode(identity, Mode::Strict);
            world.rule(ANY, identity, 0, DENY);
        }
        world
    }

    pub fn mode(&self, identity: u32, mode: Mode) {
        for bank in 0..2 {
            let subject = Subject { flags: 0, mode: mode as u32 };
            self.subjects.borrow_mut().insert(SubjectKey { bank, identity }, subject);
        }
    }

    /// Sets one entry of one row in the current bank.
    pub fn rule(&self, source: u32, destination: u32, port: u16, verdict: u32) {
        let bank = self.revision.get() & 1;
        let key = PolicyKey { bank, subject: destination, peer: source, port, ..PolicyKey::default() };
        self.policy.borrow_mut().insert(key, PolicyValue { verdict, rule: 7 });
    }

    /// Sets one entry of one egress row in the current bank, whose subject has such rows from now on.
    pub fn egress_rule(&self, source: u32, destination: u32, port: u16, verdict: u32) {
        let bank = self.revision.get() & 1;
        let key = PolicyKey {
            bank,
            subject: source,
            peer: destination,
            port,
            kind: OUTWARD,
            ..PolicyKey::default()
        };
        self.policy.borrow_mut().insert(key, PolicyValue { verdict, rule: 8 });
        for bank in 0..2 {
            let mut subjects = self.subjects.borrow_mut();
            subjects.get_mut(&SubjectKey { bank, identity: source }).unwrap().flags |= EGRESS;
        }
    }

    /// Copies the current bank to the other, applies `change` to it there and flips.
    pub fn publish(&self, change: impl FnOnce(&World)) {
        let bank = self.revision.get() & 1;
        let rows: Vec<_> =
            self.policy.borrow().iter().filter(|(k, _)| k.bank == bank).map(|(k, v)| (*k, *v)).collect();
        for (key, value) in rows {
            self.policy.borrow_mut().insert(PolicyKey { bank: bank ^ 1, ..key }, value);
        }
        self.revision.set(self.revision.get() + 1);
        change(self);
    }

    pub fn sends(&self, ifindex: u32, frame: &Frame) -> Result<Passed, Reason> {
        self.hook(ifindex, 0, FROM, frame, false)
    }

    pub fn agent_sends(&self, ifindex: u32, frame: &Frame) -> Result<Passed, Reason> {
        self.hook(ifindex, 0, FROM, frame, true)
    }

    pub fn receives(&self, ifindex: u32, ingress: u32, frame: &Frame) -> Result<Passed, Reason> {
        self.hook(ifindex, ingress, TO, frame, false)
    }

    fn hook(
        &self,
        ifindex: u32,
        ingress: u32,
        direction: u32,
        frame: &Frame,
        agent: bool,
    ) -> Result<Passed, Reason> {
        let hook = Hook { ifindex, ingress_ifindex: ingress, direction };
        traffic::decide(self, &hook, &Sent { frame, agent }, &mut Work::default())
    }
}

impl Tables for World {
    fn revision(&self) -> u32 {
        self.revision.get()
    }
    fn subject(&self, bank: u32, identity: u32) -> Option<Subject> {
        self.subjects.borrow().get(&SubjectKey { bank, identity }).copied()
    }
    fn port_mode(&self, bank: u32, identity: u32, port: u16) -> Option<u32> {
        self.modes.borrow().get(&ModeKey { bank, identity, port, pad: 0 }).copied()
    }
    fn class(&self, _bank: u32, _addr: &Addr) -> u32 {
        0
    }
    fn policy(&self, key: &PolicyKey) -> Option<PolicyValue> {
        self.policy.borrow().get(key).copied()
    }
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        self.endpoints.borrow().get(addr).copied()
    }
    fn netns(&self, _cookie: u64) -> Option<Netns> {
        None
    }
    fn inside(&self, addr: &Addr) -> bool {
        self.inside.borrow().contains(addr)
    }
    fn is_node_addr(&self, addr: &Addr) -> bool {
        self.node_addrs.borrow().contains(addr)
    }
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        self.services.borrow().get(key).copied()
    }
    fn backend(&self, service: &Service, slot: u32) -> Option<Backend> {
        self.backends.borrow().get(&BackendKey { service: service.id, epoch: service.epoch, slot }).copied()
    }
}

impl Flows for World {
    fn iface(&self, ifindex: u32) -> Option<Iface> {
        self.ifaces.borrow().get(&ifindex).copied()
    }
    fn owns(&self, key: &IfaceAddr) -> bool {
        self.owned.borrow().contains(key)
    }
    fn flow(&self, key: &FlowKey, state: &mut FlowState) -> bool {
        let flows = self.flows.borrow();
        let found = flows.get(key);
        if let Some(found) = found {
            *state = *found;
        }
        found.is_some()
    }
    fn put_flow(&self, key: &FlowKey, state: &FlowState) -> Result<(), Reason> {
        if self.conntrack_full.get() {
            return Err(Reason::ConntrackFull);
        }
        self.flows.borrow_mut().insert(*key, *state);
        Ok(())
    }
    fn show_peer(&self, key: &FlowKey, ingress: u32) {
        if let Some(state) = self.flows.borrow_mut().get_mut(key) {
            state.ingress = ingress;
        }
    }
    fn fragment(&self, key: &FragmentKey) -> bool {
        self.fragments.borrow().contains(key)
    }
    fn put_fragment(&self, key: &FragmentKey) -> Result<(), Reason> {
        self.fragments.borrow_mut().insert(*key);
        Ok(())
    }
    fn meter(&self, key: &MeterKey, bytes: u32) -> Result<(), Reason> {
        if self.meter_full.get() {
            return Err(Reason::MeterFull);
        }
        *self.meters.borrow_mut().entry(*key).or_default() += u64::from(bytes);
        Ok(())
    }
}

/// Bytes of an Ethernet frame.
#[derive(Clone)]
pub struct Frame(pub Vec<u8>);

/// A frame and whose socket sent it.
struct Sent<'a> {
    frame: &'a Frame,
    agent: bool,
}

impl Packet for Sent<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.frame.0.get(offset as usize..offset as usize + N)?.try_into().ok()
    }
    fn headers(&self) -> Option<[u32; 10]> {
        let bytes: &[u8; 40] = self.frame.0.get(14..)?.first_chunk()?;
        let (words, _) = bytes.as_chunks::<4>();
        Some(std::array::from_fn(|index| u32::from_be_bytes(words[index])))
    }
    fn ethertype(&self) -> Option<u16> {
        self.load::<2>(12).map(u16::from_be_bytes)
    }
    fn len(&self) -> u32 {
        self.frame.0.len() as u32
    }
    fn is_agents(&self) -> bool {
        self.agent
    }
}

pub const SYN: u8 = 0x02;
pub const SYN_ACK: u8 = 0x12;
pub const ACK: u8 = 0x10;

/// An IPv4 or (for addresses that are not mapped) IPv6 packet.
pub fn ip(src: Addr, dst: Addr, protocol: u8, body: &[u8]) -> Frame {
    let mut frame = vec![0u8; 12];
    if src[..12] == v4([0; 4])[..12] {
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((20 + body.len() as u16).to_be_bytes());
        frame.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
        frame.extend(&src[12..]);
        frame.extend(&dst[12..]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((body.len() as u16).to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend(src);
        frame.extend(dst);
    }
    frame.extend(body);
    Frame(frame)
}

pub fn tcp(src: (Addr, u16), dst: (Addr, u16), flags: u8, payload: &[u8]) -> Frame {
    let mut body = Vec::new();
    body.extend(src.1.to_be_bytes());
    body.extend(dst.1.to_be_bytes());
    body.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    body.extend(payload);
    ip(src.0, dst.0, 6, &body)
}

pub fn udp(src: (Addr, u16), dst: (Addr, u16), payload: &[u8]) -> Frame {
    let mut body = Vec::new();
    body.extend(src.1.to_be_bytes());
    body.extend(dst.1.to_be_bytes());
    body.extend((8 + payload.len() as u16).to_be_bytes());
    body.extend([0, 0]);
    body.extend(payload);
    ip(src.0, dst.0, 17, &body)
}

pub fn allow(world: &World, source: u32, destination: u32) {
    world.rule(source, destination, 0, ALLOW);
}
