//! Who a workload is, and how it proves it: SPIFFE IDs, certificates, TLS.
//!
//! A certificate travels `ca_client -> store -> credentials -> tls`: the [`store::CertStore`] keeps one valid
//! certificate per local identity, [`tls`] builds handshakes that read it at the moment they need it, so a renewal needs
//! no restart of anything.
//!
//! INVARIANT: private keys of workloads live in memory only. Nothing here writes them, logs them or passes them on.

pub mod certificate;
pub mod credentials;
pub mod refusal;
pub mod spiffe;
pub mod tls;

pub use credentials::{Credentials, Live, Roots};
pub use refusal::Refusal;
pub use spiffe::{NodeName, SpiffeId, TrustDomain};
