//! One JSON line per decision, in `audit.log` of the CA's directory and in the log. No line holds a secret.
//!
//! A certificate whose line cannot be written is not handed out.

use super::CaError;
use crate::identity::certificate::rfc3339;
use serde::Serialize;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

/// What was decided.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    Issued,
    Refused,
}

/// One line.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    pub decision: Decision,
    /// Address of the caller, or `local`.
    pub peer: &'a str,
    /// Node of the caller, when it proved one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<&'a str>,
    /// How it proved it: `token`, `certificate` or `local`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<&'static str>,
    /// The identity asked for, cut to a bounded length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
}

#[derive(Serialize)]
struct Timed<'a> {
    time: String,
    #[serde(flatten)]
    line: &'a Line<'a>,
}

/// Appends `line` with the time. The file is opened each time, so that it can be moved away for rotation.
pub fn write(dir: &Path, line: &Line<'_>) -> Result<(), CaError> {
    let path = dir.join("audit.log");
    let append = || -> io::Result<()> {
        let mut text = serde_json::to_string(&Timed { time: rfc3339(SystemTime::now()), line })?;
        tracing::info!(target: "weft::audit", "{text}");
        text.push('\n');
        OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?.write_all(text.as_bytes())
    };
    append().map_err(|source| CaError::file(&path, source))
}
