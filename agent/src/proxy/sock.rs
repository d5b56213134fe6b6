//! The agent's TCP sockets: made inside a workload's network namespace, marked before they touch the network, and
//! with the options that all of them share.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::datapath::Datapath;
use crate::netns::Netns;

/// Silence after which the kernel probes the peer, the pause between probes, and how many may fail.
const KEEPALIVE_IDLE_SECONDS: u32 = 60;
const KEEPALIVE_PAUSE_SECONDS: u32 = 15;
const KEEPALIVE_PROBES: u32 = 4;
/// Bytes that one read of a tunnel's socket takes.
const TUNNEL_READ: usize = 128 * 1024;
/// Connections that wait in a listener's queue; the kernel caps it at net.core.somaxconn.
const BACKLOG: u32 = 4096;

/// An unconnected, marked socket of the family of `addr` inside `netns`.
///
/// The mark comes first: the programs exempt marked sockets from capture and from the ban on the agent's ports, and a
/// socket that cannot be marked must not be used at all.
pub(super) fn new(netns: &Netns, datapath: &dyn Datapath, addr: IpAddr) -> io::Result<TcpSocket> {
    let socket = netns.run(|| match addr {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    })??;
    datapath.mark(socket.as_fd())?;
    tune(&socket);
    Ok(socket)
}

/// A listener inside `netns`. Never SO_REUSEPORT: root of the workload could join the group and take connections.
pub(super) fn listen(netns: &Netns, datapath: &dyn Datapath, addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = new(netns, datapath, addr.ip())?;
    socket.set_reuseaddr(true)?;
    if addr.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Connects within `limit`; a slower peer is `TimedOut`.
///
/// The peer's kernel may have the connection before we look: whoever gives up in between leaves a reset, not what looks
/// like a proper end.
pub(super) async fn connect(socket: TcpSocket, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let linger = |on| nix::libc::linger { l_onoff: on, l_linger: 0 };
    setsockopt(&socket, sockopt::Linger, &linger(1))?;
    let stream =
        tokio::time::timeout(limit, socket.connect(to)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    setsockopt(&stream, sockopt::Linger, &linger(0))?;
    Ok(stream)
}

/// Options of every socket. None is needed for correctness, so what a kernel lacks is let pass.
///
/// Accepted sockets inherit them from their listener. The congestion control is named because hosts that default to
/// BBR pace even loopback and veth, which costs two thirds of the throughput there.
fn tune(socket: &TcpSocket) {
    let _ = socket.set_nodelay(true);
    let _ = socket.set_keepalive(true);
    let _ = setsockopt(socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS);
    let _ = setsockopt(socket, sockopt::TcpKeepInterval, &KEEPALIVE_PAUSE_SECONDS);
    let _ = setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES);
    let _ = ["cubic", "reno"]
        .iter()
        .any(|name| setsockopt(socket, sockopt::TcpCongestion, &(*name).into()).is_ok());
}

/// A tunnel's socket.
pub(super) type Buffered = BufReader<TcpStream>;

/// Reads a tunnel's socket in large pieces: rustls asks for 4 KiB at a time, which would be a system call each.
pub(super) fn buffered(stream: TcpStream) -> Buffered {
    BufReader::with_capacity(TUNNEL_READ, stream)
}

/// Closes `stream` with a reset, as an application sees a connection that was refused or cut.
pub(super) fn reset(stream: TcpStream) {
    // Without the option the close is a FIN: still closed, only less clear about why.
    let _ = stream.set_zero_linger();
}

/// IPv4 in its own form: a dual-stack listener reports it mapped into IPv6.
pub(super) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The address as kernel maps hold it.
pub fn to_map(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}

/// The address out of a kernel map.
pub fn from_map(addr: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(addr)).to_canonical()
}

/// The address that listens on everything, in the family of `v6`.
pub(super) fn unspecified(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// The loopback address of a family.
pub(super) fn loopback(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}
