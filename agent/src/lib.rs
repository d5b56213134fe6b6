//! The node agent.

pub mod ca;
pub mod identity;
pub mod kernel;
pub mod netns;
pub mod proxy;
