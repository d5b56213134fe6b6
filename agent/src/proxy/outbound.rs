//! Connections that the kernel redirected to us: find out where they wanted to go, and carry them there in a tunnel.
//!
//! The application's connect() has already succeeded, so every failure here is a reset, as a connection shows that died
//! right after it was made.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::copy::{AppSocket, both_ways};
use super::record::{ProblemKind, Reason, ReasonKind, Reporter};
use super::registry::{Facts, Registered};
use super::tunnel::{Route, TunnelError};
use super::view::Workload;
use super::{Pod, Proxy, hbone, sock};

/// Serves one connection accepted on the outbound port, until it ends.
pub(super) async fn serve(proxy: Arc<Proxy>, pod: Arc<Pod>, app: TcpStream, from: SocketAddr) {
    // From here on, whatever returns early resets.
    let app = AppSocket::new(app);
    let from = sock::canonical(from);
    let (target, destination) = match find(&proxy, &pod, from) {
        Ok(found) => found,
        Err(text) => return proxy.problem(&pod, ProblemKind::Capture, text),
    };
    let Some(source_addr) = pod.workload.address_like(target.ip()) else {
        let text = format!("connection to {target} reset: the workload has no address of that family");
        return proxy.problem(&pod, ProblemKind::Capture, text);
    };
    let connection = proxy.registry.register(Facts {
        reporter: Reporter::Source,
        source: pod.workload.identity.clone(),
        source_workload: Some(pod.workload.clone()),
        client: SocketAddr::new(source_addr, from.port()),
        destination,
        target,
    });
    let reason = match connection.check(&*proxy.view()) {
        Ok(()) => carry(&proxy, &pod, &connection, app).await,
        Err(reason) => reason,
    };
    connection.ended(reason);
}

/// Where the application wanted to go, and the workload there.
fn find(proxy: &Proxy, pod: &Pod, from: SocketAddr) -> Result<(SocketAddr, Arc<Workload>), String> {
    let orig = proxy
        .datapath
        .take_orig_dst(pod.netns.cookie(), from)
        .map_err(|error| {
            format!("connection from {from} reset: cannot look up where it wanted to go: {error}")
        })?
        .ok_or_else(|| {
            format!("connection from {from} reset: it dialled the agent's port, nothing redirected it")
        })?;
    let target = SocketAddr::new(sock::from_map(orig.backend), orig.backend_port);
    let destination = proxy
        .view()
        .workload(target.ip())
        .ok_or_else(|| format!("connection to {target} reset: no workload has that address"))?;
    Ok((target, destination))
}

/// Opens the stream and copies; returns how it ended.
async fn carry(proxy: &Proxy, pod: &Arc<Pod>, connection: &Registered, app: AppSocket) -> Reason {
    let route = Route {
        pod: pod.clone(),
        source_addr: connection.client.ip(),
        destination: connection.target.ip(),
        expected: connection.destination.identity.clone(),
    };
    let request = hbone::request(&pod.workload, connection.client, connection.target);
    let opened = tokio::select! {
        biased;
        cut = connection.was_cut() => return Reason::new(ReasonKind::Policy, cut),
        // An application that gave up must not keep a dial going for it.
        error = app.broken() => return Reason::new(ReasonKind::AppReset, error.to_string()),
        opened = proxy.tunnels.open(&route, &request) => opened,
    };
    let stream = match opened {
        Ok(stream) => stream,
        Err(error) => {
            let kind = match &*error {
                TunnelError::Refused(status, _) if *status == http::StatusCode::UNAUTHORIZED => {
                    ReasonKind::Policy
                }
                _ => ReasonKind::Tunnel,
            };
            return Reason::new(kind, error.to_string());
        }
    };
    connection.opened();
    let ended = both_ways(
        app,
        stream.send,
        stream.recv,
        &connection.to_server,
        &connection.to_client,
        pod.unread(&proxy.settings),
        connection.was_cut(),
    )
    .await;
    drop(stream.place);
    ended.map_or_else(|broken| broken.into(), |()| Reason::new(ReasonKind::Finished, ""))
}
