//! Route patterns by Spin's rules: exact, `:param`, trailing `/...`.
//!
//! Exact beats `:param` beats the wildcard, segment by segment; the longest prefix wins; the order of declaration means
//! nothing. A wildcard captures the trailing slash: `/test/...` on `/test` leaves ``, on `/test/` leaves `/`.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Most segments of a pattern.
pub const SEGMENTS_MAX: usize = 64;

/// One step of a pattern.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Segment {
    Exact(String),
    Param(String),
}

/// A route pattern: `/`, `/a/b`, `/user/:name`, `/static/...`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    segments: Vec<Segment>,
    wildcard: bool,
}

/// Text that is no route pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A pattern is an absolute path.
    #[error("route {0:?} must start with '/'")]
    Relative(String),
    /// The wildcard stands last or not at all.
    #[error("route {0:?} has a wildcard before its end")]
    InnerWildcard(String),
    /// `:` needs a name after it.
    #[error("route {0:?} has a ':' without a name")]
    Nameless(String),
    /// A bound against hostile manifests.
    #[error("route has more than {SEGMENTS_MAX} segments")]
    Long,
}

/// What a pattern found in a path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Captures {
    /// `:name` → the segment's text, in the order of the pattern.
    pub params: Vec<(String, String)>,
    /// What the wildcard took: empty, or text that starts with '/'.
    pub rest: Option<String>,
}

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let path = text.strip_prefix('/').ok_or_else(|| PatternError::Relative(text.to_owned()))?;
        let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        if parts.len() > SEGMENTS_MAX {
            return Err(PatternError::Long);
        }
        let wildcard = matches!(parts.last(), Some(&"..." | &"*"));
        if wildcard {
            parts.pop();
        }
        let segments = parts.into_iter().map(|part| match part.strip_prefix(':') {
            _ if part == "..." || part == "*" => Err(PatternError::InnerWildcard(text.to_owned())),
            Some("") => Err(PatternError::Nameless(text.to_owned())),
            Some(name) => Ok(Segment::Param(name.to_owned())),
            None => Ok(Segment::Exact(part.to_owned())),
        });
        Ok(Self { segments: segments.collect::<Result<_, _>>()?, wildcard })
    }
}

impl Pattern {
    /// `/...`: every path.
    pub fn everything() -> Self {
        Self { segments: Vec::new(), wildcard: true }
    }

    /// Whether `path` (without query) is one of this pattern's, and what it captured.
    pub fn captures(&self, path: &str) -> Option<Captures> {
        let mut rest = path;
        let mut captures = Captures::default();
        for segment in &self.segments {
            let tail = rest.trim_start_matches('/');
            if tail.len() == rest.len() && !rest.is_empty() {
                return None;
            }
            let (head, after) = tail.split_at(tail.find('/').unwrap_or(tail.len()));
            match segment {
                Segment::Exact(text) if text == head => {}
                Segment::Param(name) if !head.is_empty() => captures.params.push((name.clone(), head.to_owned())),
                _ => return None,
            }
            rest = after;
        }
        if self.wildcard {
            captures.rest = Some(rest.to_owned());
        } else if !rest.bytes().all(|b| b == b'/') {
            return None;
        }
        Some(captures)
    }

    /// Whether `path` is one of this pattern's.
    pub fn matches(&self, path: &str) -> bool {
        self.captures(path).is_some()
    }

    /// The pattern without its wildcard: Spin's `spin-component-route`.
    pub fn prefix(&self) -> String {
        let text = self.to_string();
        text.strip_suffix("/...").map_or(text.clone(), str::to_owned)
    }

    /// Whether the pattern ends in `/...`.
    pub fn is_wildcard(&self) -> bool {
        self.wildcard
    }
}

impl Ord for Pattern {
    /// The pattern that is tried first is the lesser.
    fn cmp(&self, other: &Self) -> Ordering {
        for (mine, theirs) in self.segments.iter().zip(&other.segments) {
            let order = match (mine, theirs) {
                (Segment::Exact(_), Segment::Param(_)) => Ordering::Less,
                (Segment::Param(_), Segment::Exact(_)) => Ordering::Greater,
                (Segment::Exact(a), Segment::Exact(b)) | (Segment::Param(a), Segment::Param(b)) => a.cmp(b),
            };
            if order != Ordering::Equal {
                return order;
            }
        }
        other.segments.len().cmp(&self.segments.len()).then(self.wildcard.cmp(&other.wildcard))
    }
}

impl PartialOrd for Pattern {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            match segment {
                Segment::Exact(text) => write!(f, "/{text}")?,
                Segment::Param(name) => write!(f, "/:{name}")?,
            }
        }
        match (self.wildcard, self.segments.is_empty()) {
            (true, _) => f.write_str("/..."),
            (false, true) => f.write_str("/"),
            (false, false) => Ok(()),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;
    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    fn first<'a>(patterns: &[&'a str], path: &str) -> Option<&'a str> {
        let mut sorted: Vec<(Pattern, &str)> = patterns.iter().map(|p| (pattern(p), *p)).collect();
        sorted.sort();
        sorted.into_iter().find(|(p, _)| p.matches(path)).map(|(_, text)| text)
    }

    #[test]
    fn exact_beats_param_beats_wildcard_and_the_longest_prefix_wins() {
        let all = ["/...", "/a/...", "/a/:x", "/a/b", "/a/:x/c", "/a/b/...", "/"];
        for (path, want) in [
            ("/", "/"),
            ("/z", "/..."),
            ("/a/b", "/a/b"),
            ("/a/q", "/a/:x"),
            ("/a/q/c", "/a/:x/c"),
            ("/a/b/c", "/a/b/..."),
            ("/a/q/d", "/a/..."),
            ("/a", "/a/..."),
        ] {
            assert_eq!(first(&all, path), Some(want), "{path}");
        }
        assert_eq!(first(&["/a"], "/b"), None);
        assert_eq!(first(&["/a"], "/ab"), None);
    }

    #[test]
    fn a_wildcard_keeps_the_trailing_slash() {
        for (path, rest) in [("/test", ""), ("/test/", "/"), ("/test/a/", "/a/"), ("/test/a/b", "/a/b")] {
            assert_eq!(pattern("/test/...").captures(path).unwrap().rest.unwrap(), rest, "{path}");
        }
        assert!(!pattern("/test/...").matches("/testing"));
    }

    #[test]
    fn params_are_captured_by_name() {
        let captures = pattern("/u/:name/p/:id").captures("/u/ada/p/7").unwrap();
        assert_eq!(captures.params, [("name".into(), "ada".into()), ("id".into(), "7".into())]);
        assert!(!pattern("/u/:name").matches("/u/"));
    }

    #[test]
    fn text_that_is_no_pattern_is_refused() {
        for bad in ["", "a", "/a/.../b", "/*/b", "/a/:", &"/a".repeat(SEGMENTS_MAX + 1)] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
        assert_eq!(pattern("/static/*").to_string(), "/static/...");
    }

    proptest::proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(text in "(/[a-z:.*]{0,4}){0,6}") {
            if let Ok(parsed) = text.parse::<Pattern>() {
                proptest::prop_assert_eq!(pattern(&parsed.to_string()), parsed);
            }
        }

        #[test]
        fn no_path_panics_a_pattern(path in ".*") {
            pattern("/a/:b/...").captures(&path);
        }
    }
}
