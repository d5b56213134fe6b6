//! Loud skips: a scenario that cannot run on a kernel, or not the whole of it, says so, and only if `skips.txt` allows it there.

use std::fs::OpenOptions;
use std::io::Write;

use crate::machine::kernel;

/// Lines of `kernel test reason`; kernel is `major.minor`.
const ALLOWED: &str = include_str!("../skips.txt");

/// Says that `test` leaves something out: prints it, counts it in the file that `WEFT_SKIPS` names, and fails if this kernel
/// may not skip it.
pub fn skip(test: &str, reason: &str) {
    let kernel = kernel();
    assert!(allowed(&kernel, test), "{test} must not be skipped on {kernel} (see skips.txt): {reason}");
    let line = format!("SKIP {kernel} {test}: {reason}");
    println!("{line}");
    if let Some(path) = std::env::var_os("WEFT_SKIPS") {
        let mut file =
            OpenOptions::new().create(true).append(true).open(path).expect("open the file of WEFT_SKIPS");
        writeln!(file, "{line}").expect("write the file of WEFT_SKIPS");
    }
}

fn allowed(kernel: &str, test: &str) -> bool {
    let lines = ALLOWED.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.split_whitespace())
        .any(|mut words| words.next() == Some(kernel) && words.next() == Some(test))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_skips_are_allowed() {
        assert!(!allowed("6.18", "anything"));
        assert!(allowed("6.1", "wire"), "what skips.txt lists");
        assert!(kernel().contains('.'));
    }
}
