//! `weft observe`: one line per flow event.

use std::io::{self, Write};

use super::{DONE, Failure, client, table};
use crate::args::{ObserveArgs, Output, Verdict};
use crate::observe::admin::proto::ObserveRequest;
use crate::observe::events::{FlowEvent, Party};

pub(super) fn run(args: &ObserveArgs) -> Result<u8, Failure> {
    for workload in [&args.from, &args.to].into_iter().flatten() {
        if workload.split('/').filter(|part| !part.is_empty()).count() != 2 {
            return Err(Failure::usage(anyhow::anyhow!("write the workload {workload} as namespace/name")));
        }
    }
    let request = ObserveRequest {
        follow: args.follow,
        from: args.from.clone().unwrap_or_default(),
        to: args.to.clone().unwrap_or_default(),
        verdict: match args.verdict {
            None => "",
            Some(Verdict::Allowed) => "allowed",
            Some(Verdict::Denied) => "denied",
        }
        .into(),
    };
    let json = args.query.output.output == Output::Json;
    client::block_on(client::observe(&args.query.admin_socket, request, |event, lost| {
        let mut out = io::stdout().lock();
        if lost > 0 {
            eprintln!("weft: {lost} events were lost here, because they were not read fast enough");
        }
        let line = if json { serde_json::to_string(&event)? } else { line(&event) };
        // Flushed, so that a pipe sees events as they happen.
        writeln!(out, "{line}").and_then(|()| out.flush())?;
        Ok(())
    }))?;
    Ok(DONE)
}

/// Time, verdict, who, to whom, how; then why, for what was refused.
fn line(event: &FlowEvent) -> String {
    let time = event.time.split('T').nth(1).unwrap_or(&event.time);
    let verdict = if event.verdict == "denied" { table::red("denied ") } else { event.verdict.clone() };
    let mut line = format!(
        "{time} {verdict} {} {} -> {} {} {}",
        event.what,
        party(&event.from, false),
        party(&event.to, true),
        event.protocol,
        event.path,
    );
    if let Some(bytes) = &event.bytes {
        line +=
            &format!(", {} sent, {} received", table::bytes(bytes.to_server), table::bytes(bytes.to_client));
    }
    for (label, value) in [("reason", &event.reason), ("policy", &event.policy), ("rule", &event.rule)] {
        if !value.is_empty() {
            line += &format!(" {label}={value}");
        }
    }
    if !event.detail.is_empty() {
        line += &format!(": {}", event.detail);
    }
    if event.suppressed > 0 {
        line += &format!(" (and {} more like it)", event.suppressed);
    }
    line
}

fn party(party: &Party, with_port: bool) -> String {
    let name = if party.workload.is_empty() { &party.address } else { &party.workload };
    match (with_port, name.contains(':')) {
        (true, true) => format!("[{name}]:{}", party.port),
        (true, false) => format!("{name}:{}", party.port),
        (false, _) => name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_who_and_why() {
        let event = FlowEvent {
            time: "2026-01-02T03:04:05.006Z".into(),
            verdict: "denied".into(),
            what: "dropped".into(),
            from: Party { workload: "shop/web".into(), ..Party::default() },
            to: Party { address: "fd00::1".into(), port: 5432, ..Party::default() },
            protocol: "tcp".into(),
            path: "direct".into(),
            reason: "policy".into(),
            ..FlowEvent::default()
        };
        assert_eq!(
            line(&event),
            "03:04:05.006Z denied  dropped shop/web -> [fd00::1]:5432 tcp direct reason=policy"
        );
    }
}
