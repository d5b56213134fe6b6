//! Figures, not verdicts: the tunnel beside a plain connection over the same veth pair, interleaved.
//!
//!     cargo test --release -p weft --test proxy figures -- --ignored --nocapture --test-threads 1

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::world::World;

const ROUNDS: usize = 5;

async fn plain(world: &World, to: SocketAddr) -> TcpStream {
    let socket = world.client.netns.run(|| TcpSocket::new_v4().unwrap()).unwrap();
    let _ = setsockopt(&socket, sockopt::TcpCongestion, &"cubic".into());
    socket.connect(to).await.unwrap()
}

async fn connect(world: &World, to: SocketAddr, tunnel: bool) -> TcpStream {
    if tunnel { world.connect(to).await.unwrap() } else { plain(world, to).await }
}

/// Bytes per second of one stream, and the round trip of 64 bytes.
async fn stream(world: &World, to: SocketAddr, tunnel: bool) -> (f64, Duration) {
    let mut stream = connect(world, to, tunnel).await;
    stream.set_nodelay(true).unwrap();
    let mut small = [0; 64];
    let began = Instant::now();
    const TRIPS: u32 = 2000;
    for _ in 0..TRIPS {
        stream.write_all(&small).await.unwrap();
        stream.read_exact(&mut small).await.unwrap();
    }
    let trip = began.elapsed() / TRIPS;
    drop(stream);
    let mut stream = connect(world, SocketAddr::new(to.ip(), 7601), tunnel).await;
    let chunk = vec![5; 1 << 17];
    let (began, mut sent) = (Instant::now(), 0_usize);
    while began.elapsed() < Duration::from_millis(1500) {
        sent += stream.write(&chunk).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let mut end = [0; 8];
    stream.read_exact(&mut end).await.unwrap();
    assert_eq!(u64::from_be_bytes(end), sent as u64);
    (sent as f64 / began.elapsed().as_secs_f64(), trip)
}

/// Time per connect, one byte each way, close.
async fn short(world: &World, to: SocketAddr, tunnel: bool) -> Duration {
    let began = Instant::now();
    const COUNT: u32 = 500;
    for _ in 0..COUNT {
        let mut stream = connect(world, to, tunnel).await;
        stream.write_all(b"x").await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
    }
    began.elapsed() / COUNT
}

fn median<T: PartialOrd + Copy>(mut all: Vec<T>) -> T {
    all.sort_by(|a, b| a.partial_cmp(b).unwrap());
    all[all.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement, for release builds"]
async fn figures() {
    let world = Arc::new(World::new().await);
    let to = SocketAddr::new(world.server.v4(), 7600);
    let mut servers = JoinSet::new();
    let echo = world.server.listen(to);
    servers.spawn(async move {
        loop {
            let (mut stream, _) = echo.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    stream.write_all(&buffer[..read]).await.unwrap();
                }
            });
        }
    });
    let sink = world.server.listen(SocketAddr::new(to.ip(), 7601));
    servers.spawn(async move {
        loop {
            let (mut stream, _) = sink.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut buffer, mut total) = (vec![0; 1 << 17], 0_u64);
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    total += read as u64;
                }
                stream.write_all(&total.to_be_bytes()).await.unwrap();
            });
        }
    });
    let mut all = [(); 2].map(|_| (Vec::new(), Vec::new(), Vec::new()));
    for _ in 0..ROUNDS {
        for tunnel in [false, true] {
            let (rate, trip) = stream(&world, to, tunnel).await;
            let result = &mut all[usize::from(tunnel)];
            result.0.push(rate);
            result.1.push(trip);
            result.2.push(short(&world, to, tunnel).await);
        }
    }
    let [plain, tunnel] = all.map(|(rates, trips, shorts)| (median(rates), median(trips), median(shorts)));
    println!(
        "one stream:  {:>7.0} MB/s plain, {:>7.0} MB/s tunnel, ratio {:.2}",
        plain.0 / 1e6,
        tunnel.0 / 1e6,
        tunnel.0 / plain.0
    );
    println!(
        "round trip:  {:>10.1?} plain, {:>10.1?} tunnel, ratio {:.1}",
        plain.1,
        tunnel.1,
        tunnel.1.as_secs_f64() / plain.1.as_secs_f64()
    );
    println!(
        "short:       {:>10.1?} plain, {:>10.1?} tunnel, ratio {:.1}",
        plain.2,
        tunnel.2,
        tunnel.2.as_secs_f64() / plain.2.as_secs_f64()
    );
}
