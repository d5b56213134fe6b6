//! How each table looks to people.

use super::table::{bold, bytes, duration, red, render};
use crate::observe::tables::*;

/// A row of a table.
pub(super) trait Row {
    const HEADING: &'static [&'static str];
    fn cells(&self) -> Vec<String>;
}

/// The whole table.
pub(super) fn list<R: Row>(rows: &[R]) -> String {
    render(R::HEADING, &rows.iter().map(Row::cells).collect::<Vec<_>>())
}

/// `spiffe://` is the same everywhere and takes ten columns.
fn principal(identity: &str) -> String {
    identity.strip_prefix("spiffe://").unwrap_or(identity).to_owned()
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

impl Row for WorkloadRow {
    const HEADING: &'static [&'static str] = &["WORKLOAD", "NODE", "ADDRESSES", "STATE", "NR", "IDENTITY"];
    fn cells(&self) -> Vec<String> {
        vec![
            format!("{}/{}", self.namespace, self.name),
            or_dash(&self.node),
            self.addresses.join(","),
            self.state.clone(),
            self.number.to_string(),
            principal(&self.identity),
        ]
    }
}

impl Row for ServiceRow {
    const HEADING: &'static [&'static str] = &["SERVICE", "ADDRESS", "PORT", "BALANCE", "BACKENDS"];
    fn cells(&self) -> Vec<String> {
        vec![
            format!("{}/{}", self.namespace, self.name),
            self.address.clone(),
            format!("{}/{}", self.port, self.protocol),
            self.balance.clone(),
            if self.backends.is_empty() { red("none") } else { self.backends.join(",") },
        ]
    }
}

impl Row for IdentityRow {
    const HEADING: &'static [&'static str] = &["NR", "IDENTITY", "WORKLOADS", "LABELS"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.number.to_string(),
            principal(&self.identity),
            self.workloads.to_string(),
            or_dash(&self.labels.join(",")),
        ]
    }
}

impl Row for PolicyRow {
    const HEADING: &'static [&'static str] = &["KIND", "POLICY", "ACTION", "RULES", "SELECTS", "FILE"];
    fn cells(&self) -> Vec<String> {
        let name = match self.namespace.as_str() {
            "" => self.name.clone(),
            namespace => format!("{namespace}/{}", self.name),
        };
        vec![
            self.kind.clone(),
            name,
            self.action.clone(),
            self.rules.to_string(),
            self.selects.to_string(),
            self.file.clone(),
        ]
    }
}

impl Row for ConnectionRow {
    const HEADING: &'static [&'static str] =
        &["ID", "SIDE", "FROM", "TO", "SERVER", "AGE", "SENT", "RECEIVED"];
    fn cells(&self) -> Vec<String> {
        let known =
            |name: &str, address: &str| if name.is_empty() { address.to_owned() } else { name.to_owned() };
        vec![
            self.id.to_string(),
            self.reporter.clone(),
            known(&self.from, &self.client),
            known(&self.to, &self.server),
            self.server.clone(),
            duration(self.age_seconds),
            bytes(self.bytes_to_server),
            bytes(self.bytes_to_client),
        ]
    }
}

/// `O=weft, CN=root` as `root`.
fn common_name(name: &str) -> &str {
    name.rsplit_once("CN=").map_or(name, |(_, name)| name)
}

impl Row for CertRow {
    const HEADING: &'static [&'static str] = &["IDENTITY", "SERIAL", "EXPIRES IN", "RENEWS AT", "CHAIN"];
    fn cells(&self) -> Vec<String> {
        let expiry = match u64::try_from(self.expires_in_seconds) {
            _ if self.not_after.is_empty() => red("none yet"),
            Ok(seconds) => duration(seconds),
            Err(_) => red("expired"),
        };
        vec![
            principal(&self.identity),
            // Enough to tell certificates apart; `-o json` has it whole, and the issuers' full names.
            or_dash(&self.serial.chars().take(12).collect::<String>()),
            expiry,
            or_dash(&self.renews_at),
            if self.problem.is_empty() {
                self.chain.iter().map(|name| common_name(name)).collect::<Vec<_>>().join(" < ")
            } else {
                red(&self.problem)
            },
        ]
    }
}

/// `weft status`.
pub(super) fn status(status: &Status) -> String {
    let mut text = format!(
        "weft {} on node {}, trust domain {}, {}, up {}\nkernel {}, map layout {}\n\
         policy revision {} for {}; {} of {} workloads are here; {} connections in the proxy\n",
        status.version,
        status.node,
        status.trust_domain,
        if status.ready { "ready".to_owned() } else { red("not ready") },
        duration(status.uptime_seconds),
        status.kernel,
        status.abi,
        status.policy_revision,
        duration(status.policy_age_seconds),
        status.workloads_local,
        status.workloads,
        status.connections,
    );
    let mut section = |title: &str, table: String| text += &format!("\n{}\n{table}", bold(title));
    if status.problems.is_empty() {
        section("Problems", "none\n".into());
    } else {
        // Whole sentences, wrapped by the terminal rather than cut: they are what one came for.
        let lines = status.problems.iter().map(|problem| {
            let severity = match problem.severity.as_str() {
                "error" => red("error"),
                other => other.to_owned(),
            };
            format!("{severity} {} {}: {}\n", problem.area, problem.place, problem.message)
        });
        section("Problems", lines.collect());
    }
    let rows: Vec<_> = status
        .programs
        .iter()
        .map(|p| vec![p.name.clone(), p.id.to_string(), p.runs.to_string(), format!("{:.3}", p.run_seconds)])
        .collect();
    section("Programs", render(&["PROGRAM", "ID", "RUNS", "SECONDS"], &rows));
    let rows: Vec<_> = status.links.iter().map(|l| vec![l.program.clone(), l.target.clone()]).collect();
    section("Links", render(&["PROGRAM", "ATTACHED TO"], &rows));
    let rows: Vec<_> = status
        .maps
        .iter()
        .map(|m| {
            let percent = m.entries as f64 * 100.0 / m.capacity.max(1) as f64;
            vec![m.name.clone(), m.entries.to_string(), m.capacity.to_string(), format!("{percent:.1}%")]
        })
        .collect();
    section("Maps", render(&["MAP", "ENTRIES", "CAPACITY", "FILL"], &rows));
    let rows: Vec<_> = status
        .features
        .iter()
        .map(|f| vec![f.name.clone(), if f.present { "yes" } else { "no" }.into(), f.instead.clone()])
        .collect();
    section("Features of this kernel", render(&["FEATURE", "PRESENT", "USED INSTEAD"], &rows));
    section("Certificates", list(&status.certs));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_names_every_problem_whole() {
        let message = "x".repeat(200);
        let problem = ProblemRow {
            severity: "error".into(),
            area: "manifests".into(),
            place: "a.yaml".into(),
            message: message.clone(),
        };
        let text = status(&Status { problems: vec![problem], ..Status::default() });
        assert!(text.contains(&message) && text.contains("manifests a.yaml"));
    }
}
