//! What a node gives its peers: the blobs of releases that lie on its disk, and which of them may be signatures.
//!
//! All of it is what plans named, to all nodes alike; no value of a variable and no secret is among it. Only peers of the
//! newest plan are answered, so a node that was revoked gets nothing.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT_RANGES, CONTENT_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use selvage_config::plan::Plan;
use selvage_config::{Digest, NodeName};
use tokio::sync::{Semaphore, watch};

use super::{Answer, json, plain, refuse};
use crate::release::neighbours::{BLOBS_PATH, SIGNATURES_PATH};
use crate::release::origin::chain;
use crate::release::state::State;

/// Blobs that are read and sent at once; each is in memory while it is.
const BLOBS_AT_ONCE: usize = 8;

/// What a node gives its peers.
#[derive(Clone)]
pub struct Shelf {
    state: State,
    plans: watch::Receiver<Option<Arc<Plan>>>,
    places: Arc<Semaphore>,
}

impl Shelf {
    /// What lies in `state`, for the peers of the plans that come.
    pub fn new(state: State, plans: watch::Receiver<Option<Arc<Plan>>>) -> Self {
        Self { state, plans, places: Arc::new(Semaphore::new(BLOBS_AT_ONCE)) }
    }

    fn is_peer(&self, node: &NodeName) -> bool {
        self.plans.borrow().as_ref().is_some_and(|plan| plan.peers.iter().any(|peer| peer.node == *node))
    }

    /// Answers a peer.
    pub(super) async fn answer(&self, node: &NodeName, request: &Request<Incoming>) -> Answer {
        if !self.is_peer(node) {
            return refuse(StatusCode::FORBIDDEN, "not allowed", "the newest plan names no such peer");
        }
        let path = request.uri().path();
        let blob = path.strip_prefix(BLOBS_PATH).and_then(|text| text.parse::<Digest>().ok());
        let signed = path.strip_prefix(SIGNATURES_PATH).and_then(|text| text.parse::<Digest>().ok());
        match (request.method(), blob, signed) {
            (&Method::GET, Some(digest), _) => self.blob(digest, request.headers()).await,
            (&Method::GET, _, Some(manifest)) => self.signatures(manifest).await,
            (_, None, None) => {
                refuse(StatusCode::FORBIDDEN, "not allowed", "a peer may ask for blobs and signatures, by digest")
            }
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "use GET"),
        }
    }

    async fn blob(&self, digest: Digest, headers: &HeaderMap) -> Answer {
        let Ok(_place) = self.places.try_acquire() else {
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "busy", "ask another node, or the control plane");
        };
        let state = self.state.clone();
        let read = tokio::task::spawn_blocking(move || state.blob(digest)).await;
        let bytes = match read {
            Ok(Ok(Some(bytes))) => bytes,
            Ok(Ok(None)) => return refuse(StatusCode::NOT_FOUND, "no such blob", "ask the control plane"),
            Ok(Err(error)) => {
                tracing::error!(error = chain(&error), "blob for a peer");
                return refuse(StatusCode::INTERNAL_SERVER_ERROR, "the disk failed", "see the node's log");
            }
            Err(_) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, "reading ended early", "see the node's log"),
        };
        part(bytes, headers.get(RANGE))
    }

    async fn signatures(&self, manifest: Digest) -> Answer {
        let state = self.state.clone();
        match tokio::task::spawn_blocking(move || state.signatures(manifest)).await {
            Ok(Ok(list)) if !list.is_empty() => json(StatusCode::OK, &list),
            _ => refuse(StatusCode::NOT_FOUND, "no signature of it here", "ask the control plane"),
        }
    }
}

/// The bytes from where a range begins (RFC 9110 14.2: a range that is not understood is none).
fn part(bytes: Bytes, range: Option<&HeaderValue>) -> Answer {
    let octets = HeaderValue::from_static("application/octet-stream");
    let from =
        range.and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let length = bytes.len();
    let mut answer = match from {
        None => plain(StatusCode::OK, octets, bytes),
        Some(from) if from < length => plain(StatusCode::PARTIAL_CONTENT, octets, bytes.slice(from..)),
        Some(_) => refuse(StatusCode::RANGE_NOT_SATISFIABLE, "the blob ends before", "ask for all of it"),
    };
    let range = match (answer.status(), from) {
        (StatusCode::PARTIAL_CONTENT, Some(from)) => format!("bytes {from}-{}/{length}", length - 1),
        (StatusCode::RANGE_NOT_SATISFIABLE, _) => format!("bytes */{length}"),
        _ => String::new(),
    };
    if let Ok(range) = HeaderValue::try_from(range)
        && !range.is_empty()
    {
        answer.headers_mut().insert(CONTENT_RANGE, range);
    }
    answer.headers_mut().insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    answer
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn a_blob_is_told_from_where_a_range_begins() {
        for (range, status, want, told) in [
            (None, 200, "0123456789", None),
            (Some("bytes=4-"), 206, "456789", Some("bytes 4-9/10")),
            (Some("bytes=0-"), 206, "0123456789", Some("bytes 0-9/10")),
            (Some("bytes=9-"), 206, "9", Some("bytes 9-9/10")),
            // Not understood, so all of it.
            (Some("bytes=1-3"), 200, "0123456789", None),
            (Some("bytes=-3"), 200, "0123456789", None),
            (Some("lines=1-"), 200, "0123456789", None),
        ] {
            let range = range.map(HeaderValue::from_static);
            let answer = part(Bytes::from_static(b"0123456789"), range.as_ref());
            assert_eq!(answer.status(), status, "{range:?}");
            assert_eq!(answer.headers().get(CONTENT_RANGE).map(|told| told.to_str().unwrap()), told);
            assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), want);
        }
        let beyond = part(Bytes::from_static(b"0123456789"), Some(&HeaderValue::from_static("bytes=10-")));
        assert_eq!(beyond.status(), 416);
        assert_eq!(beyond.headers()[CONTENT_RANGE], "bytes */10");
    }
}
