//! Connections that are open while something happens around them.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use weft_agent::proxy::{Happening, ReasonKind, Settings};

use crate::world::{HOUR, Knowledge, World, ip};

async fn connected(world: &World, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = world.connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (client, server)
}

fn listener(world: &World) -> TcpListener {
    world.server.listen(SocketAddr::new(world.server.v4(), 7400))
}

async fn ping(client: &mut TcpStream, server: &mut TcpStream) {
    client.write_all(b"ping").await.unwrap();
    server.read_exact(&mut [0; 4]).await.unwrap();
    server.write_all(b"pong").await.unwrap();
    client.read_exact(&mut [0; 4]).await.unwrap();
}

async fn is_reset(stream: &mut TcpStream) {
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 64])).await;
    assert_eq!(read.expect("in time").expect_err("a reset").kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_rule_cuts_idle_connections_at_both_ends() {
    let world = World::new().await;
    let listener = listener(&world);
    let mut pairs = Vec::new();
    for _ in 0..300 {
        let (mut client, mut server) = connected(&world, &listener).await;
        // Accepted is not yet answered: only bytes prove that both agents hold the connection open.
        ping(&mut client, &mut server).await;
        pairs.push((client, server));
    }
    let list = world.proxy.registry().list();
    assert_eq!(list.len(), 600);
    let denied = vec![(world.client.workload.identity.clone(), 7400)];
    let began = Instant::now();
    assert_eq!(world.publish(Knowledge { denied, ..world.knowledge() }), 300);
    for (client, server) in &mut pairs {
        is_reset(client).await;
        is_reset(server).await;
    }
    let took = began.elapsed();
    println!("300 connections cut in {took:?}");
    assert!(took < Duration::from_millis(100), "cut only after {took:?}");
    world.settle().await;
    let events = world.records.events.lock().unwrap();
    let by_policy = events
        .iter()
        .filter(|event| {
            matches!(&event.happening, Happening::Closed(reason)
                if reason.kind == ReasonKind::Policy && &*reason.detail == "rule 7")
        })
        .count();
    assert_eq!(by_policy, 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_left_is_cut() {
    let mut world = World::new().await;
    let listener = listener(&world);
    let (mut client, mut server) = connected(&world, &listener).await;
    ping(&mut client, &mut server).await;
    world.server.proxy.take().unwrap().stop("the workload left").await;
    is_reset(&mut server).await;
    is_reset(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resets_travel_both_ways() {
    let world = World::new().await;
    let listener = listener(&world);
    for client_resets in [true, false] {
        let (mut client, mut server) = connected(&world, &listener).await;
        ping(&mut client, &mut server).await;
        let (ending, mut staying) = if client_resets { (client, server) } else { (server, client) };
        ending.set_zero_linger().unwrap();
        drop(ending);
        is_reset(&mut staying).await;
    }
    // Also when the one that stays cannot write any more, and after the other direction has ended.
    for half_closed in [false, true] {
        let (mut client, mut server) = connected(&world, &listener).await;
        if half_closed {
            server.shutdown().await.unwrap();
        }
        let writer = tokio::spawn(async move {
            let chunk = vec![1; 1 << 16];
            while client.write_all(&chunk).await.is_ok() {}
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!writer.is_finished(), "the writer is stopped by a reader that does not read");
        server.set_zero_linger().unwrap();
        server.read_exact(&mut [0; 10]).await.unwrap();
        drop(server);
        tokio::time::timeout(Duration::from_secs(2), writer)
            .await
            .expect("the writer hears of the reset")
            .unwrap();
    }
    world.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_told_who_its_client_is() {
    let world = World::new().await;
    let listener = listener(&world);
    let client = world.connect(listener.local_addr().unwrap()).await.unwrap();
    let (_server, from) = listener.accept().await.unwrap();
    let seen = world.maps.legs.lock().unwrap()[&(world.server.netns.cookie(), from)];
    let expected = SocketAddr::new(world.client.v4(), client.local_addr().unwrap().port());
    assert_eq!(seen, expected);
    assert!(world.maps.marked.load(Ordering::Relaxed) >= 8 + 2, "listeners, the tunnel, the leg");
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_reader_stops_its_writer_and_nobody_else() {
    let world = World::new().await;
    let listener = listener(&world);
    let before = resident_kib();
    let mut stopped = Vec::new();
    for _ in 0..8 {
        let (mut client, server) = connected(&world, &listener).await;
        let _ = setsockopt(&server.as_fd(), sockopt::RcvBuf, &65536);
        let writer = tokio::spawn(async move {
            let mut sent = 0_usize;
            let chunk = vec![7; 1 << 16];
            // Until it gets no further for a second, or far beyond what may be under way.
            while sent < 100 << 20 {
                match tokio::time::timeout(Duration::from_secs(1), client.write(&chunk)).await {
                    Ok(written) => sent += written.unwrap(),
                    Err(_) => break,
                }
            }
            (client, sent)
        });
        stopped.push((writer, server));
    }
    let mut others = Vec::new();
    for (writer, server) in stopped {
        let (client, sent) = writer.await.unwrap();
        assert!(sent < 32 << 20, "{sent} bytes went to a reader that reads nothing");
        others.push((client, server, sent));
    }
    let grown = resident_kib().saturating_sub(before);
    // Other tests of this process are in that number, so it is for reading only.
    println!("8 stopped readers hold {grown} KiB");
    // The same tunnel still carries others, in both directions.
    let (mut client, mut server) = connected(&world, &listener).await;
    let both = async {
        for _ in 0..100 {
            ping(&mut client, &mut server).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), both).await.expect("not held up by those that do not read");
    assert_eq!(world.proxy.pooled_tunnels(), 1);
    drop((client, server));
    // And what was held arrives when it is read.
    for (client, mut server, sent) in others {
        drop(client);
        let mut all = Vec::new();
        server.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), sent);
    }
    world.settle().await;
}

/// Connections one after the other, each with a few bytes each way, until told to stop; returns how many.
async fn keep_connecting(world: Arc<World>, until: Instant) -> usize {
    let mut count = 0;
    while Instant::now() < until {
        let mut stream = world.connect(SocketAddr::new(world.server.v4(), 7400)).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"hello");
        count += 1;
    }
    count
}

async fn echo(listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        connections.spawn(async move {
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap();
            write.shutdown().await.unwrap();
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_rotate_under_load_without_a_failure() {
    let settings = Settings { tunnel_age: Duration::from_millis(150), ..Settings::default() };
    let world = Arc::new(World::with(settings).await);
    let served = tokio::spawn(echo(listener(&world)));
    let until = Instant::now() + Duration::from_secs(3);
    let loads: Vec<_> = (0..8).map(|_| tokio::spawn(keep_connecting(world.clone(), until))).collect();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(120)).await;
        for host in [&world.client, &world.server] {
            host.live.replace(Some(Arc::new(world.ca.issue(&host.workload.identity, HOUR))));
        }
    }
    let mut connections = 0;
    for load in loads {
        connections += load.await.unwrap();
    }
    world.settle().await;
    assert!(world.records.refusals().is_empty(), "{:?}", world.records.refusals());
    let handshakes = world.records.handshakes.load(Ordering::Relaxed);
    println!("{connections} connections over {handshakes} tunnels during 20 rotations");
    assert!(handshakes >= 15, "only {handshakes} tunnels: old certificates were kept in use");
    served.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_opens_nothing() {
    let world = World::new().await;
    let _listener = listener(&world);
    let brief = world.ca.issue(&world.client.workload.identity, Duration::from_secs(1));
    world.client.live.replace(Some(Arc::new(brief)));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    // The reset may come before connect() has returned.
    if let Ok(mut stream) = world.connect(SocketAddr::new(world.server.v4(), 7400)).await {
        is_reset(&mut stream).await;
    }
    world.settle().await;
    let refusals = world.records.refusals();
    assert!(format!("{refusals:?}").contains("no valid certificate"), "{refusals:?}");
    assert_eq!(world.proxy.pooled_tunnels(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_tunnels_close() {
    let settings = Settings { idle_close: Duration::from_millis(200), ..Settings::default() };
    let world = World::with(settings).await;
    let listener = listener(&world);
    let (mut client, mut server) = connected(&world, &listener).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.proxy.pooled_tunnels(), 1, "a tunnel with an open connection is not idle");
    ping(&mut client, &mut server).await;
    drop((client, server));
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(world.proxy.pooled_tunnels(), 0);
    let (mut client, mut server) = connected(&world, &listener).await;
    ping(&mut client, &mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_given_up() {
    let settings = Settings {
        ping_pause: Duration::from_millis(100),
        ping_timeout: Duration::from_millis(400),
        ..Settings::default()
    };
    let world = World::with(settings).await;
    let listener = listener(&world);
    let (mut client, mut server) = connected(&world, &listener).await;
    ping(&mut client, &mut server).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    ping(&mut client, &mut server).await;
    world.server.netns.run(|| ip("link set eth0 down")).unwrap();
    is_reset(&mut client).await;
    is_reset(&mut server).await;
    assert_eq!(world.proxy.pooled_tunnels(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_finishes_what_is_open_and_takes_nothing_new() {
    let mut world = World::new().await;
    let listener = listener(&world);
    let (mut client, mut server) = connected(&world, &listener).await;
    let trigger = world.trigger.take().unwrap();
    drop(std::mem::replace(&mut world.drain, weft_agent::proxy::drain::channel().1));
    let drained = tokio::spawn(trigger.drain(Duration::from_secs(10)));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let refused = world.connect(listener.local_addr().unwrap()).await;
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    for _ in 0..10 {
        ping(&mut client, &mut server).await;
    }
    assert!(!drained.is_finished());
    drop((client, server));
    let complete = tokio::time::timeout(Duration::from_secs(5), drained).await.expect("drained").unwrap();
    assert!(complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_drain_deadline_resets_the_rest() {
    let mut world = World::new().await;
    let listener = listener(&world);
    let (mut client, mut server) = connected(&world, &listener).await;
    let trigger = world.trigger.take().unwrap();
    drop(std::mem::replace(&mut world.drain, weft_agent::proxy::drain::channel().1));
    let began = Instant::now();
    assert!(!trigger.drain(Duration::from_millis(300)).await);
    assert!(began.elapsed() < Duration::from_millis(1200), "{:?}", began.elapsed());
    is_reset(&mut client).await;
    is_reset(&mut server).await;
}
