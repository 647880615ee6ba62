//! What the node counts. This file and the one below it are the only ones that name a metric.

mod kv;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use selvage_config::PlacementName;

use crate::fault::Fault;
use crate::request::Protocol;

/// Upper edges of the request-time histogram, seconds.
const SECONDS: [f64; 12] = [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// The label `app` of a request that no app was found for.
pub const NO_APP: &str = "";
/// The labels `fault` and `outcome` of a request that ended well.
const WELL: (&str, &str) = ("", "ok");

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The fault's class, empty if there was none.
    pub fault: &'static str,
    /// The outcome's name.
    pub outcome: &'static str,
}

impl Outcome {
    /// The whole answer went out.
    pub const OK: Self = Self { fault: WELL.0, outcome: WELL.1 };
    /// The client went away before the end of the answer.
    pub const ABORTED: Self = Self { fault: "client", outcome: "aborted" };
    /// The client's connection or framing failed while its body was read.
    pub const TRANSPORT: Self = Self { fault: "client", outcome: "transport" };
}

impl From<&Fault> for Outcome {
    fn from(fault: &Fault) -> Self {
        Self { fault: fault.class(), outcome: fault.outcome() }
    }
}

/// All metrics of a node. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
    under_way: IntGauge,
    connections: IntGaugeVec,
    turned_away: IntCounterVec,
    handshakes: IntCounterVec,
    certificates: [(&'static str, IntGaugeVec); 2],
    acme_orders: IntCounterVec,
    log_dropped: IntCounterVec,
    in_line: IntCounterVec,
    below_http: IntCounterVec,
    refused: IntCounterVec,
    plans_refused: IntCounterVec,
    snapshot: IntGaugeVec,
    kv_lag: IntGaugeVec,
    kv_apart: IntGaugeVec,
    kv_connected: IntGaugeVec,
    kv_replication: IntGaugeVec,
    kv_homes: IntGaugeVec,
    kv_carried: IntCounter,
    early: IntCounterVec,
    kv_placements: IntGaugeVec,
    kv_placements_held: Arc<Mutex<BTreeSet<PlacementName>>>,
    kv_held: IntGaugeVec,
    kv_corrupt: IntGauge,
    kv_backends: Backends,
}

/// What is told of the backends of the KV.
#[derive(Debug, Clone)]
struct Backends {
    state: IntGaugeVec,
    requests: IntCounterVec,
    busy: IntCounterVec,
}

/// One more while it lives, one less after.
#[derive(Debug)]
#[must_use = "the gauge goes down as soon as this is dropped"]
pub struct Counted {
    gauge: IntGauge,
}

impl Counted {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self { gauge }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// What is counted of the requests of one app that end well, for each protocol: to look it up by its labels would cost
/// each request more than to count it.
#[derive(Debug)]
pub(crate) struct AppCounters {
    /// By [`Protocol`].
    each: [(IntCounter, Histogram); 3],
}

impl AppCounters {
    /// A request ended well.
    pub(crate) fn request_ended_well(&self, protocol: Protocol, seconds: f64) {
        let (requests, times) = &self.each[protocol as usize];
        requests.inc();
        times.observe(seconds);
    }
}

/// What guests of one app write more than their logs take. Clones count together.
#[derive(Debug, Clone)]
pub struct LogDropped {
    bytes: IntCounter,
}

impl LogDropped {
    /// So many bytes were dropped.
    pub(crate) fn count(&self, bytes: u64) {
        self.bytes.inc_by(bytes);
    }
}

/// A metric's definition is a constant of this file: a name or label that prometheus refuses is found by any test.
const FIXED: &str = "names, labels and buckets are constants that prometheus takes";

fn counter(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let metric = IntCounterVec::new(Opts::new(name, help), labels).expect(FIXED);
    registry.register(Box::new(metric.clone())).expect(FIXED);
    metric
}

fn gauge(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let metric = IntGaugeVec::new(Opts::new(name, help), labels).expect(FIXED);
    registry.register(Box::new(metric.clone())).expect(FIXED);
    metric
}

/// What the count of requests in early data says of itself.
const EARLY: &str = "Requests in early data (0-RTT), answered at once or after the handshake.";
/// What the count of such reads says of itself.
const CORRUPT_READS: &str = "Reads that met a damaged KV row, since the start.";

fn seconds_of(registry: &Registry) -> HistogramVec {
    let options = HistogramOpts::new("selvage_request_seconds", "Time from a request's head to its answer's end.")
        .buckets(SECONDS.to_vec());
    let metric = HistogramVec::new(options, &["app", "protocol"]).expect(FIXED);
    registry.register(Box::new(metric.clone())).expect(FIXED);
    metric
}

fn number(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let metric = IntGauge::new(name, help).expect(FIXED);
    registry.register(Box::new(metric.clone())).expect(FIXED);
    metric
}

impl Backends {
    fn new(registry: &Registry) -> Self {
        Self {
            state: gauge(
                registry,
                "selvage_kv_backend_state",
                "Whether there is a connection to a backend of the KV (connected), and requests under way there.",
                &["backend", "what"],
            ),
            requests: counter(
                registry,
                "selvage_kv_backend_requests_total",
                "Requests to a backend of the KV, by how they ended.",
                &["backend", "outcome"],
            ),
            busy: counter(
                registry,
                "selvage_kv_backend_busy_microseconds_total",
                "What requests to a backend of the KV took, all together.",
                &["backend"],
            ),
        }
    }
}

/// Where certificates of the front come from.
const CERTIFICATE_SOURCES: [&str; 2] = ["file", "acme"];

fn certificates_of(registry: &Registry, source: &str) -> IntGaugeVec {
    let name = "selvage_certificate_not_after_seconds";
    let options =
        Opts::new(name, "When a certificate of the front ends, seconds since 1970.").const_label("source", source);
    let metric = IntGaugeVec::new(options, &["name"]).expect(FIXED);
    registry.register(Box::new(metric.clone())).expect(FIXED);
    metric
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics that have counted nothing.
    pub fn new() -> Self {
        let registry = Registry::new();
        Self {
            requests: counter(
                &registry,
                "selvage_requests_total",
                "Requests that ended, by how.",
                &["app", "protocol", "fault", "outcome"],
            ),
            seconds: seconds_of(&registry),
            under_way: number(&registry, "selvage_requests_under_way", "Requests under way."),
            connections: gauge(&registry, "selvage_connections", "Open connections.", &["protocol"]),
            turned_away: counter(
                &registry,
                "selvage_connections_refused_total",
                "Connections that were not taken, by the bound that was met.",
                &["bound"],
            ),
            handshakes: counter(
                &registry,
                "selvage_tls_handshakes_total",
                "TLS handshakes over TCP, by how they ended: full, resumed, failed.",
                &["kind"],
            ),
            certificates: CERTIFICATE_SOURCES.map(|source| (source, certificates_of(&registry, source))),
            acme_orders: counter(
                &registry,
                "selvage_acme_orders_total",
                "Certificates that the node ordered by itself, by how that ended: issued, or why not.",
                &["name", "outcome"],
            ),
            log_dropped: counter(
                &registry,
                "selvage_guest_log_dropped_bytes_total",
                "Bytes that guests wrote to their log beyond their limit.",
                &["app"],
            ),
            in_line: counter(
                &registry,
                "selvage_requests_in_line_total",
                "Requests that waited for their app's turn: their core was full, and other apps asked for it too.",
                &["app"],
            ),
            below_http: counter(
                &registry,
                "selvage_front_refused_total",
                "Connections and requests refused before there was a request, by the rule that the client broke.",
                &["protocol", "cause"],
            ),
            refused: counter(
                &registry,
                "selvage_releases_refused_total",
                "Releases that this node would not run, by cause.",
                &["cause"],
            ),
            plans_refused: counter(
                &registry,
                "selvage_plans_refused_total",
                "Plans that this node would not take, by cause.",
                &["cause"],
            ),
            snapshot: gauge(
                &registry,
                "selvage_plan_snapshot",
                "The signed plan: its version, when it ends (seconds since 1970), and whether it is past that.",
                &["what"],
            ),
            kv_lag: gauge(
                &registry,
                "selvage_kv_unacknowledged_writes",
                "Writes of this node that a connected peer has not acknowledged.",
                &["peer", kv::PLACEMENT],
            ),
            kv_apart: gauge(
                &registry,
                "selvage_kv_apart_since_seconds",
                "Since when (seconds since 1970) a peer keeps this node from collecting; absent if it does not.",
                &["peer", kv::PLACEMENT],
            ),
            kv_connected: gauge(
                &registry,
                "selvage_kv_connected",
                "Whether there is a link to a peer.",
                &["peer", kv::PLACEMENT],
            ),
            kv_homes: kv::homes(&registry),
            kv_carried: kv::carried(&registry),
            early: counter(&registry, "selvage_early_requests_total", EARLY, &["answered"]),
            kv_placements: kv::placements(&registry),
            kv_placements_held: Arc::default(),
            kv_replication: kv::replication(&registry),
            kv_held: gauge(
                &registry,
                "selvage_kv_held",
                "What the KV holds: records with tombstones, bytes of them, and bytes of the engine on disk.",
                &["of", kv::PLACEMENT],
            ),
            kv_corrupt: number(&registry, "selvage_kv_corrupt_reads", CORRUPT_READS),
            kv_backends: Backends::new(&registry),
            registry,
        }
    }

    /// A request ended.
    pub fn request_ended(&self, app: &str, protocol: Protocol, outcome: Outcome, seconds: f64) {
        let labels = [app, protocol.as_str(), outcome.fault, outcome.outcome];
        self.requests.with_label_values(&labels).inc();
        self.seconds.with_label_values(&labels[..2]).observe(seconds);
    }

    /// What is counted of `app`.
    pub(crate) fn of_app(&self, app: &str) -> AppCounters {
        let each = [Protocol::H1, Protocol::H2, Protocol::H3].map(|protocol| {
            let labels = [app, protocol.as_str(), WELL.0, WELL.1];
            (self.requests.with_label_values(&labels), self.seconds.with_label_values(&labels[..2]))
        });
        AppCounters { each }
    }

    /// A request is under way until the result is dropped.
    pub fn request_under_way(&self) -> Counted {
        Counted::new(self.under_way.clone())
    }

    /// A connection is open until the result is dropped.
    pub fn connection(&self, protocol: Protocol) -> Counted {
        Counted::new(self.connections.with_label_values(&[protocol.as_str()]))
    }

    /// A connection was not taken.
    pub(crate) fn connection_refused(&self, bound: &str) {
        self.turned_away.with_label_values(&[bound]).inc();
    }

    /// A TLS handshake ended: `full`, `resumed` or `failed`.
    pub(crate) fn handshake(&self, kind: &str) {
        self.handshakes.with_label_values(&[kind]).inc();
    }

    /// These are the certificates of the front from `file`s, or those that were got by `acme`: each with the first of its
    /// names and its end.
    pub(crate) fn certificates<'n>(&self, source: &str, all: impl IntoIterator<Item = (&'n str, SystemTime)>) {
        let Some((_, gauge)) = self.certificates.iter().find(|(known, _)| *known == source) else { return };
        gauge.reset();
        for (name, end) in all {
            let seconds = end.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
            gauge.with_label_values(&[name]).set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
    }

    /// The node got a certificate.
    pub(crate) fn acme_issued(&self, name: &str) {
        self.acme_orders.with_label_values(&[name, "issued"]).inc();
    }

    /// Another node of the place got a certificate for this name.
    pub(crate) fn acme_taken(&self, name: &str) {
        self.acme_orders.with_label_values(&[name, "taken"]).inc();
    }

    /// It did not. Without a name it was the account that failed.
    pub(crate) fn acme_failed(&self, name: &str, cause: &str) {
        self.acme_orders.with_label_values(&[name, cause]).inc();
    }

    /// A request of `app` has to wait for its turn on a full core.
    pub(crate) fn request_in_line(&self, app: &str) {
        self.in_line.with_label_values(&[app]).inc();
    }

    /// What guests of `app` write more than their logs take.
    pub fn log_dropped(&self, app: &str) -> LogDropped {
        LogDropped { bytes: self.log_dropped.with_label_values(&[app]) }
    }

    /// A client broke a rule below HTTP's own.
    pub fn refused_below_http(&self, protocol: Protocol, cause: &str) {
        self.below_http.with_label_values(&[protocol.as_str(), cause]).inc();
    }

    /// The node would not run a release; `cause` is the word of the status document.
    pub fn release_refused(&self, cause: &str) {
        self.refused.with_label_values(&[cause]).inc();
    }

    /// The node would not take a plan; `cause` is the word of the status document.
    pub fn plan_refused(&self, cause: &str) {
        self.plans_refused.with_label_values(&[cause]).inc();
    }

    /// How fresh the signed plan is.
    pub fn snapshot(&self, version: u64, expires_s: u64, expired: bool) {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.snapshot.with_label_values(&["version"]).set(number(version));
        self.snapshot.with_label_values(&["expires_seconds"]).set(number(expires_s));
        self.snapshot.with_label_values(&["expired"]).set(expired.into());
    }

    /// A request in early data.
    pub fn early(&self, at_once: bool) {
        let answered = if at_once { "at-once" } else { "after-handshake" };
        self.early.with_label_values(&[answered]).inc();
    }

    /// All metrics in prometheus' text exposition format.
    pub fn text(&self) -> String {
        // The encoder fails only for a family without a metric, and `gather` returns none.
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::ClientFault;

    #[test]
    fn a_request_is_counted_by_how_it_ended() {
        let metrics = Metrics::new();
        metrics.request_ended("hello", Protocol::H2, Outcome::OK, 0.002);
        let not_found = Outcome::from(&Fault::Client(ClientFault::NotFound));
        metrics.request_ended(NO_APP, Protocol::H1, not_found, 0.001);
        let text = metrics.text();
        for line in [
            r#"selvage_requests_total{app="hello",fault="",outcome="ok",protocol="h2"} 1"#,
            r#"selvage_requests_total{app="",fault="client",outcome="not-found",protocol="h1"} 1"#,
            r#"selvage_request_seconds_count{app="hello",protocol="h2"} 1"#,
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[test]
    fn what_is_open_is_counted_while_it_lives() {
        let metrics = Metrics::new();
        let connection = metrics.connection(Protocol::H3);
        let request = metrics.request_under_way();
        assert!(metrics.text().contains(r#"selvage_connections{protocol="h3"} 1"#));
        assert!(metrics.text().contains("selvage_requests_under_way 1"));
        drop((connection, request));
        assert!(metrics.text().contains(r#"selvage_connections{protocol="h3"} 0"#));
        assert!(metrics.text().contains("selvage_requests_under_way 0"));
    }

    #[test]
    fn drops_refusals_and_lag_have_their_labels() {
        let metrics = Metrics::new();
        metrics.log_dropped("hello").count(7);
        metrics.release_refused("unsigned");
        let status = |node: &str, lag: Option<u64>| selvage_sync::PeerStatus {
            node: node.parse().unwrap(),
            region: "iad".parse().unwrap(),
            connected: lag.is_some(),
            queued_bytes: 0,
            lag,
            heard_ms: None,
            ahead_ms: None,
            apart_since_ms: lag.map(|_| 7_000),
        };
        metrics.kv_peer("", &status("iad-1", Some(40)));
        metrics.kv_peer("", &status("sin-1", Some(1)));
        metrics.kv_peer("", &status("sin-1", None));
        metrics.kv_placements(["eu".parse().unwrap()].into(), selvage_sync::PlacementCounts::default());
        assert!(!metrics.text().contains("selvage_kv_connected{"), "what was told of others is forgotten");
        metrics.kv_peer("", &status("iad-1", Some(40)));
        metrics.kv_peer("", &status("sin-1", None));
        metrics.kv_peer("eu", &status("iad-1", Some(2)));
        let mut stats = selvage_sync::engine::Stats { corrupt: 3, ..Default::default() };
        stats.records.rows = 9;
        metrics.kv_engine("", &stats);
        metrics.kv_corrupt(stats.corrupt);
        let text = metrics.text();
        assert!(text.contains(r#"selvage_kv_held{of="records",placement=""} 9"#));
        assert!(text.contains("selvage_kv_corrupt_reads 3"));
        assert!(text.contains(r#"selvage_guest_log_dropped_bytes_total{app="hello"} 7"#));
        assert!(text.contains(r#"selvage_releases_refused_total{cause="unsigned"} 1"#));
        assert!(text.contains(r#"selvage_kv_unacknowledged_writes{peer="iad-1",placement=""} 40"#));
        assert!(text.contains(r#"selvage_kv_unacknowledged_writes{peer="iad-1",placement="eu"} 2"#));
        assert!(!text.contains(r#"selvage_kv_unacknowledged_writes{peer="sin-1"#));
        assert!(text.contains(r#"selvage_kv_connected{peer="sin-1",placement=""} 0"#));
        assert!(text.contains(r#"selvage_kv_apart_since_seconds{peer="iad-1",placement=""} 7"#));
        assert!(!text.contains(r#"selvage_kv_apart_since_seconds{peer="sin-1"#));
    }
}
