//! What is known of one name.

use std::time::SystemTime;

use bytes::Bytes;
use selvage_certs::{Identity, Window};

use super::chance;

/// What is known of one name.
#[derive(Default)]
pub(super) struct Held {
    pub(super) identity: Option<Identity>,
    /// Whether the file names it, and not an app.
    pub(super) is_configured: bool,
    /// Whether something is done for it now.
    pub(super) is_busy: bool,
    /// When another certificate is wanted. None: at once.
    pub(super) renew: Option<SystemTime>,
    /// Nothing is ordered before.
    pub(super) pause: Option<SystemTime>,
    /// When to ask the authority when it wants a renewal. None: never.
    pub(super) look: Option<SystemTime>,
    pub(super) window: Option<Window>,
    pub(super) failures: u32,
    /// What another node of the place gave for it, as it was sealed: it need not be opened again.
    pub(super) seen: Bytes,
}

impl Held {
    /// What is known of a name that has this certificate, or none.
    pub(super) fn of(identity: Option<Identity>) -> Self {
        let renew = identity.as_ref().map(|identity| identity.renew_by_age(chance()));
        let look = identity.as_ref().map(|_| SystemTime::now());
        Self { identity, renew, look, ..Self::default() }
    }

    /// When something is to be done for it next. None: now.
    pub(super) fn next(&self, now: SystemTime) -> Option<SystemTime> {
        let order = self.renew.max(self.pause).unwrap_or(now);
        let look = self.identity.as_ref().and(self.look);
        Some(look.map_or(order, |look| look.min(order))).filter(|next| *next > now)
    }

    pub(super) fn has_ended(&self, now: SystemTime) -> bool {
        self.identity.as_ref().is_none_or(|identity| identity.not_after() <= now)
    }
}
