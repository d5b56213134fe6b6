//! What it costs a kernel to verify each program, and what that may become.
//!
//! A program whose checking grows comes nearer to the limit at which a kernel refuses it, so growth by more than a tenth
//! is a failure until somebody has looked at it and wrote the new numbers into `verifier.txt`.

use std::collections::BTreeMap;
use std::fmt;

/// Lines of kernel (`major.minor`), program and [`Cost`].
const RECORDED: &str = include_str!("../verifier.txt");

/// What a kernel's verifier did for one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Instructions that it walked through.
    pub instructions: u32,
    /// Bytes of its log, which has every step of every path.
    pub log: u32,
}

impl Cost {
    fn read<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Self> {
        Some(Self { instructions: words.next()?.parse().ok()?, log: words.next()?.parse().ok()? })
    }

    fn outgrows(self, before: Self) -> bool {
        let outgrows = |now, before| u64::from(now) * 10 > u64::from(before) * 11;
        outgrows(self.instructions, before.instructions) || outgrows(self.log, before.log)
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.instructions, self.log)
    }
}

/// What is wrong with these costs on `kernel`, one sentence each. A kernel that nobody recorded has no limit.
pub fn growth(kernel: &str, costs: &BTreeMap<String, Cost>) -> Vec<String> {
    compare(RECORDED, kernel, costs)
}

fn compare(recorded: &str, kernel: &str, costs: &BTreeMap<String, Cost>) -> Vec<String> {
    let recorded: BTreeMap<&str, Cost> = recorded
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(kernel)).then_some(())?;
            Some((words.next()?, Cost::read(words)?))
        })
        .collect();
    if recorded.is_empty() {
        return Vec::new();
    }
    let grown = costs.iter().filter_map(|(name, &cost)| match recorded.get(name.as_str()) {
        None => Some(format!("{name} is not in verifier.txt: add `{kernel} {name} {cost}`")),
        Some(&before) if cost.outgrows(before) => Some(format!(
            "{name} grew from {before} to {cost} (verified instructions, bytes of log): if it must, put `{kernel} {name} \
             {cost}` into verifier.txt"
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
        let recorded = "# comment\n6.12 a 1000 500\n6.12 b 1000 500\n";
        let costs = |a: (u32, u32), b: (u32, u32)| {
            let named = |name: &str, (instructions, log)| (name.to_owned(), Cost { instructions, log });
            BTreeMap::from([named("a", a), named("b", b)])
        };
        assert!(compare(recorded, "6.12", &costs((1100, 550), (900, 100))).is_empty());
        let grown = compare(recorded, "6.12", &costs((1101, 500), (1000, 551)));
        assert!(grown.len() == 2 && grown[0].contains("6.12 a 1101 500"), "{grown:?}");
        assert!(grown[1].contains("6.12 b 1000 551"), "{grown:?}");
        assert!(compare(recorded, "6.1", &costs((9999, 9999), (9999, 9999))).is_empty());
        let more = BTreeMap::from([("c".to_owned(), Cost { instructions: 1, log: 1 })]);
        assert_eq!(compare(recorded, "6.12", &more).len(), 1);
    }
}
