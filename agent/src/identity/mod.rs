//! Who a workload is, and how it proves it: SPIFFE IDs, certificates, TLS.
//!
//! A certificate travels `ca_client -> store -> credentials -> tls`: the [`store::CertStore`] keeps one valid
//! certificate per local identity, [`tls`] builds handshakes that read it at the moment they need it, so a renewal needs
//! no restart of anything.
//!
//! INVARIANT: private keys of workloads live in memory only. Nothing here writes them, logs them or passes them on.

pub mod ca_client;
mod ca_stream;
mod ca_trust;
pub mod certificate;
pub mod credentials;
mod node_file;
pub mod refusal;
pub mod signer;
pub mod spiffe;
pub mod store;
pub mod tls;

pub use ca_client::{CaClient, CaClientConfig};
pub use credentials::{Credentials, Live, Roots};
pub use refusal::Refusal;
pub use signer::{LocalCa, SignError, Signer};
pub use spiffe::{NodeName, SpiffeId, TrustDomain};
pub use store::{CertStatus, CertStore, StoreError};
