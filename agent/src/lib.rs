//! The node agent.

pub mod identity;
