//! Columns for people: at most [`WIDTH`] wide, coloured only on a terminal.

use std::io::{IsTerminal, stdout};

/// Tables fit this many columns.
pub(super) const WIDTH: usize = 100;
/// Between columns.
const GAP: usize = 2;
/// A column is not cut below this width.
const NARROW: usize = 8;

/// Lays out rows below a heading. Where they do not fit, the widest columns are cut, and `…` says so.
pub(super) fn render(heading: &[&str], rows: &[Vec<String>]) -> String {
    let length = |text: &str| text.chars().count();
    let mut widths: Vec<usize> = heading.iter().map(|text| length(text)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(length(cell));
        }
    }
    let gaps = GAP * heading.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > WIDTH {
        let Some(widest) = widths.iter_mut().max().filter(|width| **width > NARROW) else { break };
        *widest -= 1;
    }
    let mut text = line(heading.iter().map(|text| (*text).to_owned()), &widths);
    if colours() {
        text = format!("\x1b[1m{}\x1b[0m\n", text.trim_end());
    }
    for row in rows {
        text += &line(row.iter().cloned(), &widths);
    }
    text
}

fn line(cells: impl Iterator<Item = String>, widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, width) in cells.zip(widths) {
        let cell: String = if cell.chars().count() > *width {
            cell.chars().take(width - 1).chain(['…']).collect()
        } else {
            cell
        };
        text += &format!("{cell:<width$}{:GAP$}", "", width = *width);
    }
    format!("{}\n", text.trim_end())
}

/// The text in red where colours are used.
pub(super) fn red(text: &str) -> String {
    if colours() { format!("\x1b[31m{text}\x1b[0m") } else { text.to_owned() }
}

/// The text in bold where colours are used.
pub(super) fn bold(text: &str) -> String {
    if colours() { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
}

fn colours() -> bool {
    // https://no-color.org
    stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// 3725 as `1h2m`.
pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// 1536 as `1.5Ki`.
pub(super) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["", "Ki", "Mi", "Gi", "Ti"] {
        if value < 1024.0 {
            return if unit.is_empty() { format!("{count}") } else { format!("{value:.1}{unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1}Pi")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_fit() {
        let rows = vec![
            vec!["short".to_owned(), "x".repeat(90), "y".repeat(70)],
            vec!["ü".to_owned(), "b".to_owned(), "c".to_owned()],
        ];
        let text = render(&["ONE", "TWO", "THREE"], &rows);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.contains('…') && text.lines().count() == 3);
        assert!(text.lines().all(|line| !line.ends_with(' ')));
    }

    #[test]
    fn units() {
        assert_eq!([duration(59), duration(3725), duration(90000)], ["59s", "1h2m", "1d1h"]);
        assert_eq!([bytes(5), bytes(1536), bytes(1 << 40)], ["5", "1.5Ki", "1.0Ti"]);
    }
}
