//! How a node lets go of what only one process may have: the files and links of its KV, and the operators' port.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use selvage_backend::{Carrier, Mesh};
use selvage_sync::Kv;
use tokio::net::UnixStream;

use super::handover::Offer;
use crate::admin::Admin;

/// How long an operator's request may take to end.
pub(super) const ADMIN_DRAIN: Duration = Duration::from_secs(1);
/// How long the KV's last handles may take to go once it is closed.
pub(super) const RELEASE_MAX: Duration = Duration::from_secs(1);
/// How often that is looked at.
const RELEASE_LOOK: Duration = Duration::from_millis(5);

/// What is let go of.
pub(super) struct Parting {
    pub(super) mesh: Mesh,
    pub(super) admin: Option<Admin>,
    /// How long calls of the KV that have begun may take to end.
    pub(super) calls: Duration,
}

impl Parting {
    /// Lets go of all of it. Whether it is free; if not, it is when the process ends.
    pub(super) async fn let_go(self) -> bool {
        let kv = self.mesh.leave();
        let admin = async {
            if let Some(admin) = self.admin {
                // Operators may watch the drain to its end.
                admin.drain(Instant::now() + ADMIN_DRAIN).await;
            }
        };
        let calls = async {
            match &kv {
                Some(kv) => is_last(kv, self.calls).await || self.calls.is_zero(),
                None => true,
            }
        };
        let ((), are_done) = tokio::join!(admin, calls);
        let Some(kv) = kv else { return true };
        if !are_done {
            tracing::warn!("calls of the kv are under way still; it is closed");
        }
        kv.close().await;
        let released = is_last(&kv, RELEASE_MAX).await;
        if !released {
            tracing::warn!("what was under way holds the kv's files until the process ends");
        }
        released
    }

    /// Lets go of all of it while what is under way ends, and tells the successor so. From then on it is asked for the KV.
    pub(super) async fn hand_over(self, offer: Offer, ending: impl Future<Output = ()>) {
        let mesh = self.mesh.clone();
        let mut ending = pin!(ending);
        let mut handing = pin!(async {
            let free = self.let_go().await;
            let carrier = offer.let_go(free).and_then(carrier);
            if let Some(carrier) = &carrier {
                mesh.carry(carrier.clone());
            }
            (free, carrier)
        });
        // Both are polled by reference, so neither loses anything here.
        let (is_over, (free, carrier)) = tokio::select! {
            () = &mut ending => (true, handing.await),
            handed = &mut handing => (false, handed),
        };
        if !free {
            // The successor waits for this process's end: what is left is cut off.
            return;
        }
        if !is_over {
            ending.await;
        }
        if let Some((calls, failed)) = carrier.map(|carrier| carrier.counts()).filter(|(calls, _)| *calls > 0) {
            tracing::info!(calls, failed, "calls of the kv were carried to the process that has it now");
        }
    }
}

fn carrier(stream: std::os::unix::net::UnixStream) -> Option<Carrier> {
    let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
    let stream = stream.inspect_err(|error| tracing::warn!(%error, "calls of the kv can't be carried"));
    stream.ok().map(Carrier::over)
}

/// Waits until nobody else has a handle of the KV. Whether it is so in time.
async fn is_last(kv: &Kv, most: Duration) -> bool {
    let alone = async {
        while !kv.is_last_handle() {
            tokio::time::sleep(RELEASE_LOOK).await;
        }
    };
    tokio::time::timeout(most, alone).await.is_ok()
}
