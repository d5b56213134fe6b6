//! Reads a certificate signing request: its signature, its key, the names in it. Nothing else of it is used.

use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension};

/// Longest PEM of a request. One for a P-384 key has some 600 bytes.
pub const MAX_CSR_LEN: usize = 8 * 1024;

/// What a valid request says.
#[derive(Debug)]
pub struct SigningRequest {
    pub uris: Vec<String>,
    pub other_names: usize,
    /// DER SubjectPublicKeyInfo of an ECDSA key on P-256 or P-384.
    pub public_key: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("the signing request has {0} bytes, at most {MAX_CSR_LEN} are read")]
    TooLong(usize),
    #[error("the signing request cannot be read: {0}")]
    Unreadable(String),
    #[error("the signing request is not signed by the key that is in it")]
    Signature,
    #[error("the key in the signing request must be ECDSA on P-256 or P-384")]
    Key,
}

impl SigningRequest {
    pub fn from_pem(pem: &str) -> Result<SigningRequest, RequestError> {
        if pem.len() > MAX_CSR_LEN {
            return Err(RequestError::TooLong(pem.len()));
        }
        let unreadable = |error: &dyn ToString| RequestError::Unreadable(error.to_string());
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|e| unreadable(&e))?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|e| unreadable(&e))?;
        if !rest.is_empty() {
            return Err(unreadable(&"bytes after its end"));
        }
        let key = &request.certification_request_info.subject_pki;
        if !is_supported_key(key) {
            return Err(RequestError::Key);
        }
        request.verify_signature().map_err(|_| RequestError::Signature)?;
        let (mut uris, mut other_names) = (Vec::new(), 0);
        for extension in request.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(names) = extension {
                for name in &names.general_names {
                    match name {
                        GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                        _ => other_names += 1,
                    }
                }
            }
        }
        Ok(SigningRequest { uris, other_names, public_key: key.raw.to_vec() })
    }
}

/// `id-ecPublicKey` on a named curve (RFC 5480, section 2.1.1.1).
fn is_supported_key(key: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> bool {
    const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
    const CURVES: [&str; 2] = ["1.2.840.10045.3.1.7", "1.3.132.0.34"];
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    key.algorithm.algorithm.to_id_string() == EC_PUBLIC_KEY
        && curve.is_some_and(|curve| CURVES.contains(&curve.to_id_string().as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::credentials::KeyRequest;

    #[test]
    fn our_own_request_is_read() {
        let request = KeyRequest::new("spiffe://td/ns/a/sa/b").unwrap();
        let read = SigningRequest::from_pem(&request.csr_pem().unwrap()).unwrap();
        assert_eq!((read.uris.as_slice(), read.other_names), (&["spiffe://td/ns/a/sa/b".to_owned()][..], 0));
    }

    #[test]
    fn a_forged_signature_is_refused() {
        let pem = KeyRequest::new("spiffe://td/ns/a/sa/b").unwrap().csr_pem().unwrap();
        let mut der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
        let at = der.windows(4).position(|window| window == b"/a/s").unwrap();
        der[at + 1] = b'x';
        assert!(matches!(SigningRequest::from_pem(&as_pem(&der)), Err(RequestError::Signature)));
    }

    #[test]
    fn other_keys_and_rubbish_are_refused() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let pem = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        assert!(matches!(SigningRequest::from_pem(&pem), Err(RequestError::Key)));
        assert!(matches!(SigningRequest::from_pem(""), Err(RequestError::Unreadable(_))));
        assert!(matches!(SigningRequest::from_pem(&"x".repeat(9000)), Err(RequestError::TooLong(9000))));
    }

    fn as_pem(der: &[u8]) -> String {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let mut base64 = Command::new("base64").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        base64.stdin.take().unwrap().write_all(der).unwrap();
        let text = String::from_utf8(base64.wait_with_output().unwrap().stdout).unwrap();
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n")
    }
}
