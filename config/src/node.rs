//! The configuration of a node: a TOML file that its operator writes.

mod acme;
mod admin;
mod kv;
mod name;
mod tls_name;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::front::Front;
use crate::invalid::{Invalid, Problems};
use crate::limits::Limits;
use crate::rollout::is_label_text;
use crate::{NodeName, Region, app};

pub use acme::{Acme, AcmeChallenge, ExternalAccount};
pub use admin::{Admin, AdminOperator};
pub use kv::{Kv, KvBackend, KvBackendKind, KvEngine, KvStore, MESH, RedisAddress};
pub use name::{CertificateName, NotAName};
pub use tls_name::{Alpn, ClientCertificates, TlsName};

/// A node's configuration. Relative paths are relative to the file's directory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Unique in the fleet.
    pub name: NodeName,
    /// Where it stands.
    pub region: Region,
    /// What the node is for, as in `{ tier = "canary" }`: rollouts and people choose nodes by it. Labels that it was
    /// given when it joined, or by an operator, go before these.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Apps answer at `<app>.<domain>` besides the hosts that they name. Default `localhost`.
    #[serde(default = "localhost")]
    pub domain: String,
    /// Everything that must survive a restart: plan, components, compiled code, KV.
    pub state_dir: PathBuf,
    /// The file of the key that values of variables are sealed with on the disk; made where there is none. Default
    /// `sealing.key` in `state_dir`. Who copies the state without this key has no secrets.
    #[serde(default)]
    pub sealing_key: Option<PathBuf>,
    /// Where requests come in.
    pub listen: Listen,
    /// Certificates of the front.
    #[serde(default)]
    pub certificates: Vec<CertificateFiles>,
    /// Certificates that the node gets by itself.
    pub acme: Option<Acme>,
    /// TLS of the front.
    #[serde(default)]
    pub tls: TlsSettings,
    /// What the front takes from one client, and whom it believes.
    #[serde(default)]
    pub front: Front,
    /// Who this node is to its peers and the control plane. Needed for `control_plane` and for replication.
    pub identity: Option<IdentityFiles>,
    /// Where plans come from. Without it the node runs the last plan on its disk.
    pub control_plane: Option<ControlPlaneAddress>,
    /// Whose signatures count. The plan has no say in this.
    #[serde(default)]
    pub trust: Trust,
    /// The most that any component may use here, whatever its app says.
    #[serde(default = "Limits::node_cap")]
    pub limits: Limits,
    /// What guests may reach besides what their app allows.
    #[serde(default)]
    pub egress: Egress,
    /// Whom the admin listener lets in while no signed plan says so.
    #[serde(default)]
    pub admin: Admin,
    /// Where KV is kept, and how much.
    #[serde(default)]
    pub kv: Kv,
    /// Requests under way at once on this node; more are answered 503. Default 10,000.
    #[serde(default = "requests_max")]
    pub requests_max: u32,
    /// Instances that run at once, for each generation of WASI; a request beyond them is answered 503. Each reserves 12 GiB
    /// of address space, hardly any memory. Default: one for each 16 MiB of the machine's memory, 64 to 1,000.
    #[serde(default)]
    pub instances_max: Option<NonZeroU32>,
    /// On SIGTERM, how long requests under way may take to end, milliseconds. Default 30,000.
    #[serde(default = "drain_ms")]
    pub drain_ms: u64,
    /// When a new process takes over (`selvage node --take-over`), how long calls of the KV under way may take to end before
    /// the KV goes over, milliseconds; later calls wait meanwhile, and nothing else does. Not more than `drain_ms`. Default
    /// 1,000.
    #[serde(default = "handover_ms")]
    pub handover_ms: u64,
}

fn localhost() -> String {
    "localhost".into()
}

fn requests_max() -> u32 {
    10_000
}

fn drain_ms() -> u64 {
    30_000
}

fn handover_ms() -> u64 {
    1_000
}

/// Sockets of a node. Port 0 takes any free port.
#[derive(Debug, Clone, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// HTTP/1.1 and HTTP/2 over TLS (TCP), and HTTP/3 (UDP) on the same port number.
    pub https: Option<SocketAddr>,
    /// HTTP/1.1 and HTTP/2 with prior knowledge, without TLS.
    pub http: Option<SocketAddr>,
    /// Replication between nodes (UDP). Without it the node's KV stands alone.
    pub replication: Option<SocketAddr>,
    /// Health, metrics and KV for operators: mTLS where `identity` is set, else only a loopback address is taken.
    pub admin: Option<SocketAddr>,
}

/// A certificate chain and its key, PEM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    /// The chain, the leaf first.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// TLS of the front.
#[derive(Debug, Clone, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// The oldest version that is spoken: `"1.3"`, the default, or `"1.2"`.
    #[serde(default)]
    pub version_min: TlsVersionMin,
    /// Who computes: `"aws-lc-rs"`, the default, with the hybrid key exchange X25519MLKEM768; or `"ring"`, without it.
    #[serde(default)]
    pub provider: TlsProvider,
    /// A file of 32 bytes or more, the same on every node of a point of presence. From it come the keys of session
    /// tickets, and of QUIC's tokens and resets. Without it each node has its own, until it restarts.
    pub secret: Option<PathBuf>,
    /// Whether requests over HTTP/3 are taken that come in front of the handshake's end (0-RTT). Default no.
    #[serde(default)]
    pub early_data: bool,
    /// Names that differ from the others.
    #[serde(default)]
    pub names: Vec<TlsName>,
}

/// The oldest version of TLS that the front speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
pub enum TlsVersionMin {
    /// RFC 5246.
    #[serde(rename = "1.2")]
    V12,
    /// RFC 8446.
    #[default]
    #[serde(rename = "1.3")]
    V13,
}

/// Who computes for TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum TlsProvider {
    /// AWS-LC, the faster one, with X25519MLKEM768.
    #[default]
    AwsLcRs,
    /// ring.
    Ring,
}

/// The mTLS identity of a node or a control plane, PEM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityFiles {
    /// The chain, the leaf first.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
    /// The authorities that peers must come from.
    pub roots: PathBuf,
}

/// Where the control plane listens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlPlaneAddress {
    /// `host:port`, or a list of them where several control planes have one state: the first that answers is asked until
    /// it does not.
    #[serde(deserialize_with = "one_or_more")]
    pub address: Vec<String>,
}

/// Control planes that a node may know.
pub const CONTROL_PLANES_MAX: usize = 8;

fn one_or_more<'d, D: serde::Deserializer<'d>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        One(String),
        More(Vec<String>),
    }
    let all = match Either::deserialize(deserializer) {
        Ok(Either::One(one)) => vec![one],
        Ok(Either::More(all)) => all,
        Err(_) => return Err(serde::de::Error::custom("address is a host:port, or a list of them")),
    };
    if all.is_empty() || all.len() > CONTROL_PLANES_MAX {
        return Err(serde::de::Error::custom(format!("address names 1 to {CONTROL_PLANES_MAX} control planes")));
    }
    Ok(all)
}

/// Whose signatures count. Empty: nothing runs.
#[derive(Debug, Clone, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// Public keys of cosign key pairs, PEM files.
    #[serde(default)]
    pub keys: Vec<PathBuf>,
    /// Whether cosign 2's `.sig` tags count where an artifact has no bundle. Default no.
    #[serde(default)]
    pub legacy_signatures: bool,
    /// A policy file instead of `keys`: who must have signed which app, with thresholds, identities and attestations.
    pub policy: Option<PathBuf>,
    /// The root of the fleet's plans, as `selvage root` makes it: this one and those that follow it say which key signs
    /// plans. With it, an unsigned or older plan is refused.
    pub root: Option<PathBuf>,
    /// Whether plans need no signature. A node with a control plane has either a root or this. Default no.
    #[serde(default)]
    pub unsigned_plans: bool,
}

/// What guests may reach.
#[derive(Debug, Clone, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// Loopback, private and link-local addresses, also where a name resolves to one. Default no.
    #[serde(default)]
    pub private_networks: bool,
    /// Authorities trusted besides the public ones, PEM files.
    #[serde(default)]
    pub roots: Vec<PathBuf>,
}

impl NodeConfig {
    /// Reads the text of `file`; paths become absolute.
    ///
    /// # Errors
    /// Every mistake with its place.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Invalid> {
        let mut config: Self = toml::from_str(text).map_err(|e| Invalid::of_toml(file, text, &e))?;
        config.place_below(file.parent().unwrap_or(Path::new("")));
        let mut problems = Problems::default();
        let listen = &config.listen;
        if listen.https.is_none() && listen.http.is_none() {
            problems.add(None, "listen", "neither https nor http is set", Some("add https = \"0.0.0.0:443\""));
        }
        if listen.https.is_some() && config.certificates.is_empty() && config.acme.is_none() {
            let hint = "add [[certificates]] with certificate and key, or [acme]";
            problems.add(None, "certificates", "listen.https needs a certificate", Some(hint));
        }
        if config.identity.is_none() && (config.control_plane.is_some() || listen.replication.is_some()) {
            let hint = "add [identity] with certificate, key and roots";
            problems.add(None, "identity", "control_plane and listen.replication need an identity", Some(hint));
        }
        if config.identity.is_none() && listen.admin.is_some_and(|a| !a.ip().is_loopback()) {
            let hint = "listen on 127.0.0.1 or add [identity]";
            problems.add(None, "listen.admin", "without an identity only loopback is taken", Some(hint));
        }
        if config.trust.policy.is_some() && (!config.trust.keys.is_empty() || config.trust.legacy_signatures) {
            let hint = "say it in the policy's rules";
            problems.add(None, "trust.policy", "stands in place of keys and legacy_signatures", Some(hint));
        }
        if config.control_plane.is_some() && config.trust.keys.is_empty() && config.trust.policy.is_none() {
            let hint = "add keys = [\"cosign.pub\"] under [trust], or policy = \"policy.toml\"";
            problems.add(None, "trust.keys", "no key is trusted, so nothing would ever run", Some(hint));
        }
        let trust = &config.trust;
        if config.control_plane.is_some() && trust.root.is_none() && !trust.unsigned_plans {
            let hint = "add root = \"root-1.json\" under [trust] (`selvage root` makes it), or unsigned_plans = true";
            problems.add(None, "trust.root", "no root says who signs plans, so none would be taken", Some(hint));
        }
        if trust.root.is_some() && trust.unsigned_plans {
            problems.add(None, "trust.unsigned_plans", "with a root every plan needs a signature", Some("remove it"));
        }
        if let Some(acme) = &config.acme {
            acme.problems(listen, config.tls.secret.is_some(), &mut problems);
        }
        TlsName::problems(&config.tls.names, &mut problems);
        config.front.check(&mut problems);
        for (name, value) in &config.labels {
            if !is_label_text(name) || !is_label_text(value) || name == "region" {
                let message = format!("{name}={value} is no label");
                problems.add(None, "labels", message, Some("use letters, digits, '-', '_', '.' and '/'"));
            }
        }
        if !app::is_host(&config.domain) {
            problems.add(None, "domain", format!("{:?} is no lower-case host name", config.domain), None);
        }
        config.kv.problems(&mut problems);
        config.admin.problems(&mut problems);
        problems.locate(text);
        problems.settle(file, text, Some(config))
    }

    fn place_below(&mut self, base: &Path) {
        let certificates = self.certificates.iter_mut().flat_map(|c| [&mut c.certificate, &mut c.key]);
        let identity = self.identity.iter_mut().flat_map(|i| [&mut i.certificate, &mut i.key, &mut i.roots]);
        let keys = self
            .trust
            .keys
            .iter_mut()
            .chain(&mut self.trust.root)
            .chain(&mut self.trust.policy)
            .chain(&mut self.egress.roots);
        for path in certificates
            .chain(identity)
            .chain(keys)
            .chain([&mut self.state_dir])
            .chain(&mut self.tls.secret)
            .chain(&mut self.sealing_key)
        {
            *path = base.join(&path);
        }
        if let Some(acme) = &mut self.acme {
            acme.place_below(base);
        }
        self.tls.names.iter_mut().for_each(|name| name.place_below(base));
        self.kv.place_below(base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "fra-1"
region = "fra"
state_dir = "state"
listen = { https = "127.0.0.1:0", replication = "127.0.0.1:0" }
certificates = [{ certificate = "front.pem", key = "front.key" }]
identity = { certificate = "node.pem", key = "node.key", roots = "/ca.pem" }
control_plane = { address = "127.0.0.1:7400" }
trust = { keys = ["cosign.pub"], root = "root-1.json" }
"#;

    fn parse(text: &str) -> Result<NodeConfig, Invalid> {
        NodeConfig::parse(Path::new("/etc/selvage/node.toml"), text)
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.state_dir, Path::new("/etc/selvage/state"));
        assert_eq!(config.trust.keys, [Path::new("/etc/selvage/cosign.pub")]);
        assert_eq!(config.identity.unwrap().roots, Path::new("/ca.pem"));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let places = parse(&GOOD.replace("region =", "regoin =")).unwrap_err().places();
        assert_eq!((places[0].line, places[0].field.as_str()), (Some(3), "regoin"));
    }

    #[test]
    fn tls_is_new_and_fast_unless_the_file_says_otherwise() {
        let config = parse(GOOD).unwrap();
        assert_eq!((config.tls.version_min, config.tls.provider), (TlsVersionMin::V13, TlsProvider::AwsLcRs));
        assert_eq!(config.tls.secret, None);
        let with = |tls: &str| parse(&GOOD.replacen("region =", &format!("tls = {{ {tls} }}\nregion ="), 1));
        let tls = with("version_min = \"1.2\", provider = \"ring\", secret = \"pop.secret\"").unwrap().tls;
        assert_eq!((tls.version_min, tls.provider), (TlsVersionMin::V12, TlsProvider::Ring));
        assert_eq!(tls.secret.unwrap(), Path::new("/etc/selvage/pop.secret"));
        for bad in ["version_min = \"1.1\"", "version_min = 1.3", "provider = \"openssl\"", "secrets = \"x\""] {
            let places = with(bad).unwrap_err().places();
            assert_eq!(places[0].line, Some(3), "{bad}");
        }
    }

    #[test]
    fn a_number_of_instances_is_a_number_and_not_0() {
        let with = |value: &str| GOOD.replacen("region =", &format!("instances_max = {value}\nregion ="), 1);
        assert_eq!(parse(GOOD).unwrap().instances_max, None);
        assert_eq!(parse(&with("7")).unwrap().instances_max, NonZeroU32::new(7));
        for bad in ["0", "-1", "4294967296", "\"7\""] {
            let places = parse(&with(bad)).unwrap_err().places();
            assert_eq!(places[0].line, Some(3), "{bad}");
        }
    }

    #[test]
    fn the_kv_is_kept_as_its_table_says() {
        let kv = |table: &str| parse(&format!("{GOOD}{table}")).map(|config| config.kv);
        assert_eq!(kv("").unwrap(), Kv::default());
        let table = "[kv]\nengine = \"redb\"\nstore_mib_max = 2\n[kv.stores.\"app/big\"]\nmib_max = 3\n";
        let redb = kv(table).unwrap();
        assert_eq!(redb.engine, KvEngine::Redb);
        assert_eq!(redb.store_bytes_max(&"app/big".parse().unwrap()), 3 << 20);
        assert_eq!(redb.store_bytes_max(&"app/other".parse().unwrap()), 2 << 20);
        for (bad, field) in [
            ("[kv]\nengine = \"rocks\"\n", "kv.engine"),
            ("[kv]\ncache_mib = 0\n", "kv.cache_mib"),
            ("[kv]\ntotal_mib_max = 0\nstore_mib_max = 0\n", "kv.total_mib_max"),
            ("[kv]\ntotal_mib_max = 5\n", "kv.store_mib_max"),
            ("[kv]\nsurprise = 5\n", "surprise"),
            ("[kv.stores.\"no-label\"]\nmib_max = 5\n", "no-label"),
        ] {
            let places = kv(bad).unwrap_err().places();
            assert!(places[0].field.contains(field) || places[0].line.is_some(), "{bad}: {places:?}");
        }
    }

    #[test]
    fn labels_are_words_and_not_the_region() {
        let with = |labels: &str| parse(&GOOD.replacen("region =", &format!("labels = {labels}\nregion ="), 1));
        assert_eq!(with("{ tier = \"edge\" }").unwrap().labels["tier"], "edge");
        for bad in ["{ region = \"iad\" }", "{ tier = \"a b\" }", "{ tier = \"\" }"] {
            assert_eq!(with(bad).unwrap_err().places()[0].field, "labels", "{bad}");
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let text = "name='a'\nregion='b'\nstate_dir='s'\nlisten={https='127.0.0.1:0'}\ncontrol_plane={address='a:1'}\n";
        let fields: Vec<String> = parse(text).unwrap_err().places().into_iter().map(|p| p.field).collect();
        assert_eq!(fields, ["certificates", "identity", "trust.keys", "trust.root"]);
    }

    #[test]
    fn a_node_may_know_several_control_planes() {
        let of = |address: &str| toml::from_str::<ControlPlaneAddress>(&format!("address={address}"));
        assert_eq!(of("'a:1'").unwrap().address, ["a:1"]);
        assert_eq!(of("['a:1','b:2']").unwrap().address, ["a:1", "b:2"]);
        for bad in ["[]", "1", "['a:1','b:1','c:1','d:1','e:1','f:1','g:1','h:1','i:1']"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_node_with_a_control_plane_has_a_root_or_says_that_it_takes_unsigned_plans() {
        let with = |trust: &str| parse(&GOOD.replace("root = \"root-1.json\"", trust));
        assert_eq!(with("root = 'r.json'").unwrap().trust.root.unwrap(), Path::new("/etc/selvage/r.json"));
        assert!(with("unsigned_plans = true").unwrap().trust.unsigned_plans);
        for (bad, field) in [
            ("legacy_signatures = false", "trust.root"),
            ("unsigned_plans = false", "trust.root"),
            ("root = 'r.json', unsigned_plans = true", "trust.unsigned_plans"),
        ] {
            assert_eq!(with(bad).unwrap_err().places()[0].field, field, "{bad}");
        }
    }
}
