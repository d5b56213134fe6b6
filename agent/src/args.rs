//! The command line as given: commands, flags, defaults. What the values mean together is checked in [`crate::config`].

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// A service mesh whose datapath is the Linux kernel.
#[derive(Debug, Parser)]
#[command(name = "weft", version, disable_help_subcommand = true, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `weft`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node agent.
    Agent(Box<AgentArgs>),
    /// Run the mesh's own certificate authority.
    #[command(subcommand)]
    Ca(CaCommand),
    /// Programs, links, maps and their fill, certificates, features of this kernel, problems.
    Status(QueryArgs),
    /// The workloads that this node knows.
    Workloads(QueryArgs),
    /// The services that this node knows, and their backends.
    Services(QueryArgs),
    /// Identities and their numbers on this node.
    Identities(QueryArgs),
    /// The policy objects in force.
    Policies(QueryArgs),
    /// Connections that go through this node's agent.
    Connections(QueryArgs),
    /// Certificates: serial, SPIFFE ID, expiry, next renewal, chain to the root.
    Certs(QueryArgs),
    /// Check or explain policy from a directory of manifests, without an agent.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Flow events as they happen.
    Observe(ObserveArgs),
    /// Remove every program, link, map and rule that weft made on this node.
    Detach(DetachArgs),
}

/// `weft agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this node, as in `spec.nodeName` of its pods.
    #[arg(long)]
    pub node: String,
    /// Directory of YAML manifests; watched.
    #[arg(long, value_name = "DIR")]
    pub manifests: PathBuf,
    /// Certificate authority to ask for certificates: weft's own or istiod.
    #[arg(long, value_name = "URL", requires_all = ["ca_root", "token"], conflicts_with = "ca_dir")]
    pub ca: Option<String>,
    /// Root certificate (PEM) that the authority's own certificate must chain to.
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub ca_root: Option<PathBuf>,
    /// File with this node's join token (mode 0600).
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub token: Option<PathBuf>,
    /// Sign with the authority in this directory, inside the agent: a mesh of one node.
    #[arg(long, value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Where the node's own key and certificate are kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/weft")]
    pub state_dir: PathBuf,
    /// Where programs, links and maps are pinned; on a bpf file system.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/weft")]
    pub bpffs: PathBuf,
    /// cgroup that the connect hooks attach to [default: the cgroup v2 root].
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Where metrics and readiness are served.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15020")]
    pub metrics: SocketAddr,
    /// Unix socket of the admin API (mode 0600).
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
    /// What to log: a level, or target=level pairs with commas between them.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// Trust domain of every SPIFFE ID.
    #[arg(long, value_name = "TD", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Lifetime of workload certificates, renewed at half of it. A short one needs a CA that is always reached.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub cert_ttl: u64,
    /// Addresses that belong to the mesh although no manifest names them; unknown there is refused. Repeatable.
    #[arg(long, value_name = "CIDR")]
    pub mesh_cidr: Vec<String>,
    /// Refuse what no policy allows, and require mTLS where no policy says otherwise.
    #[arg(long)]
    pub default_deny: bool,
    /// Receive the listeners of the agent that runs now.
    #[arg(long)]
    pub takeover: bool,
}

/// Default of `--admin-socket`, at both ends.
pub const ADMIN_SOCKET: &str = "/run/weft/agent.sock";

/// `weft ca`.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a root and an intermediate.
    Init {
        /// Directory of the authority; keys in it are mode 0600.
        #[arg(long)]
        dir: PathBuf,
        /// Trust domain that it signs for.
        #[arg(long, value_name = "TD", default_value = "cluster.local")]
        trust_domain: String,
    },
    /// Serve certificate requests of agents.
    Serve {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// Address to listen on.
        #[arg(long, value_name = "ADDR")]
        listen: SocketAddr,
        /// The manifests that say which workloads are on which node.
        #[arg(long, value_name = "DIR")]
        manifests: PathBuf,
        /// What to log.
        #[arg(long, value_name = "FILTER", default_value = "info")]
        log: String,
    },
    /// Make a join token for one node; printed on standard output, once.
    Token {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// The node that may use it.
        #[arg(long)]
        node: String,
    },
}

/// `weft policy`.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Parse, resolve, lint; exit 1 and one line per problem.
    Check {
        /// Directory of manifests.
        dir: PathBuf,
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// May one workload reach another? Exit 0 if so, 1 if denied.
    Explain(ExplainArgs),
}

/// `weft policy explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Directory of manifests.
    pub dir: PathBuf,
    /// Source workload, `namespace/name`.
    #[arg(long, value_name = "W")]
    pub from: String,
    /// Destination workload, `namespace/name`.
    #[arg(long, value_name = "W")]
    pub to: String,
    /// Destination port; for icmp the message type.
    #[arg(long, value_name = "N")]
    pub port: u16,
    /// IP protocol.
    #[arg(long, value_enum, default_value = "tcp")]
    pub protocol: IpProtocol,
    /// One request on the connection: its method. Any of these flags makes it a question about a request, `GET /`
    /// where they say nothing else.
    #[arg(long, value_name = "M", help_heading = "Request")]
    pub method: Option<String>,
    /// Its path, with the query.
    #[arg(long, value_name = "P", help_heading = "Request")]
    pub path: Option<String>,
    /// Its host.
    #[arg(long, value_name = "H", help_heading = "Request")]
    pub host: Option<String>,
    /// A header.
    #[arg(long, value_name = "K:V", help_heading = "Request")]
    pub header: Vec<String>,
    /// A claim of its verified token; `outer[inner]=V` for a nested one, given again for a list.
    #[arg(long, value_name = "K=V", help_heading = "Request")]
    pub claim: Vec<String>,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Protocols that policy tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IpProtocol {
    Tcp,
    Udp,
    Sctp,
    Icmp,
}

/// How policy is read where no agent says so.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Trust domain of every SPIFFE ID.
    #[arg(long, value_name = "TD", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Refuse what no policy allows, and require mTLS where no policy says otherwise.
    #[arg(long)]
    pub default_deny: bool,
}

/// A question to the running agent.
#[derive(Clone, Debug, Args)]
pub struct QueryArgs {
    /// Unix socket of the agent's admin API.
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// How answers are printed.
#[derive(Clone, Debug, Args)]
pub struct OutputArgs {
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns for people.
    Table,
    /// JSON for programs.
    Json,
}

/// `weft observe`.
#[derive(Debug, Args)]
pub struct ObserveArgs {
    /// Go on as events happen, instead of ending after those that the agent remembers.
    #[arg(long)]
    pub follow: bool,
    /// Only flows from this workload, `namespace/name`.
    #[arg(long, value_name = "W")]
    pub from: Option<String>,
    /// Only flows to this workload, `namespace/name`.
    #[arg(long, value_name = "W")]
    pub to: Option<String>,
    /// Only flows with this verdict.
    #[arg(long, value_enum)]
    pub verdict: Option<Verdict>,
    #[command(flatten)]
    pub query: QueryArgs,
}

/// Verdicts that `weft observe` can select.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verdict {
    /// Passed.
    Allowed,
    /// Refused or cut.
    Denied,
}

/// `weft detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// Where programs, links and maps are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/weft")]
    pub bpffs: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Folds clap's several lines into the one sentence that goes to stderr.
pub fn usage_sentence(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let head: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty() && !line.starts_with("tip:"))
        .collect();
    let sentence = head.join(" ");
    let sentence = sentence.strip_prefix("error: ").unwrap_or(&sentence);
    format!("{}; see `weft --help`", sentence.trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn agent_defaults_are_those_of_the_design() {
        let cli = Cli::parse_from(["weft", "agent", "--node", "n1", "--manifests", "/m", "--ca-dir", "/ca"]);
        let Command::Agent(args) = cli.command else { panic!("agent was asked for") };
        assert_eq!(args.state_dir, PathBuf::from("/var/lib/weft"));
        assert_eq!(args.bpffs, PathBuf::from("/sys/fs/bpf/weft"));
        assert_eq!(args.metrics.to_string(), "127.0.0.1:15020");
        assert_eq!(args.admin_socket, PathBuf::from("/run/weft/agent.sock"));
        assert_eq!((args.log.as_str(), args.trust_domain.as_str()), ("info", "cluster.local"));
        assert!(!args.default_deny && !args.takeover && args.cgroup.is_none());
    }

    #[test]
    fn usage_errors_are_one_line() {
        for line in [
            &["weft", "agent", "--node", "n1"][..],
            &["weft", "frobnicate"],
            &["weft", "agent", "--node", "n", "--manifests", "d", "--metrics", "nowhere"],
            &["weft", "agent", "--node", "n", "--manifests", "d", "--ca", "https://ca:15012"],
            &["weft", "policy", "explain", "d", "--from", "a/b", "--to", "c/d", "--port", "65536"],
        ] {
            let error = Cli::try_parse_from(line).expect_err("the line is wrong");
            assert_eq!(error.exit_code(), 2);
            let sentence = usage_sentence(&error);
            assert!(!sentence.contains('\n') && !sentence.contains("Usage:"), "{sentence}");
            assert!(!sentence.starts_with("error"), "{sentence}");
        }
    }
}
