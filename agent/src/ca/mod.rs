//! weft's own certificate authority: `weft ca init | token | serve`.
//!
//! One directory holds everything; only its owner can read it:
//!
//! | file | what |
//! |---|---|
//! | `trust-domain` | the trust domain, one line |
//! | `roots/*.pem` | every trusted root; all are sent with every certificate |
//! | `root.key` | key of the root that `init` made; needed for a new intermediate only, keep it elsewhere if you can |
//! | `intermediate.pem`, `intermediate.key` | what signs |
//! | `tokens/` | hashes of join tokens, never the tokens |
//! | `audit.log` | one JSON line per decision |
//!
//! To replace the root while traffic flows: `weft ca init` a second directory with the same trust domain, copy its
//! `roots/*.pem` here, wait one certificate lifetime (24 h at most) until every agent trusts both, copy its
//! `intermediate.key` and `intermediate.pem` here, wait again, remove the old file from `roots/`. The directory is read
//! again when it changes; nothing restarts.
//!
//! A request travels `serve -> service -> request -> decide -> authority`, and what was decided into `audit`.

pub mod audit;
pub mod authority;
pub mod decide;
pub mod directory;
mod limit;
pub mod placement;
pub mod request;
pub mod serve;
mod service;
pub mod token;

pub use authority::{Authority, Issued};
pub use decide::{Placement, Subject};
pub use directory::init;
pub use serve::serve;
pub use token::create as create_token;

use std::io;
use std::path::{Path, PathBuf};

/// Why the CA cannot do what its operator asked.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{0} holds a certificate authority already; choose another directory, nothing was overwritten")]
    Exists(PathBuf),
    #[error("{0} holds no certificate authority; make one with `weft ca init --dir {0}`")]
    Missing(PathBuf),
    #[error("{path} is damaged: {problem}")]
    Damaged { path: PathBuf, problem: String },
    #[error("{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`")]
    Exposed { path: PathBuf, mode: u32 },
    #[error(
        "the intermediate certificate expired at {0}; make a new one with `weft ca init` and see the manual on rotation"
    )]
    IntermediateExpired(String),
    #[error("signing failed: {0}")]
    Sign(String),
}

impl CaError {
    fn file(path: &Path, source: io::Error) -> CaError {
        CaError::File { path: path.to_owned(), source }
    }

    fn damaged(path: &Path, problem: impl ToString) -> CaError {
        CaError::Damaged { path: path.to_owned(), problem: problem.to_string() }
    }
}

/// The messages and services of `proto/citadel.proto`.
pub mod proto {
    #![allow(unreachable_pub, unused_qualifications, clippy::all)]
    tonic::include_proto!("istio.v1.auth");
}
