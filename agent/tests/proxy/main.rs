//! The proxy with real sockets, real TLS and real network namespaces. Needs root.

mod patterns;
mod world;
