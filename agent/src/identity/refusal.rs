//! Why a TLS handshake failed, in one sentence that says what to do.
//!
//! rustls tells our own judgement of the peer as an error and the peer's judgement of us as an alert. Both end here, so
//! that a log line, an event and a metric name the same cause.

use super::certificate::rfc3339;
use super::spiffe::{NameError, SpiffeId};
use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error};
use std::io;
use std::time::SystemTime;

/// The reason of a failed handshake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the peer's certificate expired {0}: it did not renew in time, or the clocks differ")]
    Expired(String),
    #[error("the peer's certificate is not valid yet {0}: the clock of this node or of the CA is wrong")]
    NotYetValid(String),
    #[error("the peer's certificate was not issued under a root that this node trusts")]
    ForeignRoot,
    #[error("the peer's certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("the peer's certificate has {0} URI names, a SPIFFE certificate has exactly one")]
    UriCount(usize),
    #[error("the peer's certificate is for no workload: {0}")]
    NotAWorkload(NameError),
    #[error("the peer is {peer}, outside the trust domain {trust_domain}")]
    ForeignTrustDomain { peer: SpiffeId, trust_domain: String },
    #[error("the peer is {peer}, expected {}", list(.expected))]
    UnexpectedIdentity { peer: SpiffeId, expected: Vec<SpiffeId> },
    #[error("the server is {found}, expected the CA ({expected})")]
    NotTheCa { found: String, expected: String },
    #[error("this node has no valid certificate to show")]
    NothingToShow,
    #[error("the peer refused our certificate: {0}")]
    ByPeer(&'static str),
    #[error("the peer does not speak our TLS (1.3, ALPN h2): {0}")]
    Protocol(String),
    #[error("the connection broke during the handshake: {0}")]
    Connection(String),
}

impl Refusal {
    /// One word per cause, for metric labels.
    pub fn label(&self) -> &'static str {
        match self {
            Refusal::NoCertificate => "no_certificate",
            Refusal::Expired(_) => "expired",
            Refusal::NotYetValid(_) => "not_yet_valid",
            Refusal::ForeignRoot => "foreign_root",
            Refusal::Unreadable(_) => "unreadable",
            Refusal::UriCount(_) | Refusal::NotAWorkload(_) => "not_a_workload",
            Refusal::ForeignTrustDomain { .. } => "foreign_trust_domain",
            Refusal::UnexpectedIdentity { .. } => "unexpected_identity",
            Refusal::NotTheCa { .. } => "not_the_ca",
            Refusal::NothingToShow => "nothing_to_show",
            Refusal::ByPeer(_) => "by_peer",
            Refusal::Protocol(_) => "protocol",
            Refusal::Connection(_) => "connection",
        }
    }
}

impl From<&io::Error> for Refusal {
    /// For the error of a `tokio_rustls` handshake, or of the first read after it (a TLS 1.3 client learns only there
    /// that its certificate was refused).
    fn from(error: &io::Error) -> Refusal {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(tls) => Refusal::from(tls),
            None => Refusal::Connection(error.to_string()),
        }
    }
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Refusal {
        match error {
            Error::NoCertificatesPresented => Refusal::NoCertificate,
            Error::InvalidCertificate(cause) => of_certificate(cause),
            Error::AlertReceived(alert) => of_alert(*alert),
            // What rustls says when a resolver has nothing.
            Error::General(text) if text.contains("no server certificate chain resolved") => {
                Refusal::NothingToShow
            }
            other => Refusal::Protocol(other.to_string()),
        }
    }
}

fn of_certificate(cause: &CertificateError) -> Refusal {
    match cause {
        CertificateError::Expired => Refusal::Expired(String::new()),
        CertificateError::ExpiredContext { time, not_after } => {
            Refusal::Expired(format!("at {}, this node's clock says {}", text(*not_after), text(*time)))
        }
        CertificateError::NotValidYet => Refusal::NotYetValid(String::new()),
        CertificateError::NotValidYetContext { time, not_before } => Refusal::NotYetValid(format!(
            "(from {}, this node's clock says {})",
            text(*not_before),
            text(*time)
        )),
        // A foreign root of the same name fails by its signature.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Refusal::ForeignRoot,
        CertificateError::Other(other) => match other.0.downcast_ref::<Refusal>() {
            Some(refusal) => refusal.clone(),
            None => Refusal::Unreadable(other.to_string()),
        },
        other => Refusal::Unreadable(other.to_string()),
    }
}

fn of_alert(alert: AlertDescription) -> Refusal {
    match alert {
        AlertDescription::CertificateExpired => {
            Refusal::ByPeer("expired or not valid yet by the peer's clock")
        }
        AlertDescription::UnknownCA => Refusal::ByPeer("not issued under a root that the peer trusts"),
        AlertDescription::CertificateRequired => Refusal::ByPeer("we showed none"),
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
            Refusal::ByPeer("not the identity that the peer expects")
        }
        AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate => {
            Refusal::ByPeer("the peer cannot read it")
        }
        AlertDescription::DecryptError => Refusal::ByPeer("its signature is wrong"),
        other => Refusal::Protocol(format!("alert {other:?}")),
    }
}

fn text(moment: UnixTime) -> String {
    rfc3339(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(moment.as_secs()))
}

fn list(ids: &[SpiffeId]) -> String {
    const SHOWN: usize = 3;
    let mut text = ids.iter().take(SHOWN).map(SpiffeId::as_str).collect::<Vec<_>>().join(" or ");
    if ids.is_empty() {
        text.push_str("nobody");
    } else if ids.len() > SHOWN {
        text.push_str(&format!(" or {} more", ids.len() - SHOWN));
    }
    text
}
