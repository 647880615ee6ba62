//! What nodes tell each few seconds: passed on to the other control planes as it comes, and not kept. Each of them so knows
//! how the whole fleet does, whomever a node talks to. What is lost on the way comes with the next: a status has its digest,
//! and who knows another one asks for all of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use selvage_config::join::Authorities;
use selvage_config::plan::ReleaseLoad;
use selvage_config::{Digest, NodeName};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::{Journal, chance};
use crate::state::NodeRecord;
use crate::{Parts, disk};

/// Pause before it is tried anew to hear.
const PAUSE: Duration = Duration::from_millis(500);

/// What a node told one control plane, as the others hear it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) node: NodeName,
    /// Of its record, so that who knows it already need not be told.
    pub(crate) digest: Digest,
    /// All of it, where it is news.
    pub(crate) record: Option<NodeRecord>,
    pub(crate) load: Vec<ReleaseLoad>,
    /// Which authorities the node knows, as it writes them.
    #[serde(default)]
    pub(crate) authorities: Option<String>,
    /// Who passes it on.
    #[serde(default)]
    from: String,
}

impl Told {
    pub(crate) fn new(
        record: &NodeRecord,
        load: Vec<ReleaseLoad>,
        is_news: bool,
        believed: Option<Authorities>,
    ) -> Self {
        let node = record.status.node.clone();
        let digest = Self::digest_of(record);
        let authorities = believed.map(|authorities| authorities.to_string());
        Self { node, digest, record: is_news.then(|| record.clone()), load, authorities, from: String::new() }
    }

    pub(crate) fn digest_of(record: &NodeRecord) -> Digest {
        Digest::of(&serde_json::to_vec(record).expect("a record has only string keys"))
    }
}

impl Journal {
    /// Passes on what a node told. Where there is no way to the others it is dropped: it is told again.
    pub(crate) fn pass_on(self: &Arc<Self>, told: &Told) {
        if self.check().is_err() {
            return;
        }
        let written = |told: &Told| {
            let told = Told { from: self.run.clone(), ..told.clone() };
            Bytes::from(serde_json::to_vec(&told).expect("it has only string keys"))
        };
        let mut bytes = written(told);
        if bytes.len() + super::HEAD_BYTES > self.client.max_payload() {
            // Too much for a message: that the node lives and how its releases do is what rollouts need.
            bytes = written(&Told { record: None, ..told.clone() });
        }
        let client = self.client.clone();
        let subject = self.subject("told");
        // The client's queue is bounded, and waiting for it is nobody's business here.
        self.runtime.spawn(async move {
            let _ = client.publish(subject, bytes).await;
        });
    }
}

/// Hears what nodes tell other control planes, for as long as the program runs.
pub(crate) async fn hear(journal: Arc<Journal>, parts: Arc<Parts>) {
    loop {
        let told = journal.client.subscribe(journal.subject("told")).await;
        let asked = journal.client.subscribe(journal.subject("ask")).await;
        let (Ok(mut told), Ok(mut asked)) = (told, asked) else {
            sleep(PAUSE.mul_f64(0.5 + chance())).await;
            continue;
        };
        loop {
            // Each only waits, and takes nothing before it returns.
            tokio::select! {
                message = told.next() => {
                    let Some(message) = message else { break };
                    take(&journal, &parts, &message.payload).await;
                }
                message = asked.next() => {
                    let Some(message) = message else { break };
                    let node = std::str::from_utf8(&message.payload).ok().and_then(|text| text.parse::<NodeName>().ok());
                    if let Some(told) = node.and_then(|node| parts.fleet.told(&node)) {
                        journal.pass_on(&told);
                    }
                }
            }
        }
        sleep(PAUSE).await;
    }
}

async fn take(journal: &Arc<Journal>, parts: &Arc<Parts>, payload: &[u8]) {
    let Ok(told) = serde_json::from_slice::<Told>(payload) else {
        return tracing::warn!("what another control plane passed on can't be read");
    };
    if told.from == journal.run {
        return;
    }
    let node = told.node.clone();
    let at = Arc::clone(parts);
    match disk::wait(move || at.fleet.hear(told)).await {
        Ok(true) => {}
        Ok(false) => {
            let ask = journal.client.publish(journal.subject("ask"), node.to_string().into());
            if let Err(error) = ask.await {
                tracing::debug!(%error, "could not ask for what a node told");
            }
        }
        Err(error) => tracing::error!(%error, %node, "what a node told another control plane was not taken"),
    }
    parts.moves.notify_one();
}
