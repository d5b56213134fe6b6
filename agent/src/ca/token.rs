//! Join tokens: how a new node gets its first certificate.
//!
//! A token is 256 random bits, shown once; the directory keeps its SHA-256 and the node it is for. It serves one key:
//! the first request binds it, and the same key may ask again until the token expires (its answer may have been lost).
//! Any other key finds it used.

use super::CaError;
use super::directory::{create_dir, hex, random, read_text, write_new};
use crate::identity::NodeName;
use aws_lc_rs::digest::{SHA256, digest};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lifetime of a token unless the operator says otherwise.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);
/// Traces of a token are kept this long after it expired, so that a late user hears why.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// What every join token begins with.
pub const PREFIX: &str = "weft-join-";
const TOKENS: &str = "tokens";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the join token is unknown here; make one with `weft ca token --dir DIR --node NAME`")]
    Unknown,
    #[error("the join token for node {0} expired; make a new one with `weft ca token`")]
    Expired(NodeName),
    #[error("the join token for node {0} was used already; make a new one with `weft ca token`")]
    Used(NodeName),
    #[error("the join token cannot be checked: {0}")]
    Internal(String),
}

/// Makes a token for `node`. The caller prints it once; nothing else knows it.
pub fn create(dir: &Path, node: &NodeName, lifetime: Duration) -> Result<String, CaError> {
    super::directory::Contents::read(dir)?;
    create_dir(&dir.join(TOKENS))?;
    prune(dir);
    let token = format!("{PREFIX}{}", hex(&random::<32>()));
    let expires = seconds(SystemTime::now() + lifetime);
    write_new(&record(dir, &token), format!("{expires} {node}\n").as_bytes())?;
    Ok(token)
}

/// The node that a token is for, if it can still be used by someone.
pub(super) fn check(dir: &Path, token: &str) -> Result<NodeName, TokenError> {
    if token.len() > 256 || !token.starts_with(PREFIX) {
        return Err(TokenError::Unknown);
    }
    let text = match read_text(&record(dir, token)) {
        Ok(text) => text,
        Err(CaError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Err(TokenError::Unknown);
        }
        Err(error) => return Err(TokenError::Internal(error.to_string())),
    };
    let (expires, node) =
        parse(&text).ok_or_else(|| TokenError::Internal("its record is damaged".to_owned()))?;
    if seconds(SystemTime::now()) >= expires { Err(TokenError::Expired(node)) } else { Ok(node) }
}

/// Binds a token to the key that uses it first. Exactly one key wins, whatever happens at the same time.
pub(super) fn redeem(dir: &Path, token: &str, node: &NodeName, public_key: &[u8]) -> Result<(), TokenError> {
    let user = hex(digest(&SHA256, public_key).as_ref());
    let path = record(dir, token).with_extension("used");
    match write_new(&path, user.as_bytes()) {
        Ok(()) => Ok(()),
        Err(CaError::File { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {
            match read_text(&path) {
                Ok(first) if first == user => Ok(()),
                Ok(_) => Err(TokenError::Used(node.clone())),
                Err(error) => Err(TokenError::Internal(error.to_string())),
            }
        }
        Err(error) => Err(TokenError::Internal(error.to_string())),
    }
}

fn record(dir: &Path, token: &str) -> PathBuf {
    dir.join(TOKENS).join(hex(digest(&SHA256, token.as_bytes()).as_ref()))
}

fn parse(text: &str) -> Option<(u64, NodeName)> {
    let (expires, node) = text.trim_end().split_once(' ')?;
    Some((expires.parse().ok()?, node.parse().ok()?))
}

/// Removes records that expired long ago. Failing to is harmless: they stay expired.
fn prune(dir: &Path) {
    let limit = seconds(SystemTime::now() - KEPT);
    for entry in dir.join(TOKENS).read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        let expired = |text: String| parse(&text).is_some_and(|(expires, _)| expires < limit);
        if path.extension().is_none() && read_text(&path).is_ok_and(expired) {
            let _ = std::fs::remove_file(path.with_extension("used"));
            let _ = std::fs::remove_file(&path);
        }
    }
}

fn seconds(moment: SystemTime) -> u64 {
    moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_serves_one_key_until_it_expires() {
        let dir = tempfile::tempdir().unwrap();
        super::super::init(dir.path(), &Default::default()).unwrap();
        let node: NodeName = "n1".parse().unwrap();
        let token = create(dir.path(), &node, DEFAULT_LIFETIME).unwrap();
        assert_eq!(check(dir.path(), &token), Ok(node.clone()));
        assert_eq!(redeem(dir.path(), &token, &node, b"key one"), Ok(()));
        assert_eq!(redeem(dir.path(), &token, &node, b"key one"), Ok(()));
        assert_eq!(redeem(dir.path(), &token, &node, b"key two"), Err(TokenError::Used(node.clone())));
        assert_eq!(check(dir.path(), "weft-join-00"), Err(TokenError::Unknown));
        assert_eq!(check(dir.path(), "../../etc/passwd"), Err(TokenError::Unknown));
        let late = create(dir.path(), &node, Duration::ZERO).unwrap();
        assert_eq!(check(dir.path(), &late), Err(TokenError::Expired(node)));
    }

    #[test]
    fn the_directory_never_holds_the_token() {
        let dir = tempfile::tempdir().unwrap();
        super::super::init(dir.path(), &Default::default()).unwrap();
        let token = create(dir.path(), &"n1".parse().unwrap(), DEFAULT_LIFETIME).unwrap();
        for entry in dir.path().join(TOKENS).read_dir().unwrap() {
            let path = entry.unwrap().path();
            let secret = token.strip_prefix(PREFIX).unwrap();
            assert!(!path.to_string_lossy().contains(secret));
            assert!(!read_text(&path).unwrap().contains(secret));
        }
    }
}
