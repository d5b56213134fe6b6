//! What was checked and what came out, as it happens and at the end.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use clap::ValueEnum;
use serde_json::json;

/// How the summary is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Columns for people
    Table,
    /// JSON for programs
    Json,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Format::Table => "table",
            Format::Json => "json",
        }
    }
}

/// One thing that had to hold.
#[derive(Debug)]
struct Check {
    step: String,
    what: String,
    held: bool,
    /// What was seen.
    seen: String,
}

/// The steps and checks of a run. Progress goes to stderr, the summary to stdout.
#[derive(Debug)]
pub(super) struct Report {
    begun: Instant,
    step: String,
    steps: u32,
    checks: Vec<Check>,
}

impl Default for Report {
    fn default() -> Report {
        Report { begun: Instant::now(), step: String::new(), steps: 0, checks: Vec::new() }
    }
}

/// How many steps [`super::play`] has.
const STEPS: u32 = 9;

impl Report {
    /// A new step begins.
    pub(super) fn step(&mut self, name: &str) {
        self.steps += 1;
        name.clone_into(&mut self.step);
        let bar = "#".repeat(self.steps as usize) + &".".repeat(STEPS.saturating_sub(self.steps) as usize);
        eprintln!("\n[{bar}] {:>4.1} s  {name}", self.begun.elapsed().as_secs_f32());
    }

    /// Something to read on the way.
    pub(super) fn note(&self, text: &str) {
        text.lines().for_each(|line| eprintln!("    {line}"));
    }

    /// Something that has to hold, and what was seen.
    pub(super) fn check(&mut self, what: &str, held: bool, seen: &str) {
        eprintln!("    {} {what}: {seen}", mark(held, std::io::stderr().is_terminal()));
        self.checks.push(Check {
            step: self.step.clone(),
            what: what.to_owned(),
            held,
            seen: seen.to_owned(),
        });
    }

    /// Did all of it hold?
    pub(super) fn held(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.held)
    }

    /// The summary.
    pub(super) fn print(&self, format: Format) {
        let seconds = self.begun.elapsed().as_secs_f32();
        let text = match format {
            Format::Table => self.table(seconds, std::io::stdout().is_terminal()),
            Format::Json => {
                let checks: Vec<_> = self
                    .checks
                    .iter()
                    .map(|check| json!({ "step": check.step, "what": check.what, "held": check.held, "seen": check.seen }))
                    .collect();
                format!("{:#}\n", json!({ "held": self.held(), "seconds": seconds, "checks": checks }))
            }
        };
        let mut stdout = std::io::stdout().lock();
        // Whoever closed stdout does not want the summary; the exit code still tells.
        let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    }

    fn table(&self, seconds: f32, colour: bool) -> String {
        let wide = self.checks.iter().map(|check| check.what.chars().count()).max().unwrap_or(0).min(52);
        let mut text = String::from("\n");
        let mut step = "";
        for check in &self.checks {
            if check.step != step {
                step = &check.step;
                text += &format!("{step}\n");
            }
            text += &format!("  {} {:<wide$}  {}\n", mark(check.held, colour), check.what, check.seen);
        }
        let failed = self.checks.iter().filter(|check| !check.held).count();
        text += &format!("\n{} checks held, {failed} did not, {seconds:.0} s\n", self.checks.len() - failed);
        text
    }
}

fn mark(held: bool, colour: bool) -> &'static str {
    match (held, colour) {
        (true, true) => "\x1b[32mok  \x1b[0m",
        (true, false) => "ok  ",
        (false, true) => "\x1b[31mFAIL\x1b[0m",
        (false, false) => "FAIL",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_check_fails_the_run_and_none_does_too() {
        let mut report = Report::default();
        assert!(!report.held());
        report.check("a", true, "yes");
        assert!(report.held());
        report.check("b", false, "no");
        assert!(!report.held());
        let table = report.table(1.0, false);
        assert!(table.contains("FAIL b  no") && table.contains("1 checks held, 1 did not"), "{table}");
    }
}
