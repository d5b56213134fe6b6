//! The proxy with real sockets, real TLS and real network namespaces. Needs root.

mod figures;
mod living;
mod patterns;
mod refusals;
mod world;
