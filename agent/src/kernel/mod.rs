//! The kernel side of the agent: programs, maps, links, interfaces and sockets.
//!
//! A thin shell. What the datapath decides is in `weft_datapath`; what the tables say is compiled in `weft_policy`;
//! here desired state meets the kernel's. INVARIANT: the kernel's maps are the truth between two runs of the agent, so
//! every sync compares with what is there and writes the difference, at start as later.

mod attach;
pub(crate) mod cookie;
mod datapath;
pub mod destroy;
pub mod enrol;
pub mod error;
pub mod events;
pub mod load;
pub mod lookup;
pub mod maps;
mod mirror;
mod netlink;
pub mod numbers;
pub mod pins;
pub mod services;
pub mod state;
pub mod sync;
pub(crate) mod sys;

pub use error::{Error, Result};
pub use load::Kernel;
pub use pins::detach;
