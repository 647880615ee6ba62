//! Where several control planes have their one state: `[nats]` in a control plane's configuration.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::invalid::Problems;

/// Servers that may be named.
const SERVERS_MAX: usize = 16;
/// Longest prefix of names, bytes.
const PREFIX_BYTES_MAX: usize = 32;
/// Shortest and longest wait for an answer, milliseconds.
const REQUEST_MS: std::ops::RangeInclusive<u64> = 100..=60_000;
/// Fewest and most changes between two baselines.
const BASELINE_AFTER: std::ops::RangeInclusive<u64> = 16..=1_000_000;

/// `[nats]`. Passwords, tokens and seeds are in files of their own, never here.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsConfig {
    /// `nats://host[:port]` or `tls://host[:port]`, tried in turn.
    pub servers: Vec<String>,
    /// How the names of the stream, the buckets and the subjects begin: fleets that share servers differ in it. Default
    /// `selvage`.
    #[serde(default = "prefix")]
    pub prefix: String,
    /// On how many servers a change lies before it is answered: 1, 3 or 5. Default 3.
    #[serde(default = "replicas")]
    pub replicas: usize,
    /// Who to be there, with `password_file`.
    #[serde(default)]
    pub user: Option<String>,
    /// The file of the user's password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The file of a token.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// The file of an nkey's seed.
    #[serde(default)]
    pub nkey_file: Option<PathBuf>,
    /// A credentials file, as `nsc` makes it.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// Authorities of the servers, PEM; the public ones where it is left out. With it every connection is TLS.
    #[serde(default)]
    pub roots: Option<PathBuf>,
    /// How long an answer is waited for, milliseconds. Default 5,000.
    #[serde(default = "request_ms")]
    pub request_ms: u64,
    /// How long a change is tried anew that another control plane's changes came before, milliseconds. Default 15,000.
    #[serde(default = "contend_ms")]
    pub contend_ms: u64,
    /// After so many changes a baseline is made, and what lies before it goes. Default 4,096.
    #[serde(default = "baseline_after")]
    pub baseline_after: u64,
    /// Whether other keys than those that the fleet began with are taken for the fleet's: `selvage control-plane
    /// --new-keys`, not the file, says so.
    #[serde(skip)]
    pub new_keys: bool,
}

fn prefix() -> String {
    "selvage".into()
}

fn replicas() -> usize {
    3
}

fn request_ms() -> u64 {
    5_000
}

fn contend_ms() -> u64 {
    15_000
}

fn baseline_after() -> u64 {
    4_096
}

impl NatsConfig {
    /// Makes paths absolute and tells what can't be.
    pub(super) fn settle(&mut self, base: &Path, problems: &mut Problems) {
        if self.servers.is_empty() || self.servers.len() > SERVERS_MAX {
            problems.add(None, "nats.servers", format!("name 1 to {SERVERS_MAX} servers"), None);
        }
        for server in &self.servers {
            let host = server.strip_prefix("nats://").or_else(|| server.strip_prefix("tls://")).unwrap_or_default();
            if host.is_empty() || host.contains(['/', '?', '#']) {
                let message = format!("{:?} is not nats://host[:port] or tls://host[:port]", shown(server));
                problems.add(None, "nats.servers", message, None);
            } else if host.contains('@') {
                let hint = "use user and password_file, token_file, nkey_file or credentials_file";
                problems.add(None, "nats.servers", "a server's address holds no secrets", Some(hint));
            }
        }
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if self.prefix.is_empty() || self.prefix.len() > PREFIX_BYTES_MAX || !self.prefix.bytes().all(is_name) {
            let message = format!("must be 1 to {PREFIX_BYTES_MAX} letters, digits, '-' and '_'");
            problems.add(None, "nats.prefix", message, None);
        }
        if !matches!(self.replicas, 1 | 3 | 5) {
            problems.add(None, "nats.replicas", "must be 1, 3 or 5", None);
        }
        if self.user.is_some() != self.password_file.is_some() {
            problems.add(None, "nats.user", "user and password_file go together", None);
        }
        let ways = [&self.password_file, &self.token_file, &self.nkey_file, &self.credentials_file];
        if ways.into_iter().flatten().count() > 1 {
            problems.add(None, "nats", "there are several ways to say who it is", Some("leave one"));
        }
        for (field, value) in [("nats.request_ms", self.request_ms), ("nats.contend_ms", self.contend_ms)] {
            if !REQUEST_MS.contains(&value) {
                let message = format!("must be from {} to {}", REQUEST_MS.start(), REQUEST_MS.end());
                problems.add(None, field, message, None);
            }
        }
        if !BASELINE_AFTER.contains(&self.baseline_after) {
            let message = format!("must be from {} to {}", BASELINE_AFTER.start(), BASELINE_AFTER.end());
            problems.add(None, "nats.baseline_after", message, None);
        }
        let files = [&mut self.password_file, &mut self.token_file, &mut self.nkey_file, &mut self.credentials_file];
        for path in files.into_iter().chain([&mut self.roots]).flatten() {
            *path = base.join(&path);
        }
    }
}

/// An address without what may be a secret in it.
fn shown(server: &str) -> &str {
    server.rsplit_once('@').map_or(server, |(_, host)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Vec<String> {
        let mut config: NatsConfig = toml::from_str(text).unwrap();
        let mut problems = Problems::default();
        config.settle(Path::new("/etc"), &mut problems);
        match problems.settle(Path::new("f"), "", Some(())) {
            Ok(()) => Vec::new(),
            Err(invalid) => invalid.places().into_iter().map(|place| place.field).collect(),
        }
    }

    #[test]
    fn what_is_left_out_has_a_default_and_paths_are_absolute() {
        let mut config: NatsConfig = toml::from_str("servers=['nats://a:4222']\nroots='ca.pem'").unwrap();
        config.settle(Path::new("/etc"), &mut Problems::default());
        assert_eq!((config.prefix.as_str(), config.replicas, config.baseline_after), ("selvage", 3, 4_096));
        assert_eq!(config.roots.as_deref(), Some(Path::new("/etc/ca.pem")));
        assert!(fields("servers=['nats://a', 'tls://b:4222']\nuser='u'\npassword_file='p'").is_empty());
    }

    #[test]
    fn what_can_not_be_is_told_and_no_secret_with_it() {
        for (bad, field) in [
            ("servers=[]", "nats.servers"),
            ("servers=['http://a']", "nats.servers"),
            ("servers=['nats://u:p@a']", "nats.servers"),
            ("servers=['nats://a']\nprefix='a.b'", "nats.prefix"),
            ("servers=['nats://a']\nreplicas=2", "nats.replicas"),
            ("servers=['nats://a']\nuser='u'", "nats.user"),
            ("servers=['nats://a']\ntoken_file='t'\nnkey_file='n'", "nats"),
            ("servers=['nats://a']\nrequest_ms=1", "nats.request_ms"),
            ("servers=['nats://a']\nbaseline_after=1", "nats.baseline_after"),
        ] {
            assert_eq!(fields(bad), [field], "{bad}");
        }
        assert_eq!(shown("http://u:p@a"), "a");
        assert!(toml::from_str::<NatsConfig>("servers=['nats://a']\npassword='p'").is_err());
    }
}
