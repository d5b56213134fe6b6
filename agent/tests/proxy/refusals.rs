//! What is not allowed or not possible ends in a reset for the application, and is told with its reason.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, StatusCode};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use weft_agent::identity::{SpiffeId, tls};
use weft_agent::netns::Netns;
use weft_agent::proxy::{Happening, Pod, ProblemKind, Reason, ReasonKind, Reporter};

use crate::world::{Ca, HOUR, Knowledge, OUTBOUND, TUNNEL, World, ip, namespace};

/// The error with which the application's connection ends, which may be before connect() returned; panics on a proper
/// end.
async fn reset(stream: std::io::Result<TcpStream>) -> std::io::ErrorKind {
    let mut stream = match stream {
        Ok(stream) => stream,
        Err(error) => return error.kind(),
    };
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 64])).await;
    read.expect("an end in time").expect_err("a reset, not an end").kind()
}

fn refused(world: &World, reporter: Reporter) -> Reason {
    let found = world.records.refusals().into_iter().find(|event| event.reporter == reporter);
    match found.map(|event| event.happening) {
        Some(Happening::Refused(reason)) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

async fn problem(world: &World, kind: ProblemKind, text: &str) {
    for _ in 0..300 {
        let problems = world.records.problems.lock().unwrap().clone();
        if problems.iter().any(|problem| problem.kind == kind && problem.text.contains(text)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no {kind:?} says {text:?}: {:?}", world.records.problems.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_port_is_a_reset() {
    let world = World::new().await;
    for addr in [world.server.v4(), world.server.v6()] {
        let stream = world.connect(SocketAddr::new(addr, 9)).await;
        assert_eq!(reset(stream).await, std::io::ErrorKind::ConnectionReset);
    }
    world.settle().await;
    let reason = refused(&world, Reporter::Source);
    assert_eq!(reason.kind, ReasonKind::Tunnel);
    assert!(reason.detail.contains("503") && reason.detail.contains("does not answer"), "{reason:?}");
    assert_eq!(refused(&world, Reporter::Destination).kind, ReasonKind::Dial);
    assert!(world.maps.legs.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_refuses_before_the_application_hears_of_it() {
    let world = World::new().await;
    let listener = world.server.listen(SocketAddr::new(world.server.v4(), 7300));
    let client = world.client.workload.identity.clone();
    world.publish(Knowledge { denied: vec![(client, 7300)], ..world.knowledge() });
    let stream = world.connect(listener.local_addr().unwrap()).await;
    assert_eq!(reset(stream).await, std::io::ErrorKind::ConnectionReset);
    world.settle().await;
    assert_eq!(refused(&world, Reporter::Destination), Reason::new(ReasonKind::Policy, "rule 7"));
    let at_source = refused(&world, Reporter::Source);
    assert_eq!(at_source.kind, ReasonKind::Policy);
    assert!(at_source.detail.contains("rule 7"), "{at_source:?}");
    let accepted = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
    assert!(accepted.is_err(), "the application got a connection that policy denies");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_make_no_sense_are_reset() {
    let world = World::new().await;
    let unknown = world.connect("10.99.0.77:80".parse().unwrap()).await;
    assert_eq!(reset(unknown).await, std::io::ErrorKind::ConnectionReset);
    problem(&world, ProblemKind::Capture, "no workload has that address").await;
    // Straight to the agent's port: nothing noted where it wants to go.
    let socket = world.client.netns.run(|| TcpSocket::new_v4().unwrap()).unwrap();
    let direct = socket.connect(SocketAddr::new([127, 0, 0, 1].into(), OUTBOUND)).await;
    assert_eq!(reset(direct).await, std::io::ErrorKind::ConnectionReset);
    problem(&world, ProblemKind::Capture, "nothing redirected it").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_another_identity_is_not_talked_to() {
    let world = World::new().await;
    let listener = world.server.listen(SocketAddr::new(world.server.v4(), 7301));
    let mut knowledge = world.knowledge();
    let mut other = (*world.server.workload).clone();
    other.identity = "spiffe://cluster.local/ns/test/sa/other".parse().unwrap();
    knowledge.workloads[1] = Arc::new(other);
    world.publish(knowledge);
    let stream = world.connect(listener.local_addr().unwrap()).await;
    assert_eq!(reset(stream).await, std::io::ErrorKind::ConnectionReset);
    world.settle().await;
    let reason = refused(&world, Reporter::Source);
    assert!(reason.detail.contains("handshake"), "{reason:?}");
}

async fn to_tunnel(netns: &Netns, world: &World) -> TcpStream {
    let socket = netns.run(|| TcpSocket::new_v4().unwrap()).unwrap();
    socket.connect(SocketAddr::new(world.server.v4(), TUNNEL)).await.unwrap()
}

/// Does the server take a client that shows `ca`'s certificate for `identity`? It says so with its first bytes.
async fn accepted(world: &World, ca: &Ca, identity: &str, life: Duration) -> bool {
    let identity: SpiffeId = identity.parse().unwrap();
    let live = ca.live(&identity, life);
    // Trust the server, whoever signed for us.
    let config = tls::client_config(
        Arc::new(weft_agent::identity::Live::new(identity, live.last(), world.ca.roots.clone())),
        [world.server.workload.identity.clone()].into(),
    );
    let tcp = to_tunnel(&world.client.netns, world).await;
    let name = ServerName::from(world.server.v4());
    let Ok(mut tls) = TlsConnector::from(config).connect(name, tcp).await else { return false };
    // In TLS 1.3 the client has finished before the server judged it.
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.is_ok()
        && tls.read(&mut [0; 9]).await.is_ok_and(|n| n > 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_workloads_of_the_mesh_open_tunnels() {
    let world = World::new().await;
    let own = world.client.workload.identity.to_string();
    assert!(accepted(&world, &world.ca, &own, HOUR).await);
    assert!(!accepted(&world, &Ca::new(), &own, HOUR).await, "a foreign CA");
    assert!(
        !accepted(&world, &world.ca, "spiffe://elsewhere/ns/test/sa/client", HOUR).await,
        "a foreign trust domain"
    );

    // Not TLS: answered by an alert, then closed.
    let mut plain = to_tunnel(&world.client.netns, &world).await;
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = [0; 7];
    plain.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[0], 21, "the record type of a TLS alert");
    problem(&world, ProblemKind::Handshake, "refused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_leads_only_to_its_workload() {
    let world = World::new().await;
    let listener = world.server.listen(SocketAddr::new(world.server.v4(), 7302));
    let expected = [world.server.workload.identity.clone()].into();
    let config = tls::client_config(world.client.live.clone(), expected);
    let tcp = to_tunnel(&world.client.netns, &world).await;
    let tls = TlsConnector::from(config).connect(world.server.v4().into(), tcp).await.unwrap();
    let (requests, connection) = h2::client::handshake(tls).await.unwrap();
    let driver = tokio::spawn(connection);
    let ask = async |method: Method, uri: &str| {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = uri.parse().unwrap();
        let mut requests = requests.clone().ready().await.unwrap();
        let (response, _stream) = requests.send_request(request, false).unwrap();
        response.await.unwrap().status()
    };
    assert_eq!(ask(Method::GET, "http://10.99.0.2/").await, StatusCode::BAD_REQUEST);
    for target in
        ["10.99.0.1:7302", "10.99.0.2:15008", "10.99.0.2:15001", "10.99.0.2:15006", "127.0.0.1:7302", "x:1"]
    {
        assert_eq!(ask(Method::CONNECT, target).await, StatusCode::BAD_REQUEST, "{target}");
    }
    assert_eq!(ask(Method::CONNECT, "10.99.0.2:9").await, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ask(Method::CONNECT, &listener.local_addr().unwrap().to_string()).await, StatusCode::OK);
    driver.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_wait_for_their_port_and_for_loopback() {
    let world = World::new().await;
    let netns = Arc::new(namespace());
    let socket = netns.run(|| TcpSocket::new_v4().unwrap()).unwrap();
    socket.bind(SocketAddr::new([0, 0, 0, 0].into(), TUNNEL)).unwrap();
    let thief = socket.listen(1).unwrap();

    let pod = Pod::new(world.client.workload.clone(), netns.clone(), world.client.live.clone());
    let mut served = world.proxy.serve(pod, world.drain.clone());
    problem(&world, ProblemKind::Listener, "loopback is down").await;
    problem(&world, ProblemKind::Listener, "port 15008 is taken").await;
    assert!(!served.is_ready());
    drop(thief);
    netns.run(|| ip("link set lo up")).unwrap();
    tokio::time::timeout(Duration::from_secs(10), served.ready()).await.expect("listeners come up");
    served.stop("the test ends").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_listener_comes_back() {
    let world = World::new().await;
    let killed = world.client.netns.run(|| {
        std::process::Command::new("ss")
            .args(["-K", "-H", "-l", "-t", "-n", "sport", "=", ":15001"])
            .output()
            .unwrap()
    });
    let killed = killed.unwrap();
    assert!(
        String::from_utf8_lossy(&killed.stdout).contains("15001"),
        "ss -K kills listeners on this kernel: {killed:?}"
    );
    problem(&world, ProblemKind::Listener, "opening it again").await;
    let served = world.client.proxy.as_ref().unwrap();
    for _ in 0..500 {
        if served.is_ready() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let listener = world.server.listen(SocketAddr::new(world.server.v4(), 7303));
    let mut stream = world.connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut accepted, _) = listener.accept().await.unwrap();
    accepted.write_all(b"hello").await.unwrap();
    stream.read_exact(&mut [0; 5]).await.unwrap();
}
