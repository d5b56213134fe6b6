//! The agent's configuration, valid by construction: [`AgentArgs`] checked and typed.
//!
//! What can be known wrong before anything starts is refused here, in one sentence that says what to do.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use weft_policy::Cidr;

use crate::args::AgentArgs;

/// Everything that the agent was told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node.
    pub node: String,
    /// Directory of manifests.
    pub manifests: PathBuf,
    /// Where certificates come from.
    pub ca: CaSource,
    /// Where the node's own key and certificate are kept.
    pub state_dir: PathBuf,
    /// Pin directory.
    pub bpffs: PathBuf,
    /// Where the connect hooks attach.
    pub cgroup: Cgroup,
    /// Where metrics and readiness are served.
    pub metrics: SocketAddr,
    /// Unix socket of the admin API.
    pub admin_socket: PathBuf,
    /// Trust domain of every SPIFFE ID.
    pub trust_domain: String,
    /// Lifetime that is asked for workload certificates.
    pub cert_ttl: Duration,
    /// Further addresses that are inside the mesh.
    pub mesh_cidrs: Vec<Cidr>,
    /// Istio's defaults turned round.
    pub default_deny: bool,
    /// How long connections may go on after SIGTERM: Istio's own drain duration is 45 s and Kubernetes kills after
    /// 30 s, so end before that.
    pub drain: Duration,
}

/// Where certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaSource {
    /// A server that speaks `IstioCertificateService`.
    Remote {
        /// `https://host:port`.
        url: String,
        /// PEM file of its root.
        root: PathBuf,
        /// File with the join token.
        token: PathBuf,
    },
    /// The authority's directory, used in this process.
    Local(PathBuf),
}

/// Where the connect hooks attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Directory of the cgroup.
    pub path: PathBuf,
    /// The agent must join a cgroup below it, because it is not the root (which every process is below anyway).
    pub join: bool,
}

/// Why the arguments cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--{flag} {value}: {why}")]
    Value { flag: &'static str, value: String, why: String },
    #[error("say where certificates come from: --ca URL --ca-root FILE --token FILE, or --ca-dir DIR")]
    NoCa,
    #[error(
        "--takeover: receiving the listeners of a running agent is not available in this version; stop the running agent first"
    )]
    Takeover,
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or pass --cgroup"
    )]
    NoCgroup,
}

impl Config {
    /// Checks what was given.
    pub fn new(args: &AgentArgs) -> Result<Config, Error> {
        if args.takeover {
            return Err(Error::Takeover);
        }
        let ca = match (&args.ca, &args.ca_root, &args.token, &args.ca_dir) {
            (None, None, None, Some(dir)) => CaSource::Local(existing_dir("ca-dir", dir)?),
            (Some(url), Some(root), Some(token), None) => CaSource::Remote {
                url: https("ca", url)?,
                root: existing_file("ca-root", root)?,
                // A node that has joined needs no token any more, and its file may be gone.
                token: match args.state_dir.join("node.pem").exists() {
                    true => token.clone(),
                    false => existing_file("token", token)?,
                },
            },
            _ => return Err(Error::NoCa),
        };
        let cgroup = match &args.cgroup {
            Some(path) => {
                if !path.join("cgroup.procs").is_file() {
                    return Err(wrong("cgroup", path.display(), "this is not a cgroup v2 directory"));
                }
                Cgroup { path: path.clone(), join: path.join("cgroup.type").exists() }
            }
            None => Cgroup { path: cgroup_root()?, join: false },
        };
        let mesh_cidrs = args
            .mesh_cidr
            .iter()
            .map(|text| text.parse().map_err(|_| wrong("mesh-cidr", text, "write it as ADDRESS/LENGTH")))
            .collect::<Result<_, _>>()?;
        Ok(Config {
            node: name("node", &args.node)?,
            manifests: existing_dir("manifests", &args.manifests)?,
            ca,
            state_dir: args.state_dir.clone(),
            bpffs: args.bpffs.clone(),
            cgroup,
            metrics: args.metrics,
            admin_socket: args.admin_socket.clone(),
            trust_domain: trust_domain("trust-domain", &args.trust_domain)?,
            cert_ttl: Duration::from_secs(args.cert_ttl),
            mesh_cidrs,
            default_deny: args.default_deny,
            drain: Duration::from_secs(25),
        })
    }
}

impl fmt::Display for Config {
    /// One line for the log. There are no secrets in a [`Config`]: tokens and keys are file names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ca = match &self.ca {
            CaSource::Remote { url, .. } => url.clone(),
            CaSource::Local(dir) => format!("directory {}", dir.display()),
        };
        write!(
            f,
            "node {} in trust domain {}, manifests {}, ca {ca}, state {}, bpffs {}, cgroup {}, metrics {}, admin {}, \
             defaults {}, drain {} s",
            self.node,
            self.trust_domain,
            self.manifests.display(),
            self.state_dir.display(),
            self.bpffs.display(),
            self.cgroup.path.display(),
            self.metrics,
            self.admin_socket.display(),
            if self.default_deny { "deny" } else { "as Istio's" },
            self.drain.as_secs(),
        )?;
        for cidr in &self.mesh_cidrs {
            write!(f, ", mesh {cidr}")?;
        }
        Ok(())
    }
}

fn wrong(flag: &'static str, value: impl fmt::Display, why: &str) -> Error {
    Error::Value { flag, value: value.to_string(), why: why.into() }
}

fn existing_dir(flag: &'static str, path: &Path) -> Result<PathBuf, Error> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(path.to_owned()),
        Ok(_) => Err(wrong(flag, path.display(), "this is not a directory")),
        Err(error) => Err(wrong(flag, path.display(), &error.to_string())),
    }
}

fn existing_file(flag: &'static str, path: &Path) -> Result<PathBuf, Error> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Err(wrong(flag, path.display(), "this is a directory")),
        Ok(_) => Ok(path.to_owned()),
        Err(error) => Err(wrong(flag, path.display(), &error.to_string())),
    }
}

fn https(flag: &'static str, url: &str) -> Result<String, Error> {
    let uri: http::Uri = url.parse().map_err(|_| wrong(flag, url, "this is not a URL"))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some("https"), Some(_)) => Ok(url.to_owned()),
        _ => Err(wrong(flag, url, "write it as https://HOST:PORT; certificates are not asked for in clear")),
    }
}

/// A DNS name in lower case, as Kubernetes wants for nodes (RFC 1123).
fn name(flag: &'static str, text: &str) -> Result<String, Error> {
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if text.is_empty() || text.len() > 253 || !text.bytes().all(fine) {
        return Err(wrong(flag, text, "use lower-case letters, digits, `-` and `.`, 253 at most"));
    }
    Ok(text.to_owned())
}

/// SPIFFE ID specification, section 2.1: lower case letters, digits, `.`, `-`, `_`.
fn trust_domain(flag: &'static str, text: &str) -> Result<String, Error> {
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    if text.is_empty() || text.len() > 255 || !text.bytes().all(fine) {
        return Err(wrong(flag, text, "use lower-case letters, digits, `.`, `-` and `_`, 255 at most"));
    }
    Ok(text.to_owned())
}

/// Mount point of the cgroup v2 hierarchy: `/sys/fs/cgroup`, or beside the v1 controllers on a hybrid host.
fn cgroup_root() -> Result<PathBuf, Error> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(point))
        })
        .next()
        .ok_or(Error::NoCgroup)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn config(extra: &[&str]) -> Result<Config, Error> {
        let dir = std::env::temp_dir();
        let dir = dir.to_str().expect("the temporary directory has a plain name");
        let mut line = vec!["weft", "agent", "--node", "n1", "--manifests", dir, "--ca-dir", dir];
        line.extend(extra);
        let Command::Agent(args) = Cli::parse_from(line).command else { unreachable!("agent was asked for") };
        Config::new(&args)
    }

    #[test]
    fn wrong_values_are_named_with_their_flag() {
        for (extra, flag) in [
            (&["--mesh-cidr", "10.0.0.0/40"][..], "--mesh-cidr"),
            (&["--trust-domain", "Not a domain"], "--trust-domain"),
            (&["--cgroup", "/proc"], "--cgroup"),
            (&["--takeover"], "--takeover"),
        ] {
            let sentence = config(extra).expect_err("the value is wrong").to_string();
            assert!(sentence.contains(flag) && !sentence.contains('\n'), "{sentence}");
        }
    }
}
