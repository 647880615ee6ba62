//! Metrics of the KV: of what every node holds, of placements, of homes and of backends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use prometheus::{IntCounter, IntGaugeVec, Registry};
use selvage_config::{PlacementName, StoreName};
use selvage_sync::{HomeCounts, Place, PlacementCounts};

use super::{FIXED, Metrics, gauge};

pub(super) fn homes(registry: &Registry) -> IntGaugeVec {
    gauge(
        registry,
        "selvage_kv_homes",
        "Stores whose home is here, elsewhere, coming here (it waits for what the homes before had) or lost; and what \
         was asked of homes: carried there, decided here for peers, refused for want of a link or a home, unknown \
         for want of an answer, and writes that came back late.",
        &["what"],
    )
}

/// The label that names a placement. Without a value it is what every node holds.
pub(super) const PLACEMENT: &str = "placement";

pub(super) fn placements(registry: &Registry) -> IntGaugeVec {
    gauge(
        registry,
        "selvage_kv_placements",
        "Placements that this node holds; what it asked nodes that hold others, and answered to nodes that do not: reads \
         answered by what was kept, what was refused for want of a node that is ready, unknown for want of an answer; \
         keys carried over into placements; bytes of what is kept.",
        &["what"],
    )
}

pub(super) fn carried(registry: &Registry) -> IntCounter {
    let help = "Calls of the KV answered for guests of the process before this one.";
    let metric = IntCounter::new("selvage_kv_carried_total", help).expect(FIXED);
    registry.register(Box::new(metric.clone())).expect(FIXED);
    metric
}

pub(super) fn replication(registry: &Registry) -> IntGaugeVec {
    gauge(
        registry,
        "selvage_kv_replication",
        "How replication stands: writes that lost against concurrent ones (conflicts), entries from the future, \
         entries refused for their age (stale) or since nothing proves whose they are (forged), those of past origins \
         taken on a peer's word (hearsay), collected ones, old differences that proofs found (diverged), \
         proofs that found none, the fleet's time ahead of this clock (ahead_ms), and whether all is here.",
        &["what", PLACEMENT],
    )
}

impl Metrics {
    /// How it stands with `peer`: whether there is a link, and how many of our writes it has not acknowledged.
    /// And since when it keeps this node from collecting.
    pub fn kv_peer(&self, placement: &str, status: &selvage_sync::PeerStatus) {
        let peer = [status.node.as_str(), placement];
        self.kv_connected.with_label_values(&peer).set(status.connected.into());
        let optional = [(&self.kv_lag, status.lag), (&self.kv_apart, status.apart_since_ms.map(|ms| ms / 1_000))];
        for (metric, known) in optional {
            match known {
                Some(number) => metric.with_label_values(&peer).set(i64::try_from(number).unwrap_or(i64::MAX)),
                // An old number would look like a known one. It fails only if there is none.
                None => drop(metric.remove_label_values(&peer)),
            }
        }
    }

    /// How replication stands.
    pub fn kv_progress(&self, placement: &str, progress: &selvage_sync::Progress) {
        let selvage_sync::Counts { conflicts, future, stale, forged, hearsay, collected, diverged, proved } =
            progress.counts;
        let counted = [
            ("conflicts", conflicts),
            ("future", future),
            ("stale", stale),
            ("forged", forged),
            ("hearsay", hearsay),
            ("collected", collected),
            ("diverged", diverged),
            ("proved", proved),
            ("caught_up", progress.caught_up.into()),
            ("cut_ms", progress.cut_ms),
            ("floor_ms", progress.floor_ms),
        ];
        for (what, number) in counted {
            self.kv_replication.with_label_values(&[what, placement]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
        self.kv_replication.with_label_values(&["ahead_ms", placement]).set(progress.ahead_ms);
    }

    /// A call of the KV by the process before.
    pub fn kv_carried(&self) {
        self.kv_carried.inc();
    }

    /// How homes of stores stand, and what became of what was asked of them.
    pub fn kv_homes(&self, homes: &BTreeMap<StoreName, Place>, counts: HomeCounts) {
        let of = |is: fn(&Place) -> bool| homes.values().filter(|place| is(place)).count() as u64;
        let HomeCounts { carried, decided, refused, unknown, late } = counts;
        let facts = [
            ("here", of(|place| matches!(place, Place::Here { .. }))),
            ("elsewhere", of(|place| matches!(place, Place::At { .. }))),
            ("coming", of(|place| matches!(place, Place::Coming { lost: None, .. }))),
            ("lost", of(|place| matches!(place, Place::Coming { lost: Some(_), .. }))),
            ("carried", carried),
            ("decided", decided),
            ("refused", refused),
            ("unknown", unknown),
            ("late", late),
        ];
        for (what, number) in facts {
            self.kv_homes.with_label_values(&[what]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }

    /// How placements are used that are held elsewhere, and by others. Of those that are held here no more nothing is told.
    pub fn kv_placements(&self, held: BTreeSet<PlacementName>, counts: PlacementCounts) {
        let mut known = self.kv_placements_held.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != held {
            for metric in [&self.kv_connected, &self.kv_lag, &self.kv_apart, &self.kv_replication, &self.kv_held] {
                metric.reset();
            }
            *known = held;
        }
        let PlacementCounts { asked, answered, cached, refused, unknown, carried, cached_bytes } = counts;
        let facts = [
            ("held", known.len() as u64),
            ("asked", asked),
            ("answered", answered),
            ("cached", cached),
            ("refused", refused),
            ("unknown", unknown),
            ("carried", carried),
            ("cached_bytes", cached_bytes),
        ];
        for (what, number) in facts {
            self.kv_placements.with_label_values(&[what]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }

    /// How the engine of the KV stands, or that of a placement.
    pub fn kv_engine(&self, placement: &str, stats: &selvage_sync::engine::Stats) {
        let held = [("records", stats.records.rows), ("bytes", stats.records.bytes), ("disk_bytes", stats.disk_bytes)];
        for (of, number) in held {
            self.kv_held.with_label_values(&[of, placement]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }

    /// How many reads found damage, in all placements together.
    pub fn kv_corrupt(&self, corrupt: u64) {
        self.kv_corrupt.set(i64::try_from(corrupt).unwrap_or(i64::MAX));
    }

    /// How it stands with a backend of the KV.
    pub fn kv_backend(&self, status: &selvage_backend::BackendStatus) {
        let name = status.name.as_str();
        self.kv_backends.state.with_label_values(&[name, "connected"]).set(status.connected.into());
        let under_way = i64::try_from(status.under_way).unwrap_or(i64::MAX);
        self.kv_backends.state.with_label_values(&[name, "under_way"]).set(under_way);
        // The backend counts by itself: here is told what came since it was last asked.
        let told = |counter: &IntCounter, all: u64| counter.inc_by(all.saturating_sub(counter.get()));
        for (outcome, count) in &status.requests {
            told(&self.kv_backends.requests.with_label_values(&[name, outcome]), *count);
        }
        told(&self.kv_backends.busy.with_label_values(&[name]), status.busy_us);
    }
}
