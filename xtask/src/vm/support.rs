//! The kernel support table of README.md, written from results.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use super::Tested;
use crate::tree;

const BEGIN: &str = "<!-- kernels: written by `cargo xtask vm-test --write` -->\n";
const END: &str = "<!-- end of kernels -->\n";

/// Replaces the table in README.md by one of these results, seen today.
pub(super) fn write(results: &[Tested]) -> Result<()> {
    let path = tree::root().join("README.md");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let date = tree::output(Command::new("date").args(["-u", "+%F"]))?;
    let text = replaced(&text, &table(results, date.trim()))
        .context("README.md lacks the marks of the kernel table")?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn table(results: &[Tested], date: &str) -> String {
    let mut text = "| kernel | Debian's | scenarios | seen on |\n|---|---|---|---|\n".to_owned();
    for (series, version, verdict) in results {
        let (passed, skipped) = (verdict.passed.len(), verdict.skipped.len());
        let failed = verdict.failed.len() + verdict.trouble.len();
        let outcome = if verdict.good() {
            format!("all {passed} pass")
        } else {
            format!("{passed} pass, {failed} fail")
        };
        let outcome = if skipped == 0 { outcome } else { format!("{outcome}, {skipped} in part") };
        text += &format!("| {series} | {version} | {outcome} | {date} |\n");
    }
    text
}

/// The text with another table between the marks.
fn replaced(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::kernel;
    use crate::vm::verdict::Verdict;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let good = Verdict { passed: vec!["a".into(), "b".into()], ..Verdict::default() };
        let bad = Verdict { failed: vec!["b".into()], trouble: vec!["hung".into()], ..good.clone() };
        let results = [("6.1".into(), "6.1.1-1".into(), good), ("7.2".into(), "7.2.1-1".into(), bad)];
        let table = table(&results, "2026-01-02");
        assert!(table.contains("| 6.1 | 6.1.1-1 | all 2 pass | 2026-01-02 |"), "{table}");
        assert!(table.contains("| 7.2 | 7.2.1-1 | 2 pass, 2 fail | 2026-01-02 |"), "{table}");
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        assert_eq!(replaced(&text, "new\n").as_deref(), Some(&*format!("before\n{BEGIN}new\n{END}after\n")));
        assert_eq!(replaced("no marks", "new"), None);
    }

    #[test]
    fn the_readme_names_every_kernel_of_the_matrix() {
        let text = fs::read_to_string(tree::root().join("README.md")).unwrap();
        let table = text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).expect("the table").0;
        for kernel in kernel::all() {
            assert!(
                table.contains(&format!("\n| {} | ", kernel.series)),
                "{} is not in {table}",
                kernel.series
            );
        }
    }
}
