//! Servers: a thread per connection, totals on request (a line on stdin).

use std::io::{self, BufRead, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, sleep};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::json;

use crate::patterns::{self, Pattern};
use crate::{error_name, say};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    /// Everything back.
    Echo,
    /// Counts to the end, then answers with the count (8 bytes, big-endian).
    Sink,
    /// Says `peer local` and closes.
    Whoami,
    /// Greets first, then echoes.
    Greet,
    /// Accepts and never reads.
    Stall,
    /// Datagrams back.
    Udp,
    Pattern(Pattern),
}

#[derive(Clone, Debug)]
pub(crate) struct Listener {
    mode: Mode,
    addr: SocketAddr,
}

impl FromStr for Listener {
    type Err = String;

    fn from_str(text: &str) -> Result<Listener, String> {
        let (mode, addr) = text.split_once('=').ok_or("want MODE=ADDR")?;
        let mode = match mode {
            "echo" => Mode::Echo,
            "sink" => Mode::Sink,
            "whoami" => Mode::Whoami,
            "greet" => Mode::Greet,
            "stall" => Mode::Stall,
            "udp" => Mode::Udp,
            pattern => Mode::Pattern(Pattern::from_str(pattern, false)?),
        };
        Ok(Listener { mode, addr: addr.parse().map_err(|e| format!("{addr}: {e}"))? })
    }
}

#[derive(Default)]
struct Totals {
    accepted: AtomicU64,
    good: AtomicU64,
    bad: AtomicU64,
    bytes: AtomicU64,
    last_error: std::sync::Mutex<String>,
}

pub(crate) fn run(listeners: &[Listener]) {
    let totals = Arc::new(Totals::default());
    for &Listener { mode, addr } in listeners {
        let totals = Arc::clone(&totals);
        if matches!(mode, Mode::Udp) {
            let socket = UdpSocket::bind(addr).unwrap_or_else(|e| panic!("bind {addr}: {e}"));
            std::thread::spawn(move || udp(&socket, &totals));
        } else {
            let socket = TcpListener::bind(addr).unwrap_or_else(|e| panic!("listen on {addr}: {e}"));
            // The default backlog of 128 would measure the server's accept loop when a thousand come at once.
            nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::MAXCONN).expect("raise the backlog");
            std::thread::spawn(move || accept(mode, &socket, &totals));
        }
    }
    say(&json!({"ready": true}));
    for _ in io::stdin().lock().lines().map_while(Result::ok) {
        say(&json!({
            "accepted": totals.accepted.load(Ordering::Relaxed),
            "good": totals.good.load(Ordering::Relaxed),
            "bad": totals.bad.load(Ordering::Relaxed),
            "bytes": totals.bytes.load(Ordering::Relaxed),
            "last_error": *totals.last_error.lock().expect("no panic while held"),
        }));
    }
}

fn accept(mode: Mode, socket: &TcpListener, totals: &Arc<Totals>) {
    loop {
        let Ok((conn, _)) = socket.accept() else {
            sleep(Duration::from_millis(10));
            continue;
        };
        totals.accepted.fetch_add(1, Ordering::Relaxed);
        let totals = Arc::clone(totals);
        let work = move || match serve(mode, conn, &totals.bytes) {
            Ok(()) => {
                totals.good.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) => {
                totals.bad.fetch_add(1, Ordering::Relaxed);
                *totals.last_error.lock().expect("no panic while held") = format!("{} {e}", error_name(&e));
            }
        };
        if let Err(e) = Builder::new().stack_size(256 << 10).spawn(work) {
            eprintln!("wt-load serve: no thread for a connection: {e}");
        }
    }
}

fn serve(mode: Mode, mut conn: TcpStream, bytes: &AtomicU64) -> io::Result<()> {
    conn.set_nodelay(true)?;
    match mode {
        Mode::Pattern(pattern) => return patterns::serve(pattern, conn),
        Mode::Whoami => return writeln!(conn, "{} {}", conn.peer_addr()?, conn.local_addr()?),
        Mode::Greet => conn.write_all(b"220 hello\n")?,
        Mode::Stall => loop {
            sleep(Duration::from_secs(3600));
        },
        Mode::Sink => {
            let mut buffer = vec![0; 256 << 10];
            let mut total = 0_u64;
            loop {
                match conn.read(&mut buffer)? {
                    0 => break,
                    len => total += len as u64,
                }
            }
            bytes.fetch_add(total, Ordering::Relaxed);
            return conn.write_all(&total.to_be_bytes());
        }
        Mode::Echo | Mode::Udp => {}
    }
    bytes.fetch_add(patterns::echo(&mut conn)?, Ordering::Relaxed);
    Ok(())
}

fn udp(socket: &UdpSocket, totals: &Totals) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        totals.accepted.fetch_add(1, Ordering::Relaxed);
        totals.bytes.fetch_add(len as u64, Ordering::Relaxed);
        let _ = socket.send_to(&buffer[..len], from);
    }
}
