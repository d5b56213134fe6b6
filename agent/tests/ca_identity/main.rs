//! The CA, the store and TLS together, over real sockets on the loopback.

mod client;
mod fixture;
mod handshake;
mod istiod;
mod renewal;
mod rotation;
mod server;
