//! Clients of known protocols: each connection carries a known text there and back, the way real programs do.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::json;

use crate::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[arg(value_enum)]
    protocol: Protocol,
    addr: SocketAddr,
    /// What every connection carries both ways.
    #[arg(long)]
    text: String,
    #[arg(long, default_value_t = 1)]
    count: u64,
    #[arg(long, default_value_t = 8)]
    parallel: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    /// HTTP/1.1: the text in path and header; the server answers with what the header said.
    Http,
    /// RESP, as of redis: SET, GET, QUIT.
    Redis,
    /// The server speaks first, as in SMTP; then it echoes.
    Greeting,
    /// Binary with the text in it, echoed.
    Raw,
}

/// Prints how many connections got the text back.
pub(crate) fn run(args: &Args) {
    let (next, good) = (AtomicU64::new(0), AtomicU64::new(0));
    let failures: Mutex<Vec<String>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..args.parallel {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < args.count {
                    match once(args) {
                        Ok(()) => _ = good.fetch_add(1, Ordering::Relaxed),
                        Err(error) => failures.lock().expect("no panic under it").push(error.to_string()),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic under it");
    say(&json!({
        "good": good.into_inner(),
        "errors": failures.len(),
        "first_error": failures.first(),
    }));
}

fn once(args: &Args) -> std::io::Result<()> {
    let timeout = Duration::from_secs(20);
    let mut conn = TcpStream::connect_timeout(&args.addr, timeout)?;
    conn.set_read_timeout(Some(timeout))?;
    let text = &args.text;
    let request = match args.protocol {
        Protocol::Http => {
            format!("GET /{text} HTTP/1.1\r\nHost: server\r\nX-Text: {text}\r\nConnection: close\r\n\r\n")
        }
        Protocol::Redis => {
            let len = text.len();
            format!("SET {text} {text}\r\n*2\r\n$3\r\nGET\r\n${len}\r\n{text}\r\nQUIT\r\n")
        }
        Protocol::Greeting => {
            let mut greeting = String::new();
            BufReader::new(&conn).read_line(&mut greeting)?;
            if !greeting.starts_with("220 ") {
                return Err(std::io::Error::new(ErrorKind::InvalidData, format!("greeting {greeting:?}")));
            }
            text.clone()
        }
        Protocol::Raw => format!("\0\u{1}\u{7f}{text}\0"),
    };
    conn.write_all(request.as_bytes())?;
    if matches!(args.protocol, Protocol::Greeting | Protocol::Raw) {
        conn.shutdown(Shutdown::Write)?;
    }
    let mut answer = Vec::new();
    conn.read_to_end(&mut answer)?;
    if answer.windows(text.len()).any(|window| window == text.as_bytes()) {
        return Ok(());
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    Err(std::io::Error::new(ErrorKind::InvalidData, format!("the answer lacks the text: {answer:?}")))
}
