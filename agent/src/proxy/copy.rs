//! Bytes both ways between an application's socket and a tunnel stream, with the connection's manners kept:
//!
//! | one end | the other end sees |
//! |---|---|
//! | FIN | END_STREAM, and the other direction goes on |
//! | RST | RST_STREAM, at once, also while nothing can be written |
//! | stops reading | its writer stops: nothing is read before there is room for it |
//!
//! Memory per connection is one chunk per direction, plus what HTTP/2 flow control admits: the receive window is
//! opened only after the application's socket took the bytes. [`Budget`] bounds the sum over a workload.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::task::coop::consume_budget;

use super::record::{Reason as Ended, ReasonKind};
use super::sock;

/// A read is between these: it grows while reads fill it, so a busy connection makes few and large frames, and an idle
/// one holds little.
const SMALLEST_CHUNK: usize = 4 * 1024;
const LARGEST_CHUNK: usize = 64 * 1024;

/// Why a connection ended other than by both ends saying that they have finished.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The application reset its connection, or its kernel gave up.
    #[error("the application's connection broke: {0}")]
    App(io::Error),
    /// The other agent reset the stream, or the tunnel broke.
    #[error("the tunnel stream broke: {0}")]
    Tunnel(h2::Error),
    /// The stream was closed under us without a cause.
    #[error("the tunnel stream closed early")]
    Closed,
    /// The application does not read, and its workload already holds as much unread as it may.
    #[error(
        "the applications of this workload leave {0} bytes unread, which is all that the agent keeps for them"
    )]
    Unread(usize),
    /// Told to end, by policy or shutdown.
    #[error("{0}")]
    Cut(Arc<str>),
}

impl From<Broken> for Ended {
    fn from(broken: Broken) -> Ended {
        let kind = match &broken {
            Broken::App(_) => ReasonKind::AppReset,
            Broken::Tunnel(_) | Broken::Closed => ReasonKind::TunnelReset,
            Broken::Unread(_) => ReasonKind::Memory,
            // The one who cut has said the kind; it overrules this one.
            Broken::Cut(_) => ReasonKind::Policy,
        };
        Ended::new(kind, broken.to_string())
    }
}

/// How much the applications of one workload may leave unread in the agent.
///
/// Far above what readers that are merely slow need; a workload that reaches it has many connections that it does not
/// read at all, and further ones are reset rather than the node's memory used up.
#[derive(Debug)]
pub(super) struct Budget {
    held: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// What each connection may hold even when the budget is spent, so that those that do read go on.
    const ALWAYS: usize = 256 * 1024;

    pub(super) fn new(limit: usize) -> Budget {
        Budget { held: AtomicUsize::new(0), limit }
    }
}

/// The application's socket: closed by reset unless the connection came to its proper end. A task that is aborted or
/// panics must not look like a complete transfer.
pub(super) struct AppSocket(Option<TcpStream>);

impl AppSocket {
    pub(super) fn new(stream: TcpStream) -> AppSocket {
        AppSocket(Some(stream))
    }

    fn stream(&self) -> &TcpStream {
        self.0.as_ref().expect("taken only by finish, which consumes self")
    }

    /// Resolves when the application's connection is in error, which a FIN is not.
    pub(super) async fn broken(&self) -> io::Error {
        broken(self.stream()).await
    }

    fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>) {
        self.0.as_mut().expect("taken only by finish, which consumes self").split()
    }

    fn finish(mut self) {
        self.0.take();
    }
}

impl Drop for AppSocket {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            sock::reset(stream);
        }
    }
}

/// Copies until both directions have ended, one breaks, or `cut` resolves. Whatever is not a proper end resets both.
///
/// `up` counts bytes from the application to the tunnel, `down` those that came back, when they were written.
pub(super) async fn both_ways(
    mut app: AppSocket,
    mut send: SendStream<Bytes>,
    mut recv: RecvStream,
    up: &AtomicU64,
    down: &AtomicU64,
    budget: &Budget,
    cut: impl Future<Output = Arc<str>>,
) -> Result<(), Broken> {
    let received_all = Notify::new();
    let (read, write) = app.split();
    let result = tokio::select! {
        biased;
        reason = cut => Err(Broken::Cut(reason)),
        result = async {
            tokio::try_join!(
                to_tunnel(read, &mut send, up, &received_all),
                async {
                    to_app(write.as_ref(), &mut recv, down, budget).await?;
                    received_all.notify_one();
                    Ok(())
                },
            )
        } => result.map(drop),
    };
    match result {
        Ok(()) => app.finish(),
        Err(_) => send.send_reset(Reason::CANCEL),
    }
    result
}

async fn to_tunnel(
    mut app: ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    count: &AtomicU64,
    received_all: &Notify,
) -> Result<(), Broken> {
    let mut size = SMALLEST_CHUNK;
    let mut buffer = BytesMut::new();
    loop {
        consume_budget().await;
        // Readable first, room second: an idle connection holds next to no share of the tunnel's window.
        tokio::select! {
            biased;
            ready = app.readable() => ready.map_err(Broken::App)?,
            reset = poll_fn(|cx| send.poll_reset(cx)) => return Err(stream_reset(reset)),
        }
        let room = tokio::select! {
            biased;
            room = room(send, size) => room?,
            error = broken(app.as_ref()) => return Err(Broken::App(error)),
        };
        buffer.reserve(size);
        let mut into = bytes::BufMut::limit(&mut buffer, room.min(size));
        // Once: `poll_read` knows that a short read has emptied the socket, where `try_read` would ask again.
        let read = match poll_once(app.read_buf(&mut into)).await {
            Some(read) => read.map_err(Broken::App)?,
            None => continue,
        };
        if read == 0 {
            break;
        }
        send.send_data(buffer.split().freeze(), false).map_err(Broken::Tunnel)?;
        count.fetch_add(read as u64, Ordering::Relaxed);
        if read < room.min(size) && send.capacity() > SMALLEST_CHUNK {
            send.reserve_capacity(SMALLEST_CHUNK); // It rests: what it had taken goes back.
        }
        if read == size && size < LARGEST_CHUNK {
            size *= 4;
        } else if read < size / 4 && size > SMALLEST_CHUNK {
            size /= 4;
            buffer = BytesMut::new();
        }
    }
    drop(buffer);
    send.send_data(Bytes::new(), true).map_err(Broken::Tunnel)?;
    // The other direction may be stuck in a write to the application; a reset must still get through.
    tokio::select! {
        biased;
        _ = received_all.notified() => Ok(()),
        reset = poll_fn(|cx| send.poll_reset(cx)) => Err(stream_reset(reset)),
    }
}

/// Polls a future to see what it has now.
async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Room that is good enough not to ask for more.
const ENOUGH: usize = 1024;

/// Waits until the tunnel takes at least one byte; returns how many it takes, `wanted` if it can.
///
/// What is left of an earlier reservation is used first: reserving wakes the very task that reserves (h2 tells about
/// capacity whoever last polled the stream), and tokio another worker for it.
async fn room(send: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, Broken> {
    if wanted == SMALLEST_CHUNK && send.capacity() >= ENOUGH {
        return Ok(send.capacity());
    }
    send.reserve_capacity(wanted);
    loop {
        let room = send.capacity();
        if room > 0 {
            return Ok(room);
        }
        match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(Broken::Tunnel(error)),
            None => return Err(Broken::Closed),
        }
    }
}

async fn to_app(
    app: &TcpStream,
    recv: &mut RecvStream,
    count: &AtomicU64,
    budget: &Budget,
) -> Result<(), Broken> {
    let mut waiting = Waiting::new(budget);
    let mut ended = false;
    loop {
        consume_budget().await;
        while let Some(front) = waiting.front() {
            match app.try_write(front) {
                Ok(written) => {
                    waiting.advance(written);
                    count.fetch_add(written as u64, Ordering::Relaxed);
                    // Only now may the peer send as much again.
                    recv.flow_control().release_capacity(written).map_err(Broken::Tunnel)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(Broken::App(error)),
            }
        }
        if ended && waiting.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            chunk = recv.data(), if !ended => match chunk {
                Some(chunk) => waiting.push(chunk.map_err(Broken::Tunnel)?)?,
                None => ended = true,
            },
            ready = app.writable(), if !waiting.is_empty() => ready.map_err(Broken::App)?,
            error = broken(app), if waiting.is_empty() => return Err(Broken::App(error)),
        }
    }
    match shutdown(app.as_raw_fd(), Shutdown::Write) {
        // The application reset after it had everything; its reader will say so.
        Ok(()) | Err(nix::Error::ENOTCONN) => Ok(()),
        Err(error) => Err(Broken::App(error.into())),
    }
}

/// What the application has not taken yet; at most one stream window.
///
/// It is taken out of the HTTP/2 connection although it cannot be written: frames that wait there are counted, and many
/// small ones of one slow reader would end the connection of everybody. Small chunks are put together here.
struct Waiting<'a> {
    chunks: VecDeque<Bytes>,
    small: BytesMut,
    len: usize,
    budget: &'a Budget,
}

impl<'a> Waiting<'a> {
    const SMALL: usize = 2 * 1024;

    fn new(budget: &'a Budget) -> Waiting<'a> {
        Waiting { chunks: VecDeque::new(), small: BytesMut::new(), len: 0, budget }
    }

    fn push(&mut self, chunk: Bytes) -> Result<(), Broken> {
        if chunk.is_empty() {
            return Ok(());
        }
        self.len += chunk.len();
        let held = self.budget.held.fetch_add(chunk.len(), Ordering::Relaxed) + chunk.len();
        if held > self.budget.limit && self.len > Budget::ALWAYS {
            return Err(Broken::Unread(held));
        }
        if chunk.len() < Self::SMALL && !(self.is_empty()) {
            self.small.extend_from_slice(&chunk);
            if self.small.len() >= LARGEST_CHUNK {
                self.chunks.push_back(self.small.split().freeze());
            }
            return Ok(());
        }
        if !self.small.is_empty() {
            self.chunks.push_back(self.small.split().freeze());
        }
        self.chunks.push_back(chunk);
        Ok(())
    }

    fn front(&mut self) -> Option<&Bytes> {
        if self.chunks.is_empty() && !self.small.is_empty() {
            self.chunks.push_back(std::mem::take(&mut self.small).freeze());
        }
        self.chunks.front()
    }

    fn advance(&mut self, written: usize) {
        let front = self.chunks.front_mut().expect("written from the front chunk");
        front.advance(written);
        self.len -= written;
        self.budget.held.fetch_sub(written, Ordering::Relaxed);
        if front.is_empty() {
            self.chunks.pop_front();
        }
    }

    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.small.is_empty()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Resolves when the socket is in error, which a FIN is not.
async fn broken(app: &TcpStream) -> io::Error {
    match app.ready(Interest::ERROR).await {
        Ok(_) => app.take_error().ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(error) => error,
    }
}

fn stream_reset(reset: Result<Reason, h2::Error>) -> Broken {
    Broken::Tunnel(reset.map_or_else(|error| error, h2::Error::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_keeps_order_and_merges_small_chunks() {
        let budget = Budget::new(1 << 30);
        let mut waiting = Waiting::new(&budget);
        let mut expected = Vec::new();
        for n in 0..100_000_u32 {
            let chunk = n.to_be_bytes().repeat(if n % 1000 == 0 { 1024 } else { 1 });
            expected.extend_from_slice(&chunk);
            waiting.push(chunk.into()).unwrap();
        }
        assert!(waiting.chunks.len() < 300, "{} chunks", waiting.chunks.len());
        assert_eq!(budget.held.load(Ordering::Relaxed), expected.len());
        let mut taken = Vec::new();
        while let Some(front) = waiting.front() {
            let part = front.len().min(1000);
            taken.extend_from_slice(&front[..part]);
            waiting.advance(part);
        }
        assert!(waiting.is_empty() && taken == expected);
        assert_eq!(budget.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_spent_budget_ends_those_that_hold_much() {
        let budget = Budget::new(1 << 20);
        let mut greedy = Waiting::new(&budget);
        let full = (0..1000).find(|_| greedy.push(vec![0; 10_000].into()).is_err());
        assert_eq!(full, Some(104), "after a mebibyte");
        let mut modest = Waiting::new(&budget);
        assert!(modest.push(vec![0; 200_000].into()).is_ok(), "others still may hold a little");
        drop(greedy);
        assert_eq!(budget.held.load(Ordering::Relaxed), 200_000);
    }
}
