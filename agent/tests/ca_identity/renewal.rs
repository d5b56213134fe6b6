//! Certificates change under load and nobody notices; the CA goes away and comes back.

use super::fixture::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_agent::identity::tls::{client_config, server_config};

/// Certificates have whole seconds, so this leaves one to two.
const TTL: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_rotations_under_load_fail_no_request() {
    let ca = TestCa::start().await;
    let (mut a, mut b) = (ca.node("a"), ca.node("b"));
    // The nodes' own certificates rotate too.
    a.config.node_ttl = Some(Duration::from_secs(5));
    b.config.node_ttl = Some(Duration::from_secs(5));
    let (carts, dbs) = (a.store(TTL, &[CART]), b.store(TTL, &[DB]));
    let mut running = JoinSet::new();
    let mut stops = Vec::new();
    for store in [&carts, &dbs] {
        let (stop, stopped) = oneshot::channel::<()>();
        stops.push(stop);
        running.spawn(store.clone().run(async { drop(stopped.await) }));
    }

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(server_config(dbs.live(&id(DB)).await.unwrap()));
    let connector = TlsConnector::from(client_config(carts.live(&id(CART)).await.unwrap(), ids(&[DB])));
    let done = Arc::new(AtomicBool::new(false));
    let requests = Arc::new(AtomicU64::new(0));
    let mut load = JoinSet::new();
    load.spawn({
        let done = done.clone();
        async move {
            let mut connections = JoinSet::new();
            while !done.load(Ordering::Relaxed) {
                let accepted = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
                let Ok(Ok((stream, _))) = accepted else { continue };
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    let mut stream = acceptor.accept(stream).await.expect("the server accepts");
                    let byte = stream.read_u8().await.expect("the request arrives");
                    stream.write_u8(byte).await.expect("the answer leaves");
                });
                while let Some(result) = connections.try_join_next() {
                    result.unwrap();
                }
            }
            while let Some(result) = connections.join_next().await {
                result.unwrap();
            }
        }
    });
    for _ in 0..3 {
        let (connector, done, requests) = (connector.clone(), done.clone(), requests.clone());
        load.spawn(async move {
            while !done.load(Ordering::Relaxed) {
                let stream = TcpStream::connect(address).await.unwrap();
                let mut stream =
                    connector.connect(address.ip().into(), stream).await.expect("the client connects");
                stream.write_u8(7).await.expect("the request leaves");
                assert_eq!(stream.read_u8().await.expect("the answer arrives"), 7);
                requests.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    let mut serials = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    let deadline = SystemTime::now() + Duration::from_secs(60);
    while serials[0].len() <= 20 || serials[1].len() <= 20 || serials[2].len() <= 3 {
        assert!(SystemTime::now() < deadline, "{:?} rotations in 60 s", serials.map(|serials| serials.len()));
        assert!(load.try_join_next().is_none(), "the load stopped by itself");
        serials[0].insert(carts.credentials(&id(CART)).await.unwrap().serial().to_owned());
        serials[1].insert(dbs.credentials(&id(DB)).await.unwrap().serial().to_owned());
        serials[2].insert(carts.status()[0].serial.clone().unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    done.store(true, Ordering::Relaxed);
    while let Some(result) = load.join_next().await {
        result.unwrap();
    }
    for stop in stops {
        stop.send(()).unwrap();
    }
    running.join_all().await;
    let requests = requests.load(Ordering::Relaxed);
    println!("{requests} requests, {:?} certificates", serials.map(|serials| serials.len()));
    assert!(requests > 100);
}

#[tokio::test]
async fn an_absent_ca_costs_nothing_until_the_certificate_expires() {
    let mut ca = TestCa::start().await;
    let node = ca.node("a");
    let store = node.store(Duration::from_secs(4), &[CART]);
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(store.clone().run(async { drop(stopped.await) }));
    let first = store.credentials(&id(CART)).await.unwrap();
    let live = store.live(&id(CART)).await.unwrap();
    ca.stop().await;

    let of_cart = || store.status().into_iter().find(|status| status.spiffe == CART).unwrap();
    eventually("an alarm", || of_cart().error.is_some()).await;
    assert!(of_cart().error.unwrap().contains("cannot be reached"));
    let kept = store.credentials(&id(CART)).await.unwrap();
    assert_eq!(kept.serial(), first.serial(), "the valid certificate is kept");

    eventually("the certificate to expire", || SystemTime::now() > first.not_after()).await;
    assert!(live.credentials().is_none(), "never an expired one");
    let error = store.credentials(&id(CART)).await.unwrap_err().to_string();
    assert!(error.contains("cannot be reached"), "{error}");
    assert!(of_cart().seconds_left.unwrap() <= 0);

    ca.resume().await;
    eventually("recovery", || live.credentials().is_some()).await;
    assert_eq!((of_cart().error, of_cart().failures), (None, 0));
    stop.send(()).unwrap();
    running.await.unwrap();
}
