//! The CA's directory: making it, reading it, and files that only their owner can read.

use super::CaError;
use crate::identity::certificate::{Facts, read_pem};
use crate::identity::{Roots, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Lifetime of a root. Long, as replacing it takes an operator.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Lifetime of an intermediate.
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(5 * 365 * 86_400);
/// Certificates are valid from a little before they were made: clocks differ.
pub const BACKDATE: Duration = Duration::from_secs(60);
/// Nothing that is read from the directory is larger.
const MAX_FILE_LEN: u64 = 1 << 20;

const TRUST_DOMAIN: &str = "trust-domain";
const ROOTS: &str = "roots";
const INTERMEDIATE: &str = "intermediate.pem";
const INTERMEDIATE_KEY: &str = "intermediate.key";

/// Makes a certificate authority in `dir`: a root, an intermediate, their keys. Overwrites nothing.
pub fn init(dir: &Path, trust_domain: &TrustDomain) -> Result<(), CaError> {
    for name in [TRUST_DOMAIN, ROOTS, "root.key", INTERMEDIATE, INTERMEDIATE_KEY] {
        if dir.join(name).symlink_metadata().is_ok() {
            return Err(CaError::Exists(dir.to_owned()));
        }
    }
    create_dir(dir)?;
    create_dir(&dir.join(ROOTS))?;

    // A name of its own for each root: two roots of one trust domain can then be told apart.
    let id = hex(&random::<4>());
    let root_key = key()?;
    let root_key_pem = root_key.serialize_pem();
    let root_params = ca_params(&format!("weft root {id} of {trust_domain}"), 1, ROOT_LIFETIME);
    let root = CertifiedIssuer::self_signed(root_params, root_key).map_err(sign)?;
    let intermediate_key = key()?;
    let intermediate =
        ca_params(&format!("weft intermediate {id} of {trust_domain}"), 0, INTERMEDIATE_LIFETIME)
            .signed_by(&intermediate_key, &root)
            .map_err(sign)?;

    write_new(&dir.join("root.key"), root_key_pem.as_bytes())?;
    write_new(&dir.join(INTERMEDIATE_KEY), intermediate_key.serialize_pem().as_bytes())?;
    write_new(&dir.join(INTERMEDIATE), intermediate.pem().as_bytes())?;
    write_new(&dir.join(ROOTS).join(format!("{id}.pem")), root.pem().as_bytes())?;
    // Last: a directory with it is complete.
    write_new(&dir.join(TRUST_DOMAIN), format!("{trust_domain}\n").as_bytes())
}

/// What the directory holds.
pub(super) struct Contents {
    pub trust_domain: TrustDomain,
    pub issuer: Issuer<'static, KeyPair>,
    pub intermediate_pem: String,
    pub intermediate_not_after: SystemTime,
    pub roots: Arc<Roots>,
    pub root_pems: Vec<String>,
}

impl Contents {
    pub(super) fn read(dir: &Path) -> Result<Contents, CaError> {
        let path = dir.join(TRUST_DOMAIN);
        let text = match read_text(&path) {
            Err(CaError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Err(CaError::Missing(dir.to_owned()));
            }
            other => other?,
        };
        let trust_domain: TrustDomain =
            text.trim().parse().map_err(|error| CaError::damaged(&path, error))?;

        let mut root_pems = Vec::new();
        let mut certificates = Vec::new();
        for path in root_files(dir)? {
            let pem = read_text(&path)?;
            certificates.extend(read_pem(pem.as_bytes()).map_err(|error| CaError::damaged(&path, error))?);
            root_pems.push(pem);
        }
        let roots = Roots::new(certificates).map_err(|error| CaError::damaged(&dir.join(ROOTS), error))?;

        let path = dir.join(INTERMEDIATE);
        let intermediate_pem = read_text(&path)?;
        let certificate =
            read_pem(intermediate_pem.as_bytes()).map_err(|error| CaError::damaged(&path, error))?;
        let facts = Facts::read(&certificate[0]).map_err(|error| CaError::damaged(&path, error))?;
        let key_path = dir.join(INTERMEDIATE_KEY);
        let key = KeyPair::from_pem(&read_secret(&key_path)?)
            .map_err(|error| CaError::damaged(&key_path, error))?;
        use rcgen::PublicKeyData;
        if key.subject_public_key_info() != facts.public_key {
            return Err(CaError::damaged(&key_path, "it is not the key of intermediate.pem"));
        }
        let issuer = Issuer::from_ca_cert_pem(&intermediate_pem, key)
            .map_err(|error| CaError::damaged(&path, error))?;
        Ok(Contents {
            trust_domain,
            issuer,
            intermediate_pem,
            intermediate_not_after: facts.not_after,
            roots: Arc::new(roots),
            root_pems,
        })
    }
}

/// Changes whenever a file that [`Contents`] reads may have changed.
pub(super) fn stamp(dir: &Path) -> Result<Vec<(PathBuf, u64, i64, i64)>, CaError> {
    let mut files = root_files(dir)?;
    files.extend([TRUST_DOMAIN, INTERMEDIATE, INTERMEDIATE_KEY].map(|name| dir.join(name)));
    files
        .into_iter()
        .map(|path| {
            let meta = path.metadata().map_err(|source| CaError::file(&path, source))?;
            Ok((path, meta.ino(), meta.mtime(), meta.mtime_nsec()))
        })
        .collect()
}

fn root_files(dir: &Path) -> Result<Vec<PathBuf>, CaError> {
    let roots = dir.join(ROOTS);
    let entries = match roots.read_dir() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(CaError::Missing(dir.to_owned())),
        other => other.map_err(|source| CaError::file(&roots, source))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|source| CaError::file(&roots, source))?.path();
        if path.extension().is_some_and(|extension| extension == "pem") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn ca_params(name: &str, path_length: u8, lifetime: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "weft");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + lifetime).into();
    params
}

fn key() -> Result<KeyPair, CaError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(sign)
}

fn sign(error: rcgen::Error) -> CaError {
    CaError::Sign(error.to_string())
}

/// 127 random bits: unique without a counter, positive (RFC 5280, section 4.1.2.2).
pub(super) fn serial() -> SerialNumber {
    let mut bytes = random::<16>();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system has a source of randomness");
    bytes
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn create_dir(path: &Path) -> Result<(), CaError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| CaError::file(path, source))
}

/// Creates a file of mode 0600 that did not exist, and waits until it is on the disk.
pub(super) fn write_new(path: &Path, contents: &[u8]) -> Result<(), CaError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().map_err(|source| CaError::file(path, source))
}

pub(super) fn read_text(path: &Path) -> Result<String, CaError> {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        File::open(path)?.take(MAX_FILE_LEN).read_to_string(&mut text)?;
        Ok(text)
    };
    read().map_err(|source| CaError::file(path, source))
}

/// As [`read_text`], for a file that group and others must not be able to read.
pub(super) fn read_secret(path: &Path) -> Result<String, CaError> {
    let mode = path.metadata().map_err(|source| CaError::file(path, source))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(CaError::Exposed { path: path.to_owned(), mode });
    }
    read_text(path)
}
