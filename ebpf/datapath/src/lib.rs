//! The datapath of weft: what kernel programs and agent share, and every decision they take.
//!
//! This crate is compiled twice: for the BPF target by `ebpf/`, and for the host by `policy/` and `agent/`. It has no
//! dependency, allocates nothing and touches no kernel: a decision is a function of a flow and of lookups behind the
//! [`tables::Tables`] trait, whose two implementors are the kernel's maps and the agent's in-memory tables.
//!
//! INVARIANT: a lookup that misses, a value that is not understood and an insert that fails all deny.
#![no_std]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod addr;
pub mod connect;
pub mod conntrack;
pub mod event;
pub mod identity;
pub mod names;
pub mod packet;
pub mod policy;
pub mod reason;
pub mod service;
pub mod tables;
pub mod traffic;

#[cfg(test)]
extern crate std;
