//! What two requests of one component may share: nothing, unless its author chose otherwise.

use serde::{Deserialize, Serialize};

/// Requests of one instance if the author says nothing.
const REQUESTS_MAX_DEFAULT: u32 = 1_000;
/// The most that an author may say.
const REQUESTS_MOST: u32 = 1_000_000;
/// How long an instance waits for its next request if the author says nothing, milliseconds.
const IDLE_MS_DEFAULT: u64 = 1_000;
/// The most that an author may say, milliseconds: an instance that waits takes a place and memory from others.
const IDLE_MS_MOST: u64 = 60_000;
/// Requests at once in one instance if the author says nothing.
const CONCURRENCY_DEFAULT: u32 = 16;
/// The most that an author may say: they share the instance's handles.
const CONCURRENCY_MOST: u32 = 100;
/// Memory with which an instance may wait for its next request if the author says nothing, bytes.
const MEMORY_BYTES_MAX_DEFAULT: u64 = 64 * 1024 * 1024;

/// How requests of one component are kept apart from each other. Requests of different components never share anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Each request gets an instance that nobody used before.
    #[default]
    Fresh,
    /// One instance answers many requests, those of WASI 0.3 several at once: what the guest keeps in its memory stays
    /// there.
    Reuse(Reuse),
}

impl Isolation {
    /// Whether it is the default. Documents leave it out then, so that older nodes read them.
    pub(crate) fn is_fresh(&self) -> bool {
        *self == Self::Fresh
    }
}

/// When an instance that is used again is given up. A trap, a timeout or any other fault always ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reuse {
    /// Requests that it answers at most. Default 1,000.
    pub requests_max: u32,
    /// Requests that it answers at once, if it is of WASI 0.3; those of 0.2 can't. Default 16.
    #[serde(skip_serializing_if = "is_default_concurrency")]
    pub concurrency: u32,
    /// Time without a request, milliseconds. Default 1,000.
    pub idle_ms: u64,
    /// Sum of its linear memories after a request, bytes: beyond it, it answers no other. Default 64 MiB.
    pub memory_bytes_max: u64,
}

/// Documents leave it out then, so that older nodes read them.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands it over so")]
fn is_default_concurrency(concurrency: &u32) -> bool {
    *concurrency == CONCURRENCY_DEFAULT
}

impl Default for Reuse {
    fn default() -> Self {
        Self {
            requests_max: REQUESTS_MAX_DEFAULT,
            concurrency: CONCURRENCY_DEFAULT,
            idle_ms: IDLE_MS_DEFAULT,
            memory_bytes_max: MEMORY_BYTES_MAX_DEFAULT,
        }
    }
}

impl Reuse {
    /// The first bound that can't be meant, and why.
    pub fn mistake(&self) -> Option<(&'static str, String)> {
        let bounds = [
            ("requests_max", u64::from(self.requests_max), u64::from(REQUESTS_MOST)),
            ("concurrency", u64::from(self.concurrency), u64::from(CONCURRENCY_MOST)),
            ("idle_ms", self.idle_ms, IDLE_MS_MOST),
            ("memory_bytes_max", self.memory_bytes_max, u64::MAX),
        ];
        bounds.into_iter().find_map(|(name, value, most)| match value {
            0 => Some((name, "must not be 0".to_owned())),
            value if value > most => Some((name, format!("the most is {most}"))),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_that_are_left_out_have_their_defaults() {
        let read: Isolation = serde_json::from_str(r#"{"reuse":{"requests_max":7}}"#).unwrap();
        assert_eq!(read, Isolation::Reuse(Reuse { requests_max: 7, ..Reuse::default() }));
        assert_eq!(serde_json::from_str::<Isolation>(r#""fresh""#).unwrap(), Isolation::Fresh);
        assert!(serde_json::from_str::<Isolation>(r#"{"reuse":{"request_max":7}}"#).is_err());
        assert!(serde_json::from_str::<Isolation>(r#""shared""#).is_err());
    }

    #[test]
    fn a_bound_that_is_zero_or_too_large_is_named() {
        assert_eq!(Reuse::default().mistake(), None);
        for (bounds, name) in [
            (Reuse { requests_max: 0, ..Reuse::default() }, "requests_max"),
            (Reuse { requests_max: REQUESTS_MOST + 1, ..Reuse::default() }, "requests_max"),
            (Reuse { concurrency: 0, ..Reuse::default() }, "concurrency"),
            (Reuse { concurrency: CONCURRENCY_MOST + 1, ..Reuse::default() }, "concurrency"),
            (Reuse { idle_ms: 0, ..Reuse::default() }, "idle_ms"),
            (Reuse { idle_ms: IDLE_MS_MOST + 1, ..Reuse::default() }, "idle_ms"),
            (Reuse { memory_bytes_max: 0, ..Reuse::default() }, "memory_bytes_max"),
        ] {
            assert_eq!(bounds.mistake().map(|(name, _)| name), Some(name));
        }
    }
}
