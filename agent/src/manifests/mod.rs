//! A directory of manifests as the source of what the agent knows.

pub mod files;
pub mod watch;
