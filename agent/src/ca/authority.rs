//! Signs. Whether to sign is [`super::decide`]'s question.

use super::CaError;
use super::decide::Subject;
use super::directory::{BACKDATE, Contents, serial, stamp};
use crate::identity::certificate::rfc3339;
use crate::identity::{Roots, TrustDomain};
use arc_swap::ArcSwap;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
    SubjectPublicKeyInfo,
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// Lifetime of a certificate when none was asked for.
pub const DEFAULT_TTL: Duration = Duration::from_secs(3600);
/// No certificate lives longer.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 3600);

/// A certificate authority's directory, open for signing.
pub struct Authority {
    dir: PathBuf,
    contents: ArcSwap<Contents>,
    stamp: Mutex<Vec<(PathBuf, u64, i64, i64)>>,
}

/// A signed certificate.
#[derive(Debug)]
pub struct Issued {
    /// PEM: leaf, intermediate, then all roots.
    pub chain: Vec<String>,
    /// Lower-case hexadecimal.
    pub serial: String,
    pub not_after: SystemTime,
}

impl Authority {
    pub fn open(dir: &Path) -> Result<Authority, CaError> {
        let contents = Contents::read(dir)?;
        Ok(Authority {
            dir: dir.to_owned(),
            contents: ArcSwap::from_pointee(contents),
            stamp: Mutex::new(stamp(dir)?),
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn trust_domain(&self) -> TrustDomain {
        self.contents.load().trust_domain.clone()
    }

    /// All trusted roots, as the directory was read last.
    pub fn roots(&self) -> Arc<Roots> {
        self.contents.load().roots.clone()
    }

    /// Reads the directory again if a file in it changed. What was read before stays in use when that fails.
    pub fn refresh(&self) -> Result<(), CaError> {
        let now = stamp(&self.dir)?;
        let mut last = self.stamp.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if *last != now {
            let contents = Contents::read(&self.dir)?;
            if contents.trust_domain != self.contents.load().trust_domain {
                return Err(CaError::damaged(
                    &self.dir,
                    "its trust domain changed; restart to use another one",
                ));
            }
            self.contents.store(Arc::new(contents));
            *last = now;
        }
        Ok(())
    }

    /// A certificate for `subject` and a public key (DER SubjectPublicKeyInfo, as [`super::request`] has checked it).
    ///
    /// Blocks on files; takes well below a millisecond.
    pub fn issue(&self, subject: &Subject, public_key: &[u8], ttl: Duration) -> Result<Issued, CaError> {
        let contents = self.contents.load();
        let now = SystemTime::now();
        if now >= contents.intermediate_not_after {
            return Err(CaError::IntermediateExpired(rfc3339(contents.intermediate_not_after)));
        }
        let ttl = ttl.clamp(Duration::from_secs(1), MAX_TTL);
        let not_after = (now + ttl).min(contents.intermediate_not_after);

        let failed = |error: rcgen::Error| CaError::Sign(error.to_string());
        let uri = subject.uri(&contents.trust_domain);
        let serial = serial();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, contents.trust_domain.as_str());
        params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().map_err(failed)?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - BACKDATE).into();
        params.not_after = not_after.into();
        params.serial_number = Some(serial.clone());
        let public_key = SubjectPublicKeyInfo::from_der(public_key).map_err(failed)?;
        let leaf = params.signed_by(&public_key, &contents.issuer).map_err(failed)?;

        let mut chain = vec![leaf.pem(), contents.intermediate_pem.clone()];
        chain.extend(contents.root_pems.iter().cloned());
        Ok(Issued { chain, serial: super::directory::hex(&serial.to_bytes()), not_after })
    }
}
