//! One connection, looked at closely.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect as sock_connect, socket,
};
use serde_json::{Value, json};

use crate::{error_name, now_ms, say};

#[derive(clap::Args)]
pub(crate) struct ConnectArgs {
    addr: SocketAddr,
    /// Send this, then shut the sending side.
    #[arg(long)]
    send: Option<String>,
    /// Bind here first.
    #[arg(long)]
    bind: Option<SocketAddr>,
    /// Use an IPv6 socket for an IPv4 address.
    #[arg(long)]
    mapped: bool,
    #[arg(long, default_value_t = 5000)]
    timeout_ms: u64,
    /// How often, one after the other.
    #[arg(long, default_value_t = 1)]
    times: u32,
}

/// Prints what the socket calls said: `connect` is "ok" or the errno's name; the answer is read to the end.
pub(crate) fn connect(args: &ConnectArgs) {
    for _ in 0..args.times {
        say(&connect_once(args));
    }
}

fn connect_once(args: &ConnectArgs) -> Value {
    let start = Instant::now();
    let timeout = Duration::from_millis(args.timeout_ms);
    let mut conn = match dial(args, timeout) {
        Ok(conn) => conn,
        Err(e) => return json!({"connect": error_name(&e), "ms": start.elapsed().as_millis()}),
    };
    let connected_ms = start.elapsed().as_millis();
    let _ = conn.set_read_timeout(Some(timeout));
    let mut end = Ok(());
    if let Some(text) = &args.send {
        end = conn.write_all(text.as_bytes()).and_then(|()| conn.shutdown(Shutdown::Write));
    }
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while end.is_ok() && answer.len() < 1 << 20 {
        match conn.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => answer.extend(&buffer[..len]),
            Err(e) => end = Err(e),
        }
    }
    json!({
        "connect": "ok",
        "connected_ms": connected_ms,
        "ms": start.elapsed().as_millis(),
        "peer": conn.peer_addr().map(|a| a.to_string()).unwrap_or_default(),
        "local": conn.local_addr().map(|a| a.to_string()).unwrap_or_default(),
        "answer": String::from_utf8_lossy(&answer),
        "end": end.map_or_else(|e| error_name(&e), |()| "eof".to_owned()),
    })
}

fn dial(args: &ConnectArgs, timeout: Duration) -> std::io::Result<TcpStream> {
    if args.bind.is_none() && !args.mapped {
        return TcpStream::connect_timeout(&args.addr, timeout);
    }
    let to = match args.addr {
        SocketAddr::V4(v4) if args.mapped => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        addr => addr,
    };
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(from) = args.bind {
        bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    }
    let conn = TcpStream::from(fd);
    // SO_SNDTIMEO bounds a blocking connect().
    conn.set_write_timeout(Some(timeout))?;
    sock_connect(conn.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(conn)
}

#[derive(clap::Args)]
pub(crate) struct HoldArgs {
    addr: SocketAddr,
    /// Send a byte and await it back this often; never: stay idle.
    #[arg(long)]
    every_ms: Option<u64>,
    #[arg(long, default_value_t = 1)]
    connections: usize,
}

/// Prints a line once all are connected and have had one byte back, then one per connection when it ends.
pub(crate) fn hold(args: &HoldArgs) {
    let mut conns = Vec::new();
    for _ in 0..args.connections {
        let opened = TcpStream::connect_timeout(&args.addr, Duration::from_secs(5)).and_then(|mut conn| {
            conn.set_nodelay(true)?;
            conn.set_read_timeout(Some(Duration::from_secs(5)))?;
            conn.write_all(b"h")?;
            conn.read_exact(&mut [0])?;
            conn.set_read_timeout(args.every_ms.map(Duration::from_millis))?;
            Ok(conn)
        });
        match opened {
            Ok(conn) => conns.push(conn),
            Err(e) => {
                say(&json!({"held": conns.len(), "error": error_name(&e)}));
                return;
            }
        }
    }
    let local: Vec<String> = conns.iter().filter_map(|c| Some(c.local_addr().ok()?.to_string())).collect();
    say(&json!({"held": conns.len(), "local": local}));
    let every = args.every_ms;
    let threads: Vec<_> =
        conns.into_iter().map(|conn| std::thread::spawn(move || watch(conn, every))).collect();
    for thread in threads {
        thread.join().expect("a watcher does not panic");
    }
}

fn watch(mut conn: TcpStream, every_ms: Option<u64>) {
    let (mut answers, mut last_ms) = (0_u64, now_ms());
    let how = loop {
        match conn.read(&mut [0; 64]) {
            Ok(0) => break "eof".to_owned(),
            Ok(len) => {
                answers += len as u64;
                last_ms = now_ms();
                std::thread::sleep(Duration::from_millis(every_ms.unwrap_or(0)));
            }
            // The pause between two bytes is the read timeout.
            Err(e)
                if every_ms.is_some() && matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) => break error_name(&e),
        }
        if every_ms.is_some()
            && let Err(e) = conn.write_all(b"h")
        {
            break error_name(&e);
        }
    };
    say(&json!({"ended": how, "at_ms": now_ms(), "last_answer_ms": last_ms, "answers": answers}));
}

/// Prints how many bytes were taken before a second passed without progress.
pub(crate) fn flood(addr: SocketAddr) {
    let mut conn = match TcpStream::connect_timeout(&addr, Duration::from_secs(5)) {
        Ok(conn) => conn,
        Err(e) => return say(&json!({"connect": error_name(&e)})),
    };
    conn.set_write_timeout(Some(Duration::from_secs(1))).expect("set a timeout");
    let buffer = vec![7; 64 << 10];
    let mut taken = 0_u64;
    let end = loop {
        match conn.write(&buffer) {
            Ok(len) => taken += len as u64,
            Err(e) => break error_name(&e),
        }
        if taken > 1 << 30 {
            break "no end".to_owned();
        }
    };
    say(&json!({"connect": "ok", "taken": taken, "end": end}));
    std::thread::park();
}

#[derive(clap::Args)]
pub(crate) struct UdpArgs {
    addr: SocketAddr,
    #[arg(long, default_value = "ask")]
    send: String,
    /// Bytes to append, to force fragments.
    #[arg(long, default_value_t = 0)]
    pad: usize,
    /// connect() the socket instead of addressing each datagram.
    #[arg(long)]
    connected: bool,
    #[arg(long, default_value_t = 1)]
    times: u32,
    #[arg(long, default_value_t = 1000)]
    timeout_ms: u64,
}

pub(crate) fn udp(args: &UdpArgs) {
    let any = if args.addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).expect("bind a UDP socket");
    socket.set_read_timeout(Some(Duration::from_millis(args.timeout_ms))).expect("set a timeout");
    let mut text = args.send.clone().into_bytes();
    text.resize(text.len() + args.pad, b'.');
    let mut buffer = vec![0; 64 << 10];
    for _ in 0..args.times {
        let sent = if args.connected {
            socket.connect(args.addr).and_then(|()| socket.send(&text))
        } else {
            socket.send_to(&text, args.addr)
        };
        let result = sent.and_then(|_| socket.recv_from(&mut buffer));
        say(&match result {
            Ok((len, from)) => {
                json!({"answer": "ok", "same": buffer[..len] == text[..], "from": from.to_string()})
            }
            Err(e) => json!({"answer": error_name(&e)}),
        });
    }
}
