//! `weft policy check` and `weft policy explain`: manifests only, no agent.

use std::io::{self, Write};
use std::path::Path;

use serde_json::json;
use weft_policy::{Flow, Model, ObjectStore, Peer, Severity, Verdict, Workload};

use super::{DONE, Failure, NO};
use crate::args::{ExplainArgs, Output, PolicyArgs, PolicyCommand};
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
    let problems = store.check(settings(&policy.trust_domain, policy.default_deny));
    let mut out = io::stdout().lock();
    if output == Output::Json {
        let unreadable = unreadable.iter().map(|(file, why)| {
            json!({"severity": "error", "file": file, "line": 0, "object": null, "field": "", "message": why})
        });
        let rows = problems.iter().map(|problem| {
            json!({
                "severity": problem.severity.name(),
                "file": &*problem.origin.file,
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
    let port = args.port;
    let flow = Flow { source, source_addr, destination, destination_addr, protocol: 6, port };
    let decision = model.eval(&flow);
    let allowed = decision.verdict == Verdict::Allow;
    let rule = decision.rule.as_ref().map(ToString::to_string);
    let mut out = io::stdout().lock();
    if args.output.output == Output::Json {
        let answer = json!({
            "allowed": allowed,
            "from": args.from,
            "from_identity": from.enrolled.then(|| from.identity.spiffe.to_string()),
            "to": args.to,
            "to_identity": to.identity.spiffe.to_string(),
            "port": args.port,
            "rule": rule,
            "reason": decision.reason,
            "remedy": decision.remedy,
        });
        writeln!(out, "{answer:#}")?;
    } else {
        let verdict = if allowed { "allowed".to_owned() } else { super::table::red("denied") };
        writeln!(out, "{verdict}: {} -> {} port {}: {}", args.from, args.to, args.port, decision.reason)?;
        if let Some(rule) = rule {
            writeln!(out, "decided by {rule}")?;
        }
        if let Some(remedy) = decision.remedy {
            writeln!(out, "to allow it: {remedy}")?;
        }
    }
    Ok(if allowed { DONE } else { NO })
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
