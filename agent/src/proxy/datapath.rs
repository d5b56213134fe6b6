//! What the proxy needs of the kernel, and nothing else: a mark on its sockets and two notes per connection.
//!
//! The kernel's maps implement it in `kernel/`; tests of the proxy use a map in memory. A failure of any call is the end of
//! the connection it is about: nothing is forwarded on a guess.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use weft_datapath::abi::OrigDst;

/// Kernel state as the proxy sees it. Calls take microseconds and may be made from async code.
pub trait Datapath: Send + Sync + 'static {
    /// Marks a socket as the agent's, before it binds, listens or connects. Sockets accepted from it inherit the mark.
    fn mark(&self, socket: BorrowedFd<'_>) -> io::Result<()>;

    /// Takes (reads and deletes) where the application's socket with local end `app` in namespace `cookie` wanted to
    /// go. `None`: nobody redirected that socket, it dialled the agent's port itself.
    fn take_orig_dst(&self, cookie: u64, app: SocketAddr) -> io::Result<Option<OrigDst>>;

    /// Notes that the connection which the agent opens from `local` in namespace `cookie` speaks for `client`, so that
    /// the server there sees the client's address. Fails when the map is full.
    fn put_leg(&self, cookie: u64, local: SocketAddr, client: SocketAddr) -> io::Result<()>;

    /// Forgets the note again.
    fn del_leg(&self, cookie: u64, local: SocketAddr);
}
