//! KV for operators: values as they are, keys percent-encoded in the path; and how it stands with the peers.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::header::IF_NONE_MATCH;
use http::{HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use selvage_backend::Stores;
use selvage_config::{AppName, NodeName, PlacementName, Region, StoreLabel, StoreName};
use selvage_sync::store::{LARGE_BYTES_MAX, LIST_MAX, Terms};
use selvage_sync::{Holding, HomeError, Kv, KvError, Listed, Place, PlacementError, PlacementStatus, Token};
use serde::{Deserialize, Serialize};

use super::{Answer, away, json, plain, refuse};
use crate::metrics::Metrics;

/// Bytes of a document that orders something.
const ORDER_BYTES_MAX: usize = 1024;
/// How long a watch waits for a change.
const WATCH_MAX: Duration = Duration::from_secs(25);
/// How long a read waits for what its session has seen.
const SESSION_MAX: Duration = Duration::from_secs(10);
/// What a session has seen: an answer to a write has it, and a read with it shows at least that.
pub(super) const TOKEN: &str = "selvage-kv-token";
/// Keys of a listing that names no limit.
const LIST_DEFAULT: usize = 100;

/// One key of a listing.
#[derive(Debug, Serialize)]
struct Item {
    key: String,
    bytes: usize,
    stamp_ms: u64,
    node: Option<NodeName>,
}

/// A listing.
#[derive(Debug, Serialize)]
pub(super) struct Listing {
    keys: Vec<Item>,
    /// What to ask for next as `after`, if there may be more.
    after: Option<String>,
}

impl Listing {
    /// Of what was found where `limit` were asked for.
    pub(super) fn of(found: Vec<Listed>, limit: usize) -> Self {
        let after = (found.len() == limit).then(|| found.last().map(|last| last.name.clone())).flatten();
        let item =
            |found: Listed| Item { key: found.name, bytes: found.bytes, stamp_ms: found.stamp_ms, node: found.node };
        Self { keys: found.into_iter().map(item).collect(), after }
    }
}

/// What changed.
#[derive(Debug, Serialize)]
struct Changes {
    changes: Vec<ChangedKey>,
    /// What to ask for next as `watch`.
    cursor: u64,
    /// Whether more changed than is known.
    missed: bool,
}

/// A key that changed.
#[derive(Debug, Serialize)]
struct ChangedKey {
    key: String,
    exists: bool,
    bytes: usize,
    stamp_ms: u64,
    node: Option<NodeName>,
}

/// A peer.
#[derive(Debug, Serialize)]
struct Peer {
    /// In which placement. None: in what every node holds.
    placement: Option<PlacementName>,
    node: NodeName,
    region: Region,
    connected: bool,
    queued_bytes: usize,
    lag: Option<u64>,
    heard_ms: Option<u64>,
    ahead_ms: Option<i64>,
    apart_since_ms: Option<u64>,
}

/// Whether the node shall be without its peers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Isolation {
    on: bool,
}

/// What a path below `/kv/` names: an app, a label, and perhaps a key, still encoded.
pub(super) fn place(rest: &str) -> Option<(AppName, StoreLabel, Option<&str>)> {
    let mut parts = rest.splitn(3, '/');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()))
}

/// Answers what follows `/kv/`: `<app>/<label>` or `<app>/<label>/<key>`.
pub(super) async fn answer(stores: &Stores, rest: &str, request: Request<Incoming>) -> Answer {
    let Some((app, label, key)) = place(rest) else {
        return refuse(StatusCode::BAD_REQUEST, "no such store name", "the path is /kv/<app>/<label>/<key>");
    };
    let store = StoreName::of(&app, &label);
    let place = stores.store(store.clone());
    let key = key.filter(|key| !key.is_empty());
    if place.backend().is_some() {
        return away::answer(&place, key, request).await;
    }
    let Some(kv) = stores.mesh().kv() else { return away() };
    let Holding::Here(kv) = &kv.holding(&store) else { return away::answer(&place, key, request).await };
    let Some(key) = key else {
        return match *request.method() {
            Method::GET if request.uri().query().is_some_and(|query| query.contains("watch=")) => {
                watch(kv, &store, request.uri().query().unwrap_or_default()).await
            }
            Method::GET => list(kv.clone(), store, request.uri().query().unwrap_or_default()).await,
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "use GET to list a store"),
        };
    };
    let Some(key) = decode(key, false) else {
        return refuse(StatusCode::BAD_REQUEST, "key is not percent-encoded UTF-8", "encode the key's bytes");
    };
    match *request.method() {
        Method::GET => match (session(kv, &request).await, request.uri().query()) {
            (Err(refusal), _) => *refusal,
            (Ok(()), Some("latest")) => {
                read_answer(kv.latest(&store, &key).await.map(|kept| kept.map(|kept| kept.value)))
            }
            (Ok(()), _) => read_answer(kv.get(&store, &key)),
        },
        Method::PUT => put(kv, &store, &key, request).await,
        Method::DELETE => done(kv.delete(&store, &key).await),
        _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "use GET, PUT or DELETE"),
    }
}

/// The process that came after this one has it.
pub(super) fn away() -> Answer {
    refuse(StatusCode::SERVICE_UNAVAILABLE, "the kv is on its way to another process", "try again")
}

fn read_answer(read: Result<Option<Bytes>, KvError>) -> Answer {
    match read {
        Ok(Some(value)) => plain(StatusCode::OK, HeaderValue::from_static("application/octet-stream"), value),
        Ok(None) => refuse(StatusCode::NOT_FOUND, "no such key", "list the store's keys with GET /kv/<app>/<label>"),
        Err(error) => failed(&error),
    }
}

/// What the session of a request has seen, if it names one.
pub(super) fn token_of(request: &Request<Incoming>) -> Result<Option<Token>, Box<Answer>> {
    let Some(token) = request.headers().get(TOKEN) else { return Ok(None) };
    match token.to_str().ok().and_then(|text| text.parse().ok()) {
        Some(token) => Ok(Some(token)),
        None => Err(Box::new(refuse(StatusCode::BAD_REQUEST, "not a session's token", "send what a write answered"))),
    }
}

/// Waits until this node has what the session of a request has seen, if it names one.
async fn session(kv: &Kv, request: &Request<Incoming>) -> Result<(), Box<Answer>> {
    let Some(token) = token_of(request)? else { return Ok(()) };
    match tokio::time::timeout(SESSION_MAX, kv.wait_for(token)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Box::new(failed(&error))),
        Err(_) => {
            let hint = "ask the node that took the write, or see selvage kv lag";
            Err(Box::new(refuse(StatusCode::SERVICE_UNAVAILABLE, "what the session wrote has not arrived here", hint)))
        }
    }
}

/// Writes a value, which ends after `ttl_ms` if the query says so; with `if-none-match: *` only where there is none.
async fn put(kv: &Kv, store: &StoreName, key: &str, request: Request<Incoming>) -> Answer {
    let ends = match ends(request.uri().query()) {
        Ok(ends) => ends,
        Err(refusal) => return *refusal,
    };
    // RFC 9110 13.1.2: only if there is none yet.
    let if_absent = request.headers().get(IF_NONE_MATCH).is_some_and(|value| value == "*");
    let value = match body(request, LARGE_BYTES_MAX).await {
        Ok(value) => value,
        Err(refusal) => return *refusal,
    };
    let terms = Terms { expires_ms: ends, metadata: Bytes::new() };
    let written = match if_absent {
        true => kv.set_if(store, key, value, terms, None).await.transpose(),
        false => Some(kv.set_on(store, key, value, terms).await),
    };
    let Some(written) = written else {
        return refuse(StatusCode::PRECONDITION_FAILED, "the key exists", "read it, or set it without a condition");
    };
    match written {
        Ok(written) => {
            let mut token = Token::default();
            token.saw(&written.dot);
            let mut answer = done(Ok(()));
            if let Ok(token) = HeaderValue::from_str(&token.to_string()) {
                answer.headers_mut().insert(TOKEN, token);
            }
            answer
        }
        Err(error) => failed(&error),
    }
}

/// When a value ends that is written with this query, milliseconds since the Unix epoch.
pub(super) fn ends(query: Option<&str>) -> Result<Option<u64>, Box<Answer>> {
    let Some(query) = query.filter(|query| !query.is_empty()) else { return Ok(None) };
    match query.strip_prefix("ttl_ms=").and_then(|ttl| ttl.parse::<u64>().ok()).filter(|ttl| *ttl > 0) {
        Some(ttl_ms) => Ok(Some(selvage_sync::store::now_ms().saturating_add(ttl_ms))),
        None => Err(Box::new(refuse(StatusCode::BAD_REQUEST, "query", "it may be ttl_ms=<milliseconds to live>"))),
    }
}

/// A store that has a home.
#[derive(Debug, Serialize)]
struct StoreHome {
    store: StoreName,
    /// None: this node.
    home: Option<NodeName>,
    term: u64,
    /// `here`, `elsewhere`, `coming` (it waits for what the homes before had) or `lost`.
    state: &'static str,
    /// Who has not made way yet; or who lost what it acknowledged.
    waits_for: Vec<NodeName>,
}

/// Answers `/homes`: who decides the writes of stores, as this node knows it.
pub(super) fn homes(kv: &Kv, rest: &str, method: &Method) -> Answer {
    match (method, rest) {
        (&Method::GET, "") => {
            let home = |(store, place): (&StoreName, &Place)| {
                let (home, term, state, waits_for) = match place {
                    Place::Free => return None,
                    Place::Here { term } => (None, *term, "here", Vec::new()),
                    Place::Coming { term, lost: Some(node), .. } => (None, *term, "lost", vec![node.clone()]),
                    Place::Coming { term, waits_for, .. } => (None, *term, "coming", waits_for.clone()),
                    Place::At { home, term } => (Some(home.clone()), *term, "elsewhere", Vec::new()),
                };
                Some(StoreHome { store: store.clone(), home, term, state, waits_for })
            };
            let (all, placed) = (kv.homes(), kv.meshes());
            let placed: Vec<_> = placed.values().map(Kv::homes).collect();
            let homes = all.iter().chain(placed.iter().flat_map(|homes| homes.iter()));
            json(StatusCode::OK, &homes.filter_map(home).collect::<Vec<_>>())
        }
        (_, "") => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "GET /homes"),
        _ => refuse(StatusCode::NOT_FOUND, "no such path", "see /homes"),
    }
}

/// A placement, as this node knows it.
#[derive(Debug, Serialize)]
struct Placed {
    placement: PlacementName,
    regions: BTreeSet<Region>,
    /// Whether this node holds its stores.
    here: bool,
    /// The other nodes that do.
    holders: Vec<NodeName>,
    stores: Vec<PlacedStore>,
}

#[derive(Debug, Serialize)]
struct PlacedStore {
    store: StoreName,
    cache_ms: u64,
    /// Whether it waits here until what every node held is carried over.
    waiting: bool,
}

/// Answers `/placements`: which regions hold which stores, as this node knows it.
pub(super) fn placements(kv: &Kv, rest: &str, method: &Method) -> Answer {
    match (method, rest) {
        (&Method::GET, "") => {
            let placed = |status: PlacementStatus| {
                let PlacementStatus { name, regions, stores, holders, here, waiting } = status;
                let store = |(store, cache_ms)| PlacedStore { waiting: waiting.contains(&store), store, cache_ms };
                Placed { placement: name, regions, here, holders, stores: stores.into_iter().map(store).collect() }
            };
            json(StatusCode::OK, &kv.placements().into_iter().map(placed).collect::<Vec<_>>())
        }
        (_, "") => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "GET /placements"),
        _ => refuse(StatusCode::NOT_FOUND, "no such path", "see /placements"),
    }
}

/// Measures a KV and those of the placements that this node holds.
pub(super) fn measure(kv: &Kv, metrics: &Metrics) {
    let meshes = kv.meshes();
    metrics.kv_placements(meshes.keys().cloned().collect(), kv.placement_counts());
    let placed = meshes.iter().map(|(name, mesh)| (name.as_str(), mesh));
    let mut corrupt = 0;
    for (placement, of) in std::iter::once(("", kv)).chain(placed) {
        of.status().iter().for_each(|peer| metrics.kv_peer(placement, peer));
        metrics.kv_progress(placement, &of.progress());
        if let Ok(stats) = of.stats() {
            metrics.kv_engine(placement, &stats);
            corrupt += stats.corrupt;
        }
    }
    metrics.kv_corrupt(corrupt);
    let (mut homes, mut counts) = ((*kv.homes()).clone(), kv.home_counts());
    for mesh in meshes.values() {
        homes.extend((*mesh.homes()).clone());
        counts = counts.and(mesh.home_counts());
    }
    metrics.kv_homes(&homes, counts);
}

/// Answers what follows `/peers`.
pub(super) async fn peers(kv: &Kv, rest: &str, request: Request<Incoming>) -> Answer {
    match (request.method(), rest) {
        (&Method::GET, "") => {
            let peer = |placement: Option<&PlacementName>, peer: selvage_sync::PeerStatus| Peer {
                placement: placement.cloned(),
                node: peer.node,
                region: peer.region,
                connected: peer.connected,
                queued_bytes: peer.queued_bytes,
                lag: peer.lag,
                heard_ms: peer.heard_ms,
                ahead_ms: peer.ahead_ms,
                apart_since_ms: peer.apart_since_ms,
            };
            let meshes = kv.meshes();
            let placed =
                meshes.iter().flat_map(|(name, mesh)| mesh.status().into_iter().map(move |of| peer(Some(name), of)));
            let all = kv.status().into_iter().map(|of| peer(None, of));
            json(StatusCode::OK, &all.chain(placed).collect::<Vec<_>>())
        }
        (&Method::POST, "/isolation") => {
            let order = match body(request, ORDER_BYTES_MAX).await {
                Ok(bytes) => serde_json::from_slice::<Isolation>(&bytes),
                Err(refusal) => return *refusal,
            };
            match order {
                Ok(order) => {
                    kv.partition(order.on);
                    json(StatusCode::OK, &order)
                }
                Err(_) => refuse(StatusCode::BAD_REQUEST, "not an order", "send {\"on\":true} or {\"on\":false}"),
            }
        }
        (_, "" | "/isolation") => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "GET /peers, POST /peers/isolation"),
        _ => refuse(StatusCode::NOT_FOUND, "no such path", "see /peers and /peers/isolation"),
    }
}

async fn list(kv: Kv, store: StoreName, query: &str) -> Answer {
    let Some(asked) = Asked::parse(query) else {
        let hint = "the query may have prefix, after and limit (at most 1000)";
        return refuse(StatusCode::BAD_REQUEST, "query", hint);
    };
    let limit = asked.limit;
    // A listing reads many rows; it must not hold up a thread that serves.
    let listed = tokio::task::spawn_blocking(move || {
        kv.list_entries(&store, &asked.prefix, asked.after.as_deref(), asked.limit)
    });
    match listed.await {
        Ok(Ok(found)) => json(StatusCode::OK, &Listing::of(found, limit)),
        Ok(Err(error)) => failed(&error),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "listing ended early", "see the node's log"),
    }
}

/// Answers as soon as something changed behind the cursor, or with nothing after [`WATCH_MAX`].
async fn watch(kv: &Kv, store: &StoreName, query: &str) -> Answer {
    let Some(asked) = Watch::parse(query) else {
        let hint = "watch=now or watch=<cursor>, and prefix";
        return refuse(StatusCode::BAD_REQUEST, "query", hint);
    };
    let Some(cursor) = asked.cursor else {
        let start = Changes { changes: Vec::new(), cursor: kv.cursor(), missed: false };
        return json(StatusCode::OK, &start);
    };
    match kv.watch(store, &asked.prefix, cursor, WATCH_MAX).await {
        Ok(watched) => {
            let change = |change: selvage_sync::store::Change| ChangedKey {
                key: change.key.name,
                exists: change.exists,
                bytes: change.key.bytes,
                stamp_ms: change.key.stamp_ms,
                node: change.key.node,
            };
            let changes = watched.changes.into_iter().map(change).collect();
            json(StatusCode::OK, &Changes { changes, cursor: watched.cursor, missed: watched.missed })
        }
        Err(error) => failed(&error),
    }
}

/// A watch's query.
#[derive(Debug, PartialEq, Eq)]
struct Watch {
    prefix: String,
    /// None: from now on.
    cursor: Option<u64>,
}

impl Watch {
    fn parse(query: &str) -> Option<Self> {
        let mut watch = Self { prefix: String::new(), cursor: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=')?;
            let value = decode(value, true)?;
            match (name, value.as_str()) {
                ("prefix", _) => watch.prefix = value,
                ("watch", "now") => watch.cursor = None,
                ("watch", cursor) => watch.cursor = Some(cursor.parse().ok()?),
                _ => return None,
            }
        }
        Some(watch)
    }
}

/// A listing's query.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) prefix: String,
    pub(super) after: Option<String>,
    pub(super) limit: usize,
}

impl Asked {
    pub(super) fn parse(query: &str) -> Option<Self> {
        let mut asked = Self { prefix: String::new(), after: None, limit: LIST_DEFAULT };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=')?;
            let value = decode(value, true)?;
            match name {
                "prefix" => asked.prefix = value,
                "after" => asked.after = Some(value),
                "limit" => asked.limit = value.parse().ok().filter(|limit| (1..=LIST_MAX).contains(limit))?,
                _ => return None,
            }
        }
        Some(asked)
    }
}

/// Undoes percent-encoding (RFC 3986 2.1), and `+` for a space in a query. `None` if it is broken or no UTF-8.
pub(super) fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        bytes.push(match first {
            b'%' => {
                let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
                rest = &tail[2..];
                // `from_str_radix` takes a sign.
                let hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
                u8::from_str_radix(digits, 16).ok().filter(|_| hex)?
            }
            b'+' if plus_is_space => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

pub(super) async fn body(request: Request<Incoming>, bytes_max: usize) -> Result<Bytes, Box<Answer>> {
    match Limited::new(request.into_body(), bytes_max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let error = format!("body is larger than {bytes_max} bytes");
            Err(Box::new(refuse(StatusCode::PAYLOAD_TOO_LARGE, &error, "send less")))
        }
        Err(_) => Err(Box::new(refuse(StatusCode::BAD_REQUEST, "body ended early", "send all of it"))),
    }
}

fn done(result: Result<(), KvError>) -> Answer {
    match result {
        Ok(()) => plain(StatusCode::NO_CONTENT, HeaderValue::from_static("application/octet-stream"), Bytes::new()),
        Err(error) => failed(&error),
    }
}

pub(super) fn failed(error: &KvError) -> Answer {
    let (status, hint) = match error {
        KvError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "use a shorter key or value"),
        KvError::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "try again"),
        KvError::ClockUnsafe { .. } => (StatusCode::SERVICE_UNAVAILABLE, "set this node's clock right"),
        KvError::Crowded { .. } => (StatusCode::CONFLICT, "set or delete the key"),
        KvError::Closed => (StatusCode::SERVICE_UNAVAILABLE, "the node is shutting down"),
        KvError::Corrupt { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "set or delete the key"),
        KvError::Hidden => (StatusCode::BAD_REQUEST, "use another key"),
        KvError::Incomplete { .. } => (StatusCode::SERVICE_UNAVAILABLE, "try again: the rest is on its way"),
        KvError::Changed { .. } => (StatusCode::CONFLICT, "read it again"),
        KvError::NotCounter { .. } => (StatusCode::CONFLICT, "delete the key first"),
        KvError::Quota { .. } => (StatusCode::INSUFFICIENT_STORAGE, "delete keys, or raise the quota in node.toml"),
        KvError::Home(HomeError::Refused { .. }) => (StatusCode::CONFLICT, "it is the home that refuses"),
        KvError::Home(HomeError::Unknown { .. }) => (StatusCode::GATEWAY_TIMEOUT, "read it again before you repeat it"),
        KvError::Home(_) => {
            (StatusCode::SERVICE_UNAVAILABLE, "see selvage kv homes, and selvage kv lag for the link to it")
        }
        KvError::Placement(PlacementError::Refused { .. }) => {
            (StatusCode::CONFLICT, "it is a node that holds it that refuses")
        }
        KvError::Placement(PlacementError::Unknown { .. }) => {
            (StatusCode::GATEWAY_TIMEOUT, "read it again before you repeat it")
        }
        KvError::Placement(_) => {
            (StatusCode::SERVICE_UNAVAILABLE, "see selvage kv placements, and selvage kv lag for the links")
        }
        KvError::Full(_) => (StatusCode::INSUFFICIENT_STORAGE, "make room on the node's disk"),
        KvError::Engine(_) => (StatusCode::INTERNAL_SERVER_ERROR, "see the node's log"),
    };
    if let KvError::Engine(source) = error {
        tracing::error!(error = %source, "KV for the admin listener");
    }
    refuse(status, &error.to_string(), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_undone_or_refused() {
        for (text, want) in [
            ("a%2Fb", Some("a/b")),
            ("%C3%A4", Some("ä")),
            ("a+b", Some("a+b")),
            ("%25", Some("%")),
            ("", Some("")),
            ("%", None),
            ("%2", None),
            ("%zz", None),
            ("%+1", None),
            ("%ff", None),
            ("%ä", None),
        ] {
            assert_eq!(decode(text, false).as_deref(), want, "{text}");
        }
        assert_eq!(decode("a+b", true).as_deref(), Some("a b"));
    }

    #[test]
    fn a_query_asks_for_what_it_names() {
        let asked = Asked::parse("prefix=a%2F&after=a%2Fb&limit=7").unwrap();
        assert_eq!(asked, Asked { prefix: "a/".into(), after: Some("a/b".into()), limit: 7 });
        assert_eq!(Asked::parse("").unwrap().limit, LIST_DEFAULT);
        for bad in ["limit=0", "limit=1001", "limit=x", "surprise=1", "prefix", "prefix=%zz"] {
            assert_eq!(Asked::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_watch_begins_now_or_at_its_cursor() {
        assert_eq!(Watch::parse("watch=now&prefix=a%2F").unwrap(), Watch { prefix: "a/".into(), cursor: None });
        assert_eq!(Watch::parse("watch=7").unwrap().cursor, Some(7));
        for bad in ["watch=-1", "watch=", "watch=then", "watch=1&limit=2"] {
            assert_eq!(Watch::parse(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = decode(&text, true);
            let _ = Asked::parse(&text);
            let _ = Watch::parse(&text);
        }
    }
}
