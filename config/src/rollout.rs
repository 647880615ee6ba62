//! How a fleet moves from one release to another: a split of requests, or waves of nodes behind gates.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Region;

/// Most waves of one rollout.
pub const WAVES_MAX: usize = 32;

/// Text that can't be read as what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}: expected {expected}")]
pub struct RolloutTextError {
    what: &'static str,
    expected: &'static str,
    text: String,
}

macro_rules! as_text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = RolloutTextError;
            fn try_from(text: String) -> Result<Self, RolloutTextError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    };
}

/// What keeps the requests of one visitor at one release.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SplitKey {
    /// The client's address.
    #[default]
    Client,
    /// A header field, lower case; without it the client's address.
    Header(String),
    /// A cookie; without it the client's address.
    Cookie(String),
}

as_text!(SplitKey);

impl std::str::FromStr for SplitKey {
    type Err = RolloutTextError;
    fn from_str(text: &str) -> Result<Self, RolloutTextError> {
        // RFC 9110 5.6.2: what names of fields and cookies are made of.
        let is_token = |name: &str| {
            !name.is_empty()
                && name.len() <= 128
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
        };
        match text.split_once(':') {
            None if text == "client" => Ok(Self::Client),
            Some(("header", name)) if is_token(name) => Ok(Self::Header(name.to_ascii_lowercase())),
            Some(("cookie", name)) if is_token(name) => Ok(Self::Cookie(name.to_owned())),
            _ => Err(RolloutTextError {
                what: "key",
                expected: "client, header:NAME or cookie:NAME",
                text: text.chars().take(80).collect(),
            }),
        }
    }
}

impl fmt::Display for SplitKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client => f.write_str("client"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
        }
    }
}

/// Which nodes a wave takes, besides those that earlier waves took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selection {
    /// So many of a hundred, rounded up, earlier waves included.
    Percent(u8),
    /// Those of a region.
    Region(Region),
    /// Those with a label.
    Label {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
}

as_text!(Selection);

/// Whether `text` may be the name or the value of a label.
pub fn is_label_text(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/');
    !text.is_empty() && text.len() <= 63 && text.bytes().all(fits)
}

impl std::str::FromStr for Selection {
    type Err = RolloutTextError;
    fn from_str(text: &str) -> Result<Self, RolloutTextError> {
        let error = || RolloutTextError {
            what: "wave",
            expected: "N%, region=NAME or LABEL=VALUE",
            text: text.chars().take(80).collect(),
        };
        if let Some(number) = text.strip_suffix('%') {
            let percent = number.parse::<u8>().ok().filter(|percent| (1..=100).contains(percent));
            return percent.map(Self::Percent).ok_or_else(error);
        }
        match text.split_once('=') {
            Some(("region", name)) => name.parse().map(Self::Region).map_err(|_| error()),
            Some((name, value)) if is_label_text(name) && is_label_text(value) => {
                Ok(Self::Label { name: name.to_owned(), value: value.to_owned() })
            }
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Region(region) => write!(f, "region={region}"),
            Self::Label { name, value } => write!(f, "{name}={value}"),
        }
    }
}

/// One step of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wave {
    /// Which nodes it takes.
    pub nodes: Selection,
    /// How long all of them must have served well before the next wave, milliseconds. Default 0.
    #[serde(default)]
    pub bake_ms: u64,
}

impl std::str::FromStr for Wave {
    type Err = String;

    /// `10%`, `region=fra` or `tier=canary`, and after a colon how long it bakes: `10%:30s`, `region=fra:5m`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (nodes, bake) = text.split_once(':').unwrap_or((text, "0s"));
        let digits = bake.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit_ms = match &bake[digits.len()..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(format!("{bake:?} is no time: expected one like 30s, 5m or 1h")),
        };
        let number: u64 = digits.parse().map_err(|_| format!("{bake:?} is no time: expected one like 30s"))?;
        let nodes = nodes.parse::<Selection>().map_err(|error| error.to_string())?;
        Ok(Self { nodes, bake_ms: number.saturating_mul(unit_ms) })
    }
}

/// What halts a rollout: the new release compared with the old one on the same requests of the same time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gate {
    /// Requests of the new release before its errors and times are judged. Default 50.
    pub requests_min: u64,
    /// By how many of a thousand requests more may fail (status 500 and above) than with the old release. Default 10.
    pub errors_permille_more: u32,
    /// By how many of a thousand requests more may end in a trap than with the old release. Default 1.
    pub traps_permille_more: u32,
    /// The time that 99 of 100 requests stay below, in percent of the old release's. Default 200.
    pub p99_percent_max: u32,
    /// Nodes that may refuse the release, or fall silent with it. Default 0.
    pub refusals_max: u32,
    /// How long the nodes of a wave may take until they serve, milliseconds. Default 600,000.
    pub stall_ms: u64,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            requests_min: 50,
            errors_permille_more: 10,
            traps_permille_more: 1,
            p99_percent_max: 200,
            refusals_max: 0,
            stall_ms: 600_000,
        }
    }
}

/// Where a split or a canary cuts: whether the visitor with `key` is among the first `percent` of a hundred.
///
/// The place of a key depends on the release and the key alone, so that a larger percentage keeps whoever a smaller one
/// had, on every node, and another release meets other visitors first.
pub fn is_among(release: &str, key: &[u8], percent: u8) -> bool {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(release.as_bytes());
    context.update(&[0]);
    context.update(key);
    let hash = context.finish();
    let first = hash.as_ref().first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    // Below percent/100 of the whole range, without rounding: 0 is nobody and 100 everybody.
    u128::from(first) * 100 < (u128::from(percent) << 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_percentage_keeps_whoever_a_smaller_one_had() {
        let keys: Vec<String> = (0..2_000).map(|n| format!("visitor-{n}")).collect();
        let among = |percent: u8| keys.iter().filter(|key| is_among("hello@4", key.as_bytes(), percent)).count();
        assert_eq!((among(0), among(100)), (0, keys.len()));
        for key in &keys {
            let from = (0..=100).find(|percent| is_among("hello@4", key.as_bytes(), *percent)).unwrap();
            assert!((from..=100).all(|percent| is_among("hello@4", key.as_bytes(), percent)), "{key}");
        }
        let tenth = among(10);
        assert!((140..260).contains(&tenth), "{tenth}");
        let other = keys.iter().filter(|key| is_among("hello@5", key.as_bytes(), 10)).count();
        let both = keys
            .iter()
            .filter(|key| is_among("hello@4", key.as_bytes(), 10) && is_among("hello@5", key.as_bytes(), 10))
            .count();
        assert!(both < other / 2, "{both} of {other}");
    }

    #[test]
    fn waves_and_keys_are_read_as_people_write_them() {
        for (text, nodes, bake_ms) in [
            ("10%", "10%", 0),
            ("region=fra:30s", "region=fra", 30_000),
            ("tier=canary:5m", "tier=canary", 300_000),
            ("100%:1h", "100%", 3_600_000),
            ("1%:250ms", "1%", 250),
        ] {
            let wave: Wave = text.parse().unwrap();
            assert_eq!((wave.nodes.to_string().as_str(), wave.bake_ms), (nodes, bake_ms), "{text}");
        }
        for bad in ["", "0%", "101%", "x", "10%:", "10%:5", "10%:x", "=a", "a=", "region=A", "10%:5d"] {
            assert!(bad.parse::<Wave>().is_err(), "{bad}");
        }
        for key in ["client", "header:x-user", "cookie:sid"] {
            assert_eq!(key.parse::<SplitKey>().unwrap().to_string(), key);
        }
        for bad in ["", "header:", "header:a b", "cookie:a;b", "ip", "header"] {
            assert!(bad.parse::<SplitKey>().is_err(), "{bad}");
        }
    }
}
