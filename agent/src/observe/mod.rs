//! What people and programs see of the agent: flow events, tables, metrics.
//!
//! INVARIANT: no row, event, label or log line holds a key, a token or a byte of the application.

pub mod admin;
pub mod desk;
pub mod events;
pub mod http;
pub mod metrics;
pub mod recorder;
pub mod tables;
