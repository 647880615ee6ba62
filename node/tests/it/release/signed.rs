//! Plans as a control plane signs them, under a root of this test.

use std::path::Path;

use selvage_config::plan::Plan;
use selvage_config::release::Release;
use selvage_config::root::Root;
use selvage_config::signature::Envelope;
use selvage_config::snapshot::{Revoked, Snapshot};
use selvage_config::{Digest, PrivateKey};
use selvage_node::release::plan::now_ms;

/// A fleet's keys and its root.
pub(crate) struct Signed {
    offline: [PrivateKey; 2],
    pub(crate) key: PrivateKey,
    pub(crate) root: Root,
}

impl Signed {
    pub(crate) fn new() -> Self {
        let make = || PrivateKey::generate().unwrap();
        let (offline, key) = ([make(), make()], make());
        let root = Root::initial("test".into(), offline.iter().map(PrivateKey::public).collect(), vec![key.public()]);
        Self { offline, key, root }
    }

    pub(crate) fn write_root(&self, dir: &Path) {
        std::fs::write(dir.join("root-1.json"), serde_json::to_vec(&self.sign_root(&self.root)).unwrap()).unwrap();
    }

    pub(crate) fn sign_root(&self, root: &Root) -> Envelope {
        let mut envelope = root.envelope().unwrap();
        self.offline.iter().for_each(|key| envelope.sign(key).unwrap());
        envelope
    }

    /// A snapshot that holds for an hour.
    pub(crate) fn snapshot(&self, version: u64, releases: &[(&str, Digest)]) -> Snapshot {
        let resources = releases.iter().map(|(id, manifest)| (id.parse().unwrap(), *manifest)).collect();
        let (now, revoked) = (now_ms(), Revoked::default());
        let namespace = self.root.namespace.clone();
        let (issued_ms, expires_ms) = (now, now + 3_600_000);
        Snapshot { namespace, version, issued_ms, expires_ms, resources, revoked, operators: None }
    }

    pub(crate) fn envelope(&self, snapshot: &Snapshot) -> Envelope {
        let mut envelope = snapshot.envelope();
        envelope.sign(&self.key).unwrap();
        envelope
    }

    /// The plan for all that a snapshot lists.
    pub(crate) fn plan(&self, snapshot: &Snapshot) -> Plan {
        let release = |(id, manifest): (&selvage_config::release::ReleaseId, &Digest)| Release {
            id: id.clone(),
            repository: "acme/app".parse().unwrap(),
            manifest: *manifest,
            variables: [].into(),
            created_ms: 1,
            created_by: "ops".into(),
        };
        let releases = snapshot.resources.iter().map(release).collect();
        let plan = Plan::new("fra-1".parse().unwrap(), snapshot.version, releases, Vec::new());
        Plan { snapshot: Some(self.envelope(snapshot)), ..plan }
    }
}
