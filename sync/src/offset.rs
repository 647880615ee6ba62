//! How far this node's clock is from the others'.
//!
//! Every announcement carries the sender's time and what it last heard from the receiver, so each exchange yields an
//! offset as NTP computes it (RFC 5905 8). Of every peer the sample with the shortest round trip counts. The fleet's
//! time is the median over the peers and this node: one wrong clock, also this one's, moves it little.

use std::collections::{BTreeMap, VecDeque};

use selvage_config::NodeName;

/// Samples kept of a peer. At one in a second or less, a changed clock is noticed within some seconds.
const SAMPLES_MAX: usize = 8;

/// A round trip longer than this says nothing, milliseconds.
const ROUND_MS_MAX: u64 = 2_000;

/// Peers whose clocks must agree that ours is wrong.
const PEERS_MIN: usize = 2;

/// How far the own clock may be from the fleet's before that is told, milliseconds.
pub const OFFSET_MS_WARN: u64 = 250;

/// How far before this node takes no more writes, milliseconds.
pub const OFFSET_MS_MAX: u64 = 500;

/// Times in an announcement, each by its own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ping {
    /// The sender's, when it sent this.
    pub sent_ms: u64,
    /// The receiver's, when it sent what the sender heard last; 0 if it heard nothing.
    pub echo_ms: u64,
    /// How long ago the sender heard that.
    pub held_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    round_ms: u64,
    ahead_ms: i64,
}

/// Offsets of the peers' clocks from this one's.
#[derive(Debug, Default)]
pub(crate) struct Offsets {
    peers: BTreeMap<NodeName, VecDeque<Sample>>,
}

impl Offsets {
    /// Takes a peer's ping in that arrived now.
    pub(crate) fn heard(&mut self, peer: &NodeName, now_ms: u64, ping: Ping) {
        if ping.echo_ms == 0 {
            return;
        }
        let Some(round_ms) = now_ms.checked_sub(ping.echo_ms).and_then(|since| since.checked_sub(ping.held_ms)) else {
            // Our clock went back meanwhile.
            self.forget(peer);
            return;
        };
        if round_ms > ROUND_MS_MAX {
            return;
        }
        let theirs = i64::try_from(ping.sent_ms.saturating_add(round_ms / 2)).unwrap_or(i64::MAX);
        let ahead_ms = theirs.saturating_sub(i64::try_from(now_ms).unwrap_or(i64::MAX));
        let samples = self.peers.entry(peer.clone()).or_default();
        // Samples that a jump made wrong must not outlive it.
        let jumped = samples.back().is_some_and(|last| last.ahead_ms.abs_diff(ahead_ms) > ROUND_MS_MAX);
        if jumped || samples.len() == SAMPLES_MAX {
            let keep = if jumped { 0 } else { SAMPLES_MAX - 1 };
            samples.drain(..samples.len() - keep);
        }
        samples.push_back(Sample { round_ms, ahead_ms });
    }

    /// Forgets a peer: it is gone.
    pub(crate) fn forget(&mut self, peer: &NodeName) {
        self.peers.remove(peer);
    }

    /// How far the peer's clock is ahead of this one's.
    pub(crate) fn of(&self, peer: &NodeName) -> Option<i64> {
        self.peers.get(peer)?.iter().min_by_key(|sample| sample.round_ms).map(|sample| sample.ahead_ms)
    }

    /// How far the fleet's time is ahead of this clock.
    pub(crate) fn fleet(&self) -> i64 {
        let mut ahead: Vec<i64> = self.peers.keys().filter_map(|peer| self.of(peer)).collect();
        if ahead.len() < PEERS_MIN {
            return 0;
        }
        ahead.push(0);
        ahead.sort_unstable();
        let middle = ahead.len() / 2;
        if ahead.len() % 2 == 1 {
            return ahead[middle];
        }
        // Of the two in the middle the one that is nearer to this clock.
        if ahead[middle - 1].unsigned_abs() < ahead[middle].unsigned_abs() { ahead[middle - 1] } else { ahead[middle] }
    }

    /// The fleet's time when this clock shows `now_ms`.
    pub(crate) fn correct(&self, now_ms: u64) -> u64 {
        now_ms.saturating_add_signed(self.fleet())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An exchange with a peer that is `ahead` of us, `delay` each way.
    fn exchange(offsets: &mut Offsets, peer: &str, ahead: i64, delay: u64) {
        let (asked, held) = (100_000_000, 40);
        let answered = (asked + delay + held).saturating_add_signed(ahead);
        let ping = Ping { sent_ms: answered, echo_ms: asked, held_ms: held };
        offsets.heard(&peer.parse().unwrap(), asked + 2 * delay + held, ping);
    }

    #[test]
    fn one_or_two_wrong_peers_do_not_move_the_fleets_time() {
        let mut offsets = Offsets::default();
        exchange(&mut offsets, "b", 5_000, 10);
        assert_eq!(offsets.fleet(), 0);
        exchange(&mut offsets, "c", 3, 10);
        assert_eq!(offsets.fleet(), 3);
        exchange(&mut offsets, "d", -2, 10);
        assert!(offsets.fleet().abs() <= 3);
    }

    #[test]
    fn a_majority_says_that_our_clock_is_wrong() {
        let mut offsets = Offsets::default();
        for peer in ["b", "c"] {
            exchange(&mut offsets, peer, -7_200_000, 80);
        }
        assert_eq!(offsets.fleet(), -7_200_000);
        assert_eq!(offsets.correct(10_000_000), 2_800_000);
    }

    #[test]
    fn the_shortest_round_trip_counts_and_a_jump_begins_anew() {
        let mut offsets = Offsets::default();
        let peer = "b".parse().unwrap();
        exchange(&mut offsets, "b", 10, 5);
        exchange(&mut offsets, "b", 70, 300);
        assert_eq!(offsets.of(&peer), Some(10));
        exchange(&mut offsets, "b", 60_000, 300);
        assert_eq!(offsets.of(&peer), Some(60_000));
    }
}
