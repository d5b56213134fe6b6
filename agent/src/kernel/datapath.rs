//! What the proxy asks of the maps, connection by connection.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use weft_datapath::abi::{Client, LocalEnd, OrigDst};
use weft_policy::model::cidr::addr;

use super::error::Error;
use super::load::Kernel;
use crate::proxy::Datapath;

impl Datapath for Kernel {
    fn mark(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        // Socket storage is keyed by descriptor from this side.
        self.agent_sk.insert(&(socket.as_raw_fd() as u32), &1).map_err(io_error)
    }

    fn take_orig_dst(&self, cookie: u64, app: SocketAddr) -> io::Result<Option<OrigDst>> {
        let key = local_end(cookie, app);
        let Some(orig_dst) = self.maps.orig_dst.lookup(&key).map_err(io_error)? else { return Ok(None) };
        self.maps.orig_dst.remove(&key).map_err(io_error)?;
        Ok(Some(orig_dst))
    }

    fn put_leg(&self, cookie: u64, local: SocketAddr, client: SocketAddr) -> io::Result<()> {
        let value = Client { addr: addr(client.ip()), port: client.port(), pad: 0 };
        self.maps.leg.insert(&local_end(cookie, local), &value).map_err(io_error)
    }

    fn del_leg(&self, cookie: u64, local: SocketAddr) {
        if let Err(error) = self.maps.leg.remove(&local_end(cookie, local)) {
            // It costs one entry of the map until the port is used again.
            tracing::warn!(%local, "cannot forget a client's address: {error}");
        }
    }
}

/// The key of a socket's local end.
fn local_end(netns_cookie: u64, end: SocketAddr) -> LocalEnd {
    LocalEnd { netns_cookie, addr: addr(end.ip()), port: end.port(), ..LocalEnd::default() }
}

fn io_error(error: Error) -> io::Error {
    let kind = match error {
        Error::Full { .. } => io::ErrorKind::StorageFull,
        Error::Permission { .. } => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
