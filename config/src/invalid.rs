//! What is wrong with a document, and where: file, line, field, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};
use serde::Serialize;

/// One mistake in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Bytes of the document that are wrong, if the mistake has a place.
    pub span: Option<std::ops::Range<usize>>,
    /// The field, as a path: `component.hello.source`. Empty when the document as a whole is wrong.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// A document that can't be used: every mistake found in it, in the order of the text.
#[derive(Debug)]
pub struct Invalid {
    file: PathBuf,
    source: NamedSource<String>,
    problems: Vec<Problem>,
}

/// A [`Problem`] with its place spelled out, as `-o json` prints it.
#[derive(Debug, Serialize)]
pub struct Place {
    /// The file.
    pub file: String,
    /// Line, from 1. Absent when the mistake has no place.
    pub line: Option<usize>,
    /// Column in characters, from 1.
    pub column: Option<usize>,
    /// The field, as a path.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Invalid {
    /// All that is wrong in `text`, read from `file`. `problems` must not be empty.
    pub fn new(file: &Path, text: &str, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|p| p.span.as_ref().map_or(0, |s| s.start));
        let source = NamedSource::new(file.display().to_string(), text.to_owned());
        Self { file: file.to_owned(), source, problems }
    }

    /// A file that could not be read at all, or whose content as a whole is unusable.
    pub fn whole(file: &Path, message: impl Into<String>, hint: Option<&str>) -> Self {
        let problem =
            Problem { span: None, field: String::new(), message: message.into(), hint: hint.map(str::to_owned) };
        Self::new(file, "", vec![problem])
    }

    /// What the TOML parser refused: syntax, a missing or unknown key, a wrong type.
    pub fn of_toml(file: &Path, text: &str, error: &toml::de::Error) -> Self {
        let message = error.message().trim().to_owned();
        let hint = message.contains("unknown field").then(|| "remove the key or correct its spelling".to_owned());
        // The parser's own complaints quote characters, serde's quote fields.
        let names_field = message.contains("field `") || message.contains("key `");
        let field = quoted(&message).filter(|_| names_field).unwrap_or_default();
        Self::new(file, text, vec![Problem { span: error.span(), field, message, hint }])
    }

    /// The mistakes with file, line and column.
    pub fn places(&self) -> Vec<Place> {
        self.problems.iter().map(|p| self.place(p)).collect()
    }

    fn place(&self, problem: &Problem) -> Place {
        let before = problem.span.as_ref().and_then(|s| self.source.inner().get(..s.start));
        let line_start = before.map(|b| b.rfind('\n').map_or(0, |i| i + 1));
        Place {
            file: self.file.display().to_string(),
            line: before.map(|b| b.matches('\n').count() + 1),
            column: before.zip(line_start).map(|(b, start)| b[start..].chars().count() + 1),
            field: problem.field.clone(),
            message: problem.message.clone(),
            hint: problem.hint.clone(),
        }
    }
}

/// The first word between backticks: serde names the field there.
fn quoted(message: &str) -> Option<String> {
    message.split('`').nth(1).map(str::to_owned)
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [one] => {
                let place = self.place(one);
                write!(f, "{}", place.file)?;
                if let (Some(line), Some(column)) = (place.line, place.column) {
                    write!(f, ":{line}:{column}")?;
                }
                if !one.field.is_empty() && !one.message.contains(&one.field) {
                    write!(f, ": {}", one.field)?;
                }
                write!(f, ": {}", one.message)
            }
            many => write!(f, "{} mistakes in {}", many.len(), self.file.display()),
        }
    }
}

impl std::error::Error for Invalid {}

impl Diagnostic for Invalid {
    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.problems.iter().any(|p| p.span.is_some()).then_some(&self.source)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let many = self.problems.len() > 1;
        Some(Box::new(self.problems.iter().filter_map(move |p| {
            let label = if many { format!("{}: {}", p.field, p.message) } else { "here".to_owned() };
            p.span.clone().map(|span| LabeledSpan::new_with_span(Some(label), span))
        })))
    }

    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        let hints: Vec<&str> = self.problems.iter().filter_map(|p| p.hint.as_deref()).collect();
        (!hints.is_empty()).then(|| Box::new(hints.join("\n")) as Box<dyn fmt::Display>)
    }
}

/// Where a field is named. A key may have dots in it, so every beginning of the path is tried.
fn place_of(table: &toml::de::DeTable<'_>, field: &str) -> Option<std::ops::Range<usize>> {
    let behind = |name: &str| match field.strip_prefix(name)? {
        "" => Some(""),
        rest => rest.strip_prefix('.'),
    };
    let (key, value, rest) = table.iter().find_map(|(key, value)| Some((key, value, behind(key.get_ref())?)))?;
    let inner = value.get_ref().as_table().and_then(|table| place_of(table, rest));
    Some(inner.unwrap_or_else(|| key.span()))
}

/// What is told of an address with a secret in it. Its place is not: where a mistake has one, its line is shown.
pub(crate) const SECRET: &str = "an address holds no secrets";

/// Collects mistakes, so that all of them are told at once.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    /// Notes a mistake.
    pub(crate) fn add(
        &mut self,
        span: impl Into<Option<std::ops::Range<usize>>>,
        field: impl Into<String>,
        message: impl fmt::Display,
        hint: Option<&str>,
    ) {
        let (field, message) = (field.into(), message.to_string());
        self.0.push(Problem { span: span.into(), field, message, hint: hint.map(str::to_owned) });
    }

    /// Gives those without a place that of their field in a TOML document: of its name, or of the last table on the way.
    pub(crate) fn locate(&mut self, text: &str) {
        let Ok(document) = toml::de::DeTable::parse(text) else { return };
        for problem in self.0.iter_mut().filter(|problem| problem.span.is_none() && problem.message != SECRET) {
            problem.span = place_of(document.get_ref(), &problem.field);
        }
    }

    /// Whether nothing was noted yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `value`, or all that was noted.
    pub(crate) fn settle<T>(self, file: &Path, text: &str, value: Option<T>) -> Result<T, Invalid> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(Invalid::new(file, text, self.0)),
        }
    }
}
