//! The report as text.

use std::fmt;

use super::{Line, Report};

const HEAD: [&str; 9] = ["protocol", "requests", "answered", "errors", "p50", "p90", "p99", "p99.9", "max"];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "requests/s: {} asked, {} sent, {} answered; {} ms, seed {}{}",
            self.rate_asked,
            self.rate_sent,
            self.rate_answered,
            self.elapsed_ms,
            self.seed,
            if self.stopped { ", stopped early" } else { "" },
        )?;
        writeln!(f, "latency in us, counted from the time a request was due:\n")?;
        let mut rows = vec![HEAD.map(str::to_owned)];
        rows.extend(self.protocols.iter().map(|(protocol, line)| row(&protocol.to_string(), line)));
        rows.push(row("total", &self.total));
        write_rows(f, &rows)?;

        writeln!(f, "\nstatuses: {}", list(self.total.statuses.iter()))?;
        if !self.total.errors.is_empty() {
            writeln!(f, "errors: {}", list(self.total.errors.iter()))?;
        }
        for class in self.classes.iter().filter(|class| class.unexpected_status > 0) {
            let (name, expect, statuses) = (&class.name, &class.expect, list(class.statuses.iter()));
            writeln!(
                f,
                "unexpected: {} of class {name}, which expects {expect} and got {statuses}",
                class.unexpected_status
            )?;
        }
        let connections = self.connections;
        write!(f, "connections: {} opened, {} failed", connections.opened, connections.failed)?;
        writeln!(f, "; requests that one gave back and another one took: {}", connections.resent)?;
        writeln!(f, "generator lag in us: p50 {}, p99 {}, max {}", self.lag.p50_us, self.lag.p99_us, self.lag.max_us)?;
        match &self.reason {
            Some(reason) => writeln!(f, "NOT VALID: {reason}"),
            None => writeln!(f, "valid"),
        }
    }
}

fn row(name: &str, line: &Line) -> [String; HEAD.len()] {
    let times = line.latency;
    let errors = line.errors.values().sum::<u64>();
    let numbers =
        [line.requests, line.answered, errors, times.p50_us, times.p90_us, times.p99_us, times.p999_us, times.max_us];
    let mut cells = numbers.iter().map(u64::to_string);
    std::array::from_fn(|index| if index == 0 { name.to_owned() } else { cells.next().unwrap_or_default() })
}

/// Columns as wide as their widest cell, names to the left and numbers to the right.
fn write_rows(f: &mut fmt::Formatter<'_>, rows: &[[String; HEAD.len()]]) -> fmt::Result {
    let widths: [usize; HEAD.len()] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    for row in rows {
        write!(f, "{:<width$}", row[0], width = widths[0])?;
        for (cell, width) in row.iter().zip(widths).skip(1) {
            write!(f, "  {cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}

fn list<'entry, K: fmt::Display + 'entry>(entries: impl Iterator<Item = (&'entry K, &'entry u64)>) -> String {
    let parts: Vec<_> = entries.map(|(key, count)| format!("{key}: {count}")).collect();
    if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;

    #[test]
    fn the_table_shows_each_protocol_and_the_total() {
        let expected = "\
requests/s: 100 asked, 97 sent, 48.5 answered; 2000 ms, seed 1
latency in us, counted from the time a request was due:

protocol  requests  answered  errors   p50   p90   p99  p99.9    max
h1              75        73       2  5203  9103  10007  10007  10007
";
        let text = report(40, 3).to_string();
        // Widths follow the widest cell; the values are checked by cell.
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (line, expected) in text.lines().zip(expected.lines()) {
            assert_eq!(cells(line), cells(expected));
        }
        let lengths: Vec<_> = text.lines().skip(3).take(4).map(str::len).collect();
        assert!(lengths.windows(2).all(|pair| pair[0] == pair[1]), "{text}");
        assert!(text.contains("statuses: 200: 96, 503: 1\n"));
        assert!(text.contains("errors: generator saturated: 3\n"));
        assert!(text.contains("unexpected: 1 of class home, which expects 2xx and got 200: 96, 503: 1\n"));
        assert!(text.ends_with("NOT VALID: the generator sent 97 requests/s, due were 100\n"));
    }

    #[test]
    fn a_run_without_trouble_says_so_and_names_no_errors() {
        let text = report(40, 0).to_string();
        assert!(text.ends_with("valid\n") && !text.contains("NOT VALID"));
        assert!(!text.contains("errors:"));
    }
}
