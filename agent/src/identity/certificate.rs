//! What weft reads from a certificate: names, validity, serial number. Reading proves nothing; the chain does.

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The facts of one certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// All URI subject alternative names.
    pub uris: Vec<String>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// In lower-case hexadecimal, as `openssl x509 -serial` without its case.
    pub serial: String,
    pub subject: String,
    pub issuer: String,
    /// The DER of the subject's public key.
    pub public_key: Vec<u8>,
    /// Its subject is its issuer: a root, if it is trusted at all.
    pub self_issued: bool,
}

/// A certificate that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("this is not a DER certificate ({0})")]
    Der(String),
    #[error("this is not PEM with certificates in it ({0})")]
    Pem(String),
    #[error("there is no certificate in it")]
    Empty,
}

impl Facts {
    pub fn read(certificate: &[u8]) -> Result<Facts, ReadError> {
        let (rest, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| ReadError::Der(error.to_string()))?;
        if !rest.is_empty() {
            return Err(ReadError::Der("bytes after its end".to_owned()));
        }
        let mut uris = Vec::new();
        let names = parsed.subject_alternative_name().map_err(|error| ReadError::Der(error.to_string()))?;
        for name in names.iter().flat_map(|extension| &extension.value.general_names) {
            if let GeneralName::URI(uri) = name {
                uris.push((*uri).to_owned());
            }
        }
        Ok(Facts {
            uris,
            not_before: time(parsed.validity.not_before.timestamp()),
            not_after: time(parsed.validity.not_after.timestamp()),
            serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            subject: parsed.subject.to_string(),
            issuer: parsed.issuer.to_string(),
            public_key: parsed.public_key().raw.to_vec(),
            self_issued: parsed.subject.as_raw() == parsed.issuer.as_raw(),
        })
    }
}

/// All certificates of a PEM text, at least one.
pub fn read_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, ReadError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ReadError::Pem(error.to_string()))?;
    if certificates.is_empty() { Err(ReadError::Empty) } else { Ok(certificates) }
}

/// A moment as RFC 3339 with seconds, for people and JSON.
pub fn rfc3339(moment: SystemTime) -> String {
    let moment =
        time::OffsetDateTime::from(moment).replace_nanosecond(0).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    moment
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_else(|_| "out of range".to_owned())
}

fn time(timestamp: i64) -> SystemTime {
    match u64::try_from(timestamp) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds),
        Err(_) => UNIX_EPOCH,
    }
}
