//! Connect decisions: pass, direct, capture, refuse.

mod world;

use weft_datapath::abi::{Addr, Backend, BackendKey, Netns, Service, ServiceKey};
use weft_datapath::addr::v4;
use weft_datapath::connect::{Action, Dial, Plan, TCP, UDP, decide};
use weft_datapath::identity::ANY;
use weft_datapath::policy::{ALLOW, DENY, HTTP, Mode};
use weft_datapath::reason::Reason;
use weft_datapath::service::ROUND_ROBIN;
use world::*;

fn dial(world: &World, dst: Addr, port: u16, protocol: u8) -> Plan {
    let caller = Netns { identity: A, ifindex: IF_A, ..Netns::default() };
    decide(world, &caller, &Dial { dst, port, protocol }, |service| service.count - 1)
}

fn vip() -> Addr {
    v4([10, 96, 0, 10])
}

fn publish_service(world: &World, port: u16, protocol: u8, backends: &[(Addr, u16)]) {
    let service = Service { id: 5, epoch: 1, count: backends.len() as u32, balance: ROUND_ROBIN };
    world.services.borrow_mut().insert(ServiceKey { addr: vip(), port, protocol, pad: 0 }, service);
    for (slot, (addr, port)) in backends.iter().enumerate() {
        let key = BackendKey { service: 5, epoch: 1, slot: slot as u32 };
        world.backends.borrow_mut().insert(key, Backend { addr: *addr, port: *port, pad: 0 });
    }
}

#[test]
fn loopback_and_outside_are_none_of_our_business() {
    let world = World::new();
    for addr in [v4([127, 0, 0, 1]), v4([0, 0, 0, 0]), outside()] {
        assert_eq!(dial(&world, addr, 80, TCP).action, Action::Pass);
        assert_eq!(dial(&world, addr, 53, UDP).action, Action::Pass);
    }
    assert_eq!(dial(&world, addr_a(), 80, TCP).action, Action::Pass, "a workload may always reach itself");
}

#[test]
fn the_agents_ports_are_not_to_be_dialled() {
    let world = World::new();
    assert_eq!(dial(&world, v4([127, 0, 0, 1]), 15001, TCP).action, Action::Refuse(Reason::AgentPort));
    assert_eq!(dial(&world, addr_remote(), 15008, TCP).action, Action::Refuse(Reason::TunnelPort));
    assert_eq!(dial(&world, addr_a(), 15008, TCP).action, Action::Refuse(Reason::TunnelPort));
}

#[test]
fn a_local_workload_is_reached_directly_if_policy_allows() {
    let world = World::new();
    assert_eq!(dial(&world, addr_b(), 80, TCP).action, Action::Refuse(Reason::Policy));
    world.rule(A, B, 0, ALLOW);
    let plan = dial(&world, addr_b(), 80, TCP);
    assert_eq!((plan.action, plan.destination), (Action::Direct, B));
    world.rule(A, B, 0, HTTP);
    assert_eq!(dial(&world, addr_b(), 80, TCP).action, Action::Refuse(Reason::NeedsHttp));
    world.subjects.borrow_mut().clear();
    assert_eq!(dial(&world, addr_b(), 80, TCP).action, Action::Refuse(Reason::Policy));
}

#[test]
fn a_remote_workload_is_reached_by_tunnel_unless_its_port_is_in_clear() {
    let world = World::new();
    for mode in [Mode::Strict, Mode::Permissive] {
        world.mode(REMOTE, mode);
        let plan = dial(&world, addr_remote(), 80, TCP);
        assert_eq!((plan.action, plan.destination), (Action::Capture, REMOTE));
    }
    world.mode(REMOTE, Mode::Disable);
    assert_eq!(dial(&world, addr_remote(), 80, TCP).action, Action::Direct);
    world.subjects.borrow_mut().clear();
    let stranger = dial(&world, addr_remote(), 80, TCP).action;
    assert_eq!(stranger, Action::Refuse(Reason::Policy), "a caller without policy may nothing");
}

#[test]
fn datagrams_have_no_tunnel() {
    let world = World::new();
    publish_service(&world, 53, UDP, &[(addr_remote(), 53)]);
    assert_eq!(dial(&world, vip(), 53, UDP).action, Action::Refuse(Reason::ClearToStrict));
    world.mode(REMOTE, Mode::Permissive);
    assert_eq!(dial(&world, vip(), 53, UDP).action, Action::Direct);
}

#[test]
fn a_datagram_that_may_be_an_answer_is_left_to_tc() {
    let world = World::new();
    world.rule(A, B, 0, DENY);
    for addr in [addr_remote(), addr_b()] {
        assert_eq!(dial(&world, addr, 4000, UDP).action, Action::Pass);
    }
}

#[test]
fn a_service_stands_for_its_backends() {
    let world = World::new();
    world.rule(A, B, 0, DENY);
    world.rule(A, B, 8080, ALLOW);
    publish_service(&world, 80, TCP, &[(addr_remote(), 8080), (addr_b(), 8080)]);
    let plan = dial(&world, vip(), 80, TCP);
    assert_eq!((plan.action, plan.service), (Action::Direct, 5));
    assert_eq!((plan.backend.addr, plan.backend.port), (addr_b(), 8080));
    assert_eq!(dial(&world, vip(), 81, TCP).action, Action::Pass, "another port is another service");
    publish_service(&world, 53, UDP, &[(outside(), 53)]);
    assert_eq!(dial(&world, vip(), 53, UDP).action, Action::Direct);
}

#[test]
fn a_service_without_backends_refuses() {
    let world = World::new();
    publish_service(&world, 80, TCP, &[]);
    assert_eq!(dial(&world, vip(), 80, TCP).action, Action::Refuse(Reason::NoBackend));
    publish_service(&world, 80, TCP, &[(addr_b(), 8080)]);
    world.backends.borrow_mut().clear();
    assert_eq!(dial(&world, vip(), 80, TCP).action, Action::Refuse(Reason::NoBackend));
}

#[test]
fn an_unknown_address_inside_the_mesh_is_refused() {
    let world = World::new();
    let unknown = v4([10, 77, 5, 5]);
    world.inside.borrow_mut().insert(unknown);
    assert_eq!(dial(&world, unknown, 80, TCP).action, Action::Refuse(Reason::UnknownInside));
}

#[test]
fn egress_policy_refuses_by_errno() {
    let world = World::new();
    world.egress_rule(A, ANY, 0, DENY);
    world.egress_rule(A, ANY, 443, ALLOW);
    for (addr, allowed) in [(outside(), Action::Pass), (addr_remote(), Action::Capture)] {
        let refused = dial(&world, addr, 80, TCP);
        assert_eq!((refused.action, refused.rule), (Action::Refuse(Reason::Policy), 8));
        assert_eq!(dial(&world, addr, 443, TCP).action, allowed);
    }
    // To a workload of this node both ends are asked.
    assert_eq!(dial(&world, addr_b(), 443, TCP).rule, 7);
    world.rule(A, B, 0, ALLOW);
    assert_eq!(dial(&world, addr_b(), 443, TCP).action, Action::Direct);
    assert_eq!(dial(&world, addr_b(), 80, TCP).rule, 8);
    world.egress_rule(A, ANY, 443, HTTP);
    assert_eq!(dial(&world, outside(), 443, TCP).action, Action::Refuse(Reason::NeedsHttp));
    // Datagrams may be answers: their packets are asked.
    assert_eq!(dial(&world, outside(), 80, UDP).action, Action::Pass);
    assert_eq!(dial(&world, v4([127, 0, 0, 1]), 80, TCP).action, Action::Pass);
}
