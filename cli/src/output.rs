//! What people and programs read: answers on stdout, progress and mistakes on stderr.

use std::error::Error;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, Report};
use selvage_config::Invalid;
use serde::Serialize;

/// It did not work, or a check found something.
const FAILED: u8 = 1;
/// The arguments or a document are wrong; nothing was started.
const WRONG: u8 = 2;

/// How answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON document on stdout; a mistake is one on stderr.
    Json,
}

/// Where a command writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: Format,
    quiet: bool,
}

/// Something that did not work, with what to do about it.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{message}")]
struct Failure {
    message: String,
    #[help]
    hint: Option<String>,
    /// Whether the arguments were at fault.
    wrong: bool,
}

/// A failure: what was tried, why it failed (with all causes), and what to do.
pub(crate) fn failure(tried: &str, error: &dyn Error, hint: Option<&str>) -> Report {
    let mut message = format!("{tried}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !message.ends_with(&text) {
            message = format!("{message}: {text}");
        }
        source = cause.source();
    }
    Failure { message, hint: hint.map(str::to_owned), wrong: false }.into()
}

/// A failure that has no error behind it.
pub(crate) fn failed(message: impl Into<String>, hint: Option<&str>) -> Report {
    Failure { message: message.into(), hint: hint.map(str::to_owned), wrong: false }.into()
}

/// Arguments that can't be used.
pub(crate) fn wrong(message: impl Into<String>, hint: Option<&str>) -> Report {
    Failure { message: message.into(), hint: hint.map(str::to_owned), wrong: true }.into()
}

impl Output {
    /// Writes as `format` says.
    pub(crate) fn new(format: Format) -> Self {
        Self { format, quiet: false }
    }

    /// The same without progress: for steps of something larger that tells its own.
    pub(crate) fn quiet(self) -> Self {
        Self { quiet: true, ..self }
    }

    /// Whether a program reads.
    pub(crate) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// The answer of a command: `text` for people, `value` for programs. A closed pipe is no error.
    pub(crate) fn answer(self, value: &impl Serialize, text: impl Display) {
        let line = if self.is_json() {
            serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
        } else {
            text.to_string()
        };
        self.bytes(format!("{}\n", line.trim_end_matches('\n')).as_bytes());
    }

    /// Raw bytes on stdout.
    pub(crate) fn bytes(self, bytes: &[u8]) {
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
    }

    /// A line about what is going on, for people.
    pub(crate) fn progress(self, line: impl Display) {
        if !self.is_json() && !self.quiet {
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
    }

    /// Writes a mistake, and says what to exit with.
    pub(crate) fn failed(self, report: &Report) -> ExitCode {
        let invalid = report.downcast_ref::<Invalid>();
        if self.is_json() {
            let hint = report.help().map(|h| h.to_string());
            let places = invalid.map(Invalid::places);
            let document = serde_json::json!({ "error": report.to_string(), "hint": hint, "places": places });
            let _ = writeln!(std::io::stderr().lock(), "{document}");
        } else {
            let color = std::io::stderr().is_terminal();
            let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
            let mut text = String::new();
            let rendered = GraphicalReportHandler::new_themed(theme).render_report(&mut text, report.as_ref());
            let text = rendered.map(|()| text).unwrap_or_else(|_| report.to_string());
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        }
        let is_wrong = invalid.is_some() || report.downcast_ref::<Failure>().is_some_and(|failure| failure.wrong);
        ExitCode::from(if is_wrong { WRONG } else { FAILED })
    }
}

/// Rows under headings, columns aligned.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count()));
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let body = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    [line(headings.to_vec())].into_iter().chain(body).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_every_cause_once() {
        let inner = std::io::Error::other("port in use");
        let outer = selvage_config::release::ReleaseId::try_from("x".to_owned()).unwrap_err();
        assert_eq!(failure("listen", &inner, None).to_string(), "listen: port in use");
        assert!(failure("read", &outer, Some("fix it")).to_string().starts_with("read: "));
    }

    #[test]
    fn a_table_aligns_its_columns() {
        let rows = [vec!["fra".to_owned(), "1".to_owned()], vec!["iad-long".to_owned(), "2".to_owned()]];
        assert_eq!(table(&["NODE", "N"], &rows), "NODE      N\nfra       1\niad-long  2");
    }
}
