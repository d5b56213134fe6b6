//! What happens when a workload's socket connects, or sends a datagram to an address of its choice.

use crate::abi::{Addr, Backend, Netns, Service, ServiceKey};
use crate::addr::{is_loopback, is_unspecified};
use crate::names::{TUNNEL_PORT, is_agent_port};
use crate::policy::{self, ALLOW, Access, BY_CLASS, HTTP, Mode};
use crate::reason::Reason;
use crate::tables::Tables;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// [`crate::abi::OrigDst::mode`]: straight to the backend.
pub const MODE_DIRECT: u32 = 1;
/// [`crate::abi::OrigDst::mode`]: redirected to the agent's listener.
pub const MODE_CAPTURE: u32 = 2;

/// What the socket asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dial {
    /// Destination as the application gave it.
    pub dst: Addr,
    /// Destination port.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
}

/// What to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing of ours: leave the address alone, remember nothing.
    Pass,
    /// Go straight to `Plan::backend`.
    Direct,
    /// Go to the agent's listener in the caller's network namespace, which reaches `Plan::backend`.
    Capture,
    /// Fail the call.
    Refuse(Reason),
}

/// The decision and the facts behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What to do.
    pub action: Action,
    /// Where the flow ends: the chosen backend, or what was dialled.
    pub backend: Backend,
    /// Identity number of the workload behind `backend`, 0 when there is none.
    pub destination: u32,
    /// The service that was dialled, 0 for none.
    pub service: u32,
    /// The rule behind a refusal by policy.
    pub rule: u32,
    /// Is there a question for policy?
    asks: bool,
    /// Does it end at another workload of this node?
    here: bool,
}

/// Decides for a caller whose network namespace is enrolled as `caller`. `pick` chooses a slot below `service.count`.
#[inline(always)]
pub fn decide<T: Tables>(
    tables: &T,
    caller: &Netns,
    dial: &Dial,
    pick: impl FnOnce(&Service) -> u32,
) -> Plan {
    let mut plan = route(tables, caller, dial, pick);
    if plan.asks {
        refuse(tables, caller, dial.protocol, &mut plan);
    }
    plan
}

/// Where the flow would go. One of two steps, called in turn, so that their frames do not add up on the small stack.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn route<T: Tables>(tables: &T, caller: &Netns, dial: &Dial, pick: impl FnOnce(&Service) -> u32) -> Plan {
    let mut plan = Plan {
        action: Action::Pass,
        backend: Backend { addr: dial.dst, port: dial.port, pad: 0 },
        destination: 0,
        service: 0,
        rule: 0,
        asks: false,
        here: false,
    };
    if is_loopback(&dial.dst) || is_unspecified(&dial.dst) {
        if dial.protocol == TCP && is_agent_port(dial.port) {
            plan.action = Action::Refuse(Reason::AgentPort);
        }
        return plan;
    }
    if dial.protocol == TCP && dial.port == TUNNEL_PORT {
        plan.action = Action::Refuse(Reason::TunnelPort);
        return plan;
    }
    let key = ServiceKey { addr: dial.dst, port: dial.port, protocol: dial.protocol, pad: 0 };
    if let Some(service) = tables.service(&key) {
        plan.service = service.id;
        let backend = if service.count == 0 { None } else { tables.backend(&service, pick(&service)) };
        let Some(backend) = backend else {
            plan.action = Action::Refuse(Reason::NoBackend);
            return plan;
        };
        plan.backend = backend;
        plan.action = Action::Direct;
    }
    let endpoint = tables.endpoint(&plan.backend.addr);
    let ifindex = match endpoint {
        Some(endpoint) => {
            plan.destination = endpoint.identity;
            if endpoint.ifindex == caller.ifindex {
                return plan; // To itself: never leaves the namespace.
            }
            endpoint.ifindex
        }
        None if tables.inside(&plan.backend.addr) => {
            plan.action = Action::Refuse(Reason::UnknownInside);
            return plan;
        }
        None => 0,
    };
    // A datagram to an address may be an answer, which only TC can tell from a question: it tracks the flow.
    if dial.protocol == UDP && plan.service == 0 {
        return plan;
    }
    plan.asks = true;
    if ifindex != 0 {
        plan.here = true;
        plan.action = Action::Direct;
    } else if endpoint.is_some() {
        plan.action = remote(tables, dial.protocol, &plan);
    }
    plan
}

/// Refuses what policy refuses. The TC programs enforce it all the same, and the agents what goes through the tunnel; it is asked
/// here first, because a refusal by errno tells the application at once. Of a workload of another node its agent asks for
/// ingress, and rules about source addresses wait for the packet, which has one.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn refuse<T: Tables>(tables: &T, caller: &Netns, protocol: u8, plan: &mut Plan) {
    let bank = tables.revision() & 1;
    let addr = plan.backend.addr;
    let access = Access {
        source: caller.identity,
        source_addr: crate::addr::UNSPECIFIED,
        destination: policy::party(tables, plan.destination, &addr),
        destination_addr: addr,
        protocol,
        port: plan.backend.port,
    };
    let mut value = policy::egress(tables, bank, &access);
    if value.verdict == ALLOW && plan.here {
        match tables.subject(bank, plan.destination) {
            Some(subject) if subject.flags & BY_CLASS != 0 => {}
            _ => value = policy::ingress(tables, bank, &access),
        }
    }
    plan.rule = value.rule;
    match value.verdict {
        ALLOW => {}
        HTTP => plan.action = Action::Refuse(Reason::NeedsHttp),
        _ => plan.action = Action::Refuse(Reason::Policy),
    }
}

/// A workload of another node: the tunnel, unless the port is declared to speak in clear. UDP has no tunnel.
#[inline(always)]
fn remote<T: Tables>(tables: &T, protocol: u8, plan: &Plan) -> Action {
    let mode = policy::mode(tables, tables.revision() & 1, plan.destination, plan.backend.port);
    match (mode, protocol) {
        (Mode::Disable, _) | (Mode::Permissive, UDP) => Action::Direct,
        (_, TCP) => Action::Capture,
        _ => Action::Refuse(Reason::ClearToStrict),
    }
}
