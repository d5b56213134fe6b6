//! What a guest's lines and its kernel's console amount to. Silence, a panic, a lockup and a missing last line are
//! failures, whatever passed before.

use std::time::Duration;

use super::boot::Run;

/// What the guest puts before each of its lines (`vm-tests/src/bin/wt-guest.rs` writes them).
const PREFIX: &str = "weft-vm ";

/// What a kernel says when it is beyond help.
const TROUBLE: &[&str] = &[
    "Kernel panic",
    "Oops:",
    "BUG: ",
    "soft lockup",
    "hard LOCKUP",
    "blocked for more than",
    "general protection fault",
    "double fault",
    "detected stall",
    "WARNING: ",
];

/// One line of the guest, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Begin(String),
    Pass(String),
    Fail(String),
    Skip(String),
    /// Something to read: a failed scenario's output.
    Text(String),
    /// Scenarios that passed, and that failed.
    Done(u32, u32),
}

/// Reads a line; none if it is not the guest's, such as firmware's.
pub(crate) fn line(line: &str) -> Option<Line> {
    let (word, rest) = line.strip_prefix(PREFIX)?.split_once(' ')?;
    let rest = rest.to_owned();
    Some(match word {
        "begin" => Line::Begin(rest),
        "pass" => Line::Pass(rest),
        "fail" => Line::Fail(rest),
        "skip" => Line::Skip(rest),
        "|" => Line::Text(rest),
        "done" => {
            let (passed, failed) = rest.split_once(' ')?;
            Line::Done(passed.parse().ok()?, failed.parse().ok()?)
        }
        _ => return None,
    })
}

/// How a kernel did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) passed: Vec<String>,
    pub(crate) failed: Vec<String>,
    pub(crate) skipped: Vec<String>,
    /// What is wrong with the run itself.
    pub(crate) trouble: Vec<String>,
    pub(crate) took: Duration,
}

impl Verdict {
    /// Everything that was to run passed.
    pub(crate) fn good(&self) -> bool {
        self.failed.is_empty() && self.trouble.is_empty() && !self.passed.is_empty()
    }
}

/// Judges a run.
pub(crate) fn judge(run: &Run) -> Verdict {
    let mut verdict = Verdict { took: run.took, ..Verdict::default() };
    let mut open = None;
    let mut done = None;
    for line in run.lines.iter().filter_map(|text| line(text)) {
        match line {
            Line::Begin(name) => open = Some(name),
            Line::Pass(name) => {
                open = None;
                verdict.passed.push(name);
            }
            Line::Fail(name) => {
                open = None;
                verdict.failed.push(name);
            }
            Line::Skip(text) => verdict.skipped.push(text),
            Line::Text(_) => {}
            Line::Done(passed, failed) => done = Some((passed as usize, failed as usize)),
        }
    }
    verdict.trouble.extend(run.killed.clone());
    let trouble = run.console.lines().find(|line| TROUBLE.iter().any(|word| line.contains(word)));
    verdict.trouble.extend(trouble.map(|line| format!("the kernel says: {}", line.trim())));
    match (done, open) {
        (None, Some(name)) => verdict.trouble.push(format!("ended in {name}, without a last word")),
        (None, None) => verdict.trouble.push("ended without a last word".to_owned()),
        (Some(said), _) if said != (verdict.passed.len(), verdict.failed.len()) => {
            verdict.trouble.push(format!("the guest counts {said:?}, its lines say otherwise"));
        }
        (Some((0, 0)), _) => verdict.trouble.push("no scenario ran".to_owned()),
        (Some(_), _) => {}
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lines: &[&str], console: &str, killed: Option<&str>) -> Verdict {
        judge(&Run {
            lines: lines.iter().map(|line| (*line).to_owned()).collect(),
            console: console.to_owned(),
            killed: killed.map(str::to_owned),
            took: Duration::ZERO,
        })
    }

    const GOOD: &[&str] = &["SeaBIOS", "weft-vm begin a b", "weft-vm pass a b", "weft-vm done 1 0"];

    #[test]
    fn all_passed_is_good() {
        let verdict = run(GOOD, "Linux version 6.12\n", None);
        assert!(verdict.good(), "{verdict:?}");
        assert_eq!(verdict.passed, ["a b"]);
    }

    #[test]
    fn a_failure_is_named() {
        let verdict =
            run(&["weft-vm begin a", "weft-vm | why", "weft-vm fail a", "weft-vm done 0 1"], "", None);
        assert!(!verdict.good());
        assert_eq!(verdict.failed, ["a"]);
    }

    #[test]
    fn silence_is_a_failure() {
        assert!(!run(&[], "", None).good());
        let verdict = run(&GOOD[..2], "", Some("silent for 9 s"));
        assert_eq!(verdict.trouble, ["silent for 9 s", "ended in a b, without a last word"]);
    }

    #[test]
    fn trouble_outweighs_passes() {
        let verdict = run(GOOD, "[ 1.0] watchdog: BUG: soft lockup - CPU#0 stuck\n", None);
        assert!(verdict.trouble[0].contains("soft lockup") && !verdict.good());
        for said in [
            "Kernel panic - not syncing: sysrq",
            "[ 9.1] rcu: INFO: rcu_sched self-detected stall on CPU",
            "[ 9.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[ 9.1] WARNING: CPU: 1 PID: 99 at net/core/skbuff.c:1 skb_x+0x1/0x2",
            "[ 9.1] WARNING: net/core/skbuff.c:1 at skb_x+0x1/0x2, CPU#1: wt-load/99",
        ] {
            assert!(!run(GOOD, said, None).good(), "{said}");
        }
    }

    #[test]
    fn counts_must_agree() {
        assert!(!run(&["weft-vm pass a", "weft-vm done 2 0"], "", None).good());
        assert!(!run(&["weft-vm done 0 0"], "", None).good());
    }
}
