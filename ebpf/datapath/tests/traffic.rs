//! The TC contract, point by point, on built packets.

mod world;

use weft_datapath::abi::{Endpoint, IfaceAddr, MeterKey, PolicyKey, PolicyValue, Subject, SubjectKey};
use weft_datapath::addr::v4;
use weft_datapath::identity::{ANONYMOUS, ANY, NODE};
use weft_datapath::policy::{ALLOW, BY_PROTOCOL, DENY, HTTP, Mode};
use weft_datapath::reason::Reason;
use weft_datapath::traffic::{Passed, TO};
use world::*;

const KNOWN: Result<Passed, Reason> = Ok(Passed::Known);
const ACCEPTED: Result<Passed, Reason> = Ok(Passed::Accepted);

/// A dials B and both hooks of both veths see the handshake.
fn connect(world: &World) -> Result<Passed, Reason> {
    let syn = tcp((addr_a(), 4000), (addr_b(), 80), SYN, b"");
    world.sends(IF_A, &syn)?;
    let accepted = world.receives(IF_B, IF_A, &syn)?;
    let syn_ack = tcp((addr_b(), 80), (addr_a(), 4000), SYN_ACK, b"");
    world.sends(IF_B, &syn_ack)?;
    world.receives(IF_A, IF_B, &syn_ack)?;
    Ok(accepted)
}

fn data_from_a() -> Frame {
    tcp((addr_a(), 4000), (addr_b(), 80), ACK, b"data")
}
fn data_from_b() -> Frame {
    tcp((addr_b(), 80), (addr_a(), 4000), ACK, b"data")
}

#[test]
fn an_allowed_flow_passes_all_four_hooks_and_is_metered() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    assert_eq!(world.sends(IF_A, &data_from_a()), KNOWN);
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), KNOWN);
    assert_eq!(world.sends(IF_B, &data_from_b()), KNOWN);
    assert_eq!(world.receives(IF_A, IF_B, &data_from_b()), KNOWN);
    let bytes = world.meters.borrow()[&MeterKey { source: A, destination: B, direction: TO }];
    assert_eq!(bytes, 54 + 58);
}

#[test]
fn a_table_miss_denies() {
    let world = World::new();
    world.policy.borrow_mut().clear();
    assert_eq!(connect(&world), Err(Reason::Policy));
    allow(&world, A, B);
    world.subjects.borrow_mut().clear();
    assert_eq!(connect(&world), Err(Reason::Policy));
    world.ifaces.borrow_mut().clear();
    assert_eq!(connect(&world), Err(Reason::NotEnrolled));
}

#[test]
fn inserts_that_fail_deny() {
    let world = World::new();
    allow(&world, A, B);
    world.conntrack_full.set(true);
    assert_eq!(connect(&world), Err(Reason::ConntrackFull));
    world.conntrack_full.set(false);
    world.meter_full.set(true);
    assert_eq!(connect(&world), Err(Reason::MeterFull));
}

#[test]
fn the_sender_is_known_by_its_interface_not_by_its_address() {
    let world = World::new();
    allow(&world, A, B);
    let syn = tcp((addr_a(), 4000), (addr_b(), 80), SYN, b"");
    // A's address from an interface that is not enrolled, from the wire, from the node: anonymous.
    for ingress in [99, UPLINK, 0] {
        assert_eq!(world.receives(IF_B, ingress, &syn), Err(Reason::Policy));
    }
    // Even in the middle of A's own living flow.
    assert_eq!(connect(&world), ACCEPTED);
    assert_eq!(world.receives(IF_B, 99, &data_from_a()), Err(Reason::Policy));
}

#[test]
fn a_reply_comes_by_the_interface_of_whom_was_asked() {
    let world = World::new();
    allow(&world, A, B);
    // B's address from an interface that is not enrolled, as the answer to something that A may have asked.
    for forged in [data_from_b(), tcp((addr_b(), 80), (addr_a(), 4000), SYN_ACK, b"")] {
        for ingress in [99, UPLINK, 0] {
            assert_eq!(world.receives(IF_A, ingress, &forged), Err(Reason::SourceAddress));
        }
    }
    // In the middle of a living flow too, which goes on.
    assert_eq!(connect(&world), ACCEPTED);
    assert_eq!(world.receives(IF_A, 99, &data_from_b()), Err(Reason::SourceAddress));
    assert_eq!(world.receives(IF_A, IF_B, &data_from_b()), KNOWN);
}

#[test]
fn the_first_answer_passes_under_the_revision_that_was_asked() {
    let world = World::new();
    world.mode(REMOTE, Mode::Permissive);
    let ask = tcp((addr_a(), 4000), (addr_remote(), 80), SYN, b"");
    let answer = tcp((addr_remote(), 80), (addr_a(), 4000), SYN_ACK, b"");
    assert_eq!(world.sends(IF_A, &ask), KNOWN);
    assert_eq!(world.receives(IF_A, UPLINK, &answer), KNOWN);
    assert!(world.flows.borrow().values().all(|state| state.ingress == UPLINK), "and is remembered");
    // The remote end becomes STRICT after it was asked: no answer, whether or not the next question came first.
    for asks_again in [false, true] {
        world.flows.borrow_mut().clear();
        world.mode(REMOTE, Mode::Permissive);
        assert_eq!(world.sends(IF_A, &ask), KNOWN);
        world.publish(|world| world.mode(REMOTE, Mode::Strict));
        if asks_again {
            let more = tcp((addr_a(), 4000), (addr_remote(), 80), ACK, b"data");
            assert_eq!(world.sends(IF_A, &more), Err(Reason::ClearToStrict));
        }
        assert!(world.receives(IF_A, UPLINK, &answer).is_err());
    }
}

#[test]
fn a_workload_sends_from_its_own_addresses_only() {
    let world = World::new();
    allow(&world, A, B);
    let forged = tcp((addr_a(), 4000), (addr_remote(), 80), SYN, b"");
    assert_eq!(world.sends(IF_B, &forged), Err(Reason::SourceAddress));
    let forged = tcp((v4([10, 9, 9, 9]), 4000), (outside(), 80), SYN, b"");
    assert_eq!(world.sends(IF_A, &forged), Err(Reason::SourceAddress));
}

#[test]
fn replies_belong_to_their_originator() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    // B may answer A, but may not open a connection of its own.
    let syn = tcp((addr_b(), 5000), (addr_a(), 80), SYN, b"");
    assert_eq!(world.sends(IF_B, &syn), KNOWN);
    assert_eq!(world.receives(IF_A, IF_B, &syn), Err(Reason::Policy));
    // Nor by a SYN-ACK to a port that never asked: that is judged as A's flow to B, and the other way round.
    let syn_ack = tcp((addr_a(), 6000), (addr_b(), 5000), SYN_ACK, b"");
    assert_eq!(world.sends(IF_A, &syn_ack), Err(Reason::Policy));
}

#[test]
fn a_revocation_cuts_a_living_flow_in_both_directions() {
    let world = World::new();
    allow(&world, A, B);
    allow(&world, B, A); // The reverse sense stays allowed and must not save the flow.
    assert_eq!(connect(&world), ACCEPTED);
    world.publish(|world| world.rule(A, B, 0, DENY));
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), Err(Reason::Policy));
    assert_eq!(world.sends(IF_B, &data_from_b()), Err(Reason::Policy));
    // And it comes back when the rule does.
    world.publish(|world| world.rule(A, B, 0, ALLOW));
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), KNOWN);
}

#[test]
fn a_bank_is_switched_as_a_whole() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    // The next bank is written, but not current: nothing changes.
    let next = (world.revision.get() + 1) & 1;
    let key = PolicyKey { bank: next, subject: B, peer: A, ..Default::default() };
    world.policy.borrow_mut().insert(key, PolicyValue { verdict: DENY, rule: 0 });
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), KNOWN);
    assert_eq!(connect(&world), KNOWN);
    // Current, it decides alone: what the former bank allows is forgotten.
    world.revision.set(world.revision.get() + 1);
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), Err(Reason::Policy));
}

#[test]
fn a_syn_cannot_cut_a_living_flow() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    let forged = tcp((addr_a(), 4000), (addr_b(), 80), SYN, b"");
    assert_eq!(world.receives(IF_B, UPLINK, &forged), Err(Reason::Policy));
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), KNOWN);
}

#[test]
fn a_syn_against_the_sense_of_a_flow_is_a_new_flow() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    let backwards = tcp((addr_b(), 80), (addr_a(), 4000), SYN, b"");
    assert_eq!(world.receives(IF_A, IF_B, &backwards), Err(Reason::Policy));
    assert_eq!(world.receives(IF_A, UPLINK, &backwards), Err(Reason::Policy));
    // And the living flow is still A's.
    assert_eq!(world.receives(IF_A, IF_B, &data_from_b()), KNOWN);
}

#[test]
fn forged_packets_do_not_cut_a_living_flow() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    for ingress in [99, UPLINK, 0] {
        assert_eq!(world.receives(IF_B, ingress, &data_from_a()), Err(Reason::Policy));
        assert_eq!(world.sends(IF_B, &data_from_b()), KNOWN);
    }
}

#[test]
fn a_forgotten_flow_is_decided_again() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    world.flows.borrow_mut().clear();
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), ACCEPTED);
    world.flows.borrow_mut().clear();
    assert_eq!(world.sends(IF_B, &data_from_b()), KNOWN);
    world.flows.borrow_mut().clear();
    world.publish(|world| world.rule(A, B, 0, DENY));
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), Err(Reason::Policy));
    assert_eq!(world.sends(IF_B, &data_from_b()), Err(Reason::Policy));
    assert_eq!(world.receives(IF_A, IF_B, &data_from_b()), Err(Reason::Policy));
}

#[test]
fn an_identity_that_changes_hands_ends_the_flow_with_the_next_revision() {
    let world = World::new();
    allow(&world, A, B);
    assert_eq!(connect(&world), ACCEPTED);
    world.publish(|world| world.ifaces.borrow_mut().get_mut(&IF_A).unwrap().identity = 40);
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), Err(Reason::Policy));
    world.publish(|world| world.ifaces.borrow_mut().get_mut(&IF_A).unwrap().identity = A);
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), KNOWN);
    world.publish(|world| world.ifaces.borrow_mut().get_mut(&IF_B).unwrap().identity = 41);
    assert_eq!(world.receives(IF_B, IF_A, &data_from_a()), Err(Reason::Policy));
}

#[test]
fn the_tunnel_port_needs_the_agents_mark() {
    let world = World::new();
    let syn = tcp((addr_a(), 4000), (addr_remote(), 15008), SYN, b"");
    let data = tcp((addr_a(), 4000), (addr_remote(), 15008), ACK, b"x");
    let ack = tcp((addr_a(), 4000), (addr_remote(), 15008), ACK, b"");
    for packet in [&syn, &data, &ack] {
        assert_eq!(world.sends(IF_A, packet), Err(Reason::TunnelPort));
    }
    assert_eq!(world.agent_sends(IF_A, &syn), KNOWN);
    // Now the flow is known: control segments without a socket pass, data without a mark does not.
    assert_eq!(world.sends(IF_A, &ack), KNOWN);
    assert_eq!(world.sends(IF_A, &data), Err(Reason::TunnelPort));
    assert_eq!(world.agent_sends(IF_A, &data), KNOWN);
    let reply = tcp((addr_remote(), 15008), (addr_a(), 4000), ACK, b"x");
    assert_eq!(world.receives(IF_A, UPLINK, &reply), KNOWN);
    let stray = tcp((addr_remote(), 15008), (addr_a(), 4001), ACK, b"x");
    assert_eq!(world.receives(IF_A, UPLINK, &stray), Err(Reason::TunnelPort));
}

#[test]
fn a_server_on_the_tunnel_port_is_the_agents() {
    let world = World::new();
    let syn = tcp((addr_remote(), 4000), (addr_b(), 15008), SYN, b"");
    let syn_ack = tcp((addr_b(), 15008), (addr_remote(), 4000), SYN_ACK, b"");
    let data = tcp((addr_b(), 15008), (addr_remote(), 4000), ACK, b"x");
    assert_eq!(world.sends(IF_B, &syn_ack), Err(Reason::TunnelPort));
    assert_eq!(world.receives(IF_B, UPLINK, &syn), ACCEPTED);
    assert_eq!(world.sends(IF_B, &syn_ack), KNOWN);
    assert_eq!(world.sends(IF_B, &data), Err(Reason::TunnelPort));
    assert_eq!(world.agent_sends(IF_B, &data), KNOWN);
}

#[test]
fn clear_traffic_to_another_node_needs_a_port_that_is_not_strict() {
    let world = World::new();
    let syn = tcp((addr_a(), 4000), (addr_remote(), 80), SYN, b"");
    let datagram = udp((addr_a(), 4000), (addr_remote(), 53), b"query");
    assert_eq!(world.sends(IF_A, &syn), Err(Reason::ClearToStrict));
    assert_eq!(world.sends(IF_A, &datagram), Err(Reason::ClearToStrict));
    let echo = ip(addr_a(), addr_remote(), 1, &[8, 0, 0, 0, 0, 9, 0, 1]);
    assert_eq!(world.sends(IF_A, &echo), Err(Reason::ClearToStrict));
    world.mode(REMOTE, Mode::Disable);
    assert_eq!(world.sends(IF_A, &syn), KNOWN);
    assert_eq!(world.sends(IF_A, &datagram), KNOWN);
    world.mode(REMOTE, Mode::Permissive);
    assert_eq!(world.sends(IF_A, &udp((addr_a(), 4001), (addr_remote(), 53), b"q")), KNOWN);
    assert_eq!(world.sends(IF_A, &tcp((addr_a(), 4000), (outside(), 80), SYN, b"")), KNOWN);
}

#[test]
fn an_unknown_address_inside_the_mesh_is_refused() {
    let world = World::new();
    let unknown = v4([10, 77, 5, 5]);
    world.inside.borrow_mut().insert(unknown);
    let syn = tcp((addr_a(), 4000), (unknown, 80), SYN, b"");
    assert_eq!(world.sends(IF_A, &syn), Err(Reason::UnknownInside));
}

#[test]
fn kernel_verified_identity_satisfies_strict_and_the_wire_does_not() {
    let world = World::new();
    world.rule(ANY, B, 0, ALLOW);
    world.rule(ANONYMOUS, B, 0, DENY); // as the compiler writes STRICT
    assert_eq!(connect(&world), ACCEPTED);
    let syn = tcp((outside(), 4000), (addr_b(), 80), SYN, b"");
    assert_eq!(world.receives(IF_B, UPLINK, &syn), Err(Reason::Policy));
}

#[test]
fn the_node_is_an_identity_of_its_own() {
    let world = World::new();
    world.rule(NODE, B, 8080, ALLOW);
    world.rule(NODE, B, 0, DENY);
    let probe = tcp((addr_node(), 4000), (addr_b(), 8080), SYN, b"");
    assert_eq!(world.receives(IF_B, 0, &probe), ACCEPTED);
    let other = tcp((addr_node(), 4000), (addr_b(), 80), SYN, b"");
    assert_eq!(world.receives(IF_B, 0, &other), Err(Reason::Policy));
    // The node's address, but from a wire.
    assert_eq!(
        world.receives(IF_B, UPLINK, &tcp((addr_node(), 4001), (addr_b(), 8080), SYN, b"")),
        Err(Reason::Policy)
    );
}

#[test]
fn what_needs_http_is_refused_without_an_engine() {
    let world = World::new();
    world.rule(A, B, 0, HTTP);
    assert_eq!(connect(&world), Err(Reason::NeedsHttp));
}

#[test]
fn port_rows_win_over_the_row_for_any_port() {
    let world = World::new();
    world.rule(A, B, 80, ALLOW);
    world.rule(A, B, 0, DENY);
    assert_eq!(connect(&world), ACCEPTED);
    let other = tcp((addr_a(), 4000), (addr_b(), 81), SYN, b"");
    assert_eq!(world.receives(IF_B, IF_A, &other), Err(Reason::Policy));
}

#[test]
fn udp_is_stateful() {
    let world = World::new();
    let query = udp((addr_a(), 4000), (outside(), 53), b"query");
    let answer = udp((outside(), 53), (addr_a(), 4000), b"answer");
    assert_eq!(world.receives(IF_A, UPLINK, &answer), Err(Reason::Policy));
    assert_eq!(world.sends(IF_A, &query), KNOWN);
    assert_eq!(world.receives(IF_A, UPLINK, &answer), KNOWN);
}

#[test]
fn fragments() {
    let world = World::new();
    let fragment = |frame: &Frame, flags: u16| {
        let mut frame = frame.clone();
        frame.0[20..22].copy_from_slice(&flags.to_be_bytes());
        frame
    };
    let datagram = udp((addr_a(), 4000), (outside(), 53), &[0; 64]);
    let later = fragment(&datagram, 0x0008);
    assert_eq!(world.sends(IF_A, &later), Err(Reason::Fragment));
    assert_eq!(world.sends(IF_A, &fragment(&datagram, 0x2000)), KNOWN);
    assert_eq!(world.sends(IF_A, &later), KNOWN);
    assert_eq!(
        world.receives(IF_A, UPLINK, &later),
        Err(Reason::Fragment),
        "the other direction proves nothing"
    );
    let segment = tcp((addr_a(), 4000), (outside(), 80), SYN, b"");
    assert_eq!(world.sends(IF_A, &fragment(&segment, 0x2000)), Err(Reason::Fragment));
    assert_eq!(world.sends(IF_A, &fragment(&segment, 0x0008)), Err(Reason::Fragment));
}

#[test]
fn options_extension_headers_and_odd_protocols() {
    let world = World::new();
    let mut options = tcp((addr_a(), 4000), (outside(), 80), SYN, b"");
    options.0[14] = 0x46;
    assert_eq!(world.sends(IF_A, &options), Err(Reason::IpOptions));
    let mut six = [0u8; 16];
    six[0] = 0xfd;
    world.owned.borrow_mut().insert(IfaceAddr { ifindex: IF_A, addr: six });
    let mut there = six;
    there[15] = 9;
    assert_eq!(world.sends(IF_A, &ip(six, there, 0, &[6, 0, 0, 0, 0, 0, 0, 0, 0])), Err(Reason::IpOptions));
    assert_eq!(world.sends(IF_A, &ip(six, there, 60, &[6, 0, 0, 0, 0, 0, 0, 0])), Err(Reason::Protocol));
    assert_eq!(world.sends(IF_A, &ip(addr_a(), outside(), 47, &[0; 8])), Err(Reason::Protocol));
    assert_eq!(world.sends(IF_A, &Frame(vec![0; 13])), Err(Reason::Malformed));
    let mut vlan = tcp((addr_a(), 4000), (outside(), 80), SYN, b"");
    vlan.0[12..14].copy_from_slice(&[0x81, 0x00]);
    assert_eq!(world.sends(IF_A, &vlan), Err(Reason::EtherType));
    // Multicast listener discovery behind a router alert is how IPv6 works.
    assert_eq!(world.sends(IF_A, &ip(six, there, 0, &[58, 0, 5, 2, 0, 0, 1, 0, 143])), KNOWN);
}

#[test]
fn neighbour_discovery_and_arp_speak_for_themselves_only() {
    let world = World::new();
    let six = |last: u8| {
        let mut addr = [0u8; 16];
        addr[0] = 0xfd;
        addr[15] = last;
        addr
    };
    world.owned.borrow_mut().insert(IfaceAddr { ifindex: IF_A, addr: six(1) });
    let advertise = |target: [u8; 16], hops: u8| {
        let mut body = vec![136, 0, 0, 0, 0, 0, 0, 0];
        body.extend(target);
        let mut frame = ip(six(1), six(9), 58, &body);
        frame.0[21] = hops;
        frame
    };
    assert_eq!(world.sends(IF_A, &advertise(six(1), 255)), KNOWN);
    assert_eq!(world.sends(IF_A, &advertise(six(2), 255)), Err(Reason::Icmp));
    assert_eq!(world.sends(IF_A, &advertise(six(1), 64)), Err(Reason::Icmp));
    let arp = |sender: [u8; 4], target: [u8; 4]| {
        let mut frame = vec![0u8; 12];
        frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2]);
        frame.extend([0; 6]);
        frame.extend(sender);
        frame.extend([0; 6]);
        frame.extend(target);
        Frame(frame)
    };
    assert_eq!(world.sends(IF_A, &arp([10, 77, 1, 2], [10, 77, 1, 1])), KNOWN);
    assert_eq!(world.sends(IF_A, &arp([10, 77, 1, 3], [10, 77, 1, 1])), Err(Reason::Arp));
    assert_eq!(world.sends(IF_A, &arp([0; 4], [10, 77, 1, 2])), KNOWN);
}

#[test]
fn icmp_errors_are_about_tracked_flows() {
    let world = World::new();
    let query = udp((addr_a(), 4000), (outside(), 53), b"query");
    let error = |quoted: &Frame| {
        let mut body = vec![3, 3, 0, 0, 0, 0, 0, 0];
        body.extend(&quoted.0[14..42]);
        ip(outside(), addr_a(), 1, &body)
    };
    assert_eq!(world.receives(IF_A, UPLINK, &error(&query)), Err(Reason::Icmp));
    assert_eq!(world.sends(IF_A, &query), KNOWN);
    assert_eq!(world.receives(IF_A, UPLINK, &error(&query)), KNOWN);
    let other = udp((addr_a(), 4001), (outside(), 53), b"query");
    assert_eq!(world.receives(IF_A, UPLINK, &error(&other)), Err(Reason::Icmp));
}

#[test]
fn echo_follows_policy_and_its_reply_the_request() {
    let world = World::new();
    allow(&world, A, B);
    let request = ip(addr_a(), addr_b(), 1, &[8, 0, 0, 0, 0, 9, 0, 1]);
    let reply = ip(addr_b(), addr_a(), 1, &[0, 0, 0, 0, 0, 9, 0, 1]);
    assert_eq!(world.receives(IF_A, IF_B, &reply), Err(Reason::Policy));
    assert_eq!(world.sends(IF_A, &request), KNOWN);
    assert_eq!(world.receives(IF_B, IF_A, &request), ACCEPTED);
    assert_eq!(world.sends(IF_B, &reply), KNOWN);
    assert_eq!(world.receives(IF_A, IF_B, &reply), KNOWN);
}

#[test]
fn an_address_not_of_the_interface_is_not_delivered() {
    let world = World::new();
    allow(&world, A, B);
    let stray = v4([10, 77, 1, 77]);
    world
        .endpoints
        .borrow_mut()
        .insert(stray, Endpoint { identity: B, ifindex: IF_B, ..Endpoint::default() });
    let syn = tcp((addr_a(), 4000), (stray, 80), SYN, b"");
    assert_eq!(world.receives(IF_B, IF_A, &syn), Err(Reason::UnknownInside));
}

#[test]
fn egress_policy_is_asked_where_the_flow_begins_and_again_when_it_changes() {
    let world = World::new();
    let out = tcp((addr_a(), 4000), (outside(), 443), SYN, b"");
    assert_eq!(world.sends(IF_A, &out), KNOWN, "without egress rows a workload reaches everything");
    world.publish(|world| {
        world.egress_rule(A, ANY, 0, DENY);
        world.egress_rule(A, ANONYMOUS, 443, ALLOW);
        world.egress_rule(A, ANONYMOUS, 0, DENY);
    });
    assert_eq!(world.sends(IF_A, &out), KNOWN);
    let other = tcp((addr_a(), 4001), (outside(), 80), SYN, b"");
    assert_eq!(world.sends(IF_A, &other), Err(Reason::Policy));
    // Replies are part of what was allowed.
    let reply = tcp((outside(), 443), (addr_a(), 4000), SYN_ACK, b"");
    assert_eq!(world.receives(IF_A, UPLINK, &reply), KNOWN);
    world.publish(|world| world.egress_rule(A, ANONYMOUS, 443, DENY));
    assert_eq!(
        world.receives(IF_A, UPLINK, &reply),
        Err(Reason::Policy),
        "replies are refused with the flow"
    );
    assert_eq!(world.sends(IF_A, &tcp((addr_a(), 4000), (outside(), 443), ACK, b"x")), Err(Reason::Policy));
}

#[test]
fn egress_to_a_workload_of_the_node_needs_both_ends() {
    let world = World::new();
    allow(&world, A, B);
    world.egress_rule(A, ANY, 0, DENY);
    let syn = tcp((addr_a(), 4000), (addr_b(), 80), SYN, b"");
    assert_eq!(world.sends(IF_A, &syn), Err(Reason::Policy));
    world.publish(|world| world.egress_rule(A, B, 80, ALLOW));
    assert_eq!(world.sends(IF_A, &syn), KNOWN);
    assert_eq!(world.receives(IF_B, IF_A, &syn), ACCEPTED);
    // Answers of B, and what B begins, are none of A's egress policy.
    assert_eq!(world.sends(IF_B, &tcp((addr_b(), 80), (addr_a(), 4000), SYN_ACK, b"")), KNOWN);
    world.publish(|world| world.rule(A, B, 0, DENY));
    assert_eq!(world.sends(IF_A, &syn), KNOWN, "the receiver's veth refuses it");
    assert_eq!(world.receives(IF_B, IF_A, &syn), Err(Reason::Policy));
}

#[test]
fn a_workload_without_a_subject_begins_nothing() {
    let world = World::new();
    world.subjects.borrow_mut().clear();
    assert_eq!(world.sends(IF_A, &tcp((addr_a(), 4000), (outside(), 443), SYN, b"")), Err(Reason::Policy));
}

#[test]
fn rows_of_protocols_tell_tcp_from_udp_sctp_and_echo() {
    let world = World::new();
    world.mode(B, Mode::Permissive);
    let rule = |protocol, port, verdict| {
        let bank = world.revision.get() & 1;
        let key = PolicyKey { bank, subject: B, peer: A, protocol, port, ..PolicyKey::default() };
        world.policy.borrow_mut().insert(key, PolicyValue { verdict, rule: 7 });
    };
    for bank in 0..2 {
        let subject = Subject { flags: BY_PROTOCOL, mode: Mode::Permissive as u32 };
        world.subjects.borrow_mut().insert(SubjectKey { bank, identity: B }, subject);
    }
    rule(0, 0, DENY);
    rule(17, 53, ALLOW);
    rule(132, 0, ALLOW);
    rule(132, 7, DENY);
    rule(1, 9, ALLOW);
    let tcp_53 = tcp((addr_a(), 4000), (addr_b(), 53), SYN, b"");
    assert_eq!(world.receives(IF_B, IF_A, &tcp_53), Err(Reason::Policy));
    assert_eq!(world.receives(IF_B, IF_A, &udp((addr_a(), 4000), (addr_b(), 53), b"?")), ACCEPTED);
    assert_eq!(world.receives(IF_B, IF_A, &udp((addr_a(), 4000), (addr_b(), 54), b"?")), Err(Reason::Policy));
    let sctp = |port: u16| {
        let mut body = 4000u16.to_be_bytes().to_vec();
        body.extend(port.to_be_bytes());
        body.extend([0; 8]);
        ip(addr_a(), addr_b(), 132, &body)
    };
    assert_eq!(world.receives(IF_B, IF_A, &sctp(9)), ACCEPTED);
    assert_eq!(world.receives(IF_B, IF_A, &sctp(7)), Err(Reason::Policy));
    let echo = ip(addr_a(), addr_b(), 1, &[8, 0, 0, 0, 0, 1, 0, 1]);
    assert_eq!(world.receives(IF_B, IF_A, &echo), ACCEPTED);
}
