//! How many instructions a kernel's verifier walked through for each program, and what it may become.
//!
//! A program whose checking grows comes nearer to the limit at which a kernel refuses it, so growth by more than a tenth
//! is a failure until somebody has looked at it and wrote the new number into `verifier.txt`.

use std::collections::BTreeMap;

/// Lines of `kernel program instructions`; kernel is `major.minor`.
const RECORDED: &str = include_str!("../verifier.txt");

/// What is wrong with these counts on `kernel`, one sentence each. A kernel that nobody recorded has no limit.
pub fn growth(kernel: &str, counts: &BTreeMap<String, u32>) -> Vec<String> {
    compare(RECORDED, kernel, counts)
}

fn compare(recorded: &str, kernel: &str, counts: &BTreeMap<String, u32>) -> Vec<String> {
    let recorded: BTreeMap<&str, u32> = recorded
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(kernel)).then_some(())?;
            Some((words.next()?, words.next()?.parse().ok()?))
        })
        .collect();
    if recorded.is_empty() {
        return Vec::new();
    }
    let grown = counts.iter().filter_map(|(name, &count)| match recorded.get(name.as_str()) {
        None => Some(format!("{name} is not in verifier.txt: add `{kernel} {name} {count}`")),
        Some(&before) if u64::from(count) * 10 > u64::from(before) * 11 => Some(format!(
            "{name} grew from {before} to {count} verified instructions: if it must, put `{kernel} {name} {count}` into \
             verifier.txt"
        )),
        Some(_) => None,
    });
    grown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_by_more_than_a_tenth_is_told() {
        let recorded = "# comment\n6.12 a 1000\n6.12 b 1000\n";
        let counts = |a, b| BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        assert!(compare(recorded, "6.12", &counts(1100, 900)).is_empty());
        let grown = compare(recorded, "6.12", &counts(1101, 900));
        assert!(grown.len() == 1 && grown[0].contains("6.12 a 1101"), "{grown:?}");
        assert!(compare(recorded, "6.1", &counts(9999, 9999)).is_empty());
        let more = BTreeMap::from([("c".to_owned(), 1)]);
        assert_eq!(compare(recorded, "6.12", &more).len(), 1);
    }
}
