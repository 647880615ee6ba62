//! Tokens by which clients that come back to QUIC show that their address is theirs (RFC 9000 8.1.3).
//!
//! Early data is taken only of these: nobody shall ask in another's name.

use std::collections::HashSet;
use std::mem::take;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use quinn::{TokenLog, TokenReuseError, ValidationTokenConfig};

/// How long a token is good.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Tokens that a client is given when it has shown its address.
const SENT: u32 = 2;
/// Tokens that came within a lifetime and are remembered. Beyond, they are good for nothing until some are forgotten.
const USED_MAX: usize = 128 * 1024;

/// What of tokens a listener hands out and takes.
pub(super) fn config() -> ValidationTokenConfig {
    let mut config = ValidationTokenConfig::default();
    config.lifetime(LIFETIME).sent(SENT).log(Arc::new(Used::default()));
    config
}

/// Which tokens have come, so that each is good once (RFC 9000 8.1.4).
#[derive(Default)]
struct Used(Mutex<Spans>);

/// Two spans of time, each as long as a token is good: what is older than both is too old to be taken.
#[derive(Default)]
struct Spans {
    since: Option<SystemTime>,
    now: HashSet<u128>,
    before: HashSet<u128>,
}

impl Spans {
    fn note(&mut self, nonce: u128, at: SystemTime, lifetime: Duration) -> Result<(), TokenReuseError> {
        let is_over = |since| at.duration_since(since).is_ok_and(|age| age >= lifetime);
        if self.since.is_none_or(is_over) {
            self.before = take(&mut self.now);
            self.since = Some(at);
        }
        let has_room = self.now.len() + self.before.len() < USED_MAX;
        if has_room && !self.before.contains(&nonce) && self.now.insert(nonce) { Ok(()) } else { Err(TokenReuseError) }
    }
}

impl TokenLog for Used {
    fn check_and_insert(&self, nonce: u128, _: SystemTime, lifetime: Duration) -> Result<(), TokenReuseError> {
        let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spans.note(nonce, SystemTime::now(), lifetime)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once_and_their_number_is_bounded() {
        let (mut spans, start) = (Spans::default(), SystemTime::UNIX_EPOCH + LIFETIME);
        let mut note = |nonce, after: Duration| spans.note(nonce, start + after, LIFETIME).is_ok();
        assert!(note(1, Duration::ZERO));
        assert!(!note(1, Duration::ZERO));
        // In the next span it is still known.
        assert!(note(2, LIFETIME));
        assert!(!note(1, LIFETIME + LIFETIME / 2));
        for nonce in 3..=USED_MAX as u128 {
            assert!(note(nonce, LIFETIME + LIFETIME / 2));
        }
        assert!(!note(0, LIFETIME + LIFETIME / 2), "more than are remembered");
        // What is forgotten is too old for quinn to ask about.
        assert!(note(0, LIFETIME * 3));
    }
}
