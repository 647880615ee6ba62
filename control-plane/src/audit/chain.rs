//! The lines of an audit log, and whether they are all there as they were written.

use std::io::{self, BufRead, BufReader, Read};

use selvage_config::Digest;
use serde::{Deserialize, Serialize};

/// What stands for the line before the first.
pub(super) const BEGIN: Digest = Digest::from_sha256([0; 32]);
/// Bytes of a line that is read; more is no line of ours.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// From 0, without a gap.
    pub number: u64,
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// Who, and how that was proved.
    pub who: String,
    /// What was done.
    pub what: String,
    /// To what: an app, a node, a blob.
    pub subject: String,
    /// What was there before, where there was something.
    pub before: String,
    /// What is there now. Never the value of a variable.
    pub after: String,
    /// The hash of the line before, without its line end.
    pub last: Digest,
}

/// Lines that are all there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// How many.
    pub lines: u64,
    /// The number of the first: 0, unless older lines are in a file that was set aside and is gone.
    pub first: Option<u64>,
    /// The hash of the last: what to note down elsewhere, for who can rewrite the whole file can rewrite every hash.
    pub head: Option<Digest>,
}

/// Why lines are not what was written.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// It can't be read.
    #[error("read the audit log")]
    Io(#[from] io::Error),
    /// A line is none.
    #[error("line {place} is no line of an audit log")]
    Line {
        /// Which, from 1.
        place: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A line is missing or was put in.
    #[error("line {place} has number {found}, not {expected}")]
    Number {
        /// Which, from 1.
        place: u64,
        /// Its number.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// The line before is not what it was.
    #[error("line {place} was written after another line than the one before it")]
    Broken {
        /// Which, from 1.
        place: u64,
    },
}

/// Reads lines and checks that each was written after the one before it.
///
/// # Errors
/// The first line that was not.
pub fn verify(log: impl Read) -> Result<Verified, ChainError> {
    let mut reader = BufReader::new(log);
    let mut verified = Verified { lines: 0, first: None, head: None };
    let mut expected = 0;
    loop {
        let mut text = Vec::new();
        (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut text)?;
        if text.is_empty() {
            return Ok(verified);
        }
        let place = verified.lines + 1;
        let text = text.strip_suffix(b"\n").unwrap_or(&text);
        let line: Line = serde_json::from_slice(text).map_err(|source| ChainError::Line { place, source })?;
        match verified.head {
            None => verified.first = Some(line.number),
            Some(_) if line.number != expected => {
                return Err(ChainError::Number { place, found: line.number, expected });
            }
            Some(head) if line.last != head => return Err(ChainError::Broken { place }),
            Some(_) => {}
        }
        if line.number == 0 && line.last != BEGIN {
            return Err(ChainError::Broken { place });
        }
        expected = line.number + 1;
        verified.lines += 1;
        verified.head = Some(Digest::of(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Vec<String> {
        let mut last = BEGIN;
        let mut lines = Vec::new();
        for number in 0..4 {
            let text = |text: &str| text.to_owned();
            let line = Line {
                number,
                at_ms: 1,
                who: text("ops"),
                what: text("w"),
                subject: text("s"),
                before: text(""),
                after: text("a"),
                last,
            };
            let line = serde_json::to_string(&line).unwrap();
            last = Digest::of(line.as_bytes());
            lines.push(line);
        }
        lines
    }

    fn verdict(lines: &[String]) -> Result<Verified, ChainError> {
        verify(format!("{}\n", lines.join("\n")).as_bytes())
    }

    #[test]
    fn lines_as_they_were_written_are_fine() {
        let verified = verdict(&log()).unwrap();
        assert_eq!((verified.lines, verified.first), (4, Some(0)));
        assert_eq!(verified.head, Some(Digest::of(log()[3].as_bytes())));
        assert_eq!(verdict(&log()[2..]).unwrap().first, Some(2));
        assert_eq!(verify(b"".as_slice()).unwrap().lines, 0);
    }

    #[test]
    fn a_line_that_was_changed_left_out_or_put_in_is_found() {
        let mut changed = log();
        changed[1] = changed[1].replace("ops", "eve");
        assert!(matches!(verdict(&changed), Err(ChainError::Broken { place: 3 })));
        let mut missing = log();
        missing.remove(1);
        assert!(matches!(verdict(&missing), Err(ChainError::Number { place: 2, .. })));
        let mut doubled = log();
        doubled.insert(2, doubled[1].clone());
        assert!(matches!(verdict(&doubled), Err(ChainError::Number { place: 3, .. })));
        let mut swapped = log();
        swapped.swap(1, 2);
        assert!(verdict(&swapped).is_err());
        let mut first = log();
        first[0] = first[0].replace("ops", "eve");
        assert!(matches!(verdict(&first), Err(ChainError::Broken { place: 2 })));
        assert!(matches!(verify(b"{}\n".as_slice()), Err(ChainError::Line { place: 1, .. })));
    }
}
