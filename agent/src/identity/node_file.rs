//! What the agent keeps in its state directory: the node's own key with its certificate, and the CA's roots.
//!
//! Files are replaced whole (written beside, synced, renamed), mode 0600. No workload's key ever comes here.

use super::certificate::read_pem;
use super::credentials::{KeyRequest, Roots};
use super::signer::SignError;
use rustls::pki_types::CertificateDer;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What tokens for weft's own CA begin with.
pub(super) const JOIN_PREFIX: &str = crate::ca::token::PREFIX;

const MAX_FILE_LEN: u64 = 1 << 20;

/// The files of one state directory.
pub(super) struct NodeFile {
    dir: PathBuf,
    path: PathBuf,
}

impl NodeFile {
    pub(super) fn new(state_dir: &Path) -> NodeFile {
        NodeFile { dir: state_dir.to_owned(), path: state_dir.join("node.pem") }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The node's key and its chain; the chain is empty while the node has not joined.
    pub(super) fn read(
        &self,
        uri: &str,
    ) -> Result<Option<(KeyRequest, Vec<CertificateDer<'static>>)>, SignError> {
        let Some(text) = read_secret(&self.path)? else { return Ok(None) };
        let request = KeyRequest::with_key(uri, &text)
            .map_err(|error| self.failed(format!("no usable key in it ({error})")))?;
        // Without a certificate in it the node has not joined yet.
        Ok(Some((request, read_pem(text.as_bytes()).unwrap_or_default())))
    }

    /// The key that joins: the one that is there, or a new one.
    pub(super) fn key_for_joining(&self, uri: &str) -> Result<KeyRequest, SignError> {
        if let Ok(Some((request, _))) = self.read(uri) {
            return Ok(request);
        }
        let request = KeyRequest::new(uri)?;
        self.write(&request, &[])?;
        Ok(request)
    }

    pub(super) fn write(
        &self,
        request: &KeyRequest,
        chain: &[CertificateDer<'static>],
    ) -> Result<(), SignError> {
        self.replace(&self.path, &format!("{}{}", request.key_pem(), pem(chain)))
    }

    pub(super) fn read_roots(&self) -> Result<Option<Roots>, SignError> {
        let path = self.roots_path();
        let Some(text) = read_secret(&path)? else { return Ok(None) };
        Roots::from_pem(text.as_bytes())
            .map(Some)
            .map_err(|error| SignError::File { path: path.display().to_string(), cause: error.to_string() })
    }

    pub(super) fn write_roots(&self, roots: &Roots) -> Result<(), SignError> {
        self.replace(&self.roots_path(), &pem(roots.certificates()))
    }

    fn roots_path(&self) -> PathBuf {
        self.dir.join("ca-roots.pem")
    }

    fn replace(&self, path: &Path, text: &str) -> Result<(), SignError> {
        let write = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            let beside = path.with_extension("new");
            match std::fs::remove_file(&beside) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&beside, path)?;
            File::open(&self.dir)?.sync_all()
        };
        write()
            .map_err(|error| SignError::File { path: path.display().to_string(), cause: error.to_string() })
    }

    fn failed(&self, cause: String) -> SignError {
        SignError::File { path: self.path.display().to_string(), cause }
    }
}

/// The token in a file, without line ends. A missing file is fine when `optional`.
///
/// A join token must be readable by its owner only. Other tokens are mounted by Kubernetes, which has its own modes.
pub(super) fn read_token(path: &Path, optional: bool) -> Result<Option<String>, SignError> {
    let failed = |cause: String| SignError::File { path: path.display().to_string(), cause };
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && optional => return Ok(None),
        other => other.map_err(|error| failed(error.to_string()))?,
    };
    let token = text.trim();
    if token.is_empty() {
        return Err(failed("it holds no token".to_owned()));
    }
    if token.starts_with(JOIN_PREFIX) {
        let mode = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?.mode();
        check_mode(mode).map_err(failed)?;
    }
    Ok(Some(token.to_owned()))
}

/// Nobody but the owner may read it.
fn check_mode(mode: u32) -> Result<(), String> {
    match mode & 0o077 {
        0 => Ok(()),
        _ => Err(format!("others can read it (mode {:o}); run `chmod 600` on it", mode & 0o777)),
    }
}

/// The text of a file that others must not be able to read; `None` when there is none.
fn read_secret(path: &Path) -> Result<Option<String>, SignError> {
    let failed = |cause: String| SignError::File { path: path.display().to_string(), cause };
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| failed(error.to_string()))?,
    };
    check_mode(file.metadata().map_err(|error| failed(error.to_string()))?.mode()).map_err(failed)?;
    let mut text = String::new();
    file.take(MAX_FILE_LEN).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    Ok(Some(text))
}

fn pem(certificates: &[CertificateDer<'static>]) -> String {
    certificates.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))).collect()
}
