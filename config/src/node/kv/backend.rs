//! Servers that keep stores in place of the mesh: `[kv.backends.NAME]`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::invalid::{Problems, SECRET};

/// The name that means the node's own replicated KV, where another one would be the default.
pub const MESH: &str = "mesh";
/// Backends that a node may have.
const BACKENDS_MAX: usize = 16;
/// Servers that one may be reached by.
const SERVERS_MAX: usize = 16;
/// Longest name, prefix or bucket, bytes.
const NAME_BYTES_MAX: usize = 63;
/// Shortest and longest wait for a connection or an answer, milliseconds.
const WAIT_MS: std::ops::RangeInclusive<u64> = 10..=60_000;
/// Fewest and most requests under way at one backend.
const REQUESTS: std::ops::RangeInclusive<u32> = 1..=4_096;
/// Smallest and largest bound on a value, KiB: the mesh's own bound is 25 MiB.
const VALUE_KIB: std::ops::RangeInclusive<u32> = 1..=25 * 1024;
/// Where a Redis server listens by default.
const REDIS_PORT: u16 = 6379;

/// `[kv.backends.NAME]`: a server, or several that are one. Passwords, tokens and seeds are in files of their own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvBackend {
    /// What it is.
    pub kind: KvBackendKind,
    /// Redis: `redis://host[:port][/database]`, or `rediss://` for TLS.
    #[serde(default)]
    pub url: Option<String>,
    /// Redis: how its keys begin: fleets that share a server differ in it. Default `selvage`.
    #[serde(default)]
    pub prefix: Option<String>,
    /// NATS: `nats://host[:port]` or `tls://host[:port]`, tried in turn.
    #[serde(default)]
    pub servers: Vec<String>,
    /// NATS: the bucket that has all the stores. Made where it is not there. Default `selvage`.
    #[serde(default)]
    pub bucket: Option<String>,
    /// NATS: on how many servers a bucket that this node makes lies: 1, 3 or 5. Default 3.
    #[serde(default)]
    pub replicas: Option<usize>,
    /// NATS: the most that a bucket that this node makes takes, MiB. Default 1,024.
    #[serde(default)]
    pub bucket_mib_max: Option<u32>,
    /// Who to be there, with `password_file`. Redis has a default user.
    #[serde(default)]
    pub user: Option<String>,
    /// The file of the password. This and the other files are read anew for each connection.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// NATS: the file of a token.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// NATS: the file of an nkey's seed.
    #[serde(default)]
    pub nkey_file: Option<PathBuf>,
    /// NATS: a credentials file, as `nsc` makes it.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// Authorities of the servers, PEM; the public ones where it is left out. With it every connection is TLS.
    #[serde(default)]
    pub roots: Option<PathBuf>,
    /// How long a connection may take to be made, milliseconds. Default 2,000.
    #[serde(default = "connect_ms")]
    pub connect_ms: u64,
    /// How long an answer is waited for, milliseconds. Default 1,000.
    #[serde(default = "request_ms")]
    pub request_ms: u64,
    /// Requests under way at once; more are refused. Default 128.
    #[serde(default = "requests_max")]
    pub requests_max: u32,
    /// The longest value, KiB. Default 1,000: below what a NATS server takes by default.
    #[serde(default = "value_kib_max")]
    pub value_kib_max: u32,
}

/// What keeps the stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvBackendKind {
    /// A Redis server, or one that speaks as it does.
    Redis,
    /// A bucket of NATS JetStream.
    Nats,
}

impl KvBackendKind {
    /// As it stands in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Nats => "nats",
        }
    }
}

fn connect_ms() -> u64 {
    2_000
}

fn request_ms() -> u64 {
    1_000
}

fn requests_max() -> u32 {
    128
}

fn value_kib_max() -> u32 {
    1_000
}

/// Where a Redis server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisAddress {
    /// Whether it is spoken to by TLS.
    pub is_tls: bool,
    /// Its name or address, without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Which of its databases.
    pub database: i64,
}

impl RedisAddress {
    /// Reads `redis[s]://host[:port][/database]`; nothing else may be in it.
    pub(super) fn parse(url: &str) -> Option<Self> {
        let (is_tls, rest) = match url.strip_prefix("rediss://") {
            Some(rest) => (true, rest),
            None => (false, url.strip_prefix("redis://")?),
        };
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let database = if database.is_empty() { 0 } else { database.parse::<u16>().ok()?.into() };
        let (host, port) = match authority.strip_prefix('[') {
            // RFC 3986 3.2.2: an IPv6 address stands in brackets.
            Some(rest) => {
                let (host, port) = rest.split_once(']')?;
                host.parse::<std::net::Ipv6Addr>().ok()?;
                (host, port)
            }
            None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
        };
        let port = match port {
            "" => REDIS_PORT,
            port => port.strip_prefix(':')?.parse().ok().filter(|port| *port != 0)?,
        };
        let is_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        let host = Some(host).filter(|host| !host.is_empty() && host.chars().all(is_host))?.to_owned();
        Some(Self { is_tls, host, port, database })
    }
}

impl KvBackend {
    /// Where it is, if it is a Redis server.
    pub fn redis_address(&self) -> Option<RedisAddress> {
        self.url.as_deref().and_then(RedisAddress::parse)
    }

    /// How its keys begin.
    pub fn prefix(&self) -> &str {
        self.prefix.as_deref().unwrap_or("selvage")
    }

    /// The bucket of all its stores.
    pub fn bucket(&self) -> &str {
        self.bucket.as_deref().unwrap_or("selvage")
    }

    /// On how many servers a new bucket lies.
    pub fn replicas(&self) -> usize {
        self.replicas.unwrap_or(3)
    }

    /// What a new bucket takes, bytes.
    pub fn bucket_bytes_max(&self) -> u64 {
        u64::from(self.bucket_mib_max.unwrap_or(1_024)) << 20
    }

    /// The longest value, bytes.
    pub fn value_bytes_max(&self) -> usize {
        self.value_kib_max as usize * 1_024
    }

    pub(in crate::node) fn place_below(&mut self, base: &Path) {
        let files = [&mut self.password_file, &mut self.token_file, &mut self.nkey_file, &mut self.credentials_file];
        for path in files.into_iter().chain([&mut self.roots]).flatten() {
            *path = base.join(&path);
        }
    }

    fn problems(&self, field: &str, problems: &mut Problems) {
        let mut wrong = |name: &str, message: String| problems.add(None, format!("{field}.{name}"), message, None);
        for (name, ms) in [("connect_ms", self.connect_ms), ("request_ms", self.request_ms)] {
            if !WAIT_MS.contains(&ms) {
                wrong(name, format!("must be from {} to {}", WAIT_MS.start(), WAIT_MS.end()));
            }
        }
        if !REQUESTS.contains(&self.requests_max) {
            wrong("requests_max", format!("must be from {} to {}", REQUESTS.start(), REQUESTS.end()));
        }
        if !VALUE_KIB.contains(&self.value_kib_max) {
            wrong("value_kib_max", format!("must be from {} to {}", VALUE_KIB.start(), VALUE_KIB.end()));
        }
        if self.user.is_some() && self.password_file.is_none() {
            wrong("user", "needs password_file beside it".into());
        }
        match self.kind {
            KvBackendKind::Redis => self.redis_problems(field, problems),
            KvBackendKind::Nats => self.nats_problems(field, problems),
        }
    }

    fn redis_problems(&self, field: &str, problems: &mut Problems) {
        let of_nats = [
            ("servers", !self.servers.is_empty()),
            ("bucket", self.bucket.is_some()),
            ("replicas", self.replicas.is_some()),
            ("bucket_mib_max", self.bucket_mib_max.is_some()),
            ("token_file", self.token_file.is_some()),
            ("nkey_file", self.nkey_file.is_some()),
            ("credentials_file", self.credentials_file.is_some()),
        ];
        unknown(field, "redis", &of_nats, problems);
        let hint = Some("url = \"redis://host[:port][/database]\", or rediss:// for TLS");
        match self.url.as_deref() {
            None => problems.add(None, field, "a redis backend needs a url", hint),
            Some(url) if url.contains('@') => secret(&format!("{field}.url"), problems),
            Some(_) => match self.redis_address() {
                None => problems.add(None, format!("{field}.url"), "is no address of a Redis server", hint),
                Some(address) if !address.is_tls && self.roots.is_some() => {
                    let message = "is for TLS, and the url is redis:// without it";
                    problems.add(None, format!("{field}.roots"), message, Some("use rediss://"));
                }
                Some(_) => {}
            },
        }
        if !is_name(self.prefix()) {
            problems.add(None, format!("{field}.prefix"), name_rule(), None);
        }
    }

    fn nats_problems(&self, field: &str, problems: &mut Problems) {
        unknown(field, "nats", &[("url", self.url.is_some()), ("prefix", self.prefix.is_some())], problems);
        if self.servers.is_empty() || self.servers.len() > SERVERS_MAX {
            let hint = Some("servers = [\"nats://host[:port]\"], or tls:// for TLS");
            problems.add(None, field, format!("a nats backend needs 1 to {SERVERS_MAX} servers"), hint);
        }
        if self.servers.iter().any(|server| server.contains('@')) {
            secret(&format!("{field}.servers"), problems);
        }
        let is_server = |server: &str| {
            let host = server.strip_prefix("nats://").or_else(|| server.strip_prefix("tls://")).unwrap_or_default();
            !host.is_empty() && !host.contains(['/', '?', '#'])
        };
        if let Some(server) = self.servers.iter().find(|server| !server.contains('@') && !is_server(server)) {
            let message = format!("{server:?} is not nats://host[:port] or tls://host[:port]");
            problems.add(None, format!("{field}.servers"), message, None);
        }
        if !is_name(self.bucket()) {
            problems.add(None, format!("{field}.bucket"), name_rule(), None);
        }
        if !matches!(self.replicas(), 1 | 3 | 5) {
            problems.add(None, format!("{field}.replicas"), "must be 1, 3 or 5", None);
        }
        if self.bucket_mib_max == Some(0) {
            problems.add(None, format!("{field}.bucket_mib_max"), "nothing could be written", None);
        }
        if self.user.is_none() && self.password_file.is_some() {
            problems.add(None, format!("{field}.password_file"), "needs user beside it", None);
        }
        let ways = [&self.password_file, &self.token_file, &self.nkey_file, &self.credentials_file];
        if ways.into_iter().flatten().count() > 1 {
            problems.add(None, field, "there are several ways to say who it is", Some("leave one"));
        }
    }
}

/// What the other kind has is no field of this one.
fn unknown(field: &str, kind: &str, fields: &[(&str, bool)], problems: &mut Problems) {
    for (name, _) in fields.iter().filter(|(_, is_there)| *is_there) {
        problems.add(None, format!("{field}.{name}"), format!("a {kind} backend has no such field"), None);
    }
}

fn secret(field: &str, problems: &mut Problems) {
    let hint = "use password_file (nats: or token_file, nkey_file, credentials_file)";
    problems.add(None, field, SECRET, Some(hint));
}

fn is_name(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !text.is_empty() && text.len() <= NAME_BYTES_MAX && text.bytes().all(is_plain)
}

fn name_rule() -> String {
    format!("must be 1 to {NAME_BYTES_MAX} letters, digits, '-' and '_'")
}

/// Notes what is wrong with the backends of a node.
pub(super) fn problems(backends: &BTreeMap<String, KvBackend>, problems: &mut Problems) {
    if backends.len() > BACKENDS_MAX {
        problems.add(None, "kv.backends", format!("{} of at most {BACKENDS_MAX}", backends.len()), None);
    }
    for (name, backend) in backends {
        let field = format!("kv.backends.{name}");
        if !is_name(name) || name == MESH {
            let hint = (name == MESH).then_some("\"mesh\" is the node's own KV");
            problems.add(None, &*field, format!("the name {}", name_rule()), hint);
        }
        backend.problems(&field, problems);
    }
}
