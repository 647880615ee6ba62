//! Names: every noun that crosses a process border has a type that holds only valid ones.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest name of anything, bytes: a DNS label (RFC 1035 2.3.4), so that a name can stand in a host name.
pub const NAME_BYTES_MAX: usize = 63;
/// No app: stores that begin with it hold what nodes tell each other, so no guest and no operator of one app has them.
pub const NODES_APP: &str = "selvage-acme";

/// A name that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {text:?} {}", broken(.text))]
pub struct NameError {
    kind: &'static str,
    text: String,
}

/// Which rule it breaks.
fn broken(text: &str) -> String {
    if text == NODES_APP {
        return "is none that an app may have: stores of that name are the nodes' own".to_owned();
    }
    format!("must be 1 to {NAME_BYTES_MAX} characters of a-z, 0-9 and inner '-', starting with a letter or digit")
}

fn is_name(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= NAME_BYTES_MAX
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

fn is_app_name(text: &str) -> bool {
    is_name(text) && text != NODES_APP
}

// Shared text: every request has a few of them in hand, and none changes one.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $is_good:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_from(text.to_owned())
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                if $is_good(&text) { Ok(Self(text.into())) } else { Err(NameError { kind: $kind, text }) }
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A node: one worker process. Unique in the fleet.
    NodeName, "node name", is_name
);
name!(
    /// A region: where a node stands (`fra`, `iad`, …).
    Region, "region", is_name
);
name!(
    /// A placement: the regions that hold some of the stores.
    PlacementName, "placement name", is_name
);
name!(
    /// An app: a manifest and its components.
    AppName, "app name", is_app_name
);
name!(
    /// A component's name within its app (kebab-case, as in `spin.toml`).
    ComponentName, "component name", is_name
);

/// A store: one named KV namespace. A guest's label is scoped by its app, so `counter/default` and
/// `gate/default` are two stores.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreName(String);

impl StoreName {
    /// The store behind `label` in `app`'s manifest.
    pub fn of(app: &AppName, label: &StoreLabel) -> Self {
        Self(format!("{app}/{label}"))
    }

    /// `app/label`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for StoreName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        match text.split_once('/') {
            Some((app, label)) if is_name(app) && is_label(label) => Ok(Self(text)),
            _ => Err(NameError { kind: "store (app/label)", text }),
        }
    }
}

impl std::str::FromStr for StoreName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<StoreName> for String {
    fn from(name: StoreName) -> String {
        name.0
    }
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A guest's word for a store: an entry of `key_value_stores` in `spin.toml`. Spin allows `_` too.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreLabel(String);

fn is_label(text: &str) -> bool {
    is_name(&text.replace('_', "-"))
}

impl StoreLabel {
    /// The label as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for StoreLabel {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        if is_label(&text) { Ok(Self(text)) } else { Err(NameError { kind: "store label", text }) }
    }
}

impl std::str::FromStr for StoreLabel {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<StoreLabel> for String {
    fn from(label: StoreLabel) -> String {
        label.0
    }
}

impl fmt::Display for StoreLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_a_dns_label() {
        for good in ["a", "hello", "hello-p3", "0x", &"a".repeat(NAME_BYTES_MAX)] {
            assert!(good.parse::<AppName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "a.b", "ä", &"a".repeat(NAME_BYTES_MAX + 1)] {
            assert!(bad.parse::<AppName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_app_has_the_stores_that_are_the_nodes_own() {
        let error = NODES_APP.parse::<AppName>().unwrap_err().to_string();
        assert!(error.contains("the nodes' own"), "{error}");
        assert!(format!("{NODES_APP}/place").parse::<StoreName>().is_ok());
    }

    #[test]
    fn a_store_belongs_to_an_app() {
        let store = StoreName::of(&"counter".parse().expect("valid"), &"my_store".parse().expect("valid"));
        assert_eq!(store.as_str(), "counter/my_store");
        assert_eq!(store.to_string().parse::<StoreName>(), Ok(store));
        assert!("default".parse::<StoreName>().is_err());
        assert!("a/b/c".parse::<StoreName>().is_err());
    }
}
