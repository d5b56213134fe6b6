//! A TLS stream that remembers why it broke.
//!
//! A TLS 1.3 client hears only after the handshake that its certificate was refused. HTTP/2 above reports that as some
//! "transport error"; the sentence for the operator is what the stream itself said.

use super::refusal::Refusal;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

pub(super) struct CaStream {
    stream: TlsStream<TcpStream>,
    broke: Arc<OnceLock<Refusal>>,
}

impl CaStream {
    /// The stream, and where its first read error will be.
    pub(super) fn new(stream: TlsStream<TcpStream>) -> (CaStream, Arc<OnceLock<Refusal>>) {
        let broke = Arc::new(OnceLock::new());
        (CaStream { stream, broke: broke.clone() }, broke)
    }
}

impl AsyncRead for CaStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Poll::Ready(Err(error)) = &polled {
            let _ = self.broke.set(Refusal::from(error));
        }
        polled
    }
}

impl AsyncWrite for CaStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
