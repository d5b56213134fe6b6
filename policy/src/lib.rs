//! Manifests in, tables out.
//!
//! | stage | module | from, to |
//! |---|---|---|
//! | read | [`source`] | YAML text, typed objects with their place in the file |
//! | keep | [`store`] | the objects of all files; each whole, or its former version |
//! | resolve | [`model`] | objects, a [`Model`] in which every reference is resolved |
//! | compile | [`compile()`] | a model, the [`Tables`] that the kernel reads |
//! | decide | [`eval`] | a model and a flow, a verdict with its reason |
//! | ask | [`http`] | a model and a connection, what is left to ask of each request |
//! | follow | [`engine`] | a change of some objects, the difference of the tables |
//! | explain | [`mod@explain`] | the line that decided, and for a deny what would allow it |
//!
//! INVARIANT: this crate does no I/O, and nothing that it cannot enforce is skipped in silence: a policy object that
//! cannot be read refuses every flow to the workloads that it would have selected.
#![forbid(unsafe_code)]

pub mod compile;
pub mod engine;
pub mod error;
pub mod eval;
pub mod explain;
pub mod http;
pub mod lint;
pub mod model;
pub mod request;
pub mod source;
pub mod store;
pub mod tables;

pub use compile::compile;
pub use engine::Engine;
pub use error::{ObjectRef, Origin, Problem, Severity};
pub use eval::{Decision, Flow, Peer, Verdict};
pub use explain::{Change, Explanation};
pub use http::HttpRules;
pub use model::{Cidr, Identity, Model, Settings, SpiffeId, Workload};
pub use request::Request;
pub use store::ObjectStore;
pub use tables::{RuleRef, Tables};
