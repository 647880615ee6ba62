//! What the registry keeps, refuses and mirrors: `[registry]` in a control plane's configuration.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::invalid::Problems;
use crate::oci::Repository;

/// Bytes of all that the registry holds, where the configuration sets no number: 64 GiB.
const BYTES_MAX_DEFAULT: u64 = 64 * 1024 * 1024 * 1024;
/// For how long what nothing refers to is kept, where the configuration sets no number: a week.
const COLLECT_AFTER_HOURS_DEFAULT: u64 = 7 * 24;
/// For how long a mirrored tag is believed, where the configuration sets no number.
const TAG_SECONDS_DEFAULT: u64 = 60;

/// `[registry]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryConfig {
    /// Bytes of all blobs and manifests together; a push beyond is refused. Default 64 GiB.
    pub bytes_max: u64,
    /// A blob that no manifest names, and a manifest that no tag, release, index or subject leads to, goes after this
    /// many hours. 0: nothing ever goes. Default 168.
    pub collect_after_hours: u64,
    /// What holds for which repositories. The first that fits counts.
    pub rules: Vec<RepositoryRule>,
    /// Other registries that are mirrored here.
    pub upstreams: Vec<Upstream>,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            bytes_max: BYTES_MAX_DEFAULT,
            collect_after_hours: COLLECT_AFTER_HOURS_DEFAULT,
            rules: Vec::new(),
            upstreams: Vec::new(),
        }
    }
}

/// What holds for some repositories.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryRule {
    /// A repository, or all below a path, as in `acme/*`. `*` is every repository.
    pub repositories: String,
    /// A tag that is there names the same manifest for ever, and is not deleted. Default no.
    #[serde(default)]
    pub immutable_tags: bool,
    /// Bytes of each of these repositories; a push beyond is refused. Default: what the registry has.
    #[serde(default)]
    pub bytes_max: Option<u64>,
}

impl RepositoryRule {
    /// Whether it is about `repository`.
    pub fn fits(&self, repository: &Repository) -> bool {
        match self.repositories.strip_suffix('*') {
            Some(path) => repository.as_str().starts_with(path),
            None => repository.as_str() == self.repositories,
        }
    }
}

/// Another registry: `<prefix>/<name>` here is `<name>` there.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// The first part of the repositories that are mirrors of it. Nothing else is pushed there.
    pub prefix: Repository,
    /// `https://host[:port]`.
    pub url: String,
    /// Who to be there, if it demands to know.
    #[serde(default)]
    pub username: Option<String>,
    /// A file with the password or token.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Authorities trusted instead of the public ones, PEM.
    #[serde(default)]
    pub roots: Option<PathBuf>,
    /// Hosts besides its own that it may send us to, for blobs and for tokens: names, or `*.` and a domain.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// For how long a tag is believed before it is asked for again, seconds. Default 60.
    #[serde(default = "tag_seconds")]
    pub tag_seconds: u64,
}

fn tag_seconds() -> u64 {
    TAG_SECONDS_DEFAULT
}

impl RegistryConfig {
    /// Makes paths absolute and tells what can't be.
    pub(super) fn settle(&mut self, base: &Path, problems: &mut Problems) {
        for (index, rule) in self.rules.iter().enumerate() {
            let plain = rule.repositories.trim_end_matches('*').trim_end_matches('/');
            let is_path = plain.is_empty() || plain.parse::<Repository>().is_ok();
            let is_pattern = rule.repositories == "*" || rule.repositories.ends_with("/*");
            if !is_path || plain.contains('*') || (rule.repositories.contains('*') && !is_pattern) {
                let field = format!("registry.rules[{index}].repositories");
                let message = format!("{:?} is neither a repository nor a path with /* at its end", rule.repositories);
                problems.add(None, field, message, None);
            }
        }
        for index in 0..self.upstreams.len() {
            let (before, rest) = self.upstreams.split_at_mut(index);
            let upstream = &mut rest[0];
            let field = |name: &str| format!("registry.upstreams[{index}].{name}");
            let host = upstream.url.strip_prefix("https://").unwrap_or_default();
            if host.is_empty() || host.contains(['/', '@', '?', '#']) {
                problems.add(None, field("url"), format!("{:?} is not https://host[:port]", upstream.url), None);
            }
            if upstream.username.is_some() != upstream.password_file.is_some() {
                problems.add(None, field("username"), "username and password_file go together", None);
            }
            if before.iter().any(|other| other.prefix == upstream.prefix) {
                problems.add(None, field("prefix"), format!("{} is there twice", upstream.prefix), None);
            }
            for path in [&mut upstream.password_file, &mut upstream.roots].into_iter().flatten() {
                *path = base.join(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_for_one_repository_or_all_below_a_path() {
        let fits = |pattern: &str, name: &str| {
            let rule = RepositoryRule { repositories: pattern.into(), immutable_tags: false, bytes_max: None };
            rule.fits(&name.parse().unwrap())
        };
        assert!(fits("acme/*", "acme/a") && fits("acme/*", "acme/a/b") && fits("*", "x") && fits("acme/a", "acme/a"));
        assert!(!fits("acme/*", "acme") && !fits("acme/*", "acme2/a") && !fits("acme/a", "acme/ab"));
    }

    #[test]
    fn what_can_not_be_is_told() {
        let text = "rules = [{ repositories = 'A' }, { repositories = 'a*' }, { repositories = 'a/*' }]\n\
                    upstreams = [{ prefix = 'x', url = 'http://x' }, { prefix = 'x', url = 'https://x', username = 'u' }]";
        let mut config: RegistryConfig = toml::from_str(text).unwrap();
        let mut problems = Problems::default();
        config.settle(Path::new("/etc"), &mut problems);
        let invalid = problems.settle(Path::new("f"), "", Some(())).unwrap_err();
        let fields: Vec<String> = invalid.places().into_iter().map(|place| place.field).collect();
        assert_eq!(
            fields,
            [
                "registry.rules[0].repositories",
                "registry.rules[1].repositories",
                "registry.upstreams[0].url",
                "registry.upstreams[1].username",
                "registry.upstreams[1].prefix"
            ]
        );
    }
}
