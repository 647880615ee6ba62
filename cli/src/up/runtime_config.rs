//! The part of Spin's runtime configuration that means something here. What means nothing is refused, not ignored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use miette::Report;
use selvage_config::Invalid;
use serde::Deserialize;

use crate::output::wrong;

/// A runtime configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuntimeConfig {
    /// Where state stays.
    pub(super) state_dir: Option<PathBuf>,
    /// Most memory of an instance, bytes.
    pub(super) max_instance_memory: Option<u64>,
    /// Where values of variables come from; `config_provider` is Spin's older name.
    #[serde(default, alias = "config_provider")]
    variables_provider: Vec<Provider>,
    /// Stores. Every store here is the replicated one, so only Spin's own type with its default place fits.
    #[serde(default)]
    key_value_store: BTreeMap<String, KeyValueStore>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Provider {
    /// Values in the file.
    Static { values: BTreeMap<String, String> },
    /// `PREFIX_NAME` in the environment; the prefix is `SPIN_VARIABLE` unless it says otherwise.
    Env { prefix: Option<String> },
}

impl std::fmt::Debug for Provider {
    /// Without values: one may be a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Static { .. } => "Static",
            Self::Env { .. } => "Env",
        })
    }
}

#[derive(Debug, Deserialize)]
struct KeyValueStore {
    #[serde(rename = "type")]
    kind: String,
}

impl RuntimeConfig {
    /// Reads a runtime configuration.
    pub(super) fn load(path: &Path) -> Result<Self, Report> {
        let name = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("read {name}: {error}"), None))?;
        let mut config: Self = toml::from_str(&text).map_err(|error| Invalid::of_toml(path, &text, &error))?;
        if let Some((label, store)) = config.key_value_store.iter().find(|(_, store)| store.kind != "spin") {
            let message = format!("{name}: key_value_store.{label} has type {:?}", store.kind);
            return Err(wrong(message, Some("every store is the replicated one here: remove the table")));
        }
        let base = path.parent().unwrap_or(Path::new(""));
        config.state_dir = config.state_dir.map(|dir| base.join(dir));
        Ok(config)
    }

    /// Values for the declared variables; the first provider that has one wins.
    pub(super) fn variables<'a>(&self, declared: impl Iterator<Item = &'a String>) -> BTreeMap<String, String> {
        let value = |name: &String| self.variables_provider.iter().find_map(|provider| provider.value(name));
        declared.filter_map(|name| Some((name.clone(), value(name)?))).collect()
    }
}

impl Provider {
    fn value(&self, name: &str) -> Option<String> {
        match self {
            Self::Static { values } => values.get(name).cloned(),
            Self::Env { prefix } => {
                let prefix = prefix.as_deref().unwrap_or("SPIN_VARIABLE");
                std::env::var(format!("{prefix}_{}", name.to_ascii_uppercase())).ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<RuntimeConfig, Report> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime.toml");
        std::fs::write(&path, text).unwrap();
        RuntimeConfig::load(&path)
    }

    #[test]
    fn the_first_provider_that_has_a_value_wins() {
        let config = load("[[variables_provider]]\ntype='static'\nvalues={a='1'}\n[[variables_provider]]\ntype='static'\nvalues={a='2',b='3'}\n").unwrap();
        let declared = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let values = config.variables(declared.iter());
        assert_eq!(values, [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "3".to_owned())].into());
        assert!(!format!("{config:?}").contains('1'));
    }

    #[test]
    fn what_means_nothing_here_is_refused() {
        for bad in [
            "[key_value_store.default]\ntype='redis'\nurl='redis://x'\n",
            "[sqlite_database.default]\ntype='spin'\n",
            "[[variables_provider]]\ntype='vault'\nurl='x'\n",
        ] {
            assert!(load(bad).is_err(), "{bad}");
        }
    }
}
