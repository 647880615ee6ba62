//! What a component may use for one request. Each excess is one named outcome.

use serde::{Deserialize, Serialize};

/// Bytes in one mebibyte.
const MIB: u64 = 1024 * 1024;

/// Limits of one component, for one request unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// CPU time in the guest, milliseconds. Default 1,000.
    pub cpu_ms: u64,
    /// Time from the first byte of the request to the last byte of the answer, milliseconds. Default 30,000.
    pub wall_ms: u64,
    /// Sum of all linear memories of one instance, bytes. Default 128 MiB.
    pub memory_bytes: u64,
    /// Request body, bytes; more is 413. Default 10 MiB.
    pub request_body_bytes: u64,
    /// What one request may write to stdout and stderr, bytes; the rest is dropped and counted. Default 64 KiB.
    pub log_bytes: u64,
    /// Outgoing requests. Default 32.
    pub outbound_requests: u32,
    /// Requests of this component at once on one node; more wait or are shed. Default 64.
    pub concurrent_requests: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_ms: 1_000,
            wall_ms: 30_000,
            memory_bytes: 128 * MIB,
            request_body_bytes: 10 * MIB,
            log_bytes: 64 * 1024,
            outbound_requests: 32,
            concurrent_requests: 64,
        }
    }
}

impl Limits {
    /// These limits, none above `cap`: a node's own word beats an app's.
    #[must_use]
    pub fn capped(&self, cap: &Self) -> Self {
        Self {
            cpu_ms: self.cpu_ms.min(cap.cpu_ms),
            wall_ms: self.wall_ms.min(cap.wall_ms),
            memory_bytes: self.memory_bytes.min(cap.memory_bytes),
            request_body_bytes: self.request_body_bytes.min(cap.request_body_bytes),
            log_bytes: self.log_bytes.min(cap.log_bytes),
            outbound_requests: self.outbound_requests.min(cap.outbound_requests),
            concurrent_requests: self.concurrent_requests.min(cap.concurrent_requests),
        }
    }

    /// The most that a node allows unless its operator says otherwise.
    pub fn node_cap() -> Self {
        Self {
            cpu_ms: 30_000,
            wall_ms: 300_000,
            memory_bytes: 1024 * MIB,
            request_body_bytes: 512 * MIB,
            log_bytes: 16 * MIB,
            outbound_requests: 1_000,
            concurrent_requests: 1_024,
        }
    }

    /// The name of the first limit that is zero: such an app could answer nothing.
    pub fn zero(&self) -> Option<&'static str> {
        let all = [
            ("cpu_ms", self.cpu_ms),
            ("wall_ms", self.wall_ms),
            ("memory_bytes", self.memory_bytes),
            ("concurrent_requests", u64::from(self.concurrent_requests)),
        ];
        all.into_iter().find(|(_, value)| *value == 0).map(|(name, _)| name)
    }
}
