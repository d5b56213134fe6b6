//! Figures. Each prints the median of its samples; the caller interleaves and compares.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::{error_name, say};

#[derive(clap::Args)]
pub(crate) struct RttArgs {
    addr: SocketAddr,
    #[arg(long, default_value_t = 64)]
    size: usize,
    #[arg(long, default_value_t = 5000)]
    rounds: usize,
}

pub(crate) fn rtt(args: &RttArgs) {
    let mut samples = Vec::with_capacity(args.rounds);
    let run = |samples: &mut Vec<Duration>| -> std::io::Result<()> {
        let mut conn = TcpStream::connect(args.addr)?;
        conn.set_nodelay(true)?;
        conn.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut buffer = vec![1; args.size];
        let warm_up = args.rounds / 10;
        for round in 0..args.rounds + warm_up {
            let start = Instant::now();
            conn.write_all(&buffer)?;
            conn.read_exact(&mut buffer)?;
            if round >= warm_up {
                samples.push(start.elapsed());
            }
        }
        Ok(())
    };
    let end = run(&mut samples);
    report(samples, &end.err().map(|e| error_name(&e)).into_iter().collect::<Vec<_>>());
}

/// Microseconds at three ranks, and what went wrong.
fn report(mut samples: Vec<Duration>, errors: &[String]) {
    samples.sort_unstable();
    let rank = |percent: usize| {
        let last = samples.len().saturating_sub(1);
        samples.get(last * percent / 100).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    say(&json!({
        "samples": samples.len(),
        "p50_us": rank(50),
        "p90_us": rank(90),
        "p99_us": rank(99),
        "errors": errors.len(),
        "first_errors": errors.iter().take(3).collect::<Vec<_>>(),
    }));
}

#[derive(clap::Args)]
pub(crate) struct CrrArgs {
    addr: SocketAddr,
    #[arg(long, default_value_t = 1000)]
    rounds: usize,
}

pub(crate) fn crr(args: &CrrArgs) {
    let mut samples = Vec::with_capacity(args.rounds);
    let mut errors = Vec::new();
    let once = || -> std::io::Result<()> {
        let mut conn = TcpStream::connect(args.addr)?;
        conn.set_nodelay(true)?;
        conn.set_read_timeout(Some(Duration::from_secs(10)))?;
        conn.write_all(b"1")?;
        conn.read_exact(&mut [0])
    };
    for _ in 0..args.rounds {
        let start = Instant::now();
        match once() {
            Ok(()) => samples.push(start.elapsed()),
            Err(e) => errors.push(error_name(&e)),
        }
    }
    report(samples, &errors);
}

#[derive(clap::Args)]
pub(crate) struct BulkArgs {
    addr: SocketAddr,
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// Bytes per write.
    #[arg(long, default_value_t = 131_072)]
    size: usize,
}

/// Counts what the sink has read, not what the kernel has taken.
pub(crate) fn bulk(args: &BulkArgs) {
    let run = || -> std::io::Result<(u64, Duration)> {
        let mut conn = TcpStream::connect(args.addr)?;
        conn.set_read_timeout(Some(Duration::from_secs(20)))?;
        let buffer = vec![1; args.size];
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(args.millis) {
            conn.write_all(&buffer)?;
        }
        conn.shutdown(Shutdown::Write)?;
        let mut total = [0; 8];
        conn.read_exact(&mut total)?;
        Ok((u64::from_be_bytes(total), start.elapsed()))
    };
    say(&match run() {
        Ok((bytes, time)) => json!({"bytes": bytes, "mb_per_s": bytes as f64 / time.as_secs_f64() / 1e6}),
        Err(e) => json!({"error": error_name(&e)}),
    });
}
