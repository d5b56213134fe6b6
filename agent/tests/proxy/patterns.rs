//! Every way to end a connection carries every byte.

use std::hash::{DefaultHasher, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::world::World;

/// What both ends do; the server listens on 7000 plus the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    HalfClose,
    ServerFirst,
    CloseAtOnce,
    Chunked,
    FullDuplex,
    LateReader,
}

const ALL: [Pattern; 6] = [
    Pattern::HalfClose,
    Pattern::ServerFirst,
    Pattern::CloseAtOnce,
    Pattern::Chunked,
    Pattern::FullDuplex,
    Pattern::LateReader,
];

impl Pattern {
    fn port(self) -> u16 {
        7000 + self as u16
    }
}

/// Bytes that depend on a seed, so that mixed-up connections are noticed.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn sum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

async fn to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("a proper end");
    all
}

/// What a server does with one connection; `heard` gets the checksum of what it read.
async fn serve(pattern: Pattern, mut stream: TcpStream, heard: mpsc::UnboundedSender<u64>) {
    match pattern {
        Pattern::HalfClose | Pattern::Chunked => {
            let request = to_end(&mut stream).await;
            heard.send(sum(&request)).unwrap();
            stream.write_all(&content(sum(&request), request.len() * 2)).await.unwrap();
        }
        Pattern::ServerFirst => {
            stream.write_all(b"220 welcome\r\n").await.unwrap();
            let request = to_end(&mut stream).await;
            heard.send(sum(&request)).unwrap();
            stream.write_all(&content(sum(&request), 1000)).await.unwrap();
        }
        Pattern::CloseAtOnce => heard.send(sum(&to_end(&mut stream).await)).unwrap(),
        Pattern::FullDuplex => {
            let (mut read, mut write) = stream.into_split();
            let writer = tokio::spawn(async move { write.write_all(&content(77, 400_000)).await.unwrap() });
            let mut request = Vec::new();
            read.read_to_end(&mut request).await.unwrap();
            heard.send(sum(&request)).unwrap();
            writer.await.unwrap();
        }
        Pattern::LateReader => {
            stream.write_all(&content(78, 1_500_000)).await.unwrap();
            stream.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            heard.send(sum(&to_end(&mut stream).await)).unwrap();
        }
    }
}

/// What a client does; returns the checksum of what it sent.
async fn ask(pattern: Pattern, mut stream: TcpStream, seed: u64) -> u64 {
    let request = content(seed, (seed as usize * 7919) % 90_000 + 1);
    let sent = sum(&request);
    match pattern {
        Pattern::HalfClose => {
            stream.write_all(&request).await.unwrap();
            stream.shutdown().await.unwrap();
            assert!(to_end(&mut stream).await == content(sent, request.len() * 2), "{pattern:?} {seed}");
        }
        Pattern::ServerFirst => {
            let mut banner = [0; 13];
            stream.read_exact(&mut banner).await.unwrap();
            assert_eq!(&banner, b"220 welcome\r\n");
            stream.write_all(&request).await.unwrap();
            stream.shutdown().await.unwrap();
            assert!(to_end(&mut stream).await == content(sent, 1000), "{pattern:?} {seed}");
        }
        Pattern::CloseAtOnce => stream.write_all(&request).await.unwrap(),
        Pattern::Chunked => {
            for (number, chunk) in request.chunks(request.len() / 20 + 1).enumerate() {
                stream.write_all(chunk).await.unwrap();
                if number % 5 == 0 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            stream.shutdown().await.unwrap();
            assert!(to_end(&mut stream).await == content(sent, request.len() * 2), "{pattern:?} {seed}");
        }
        Pattern::FullDuplex => {
            let (mut read, mut write) = stream.into_split();
            let writer = tokio::spawn(async move {
                write.write_all(&request).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut answer = Vec::new();
            read.read_to_end(&mut answer).await.unwrap();
            assert!(answer == content(77, 400_000), "{pattern:?} {seed}");
            writer.await.unwrap();
        }
        Pattern::LateReader => {
            stream.write_all(&request).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            stream.shutdown().await.unwrap();
            assert!(to_end(&mut stream).await == content(78, 1_500_000), "{pattern:?} {seed}");
        }
    }
    sent
}

/// `count` connections of each pattern, `parallel` at a time, alternating address families.
async fn run(world: &Arc<World>, count: u64, parallel: usize) {
    let mut servers = JoinSet::new();
    let mut clients = JoinSet::new();
    let gate = Arc::new(Semaphore::new(parallel));
    let (heard, mut all_heard) = mpsc::unbounded_channel();
    for pattern in ALL {
        for addr in [world.server.v4(), world.server.v6()] {
            let listener = world.server.listen(SocketAddr::new(addr, pattern.port()));
            let heard = heard.clone();
            servers.spawn(async move {
                let mut connections = JoinSet::new();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    connections.spawn(serve(pattern, stream, heard.clone()));
                }
            });
        }
    }
    for seed in 0..count {
        for pattern in ALL {
            let (world, gate) = (world.clone(), gate.clone());
            clients.spawn(async move {
                let _turn = gate.acquire_owned().await.unwrap();
                let addr = if seed % 2 == 0 { world.server.v4() } else { world.server.v6() };
                let stream = world.connect(SocketAddr::new(addr, pattern.port())).await.unwrap();
                ask(pattern, stream, seed * 6 + pattern as u64).await
            });
        }
    }
    let mut sent = clients.join_all().await;
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let next = tokio::time::timeout(Duration::from_secs(20), all_heard.recv()).await;
        received.push(next.expect("every server ends").unwrap());
    }
    sent.sort_unstable();
    received.sort_unstable();
    assert!(sent == received, "what servers read is not what clients wrote");
    world.settle().await;
    assert!(world.records.refusals().is_empty(), "{:?}", world.records.refusals());
    assert!(world.maps.legs.lock().unwrap().is_empty() && world.maps.orig.lock().unwrap().is_empty());
    servers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn six_close_patterns_lose_no_byte() {
    let world = Arc::new(World::new().await);
    run(&world, 60, 40).await;
    // Both ends told about each connection, and their counts agree.
    let events = world.records.events.lock().unwrap();
    assert_eq!(events.len(), 60 * 6 * 4, "opened and closed, at both ends");
    let total = |source: bool| {
        events
            .iter()
            .filter(|event| (event.reporter == weft_agent::proxy::Reporter::Source) == source)
            .map(|event| event.to_server + event.to_client)
            .sum::<u64>()
    };
    assert_eq!(total(true), total(false));
    assert!(events.iter().all(|event| event.source_workload.is_some()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_at_once() {
    let world = Arc::new(World::new().await);
    let began = Instant::now();
    let listener = world.server.listen(SocketAddr::new(world.server.v4(), 7100));
    let echo = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            connections.spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
        }
    });
    let barrier = Arc::new(tokio::sync::Barrier::new(1000));
    let mut clients = JoinSet::new();
    for seed in 0..1000 {
        let (world, barrier) = (world.clone(), barrier.clone());
        clients.spawn(async move {
            let mut stream = world.connect(SocketAddr::new(world.server.v4(), 7100)).await.unwrap();
            let request = content(seed, 2000);
            stream.write_all(&request[..1000]).await.unwrap();
            let mut first = vec![0; 1000];
            stream.read_exact(&mut first).await.unwrap();
            // All thousand are open here.
            barrier.wait().await;
            stream.write_all(&request[1000..]).await.unwrap();
            stream.shutdown().await.unwrap();
            first.extend(to_end(&mut stream).await);
            assert!(first == request);
        });
    }
    clients.join_all().await;
    world.settle().await;
    assert!(world.records.refusals().is_empty(), "{:?}", world.records.refusals());
    // No connection carries more than 100, and none was opened for nothing.
    assert_eq!(world.proxy.pooled_tunnels(), 10);
    println!("1000 at once in {:?}", began.elapsed());
    echo.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_of_small_messages_does_not_end_the_tunnel_of_others() {
    let world = Arc::new(World::new().await);
    let listener = world.server.listen(SocketAddr::new(world.server.v4(), 7200));
    let mut slow = world.connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut slow_end, _) = listener.accept().await.unwrap();
    slow.set_nodelay(true).unwrap();
    // Far more small frames than an HTTP/2 connection may have waiting.
    let writer = tokio::spawn(async move {
        for number in 0..150_000_u32 {
            slow.write_all(&number.to_be_bytes()).await.unwrap();
            if number % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        slow.shutdown().await.unwrap();
        slow
    });
    let mut other = world.connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut other_end, _) = listener.accept().await.unwrap();
    for _ in 0..200 {
        other.write_all(b"ping").await.unwrap();
        let mut read = [0; 4];
        other_end.read_exact(&mut read).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let all = to_end(&mut slow_end).await;
    assert!(all.chunks(4).enumerate().all(|(number, chunk)| chunk == (number as u32).to_be_bytes()));
    assert_eq!(all.len(), 600_000);
    writer.await.unwrap();
    assert_eq!(world.proxy.pooled_tunnels(), 1);
}
