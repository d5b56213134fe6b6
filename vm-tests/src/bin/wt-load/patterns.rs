//! Six ways to open, use and close a connection; every byte is checked at both ends.
//!
//! | pattern | client | server |
//! |---|---|---|
//! | half-close | sends, shuts its side, reads to the end | reads to the end, answers, closes |
//! | server-first | reads, answers, closes | sends at once, reads to the end |
//! | close-at-once | sends, closes without reading | reads to the end |
//! | chunked | sends in small pieces while reading them back | sends every byte back |
//! | full-duplex | sends and reads at the same time | the same |
//! | late-reader | sends, waits, then reads | waits, then reads, then answers |

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::json;

use crate::stream::{Random, expect_end, message, receive, send_chunked};
use crate::{error_name, say};

/// No step of a connection may take longer: a hang is an error with a name.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How late the late readers are.
const LATE: Duration = Duration::from_millis(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    HalfClose,
    ServerFirst,
    CloseAtOnce,
    Chunked,
    FullDuplex,
    LateReader,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    pattern: Pattern,
    addr: SocketAddr,
    /// Connections.
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// Connections at a time.
    #[arg(long, default_value_t = 8)]
    parallel: u64,
    /// Longest message.
    #[arg(long, default_value_t = 65536)]
    max_len: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub(crate) fn run(args: &Args) {
    let (next, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    let errors = Mutex::new(Vec::new());
    let start = Instant::now();
    scope(|scope| {
        for _ in 0..args.parallel {
            let work = || loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= args.count {
                    return;
                }
                let mut random = Random::new(args.seed.wrapping_mul(1_000_003) + number);
                let (seed, len) =
                    (random.number(), usize::try_from(random.below(args.max_len)).expect("small"));
                match client(args.pattern, args.addr, seed, len) {
                    Ok(()) => bytes.fetch_add(len as u64, Ordering::Relaxed),
                    Err((step, e)) => {
                        let text = format!("connection {number}, {step}: {} {e}", error_name(&e));
                        errors.lock().expect("no panic while held").push(text);
                        0
                    }
                };
            };
            // Small stacks: a thousand of them are a test of the mesh, not of memory.
            std::thread::Builder::new()
                .stack_size(128 << 10)
                .spawn_scoped(scope, work)
                .expect("start a thread");
        }
    });
    let errors = errors.into_inner().expect("threads are joined");
    say(&json!({
        "pattern": format!("{:?}", args.pattern),
        "connections": args.count,
        "errors": errors.len(),
        "first_errors": errors.iter().take(5).collect::<Vec<_>>(),
        "bytes": bytes.into_inner(),
        "seconds": start.elapsed().as_secs_f64(),
    }));
}

type Step<T> = Result<T, (&'static str, io::Error)>;

fn step<T>(name: &'static str, result: io::Result<T>) -> Step<T> {
    result.map_err(|e| (name, e))
}

fn timeouts(conn: &TcpStream) -> io::Result<()> {
    conn.set_read_timeout(Some(TIMEOUT))?;
    conn.set_write_timeout(Some(TIMEOUT))
}

fn client(pattern: Pattern, addr: SocketAddr, seed: u64, len: usize) -> Step<()> {
    let mut conn = step("connect", TcpStream::connect_timeout(&addr, TIMEOUT))?;
    step("configure", timeouts(&conn))?;
    match pattern {
        Pattern::HalfClose => {
            step("send", conn.write_all(&message(seed, len)))?;
            step("shut", conn.shutdown(Shutdown::Write))?;
            same(seed, step("receive", receive(&mut conn))?)?;
            step("end", expect_end(&mut conn))
        }
        Pattern::ServerFirst => {
            let theirs = step("receive", receive(&mut conn))?;
            step("send", conn.write_all(&message(theirs, len)))?;
            step("shut", conn.shutdown(Shutdown::Write))?;
            step("end", expect_end(&mut conn))
        }
        Pattern::CloseAtOnce => step("send", conn.write_all(&message(seed, len))),
        Pattern::Chunked | Pattern::FullDuplex => {
            let mut writer = step("clone", conn.try_clone())?;
            scope(|scope| {
                let sender = scope.spawn(move || {
                    step("send", send_chunked(&mut writer, seed, len))?;
                    step("shut", writer.shutdown(Shutdown::Write))
                });
                let theirs = step("receive", receive(&mut conn));
                let end = theirs.and_then(|theirs| {
                    // A chunked server sends our own bytes back; a duplex one has a stream of its own.
                    if pattern == Pattern::Chunked {
                        same(seed, theirs)?
                    }
                    step("end", expect_end(&mut conn))
                });
                sender.join().expect("the sender does not panic")?;
                end
            })
        }
        Pattern::LateReader => {
            step("send", conn.write_all(&message(seed, len)))?;
            step("shut", conn.shutdown(Shutdown::Write))?;
            sleep(LATE * 2);
            same(seed, step("receive", receive(&mut conn))?)?;
            step("end", expect_end(&mut conn))
        }
    }
}

/// The server's side of one connection.
pub(crate) fn serve(pattern: Pattern, mut conn: TcpStream) -> io::Result<()> {
    timeouts(&conn)?;
    match pattern {
        Pattern::HalfClose | Pattern::LateReader => {
            if pattern == Pattern::LateReader {
                sleep(LATE);
            }
            let seed = receive(&mut conn)?;
            expect_end(&mut conn)?;
            // The answer has its own length, so that sizes of both directions differ.
            conn.write_all(&message(seed, usize::try_from(seed % 32768).expect("small")))
        }
        Pattern::ServerFirst => {
            let seed = Random::new(conn.peer_addr()?.port().into()).number();
            conn.write_all(&message(seed, usize::try_from(seed % 32768).expect("small")))?;
            if receive(&mut conn)? != seed {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer to another connection"));
            }
            expect_end(&mut conn)
        }
        Pattern::CloseAtOnce => {
            receive(&mut conn)?;
            expect_end(&mut conn)
        }
        Pattern::Chunked => echo(&mut conn).map(drop),
        Pattern::FullDuplex => {
            let mut writer = conn.try_clone()?;
            let seed = Random::new(conn.peer_addr()?.port().into()).number();
            scope(|scope| {
                let sender = scope.spawn(move || {
                    send_chunked(&mut writer, seed, usize::try_from(seed % 65536).expect("small"))?;
                    writer.shutdown(Shutdown::Write)
                });
                receive(&mut conn)?;
                expect_end(&mut conn)?;
                sender.join().expect("the sender does not panic")
            })
        }
    }
}

/// Sends everything back until the end of the peer. Returns the bytes.
pub(crate) fn echo(conn: &mut TcpStream) -> io::Result<u64> {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    loop {
        match conn.read(&mut buffer)? {
            0 => return Ok(total),
            len => {
                conn.write_all(&buffer[..len])?;
                total += len as u64;
            }
        }
    }
}

fn same(sent: u64, received: u64) -> Step<()> {
    if sent == received {
        return Ok(());
    }
    Err(("compare", io::Error::new(io::ErrorKind::InvalidData, "the answer to another connection")))
}
