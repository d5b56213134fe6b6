//! The server's side of tunnels: who comes is known by certificate, what it wants is checked, the application inside the
//! workload's namespace is dialled with the client's address visible to it.
//!
//! Phases of a stream: request understood, registered, checked, dialled, answered with 200. Until the answer, a failure
//! is a status; after it, a reset.

use std::future::poll_fn;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason as H2Reason, RecvStream};
use http::{Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::copy::{AppSocket, both_ways};
use super::datapath::Datapath;
use super::record::{ProblemKind, Reason, ReasonKind, Reporter};
use super::registry::{Facts, Registered};
use super::sock::Buffered;
use super::{Pod, Proxy, drain, hbone, sock};
use crate::identity::certificate::Facts as CertificateFacts;
use crate::identity::{Refusal, SpiffeId, tls};

/// One tunnel: what all its streams share.
struct Tunnel {
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    /// The identity that the peer's certificate proved.
    peer: SpiffeId,
    /// Source address of the tunnel's TCP connection.
    from: SocketAddr,
}

/// Serves one connection accepted on the tunnel port, until it ends.
pub(super) async fn serve(
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    from: SocketAddr,
    drain: drain::Watch,
) {
    let from = sock::canonical(from);
    let (tls, peer, not_after) = match handshake(&proxy, &pod, tcp).await {
        Ok(done) => done,
        Err(text) => {
            let text = format!("tunnel from {from} refused: {text}");
            return proxy.problem(&pod, ProblemKind::Handshake, text);
        }
    };
    let connection = h2::server::Builder::new()
        .initial_window_size(hbone::STREAM_WINDOW)
        .initial_connection_window_size(hbone::CONNECTION_WINDOW)
        .max_frame_size(hbone::FRAME)
        .max_header_list_size(hbone::HEADER_LIST)
        .max_send_buffer_size(hbone::SEND_BUFFER)
        .max_concurrent_streams(hbone::SERVER_STREAMS)
        // All streams of a client that dies are reset at once; that is no attack.
        .max_pending_accept_reset_streams(hbone::SERVER_STREAMS as usize)
        .handshake(tls);
    match tokio::time::timeout(proxy.settings.handshake_timeout, connection).await {
        Ok(Ok(connection)) => {
            let until_expiry = not_after.duration_since(SystemTime::now()).unwrap_or_default();
            // The client retires its connections first, where it is one of ours; this is for others.
            let end = Instant::now() + (proxy.settings.tunnel_age * 2).min(until_expiry);
            let tunnel = Arc::new(Tunnel { proxy, pod, peer, from });
            accept_streams(connection, tunnel, end, drain).await;
        }
        Ok(Err(error)) => {
            proxy.problem(
                &pod,
                ProblemKind::Handshake,
                format!("tunnel from {from} speaks no HTTP/2: {error}"),
            );
        }
        Err(_) => {
            proxy.problem(&pod, ProblemKind::Handshake, format!("tunnel from {from} sent no HTTP/2 in time"))
        }
    }
}

/// TLS; returns the session, who the peer is, and when its certificate expires.
async fn handshake(
    proxy: &Proxy,
    pod: &Pod,
    tcp: TcpStream,
) -> Result<(TlsStream<Buffered>, SpiffeId, SystemTime), String> {
    let handshake = TlsAcceptor::from(pod.server_config.clone()).accept(sock::buffered(tcp));
    let tls = tokio::time::timeout(proxy.settings.handshake_timeout, handshake)
        .await
        .map_err(|_| "no TLS handshake in time".to_owned())?
        .map_err(|error| Refusal::from(&error).to_string())?;
    let session = tls.get_ref().1;
    if session.alpn_protocol() != Some(tls::ALPN) {
        return Err("the peer did not ask for HTTP/2 in the handshake".into());
    }
    let peer = tls::peer_spiffe(session).map_err(|refusal| refusal.to_string())?;
    let leaf = session.peer_certificates().and_then(<[_]>::first).ok_or("no certificate")?;
    let not_after = CertificateFacts::read(leaf).map_err(|error| error.to_string())?.not_after;
    Ok((tls, peer, not_after))
}

/// Drives the connection and its streams. No new streams after `end` or while draining.
async fn accept_streams(
    mut connection: Connection<TlsStream<Buffered>, Bytes>,
    tunnel: Arc<Tunnel>,
    end: Instant,
    mut drain: drain::Watch,
) {
    let settings = &tunnel.proxy.settings;
    let lost = hbone::lost(connection.ping_pong(), settings.ping_pause, settings.ping_timeout);
    let mut lost = std::pin::pin!(lost);
    let mut streams = JoinSet::new();
    let mut last_call = false;
    loop {
        tokio::select! {
            next = connection.accept() => match next {
                Some(Ok((request, respond))) => {
                    streams.spawn(serve_stream(tunnel.clone(), request, respond));
                }
                // Streams learn of the end by their own errors.
                Some(Err(_)) | None => break,
            },
            Some(done) = streams.join_next() => tunnel.proxy.joined(&tunnel.pod, done),
            _ = &mut lost => break,
            _ = drain.draining(), if !last_call => {
                last_call = true;
                connection.graceful_shutdown();
            }
            _ = tokio::time::sleep_until(end), if !last_call => {
                last_call = true;
                connection.graceful_shutdown();
            }
        }
    }
    drop(connection);
    while let Some(done) = streams.join_next().await {
        tunnel.proxy.joined(&tunnel.pod, done);
    }
}

async fn serve_stream(tunnel: Arc<Tunnel>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let target = match hbone::target(&request, &tunnel.pod.workload.addresses) {
        Ok(target) => target,
        Err(text) => {
            let text = format!("request of {} from {} refused: {text}", tunnel.peer, tunnel.from);
            tunnel.proxy.problem(&tunnel.pod, ProblemKind::Capture, text);
            return refuse(&mut respond, StatusCode::BAD_REQUEST, "bad request");
        }
    };
    let client = SocketAddr::new(
        tunnel.from.ip(),
        hbone::client_port(request.headers()).unwrap_or_else(|| tunnel.from.port()),
    );
    let source_workload =
        tunnel.proxy.view().workload(client.ip()).filter(|workload| workload.identity == tunnel.peer);
    let connection = tunnel.proxy.registry.register(Facts {
        reporter: Reporter::Destination,
        source: tunnel.peer.clone(),
        source_workload,
        client,
        destination: tunnel.pod.workload.clone(),
        target,
    });
    // Registered first: the view is read only now.
    let reason = match connection.check(&*tunnel.proxy.view()) {
        Ok(()) => carry(&tunnel, &connection, request.into_body(), &mut respond).await,
        Err(reason) => {
            refuse(&mut respond, StatusCode::UNAUTHORIZED, &reason.detail);
            reason
        }
    };
    connection.ended(reason);
}

/// Dials, answers and copies; returns how it ended.
async fn carry(
    tunnel: &Tunnel,
    connection: &Registered,
    body: RecvStream,
    respond: &mut SendResponse<Bytes>,
) -> Reason {
    let began = Instant::now();
    let dialed = tokio::select! {
        biased;
        cut = connection.was_cut() => {
            refuse(respond, StatusCode::UNAUTHORIZED, &cut);
            return Reason::new(ReasonKind::Policy, cut);
        }
        _ = poll_fn(|cx| respond.poll_reset(cx)) => {
            return Reason::new(ReasonKind::TunnelReset, "the client gave up before the application answered");
        }
        dialed = dial(tunnel, connection.client, connection.target) => dialed,
    };
    let (app, leg) = match dialed {
        Ok(dialed) => dialed,
        Err(reason) => {
            refuse(respond, StatusCode::SERVICE_UNAVAILABLE, &reason.detail);
            return reason;
        }
    };
    tunnel.proxy.recorder.dial(began.elapsed());
    let app = AppSocket::new(app);
    let send = match respond.send_response(Response::new(()), false) {
        Ok(send) => send,
        Err(error) => return Reason::new(ReasonKind::TunnelReset, error.to_string()),
    };
    connection.opened();
    let ended = both_ways(
        app,
        send,
        body,
        &connection.to_client,
        &connection.to_server,
        tunnel.pod.unread(&tunnel.proxy.settings),
        connection.was_cut(),
    )
    .await;
    drop(leg);
    ended.map_or_else(|broken| broken.into(), |()| Reason::new(ReasonKind::Finished, ""))
}

/// Connects to the application. The client's address is noted before the first packet, so that the application never
/// sees the connection without it.
async fn dial(tunnel: &Tunnel, client: SocketAddr, target: SocketAddr) -> Result<(TcpStream, Leg), Reason> {
    let failed =
        |what: &str, error: std::io::Error| Reason::new(ReasonKind::Dial, format!("{what}: {error}"));
    let (pod, datapath) = (&tunnel.pod, &tunnel.proxy.datapath);
    let socket = sock::new(&pod.netns, &**datapath, target.ip())
        .map_err(|error| Reason::new(ReasonKind::Datapath, format!("cannot make a socket: {error}")))?;
    let source = leg_source(client, target.ip());
    socket.bind(SocketAddr::new(source, 0)).map_err(|error| failed("cannot bind", error))?;
    let local = socket.local_addr().map_err(|error| failed("cannot bind", error))?;
    let leg = socket
        .as_fd()
        .try_clone_to_owned()
        .and_then(|held| Leg::put(datapath.clone(), pod.netns.cookie(), local, client, held));
    let leg =
        leg.map_err(|error| Reason::new(ReasonKind::Datapath, format!("cannot note the client: {error}")))?;
    let app = sock::connect(socket, target, tunnel.proxy.settings.connect_timeout)
        .await
        .map_err(|error| failed("the application does not answer", error))?;
    Ok((app, leg))
}

/// The address the application's server is dialled from.
///
/// IPv4: one of 127.64.0.0/10 by the client, so that no address runs out of ports however many connections wait in
/// TIME_WAIT (28,000 in a minute for a single one). IPv6 has one loopback address; the workload's own is as good.
fn leg_source(client: SocketAddr, target: IpAddr) -> IpAddr {
    if target.is_ipv6() {
        return target;
    }
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(client);
    let low = hash as u32 & 0x003f_ffff;
    // Neither a network's first nor its last address, for the sake of those who filter by habit.
    let low = if low & 0xff == 0 || low & 0xff == 0xff { low ^ 1 } else { low };
    Ipv4Addr::from_bits(0x7f40_0000 | low).into()
}

/// The note about the client behind one of our connections; gone when the connection is.
struct Leg {
    datapath: Arc<dyn Datapath>,
    cookie: u64,
    local: SocketAddr,
    /// The socket once more: while the note is there nobody else gets its port, whose note ours would be taken for.
    _held: OwnedFd,
}

impl Leg {
    fn put(
        datapath: Arc<dyn Datapath>,
        cookie: u64,
        local: SocketAddr,
        client: SocketAddr,
        held: OwnedFd,
    ) -> std::io::Result<Leg> {
        datapath.put_leg(cookie, local, client)?;
        Ok(Leg { datapath, cookie, local, _held: held })
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        self.datapath.del_leg(self.cookie, self.local);
    }
}

/// Answers with a status and the reason, and ends the stream. A peer that is gone needs no answer.
fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode, reason: &str) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert(hbone::REASON, hbone::reason_value(reason));
    if respond.send_response(response, true).is_err() {
        respond.send_reset(H2Reason::CANCEL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legs_spread_over_loopback() {
        let target = "10.1.0.1".parse().unwrap();
        let sources: std::collections::HashSet<_> = (1..=1000)
            .map(|port| leg_source(SocketAddr::new("10.2.0.1".parse().unwrap(), port), target))
            .collect();
        assert!(sources.len() > 990);
        assert!(sources.iter().all(|addr| addr.is_loopback()));
        let v6: IpAddr = "fd00::1".parse().unwrap();
        assert_eq!(leg_source("[fd00::2]:1".parse().unwrap(), v6), v6);
    }
}
