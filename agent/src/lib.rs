//! The node agent.

pub mod identity;
pub mod kernel;
