//! What the proxy asks of the maps, connection by connection.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use weft_datapath::abi::{Client, OrigDst};

use super::address::{addr, local_end};
use super::error::Error;
use super::load::Kernel;

impl Kernel {
    /// Marks a socket as the agent's. Sockets accepted from it inherit the mark.
    pub fn mark(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        // Socket storage is keyed by descriptor from this side.
        self.agent_sk.insert(&(socket.as_raw_fd() as u32), &1).map_err(io_error)
    }

    /// Takes (reads and deletes) where the application's socket with local end `app` wanted to go.
    pub fn take_orig_dst(&self, netns_cookie: u64, app: SocketAddr) -> io::Result<Option<OrigDst>> {
        let key = local_end(netns_cookie, app);
        let Some(orig_dst) = self.maps.orig_dst.lookup(&key).map_err(io_error)? else { return Ok(None) };
        self.maps.orig_dst.remove(&key).map_err(io_error)?;
        Ok(Some(orig_dst))
    }

    /// Notes that the connection which the agent opens from `local` speaks for `client`.
    pub fn put_leg(&self, netns_cookie: u64, local: SocketAddr, client: SocketAddr) -> io::Result<()> {
        let value = Client { addr: addr(client.ip()), port: client.port(), pad: 0 };
        self.maps.leg.insert(&local_end(netns_cookie, local), &value).map_err(io_error)
    }

    /// Forgets the note again. One that is gone already is no error.
    pub fn del_leg(&self, netns_cookie: u64, local: SocketAddr) -> io::Result<()> {
        self.maps.leg.remove(&local_end(netns_cookie, local)).map(drop).map_err(io_error)
    }
}

fn io_error(error: Error) -> io::Error {
    let kind = match error {
        Error::Full { .. } => io::ErrorKind::StorageFull,
        Error::Permission { .. } => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
