//! What the nodes of a place tell each other of their certificates: those that one secret makes one (`tls.secret`).
//!
//! One orders for all. Whoever wants a certificate says so with an expiring record, waits until its peers have heard of it,
//! and looks who is said to have the turn: of two who wrote at once the later stands, everywhere. That is no lock, and
//! need not be one: two who order at once, on two sides of a broken network, get a certificate too many. What an authority
//! may ask of any of them stands there as well, and the certificate itself when it came. All but the turns is sealed.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use selvage_certs::{Identity, IssuedFiles, PlaceSeal};
use selvage_config::node::CertificateName;
use selvage_config::{NODES_APP, NodeName, StoreName};
use selvage_sync::{Kv, KvError};
use tokio::time::{Instant, sleep};

/// The label of the store where it stands, which is no app's.
const LABEL: &str = "place";
/// How long a node that says nothing more has the turn: longer than any order takes.
const TURN: Duration = Duration::from_secs(600);
/// How long peers are waited for until they have heard of something.
const HEARD_MAX: Duration = Duration::from_secs(5);
/// Between two looks whether they have.
const HEARD_LOOK: Duration = Duration::from_millis(20);
/// What was on its way to this node when it wrote may come so much later.
const CROSSING: Duration = Duration::from_millis(500);

/// The place that a node is of.
pub struct Place {
    kv: Kv,
    sealing: PlaceSeal,
    node: NodeName,
    store: StoreName,
}

/// Something could not be told to the other nodes.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    #[error("write for the other nodes of the place")]
    Write(#[from] KvError),
    #[error("seal what is for the other nodes of the place")]
    Seal(#[from] selvage_certs::RandomError),
}

/// A challenge's answer that every node of the place gives, and its key. It ends by itself if nobody takes it away.
pub(super) struct Posted(String);

impl Place {
    /// The place of the nodes with the secret of `sealing`, as the KV of `node` knows it.
    pub fn new(kv: Kv, sealing: PlaceSeal, node: NodeName) -> Self {
        Self { kv, sealing, node, store: format!("{NODES_APP}/{LABEL}").parse().expect("a name and a label") }
    }

    fn key(&self, about: &str) -> String {
        format!("{}/{about}", self.sealing.place())
    }

    /// What an authority is answered that asks this node and means another one.
    pub(super) fn answer(&self, host: &str, token: Option<&str>) -> Option<Vec<u8>> {
        let about = challenge(host, token);
        self.sealing.open(&about, &self.read(&about)?)
    }

    /// Has every node of the place answer so.
    pub(super) async fn post(&self, host: &str, token: Option<&str>, answer: &[u8]) -> Result<Posted, PlaceError> {
        let about = challenge(host, token);
        self.write(&about, answer, SystemTime::now() + TURN).await?;
        self.heard().await;
        Ok(Posted(about))
    }

    /// Nobody answers so any more.
    pub(super) async fn take_away(&self, Posted(about): Posted) -> Result<(), PlaceError> {
        Ok(self.kv.delete(&self.store, &self.key(&about)).await?)
    }

    /// Whether it is this node's turn to order for `name`. Else it is another's, and it is worth looking again.
    pub(super) async fn has_turn(&self, name: &CertificateName) -> Result<bool, PlaceError> {
        let key = self.key(&format!("turn/{name}"));
        let own = self.node.as_str().as_bytes();
        if self.kv.get(&self.store, &key)?.is_some_and(|other| other != own) {
            return Ok(false);
        }
        let until = ms(SystemTime::now() + TURN);
        self.kv.set_until(&self.store, &key, Bytes::copy_from_slice(own), Some(until)).await?;
        self.heard().await;
        sleep(CROSSING).await;
        Ok(self.kv.get(&self.store, &key)?.is_some_and(|now| now == own))
    }

    /// The turn is over.
    pub(super) async fn pass(&self, name: &CertificateName) -> Result<(), PlaceError> {
        Ok(self.kv.delete(&self.store, &self.key(&format!("turn/{name}"))).await?)
    }

    /// Gives a certificate to all, and with it the turn back. `files` are those of its authority.
    pub(super) async fn give(
        &self,
        files: &IssuedFiles,
        name: &CertificateName,
        identity: &Identity,
    ) -> Result<(), PlaceError> {
        self.write(&certificate(files, name), identity.to_pem().as_bytes(), identity.not_after()).await?;
        self.pass(name).await
    }

    /// What was given for `name`, as it was sealed.
    pub(super) fn given(&self, files: &IssuedFiles, name: &CertificateName) -> Option<Bytes> {
        self.read(&certificate(files, name))
    }

    /// The certificate in that.
    pub(super) fn opened(&self, files: &IssuedFiles, name: &CertificateName, sealed: &[u8]) -> Option<Identity> {
        let pem = self.sealing.open(&certificate(files, name), sealed)?;
        let identity = Identity::of_pem(&pem).ok()?;
        identity.names().iter().any(|other| other == name.as_str()).then_some(identity)
    }

    fn read(&self, about: &str) -> Option<Bytes> {
        let sealed = self.kv.get(&self.store, &self.key(about));
        sealed.inspect_err(|error| tracing::debug!(%error, about, "the place is not told")).ok()?
    }

    async fn write(&self, about: &str, message: &[u8], until: SystemTime) -> Result<(), PlaceError> {
        let sealed = self.sealing.seal(about, message)?.into();
        self.kv.set_until(&self.store, &self.key(about), sealed, Some(ms(until))).await?;
        Ok(())
    }

    /// Waits until every peer that there is a link to has what this node wrote, and not for long.
    async fn heard(&self) {
        let start = Instant::now();
        let waits = || self.kv.status().iter().any(|peer| peer.connected && peer.lag != Some(0));
        while waits() && start.elapsed() < HEARD_MAX {
            sleep(HEARD_LOOK).await;
        }
    }
}

fn challenge(host: &str, token: Option<&str>) -> String {
    match token {
        Some(token) => format!("http/{host}/{token}"),
        None => format!("tls/{host}"),
    }
}

/// Each authority has its own: certificates of a trial are not shown when the real one is named.
fn certificate(files: &IssuedFiles, name: &CertificateName) -> String {
    let authority = files.directory().file_name().unwrap_or_default().to_string_lossy();
    format!("certificate/{authority}/{name}")
}

fn ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
