//! `weft policy check` and `weft policy explain`: manifests only, no agent.

use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;

use clap::ValueEnum;
use serde_json::json;
use weft_policy::lint::lint;
use weft_policy::model::layer::icmp_port;
use weft_policy::{Explanation, Flow, Model, ObjectStore, Origin, Peer, Severity, Verdict, Workload};

use super::request::request;
use super::{DONE, Failure, NO};
use crate::args::{ExplainArgs, IpProtocol, Output, PolicyArgs, PolicyCommand};
use crate::control::settings;
use crate::manifests::files;

pub(super) fn run(command: &PolicyCommand) -> Result<u8, Failure> {
    match command {
        PolicyCommand::Check { dir, policy, output } => check(dir, policy, output.output),
        PolicyCommand::Explain(args) => explain(args),
    }
}

/// One line per problem, errors and warnings and notes; 1 if there is an error.
fn check(dir: &Path, policy: &PolicyArgs, output: Output) -> Result<u8, Failure> {
    let (store, unreadable) = read(dir)?;
    let model = store.model(settings(&policy.trust_domain, policy.default_deny));
    let mut problems: Vec<_> = store.problems().chain(model.problems()).cloned().collect();
    problems.extend(lint(&store, &model));
    problems.sort();
    let mut out = io::stdout().lock();
    if output == Output::Json {
        let unreadable = unreadable.iter().map(|(file, why)| {
            json!({"severity": "error", "file": file, "document": 0, "line": 0, "object": null, "field": "", "message": why})
        });
        let rows = problems.iter().map(|problem| {
            json!({
                "severity": problem.severity.name(),
                "file": &*problem.origin.file,
                "document": problem.origin.document,
                "line": problem.origin.line,
                "object": problem.object.as_ref().map(ToString::to_string),
                "field": problem.field,
                "message": problem.message,
            })
        });
        writeln!(out, "{:#}", serde_json::Value::from_iter(unreadable.chain(rows)))?;
    } else {
        for (file, why) in &unreadable {
            writeln!(out, "{file}: error: {why}")?;
        }
        for problem in &problems {
            writeln!(out, "{problem}")?;
        }
    }
    let bad = !unreadable.is_empty() || problems.iter().any(|problem| problem.severity == Severity::Error);
    Ok(if bad { NO } else { DONE })
}

/// 0 when the flow would pass, 1 when it is denied.
fn explain(args: &ExplainArgs) -> Result<u8, Failure> {
    let (store, unreadable) = read(&args.dir)?;
    if let Some((file, why)) = unreadable.first() {
        return Err(Failure::usage(anyhow::anyhow!("{file}: {why}")));
    }
    let model = store.model(settings(&args.policy.trust_domain, args.policy.default_deny));
    let (from, to) = (workload(&model, &args.from)?, workload(&model, &args.to)?);
    let Some(source_addr) = from.addresses.first().copied() else {
        return Err(Failure::usage(anyhow::anyhow!(
            "{} has no address of its own; see `weft policy check`",
            args.from
        )));
    };
    let source = if from.enrolled { Peer::Workload(&from.identity) } else { Peer::Anonymous };
    let Some(destination_addr) = to.addresses.first().copied() else {
        return Err(Failure::usage(anyhow::anyhow!(
            "{} has no address of its own; see `weft policy check`",
            args.to
        )));
    };
    let destination = if to.enrolled { Peer::Workload(&to.identity) } else { Peer::Anonymous };
    let (protocol, port) = destination_port(args, destination_addr)?;
    let flow = Flow { source, source_addr, destination, destination_addr, protocol, port, request: None };
    let Explanation { decision, place, changes } = model.explain(&flow);
    let place_of = |place: &Origin| format!("{}:{}", place.file, place.line);
    let allowed = decision.verdict == Verdict::Allow;
    // What policy says of one request on the connection. The connection itself is refused as long as no engine looks
    // into it, so the answer to that stays the first.
    let asked = request(args)?;
    let of_request = asked.as_ref().map(|request| model.eval(&Flow { request: Some(request), ..flow }));
    let rule = decision.rule.as_ref().map(ToString::to_string);
    let mut out = io::stdout().lock();
    if args.output.output == Output::Json {
        let answer = json!({
            "allowed": allowed,
            "verdict": name(decision.verdict),
            "request": of_request.as_ref().map(|decision| {
                json!({
                    "verdict": name(decision.verdict),
                    "rule": decision.rule.as_ref().map(ToString::to_string),
                    "reason": decision.reason,
                    "remedy": decision.remedy,
                })
            }),
            "from": args.from,
            "from_identity": from.enrolled.then(|| from.identity.spiffe.to_string()),
            "to": args.to,
            "to_identity": to.identity.spiffe.to_string(),
            "protocol": args.protocol.to_possible_value().map(|name| name.get_name().to_owned()),
            "port": args.port,
            "rule": rule,
            "file": place.as_ref().map(|place| &*place.file),
            "line": place.as_ref().map(|place| place.line),
            "document": place.as_ref().map(|place| place.document),
            "reason": decision.reason,
            "remedy": decision.remedy,
            "changes": changes.iter().map(|change| {
                json!({
                    "change": change.what,
                    "file": change.place.as_ref().map(|place| &*place.file),
                    "line": change.place.as_ref().map(|place| place.line),
                })
            }).collect::<Vec<_>>(),
        });
        writeln!(out, "{answer:#}")?;
    } else {
        let verdict = if allowed { "allowed".to_owned() } else { super::table::red("denied") };
        writeln!(out, "{verdict}: {} -> {} port {}: {}", args.from, args.to, args.port, decision.reason)?;
        if let Some(rule) = rule {
            let place = place.as_ref().map(|place| format!(" in {}", place_of(place))).unwrap_or_default();
            writeln!(out, "decided by {rule}{place}")?;
        }
        for change in &changes {
            let place =
                change.place.as_ref().map(|place| format!(" in {}", place_of(place))).unwrap_or_default();
            writeln!(out, "to allow it: {}{place}", change.what)?;
        }
        if let Some(remedy) = decision.remedy.filter(|_| changes.is_empty()) {
            writeln!(out, "to allow it: {remedy}")?;
        }
        if let Some(of_request) = of_request {
            let verdict = if of_request.verdict == Verdict::Allow { "allows" } else { "denies" };
            let rule = of_request.rule.map(|rule| format!(", by {rule}")).unwrap_or_default();
            writeln!(out, "of the request: policy {verdict} it, because {}{rule}", of_request.reason)?;
        }
    }
    Ok(if allowed { DONE } else { NO })
}

fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
        Verdict::Http => "http",
    }
}

/// IP protocol number, and the port as policy has it.
fn destination_port(args: &ExplainArgs, destination: IpAddr) -> Result<(u8, u16), Failure> {
    let usage = |message: &str| Failure::usage(anyhow::anyhow!("{message}"));
    let protocol = match args.protocol {
        IpProtocol::Icmp => {
            let kind =
                u8::try_from(args.port).map_err(|_| usage("--port is the message type of icmp: 0 to 255"))?;
            return Ok((if destination.is_ipv4() { 1 } else { 58 }, icmp_port(kind)));
        }
        IpProtocol::Tcp => 6,
        IpProtocol::Udp => 17,
        IpProtocol::Sctp => 132,
    };
    match args.port {
        0 => Err(usage("--port is a number from 1 to 65535")),
        port => Ok((protocol, port)),
    }
}

/// All objects, and the files that could not be read.
fn read(dir: &Path) -> Result<(ObjectStore, Vec<(String, String)>), Failure> {
    let (files, _) = files::read(dir).map_err(|error| {
        Failure::usage(anyhow::anyhow!("{}: {error}; name a directory of manifests", dir.display()))
    })?;
    let mut store = ObjectStore::new();
    let mut unreadable = Vec::new();
    for (name, text) in files {
        match text {
            Ok(text) => drop(store.apply(&name, &text).len()),
            Err(why) => unreadable.push((name, why)),
        }
    }
    Ok((store, unreadable))
}

fn workload<'a>(model: &'a Model, name: &str) -> Result<&'a Workload, Failure> {
    let (namespace, pod) = name
        .split_once('/')
        .ok_or_else(|| Failure::usage(anyhow::anyhow!("write the workload {name} as namespace/name")))?;
    model.workload(namespace, pod).ok_or_else(|| {
        Failure::usage(anyhow::anyhow!("no manifest describes the workload {name}; see `weft policy check`"))
    })
}
