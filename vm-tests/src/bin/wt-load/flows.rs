//! Many flows at once, as a list on stdin asks for them: did each get there and back?

use std::io::{BufRead, Error, Read, Result};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use serde_json::Value;

use crate::{error_name, say};

/// Echo request, code 0, no checksum (the kernel's business), any number, sequence 1.
const PING: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];
const PING6: [u8; 8] = [128, 0, 0, 0, 0, 0, 0, 1];

/// Each line is a list of `[protocol, address, timeout in ms]`; the answer is a list in the same order: `ok`, or the name
/// of an error. All flows of a line run at the same time.
pub(crate) fn run() {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let asked: Vec<(String, SocketAddr, u64)> = serde_json::from_str(&line).expect("a list of flows");
        let answers: Vec<Value> = thread::scope(|scope| {
            let threads: Vec<_> = asked
                .iter()
                .map(|(protocol, addr, ms)| {
                    let one = move || flow(protocol, *addr, Duration::from_millis(*ms));
                    thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, one).expect("a thread")
                })
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join().expect("a flow does not panic"));
            ended
                .map(|end| end.map_or_else(|error| error_name(&error), |()| "ok".to_owned()).into())
                .collect()
        });
        say(&answers.into());
    }
}

fn flow(protocol: &str, addr: SocketAddr, timeout: Duration) -> Result<()> {
    if protocol == "tcp" {
        let mut conn = TcpStream::connect_timeout(&addr, timeout)?;
        conn.set_read_timeout(Some(timeout))?;
        // The server speaks first: a byte of it proves the whole way, behind a tunnel too.
        return conn.read_exact(&mut [0]);
    }
    let (socket, message): (UdpSocket, &[u8]) = match (protocol, addr) {
        ("icmp", SocketAddr::V4(_)) => (ping(AddressFamily::Inet, SockProtocol::Icmp)?, &PING),
        ("icmp", SocketAddr::V6(_)) => (ping(AddressFamily::Inet6, SockProtocol::IcmpV6)?, &PING6),
        (_, SocketAddr::V4(_)) => (UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?, b"?"),
        (_, SocketAddr::V6(_)) => (UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?, b"?"),
    };
    socket.set_read_timeout(Some(timeout))?;
    socket.send_to(message, addr)?;
    let mut buffer = [0; 64];
    let (_, from) = socket.recv_from(&mut buffer)?;
    if from.ip() == addr.ip() { Ok(()) } else { Err(Error::other("another answered")) }
}

/// A ping socket: the kernel fills in number and checksum, and gives it the answers to its own requests only.
fn ping(family: AddressFamily, protocol: SockProtocol) -> Result<UdpSocket> {
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    Ok(UdpSocket::from(fd))
}
