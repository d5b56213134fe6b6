//! The node agent.

pub mod args;
pub mod ca;
pub mod cli;
pub mod config;
pub mod control;
pub mod drain;
pub mod identity;
pub mod kernel;
pub mod manifests;
pub mod netns;
pub mod observe;
pub mod pods;
pub mod proxy;
pub mod run;
pub mod snapshot;
pub mod supervise;
