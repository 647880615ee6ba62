//! Telling the committer what the plan says of homes, and asking for what this node shall become the home of.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use selvage_config::NodeName;
use selvage_config::plan::Home;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};

use crate::commit::{HomeInput, Input};
use crate::home::Claim;
use crate::home::wire::{Answer, Request};
use crate::store::{Kv, Shared};

/// Time between two looks at what is still to be asked, milliseconds.
const LOOK_MS: u64 = 250;

/// How long a node may take to make way, milliseconds.
const CLAIM_MS_MAX: u64 = 2_000;

/// Nodes that are asked at once.
const CLAIMS_MAX: usize = 256;

/// Looks after this node's homes as long as the store is open.
pub(in crate::store) fn start(shared: &Arc<Shared>) -> JoinHandle<()> {
    let planned = shared.told.homes.subscribe();
    let shared = Arc::downgrade(shared);
    tokio::spawn(async move {
        let mut planned = planned;
        let mut told = None;
        let mut turns = tokio::time::interval(Duration::from_millis(LOOK_MS));
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Both wait for one thing and lose nothing if dropped.
            tokio::select! {
                changed = planned.changed() => if changed.is_err() { return },
                _ = turns.tick() => {}
            }
            let Some(shared) = shared.upgrade() else { return };
            let kv = Kv { shared };
            if kv.look_after_homes(&mut planned, &mut told).await.is_none() {
                return;
            }
        }
    })
}

impl Kv {
    /// None once the store is closed.
    async fn look_after_homes(
        &self,
        planned: &mut watch::Receiver<Vec<Home>>,
        told: &mut Option<(Vec<Home>, BTreeSet<NodeName>)>,
    ) -> Option<()> {
        let homes = planned.borrow_and_update().clone();
        if homes.is_empty() {
            return Some(());
        }
        let peers = self.shared.link.as_ref().map(|link| link.peers()).unwrap_or_default();
        let members = peers.into_iter().map(|peer| peer.node).chain([self.shared.node.clone()]).collect();
        let news = (homes, members);
        if told.as_ref() != Some(&news) {
            let (homes, members) = news.clone();
            self.tell_committer(HomeInput::Plan { homes, members }).await?;
            *told = Some(news);
        }
        let (reply, claims) = oneshot::channel();
        self.tell_committer(HomeInput::Claims(reply)).await?;
        let claims = claims.await.ok()?;
        let mut asking = JoinSet::new();
        for (node, claim) in claims.into_iter().take(CLAIMS_MAX) {
            let kv = self.clone();
            asking.spawn(async move { kv.claim(node, claim).await });
        }
        while asking.join_next().await.is_some() {}
        Some(())
    }

    async fn tell_committer(&self, input: HomeInput) -> Option<()> {
        self.shared.inputs.send(Input::Home(input)).await.ok()
    }

    /// Asks one node to make way. Whoever can't be reached is asked again at the next look.
    async fn claim(&self, node: NodeName, claim: Claim) {
        let Some(link) = &self.shared.link else { return };
        let until = Instant::now() + Duration::from_millis(CLAIM_MS_MAX);
        let question = Request::Claim(claim.clone());
        match link.ask(&node, &question, until).await.map(Answer::decode) {
            Ok(Ok(Answer::Claimed(answer))) => {
                self.tell_committer(HomeInput::Claimed { node, claim, answer }).await;
            }
            Ok(_) => tracing::warn!(peer = %node, "an answer to something else"),
            Err(error) => tracing::debug!(peer = %node, store = %claim.store, ?error, "a home waits for it"),
        }
    }
}
