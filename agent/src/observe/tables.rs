//! The rows of every table that the agent can show. Compiled into both ends of the admin socket.

use serde::{Deserialize, Serialize};

/// The tables of the admin API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Status,
    Workloads,
    Services,
    Identities,
    Policies,
    Connections,
    Certs,
}

impl Table {
    pub const ALL: [Table; 7] = [
        Table::Status,
        Table::Workloads,
        Table::Services,
        Table::Identities,
        Table::Policies,
        Table::Connections,
        Table::Certs,
    ];

    /// The name of the command and of the request.
    pub const fn name(self) -> &'static str {
        match self {
            Table::Status => "status",
            Table::Workloads => "workloads",
            Table::Services => "services",
            Table::Identities => "identities",
            Table::Policies => "policies",
            Table::Connections => "connections",
            Table::Certs => "certs",
        }
    }

    /// The table of that name.
    pub fn from_name(name: &str) -> Option<Table> {
        Table::ALL.into_iter().find(|table| table.name() == name)
    }
}

/// `weft status`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub trust_domain: String,
    pub ready: bool,
    pub uptime_seconds: u64,
    pub kernel: String,
    pub abi: u32,
    pub policy_revision: u32,
    pub policy_age_seconds: u64,
    pub workloads_local: usize,
    pub workloads: usize,
    pub connections: usize,
    pub programs: Vec<Program>,
    pub links: Vec<Link>,
    pub maps: Vec<MapFill>,
    pub features: Vec<Feature>,
    pub certs: Vec<CertRow>,
    pub problems: Vec<ProblemRow>,
}

/// A BPF program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub id: u32,
    /// Needs `kernel.bpf_stats_enabled`; 0 without it.
    pub runs: u64,
    pub run_seconds: f64,
}

/// Where a program is attached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Link {
    pub program: String,
    pub target: String,
}

/// How full a map is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapFill {
    pub name: String,
    pub entries: u64,
    pub capacity: u64,
}

/// Something that only some kernels have.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Feature {
    pub name: String,
    pub present: bool,
    /// What is used in its place; empty where it is present.
    pub instead: String,
}

/// Something that is wrong, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemRow {
    /// `error`, `warning` or `note`.
    pub severity: String,
    /// `manifests`, `workload`, `certificates`, `datapath`, `proxy`.
    pub area: String,
    /// File and object, or workload.
    pub place: String,
    pub message: String,
}

/// `weft workloads`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkloadRow {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub addresses: Vec<String>,
    pub identity: String,
    pub number: u32,
    /// `enrolled`, `remote`, `waiting` (with the reason in `status`), `outside` (no way to enrol it is declared).
    pub state: String,
}

/// `weft services`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceRow {
    pub namespace: String,
    pub name: String,
    pub address: String,
    pub port: u16,
    pub protocol: String,
    pub balance: String,
    pub backends: Vec<String>,
}

/// `weft identities`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdentityRow {
    pub number: u32,
    pub identity: String,
    pub labels: Vec<String>,
    pub workloads: usize,
}

/// `weft policies`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyRow {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub action: String,
    pub rules: usize,
    /// Workloads that it selects.
    pub selects: usize,
    pub file: String,
}

/// `weft connections`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionRow {
    pub id: u64,
    /// `source` or `destination`: at which end this node is.
    pub reporter: String,
    pub from: String,
    pub from_identity: String,
    pub client: String,
    pub to: String,
    pub to_identity: String,
    pub server: String,
    pub age_seconds: u64,
    pub bytes_to_server: u64,
    pub bytes_to_client: u64,
}

/// `weft certs`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CertRow {
    pub identity: String,
    pub serial: String,
    /// RFC 3339; empty when there is no certificate yet.
    pub not_after: String,
    pub expires_in_seconds: i64,
    pub renews_at: String,
    /// Issuers from the leaf's to the root.
    pub chain: Vec<String>,
    /// Why there is none, or why the last renewal failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub problem: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_distinct_names() {
        for table in Table::ALL {
            assert_eq!(Table::from_name(table.name()), Some(table));
        }
        assert_eq!(Table::from_name("keys"), None);
    }
}
