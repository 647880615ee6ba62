//! The same components, whatever keeps their stores: the mesh, a Redis server, NATS.

#[path = "../../../../backend/tests/it/server.rs"]
#[allow(dead_code, reason = "the suite of the backends uses all of it")]
pub(crate) mod server;

use selvage_backend::{Backends, Stores};
use selvage_config::node::NodeConfig;

use self::server::{Kind, Server, until};
use super::*;

/// How long an answer is waited for where it must come.
pub(crate) const REQUEST_MS: u64 = 20_000;

/// What keeps the stores of an app: nothing besides the node, or a server.
struct Keeper {
    backends: Option<Backends>,
    server: Option<Server>,
}

impl Keeper {
    /// The mesh, and each server that is installed.
    fn all() -> Vec<Self> {
        let servers = [Kind::Redis, Kind::Nats].into_iter().filter_map(|kind| Some((kind, Server::start(kind)?)));
        let with = |(kind, server): (Kind, Server)| {
            let backends = Backends::open(&kv(kind, server.port(), REQUEST_MS)).unwrap();
            Self { backends: Some(backends), server: Some(server) }
        };
        std::iter::once(Self { backends: None, server: None }).chain(servers.map(with)).collect()
    }

    /// A guest whose stores are there.
    async fn guest(&self, name: &str) -> Active {
        let guest = Guest::new(name).await.with(|grants| {
            grants.stores = vec!["default".parse().unwrap()];
            if let Some(backends) = &self.backends {
                grants.kv = Stores::new(grants.kv.mesh().clone(), backends.clone());
            }
        });
        let stores = guest.grants.kv.clone();
        until("connected", async || stores.status().iter().all(|status| status.connected)).await;
        guest.activate().unwrap()
    }
}

/// What `[kv]` of a node's file says that has all its stores at this server.
pub(crate) fn kv(kind: Kind, port: u16, request_ms: u64) -> selvage_config::node::Kv {
    let backend = match kind {
        Kind::Redis => format!("kind='redis'\nurl='redis://127.0.0.1:{port}'"),
        Kind::Nats => format!("kind='nats'\nservers=['nats://127.0.0.1:{port}']\nreplicas=1"),
    };
    let text = format!(
        "name='a'\nregion='b'\nstate_dir='s'\nlisten={{http='127.0.0.1:0'}}\n\
         [kv]\nbackend='x'\n[kv.backends.x]\nrequest_ms={request_ms}\n{backend}\n"
    );
    NodeConfig::parse(Path::new("/node.toml"), &text).unwrap().kv
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_keeps_and_counts_wherever_its_store_is() {
    for keeper in Keeper::all() {
        // Spin's key-value, and wasi:keyvalue's store and atomics.
        let (one, other) = (keeper.guest("counter").await, keeper.guest("counter").await);
        assert_eq!(one.ask("GET", "/kv/a", "").await.0, 404);
        assert_eq!(one.ask("PUT", "/kv/a", "value").await.0, 204);
        assert_eq!(one.ask("GET", "/kv/a", "").await, (200, "value".into()));
        assert_eq!(one.ask("PUT", "/kv/b", "").await.0, 204);
        assert_eq!(one.ask("GET", "/keys", "").await, (200, r#"["a","b"]"#.into()));
        assert_eq!(one.ask("DELETE", "/kv/a", "").await.0, 204);
        assert_eq!(one.ask("GET", "/kv/a", "").await.0, 404);
        assert_eq!(one.ask("POST", "/count/visits", "").await, (200, "1\n".into()));
        // A backend is one for two nodes, which know nothing of each other.
        let second = if keeper.server.is_some() { "2\n" } else { "1\n" };
        assert_eq!(other.ask("POST", "/count/visits", "").await, (200, second.into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_on_its_terms_wherever_its_store_is() {
    for keeper in Keeper::all() {
        let guest = keeper.guest("session").await;
        let put = async |path: &str, etag: Option<&str>| {
            let mut request = request("PUT", path, full("stitch"));
            request.http.headers_mut().insert("content-type", "text/tailored".parse().unwrap());
            if let Some(etag) = etag {
                request.http.headers_mut().insert("if-match", etag.parse().unwrap());
            }
            let response = guest.call(request).await.unwrap();
            let etag = response.headers().get("etag").map(|etag| etag.to_str().unwrap().to_owned());
            (response.status().as_u16(), etag)
        };
        let (status, etag) = put("/alice?ttl=600000", None).await;
        assert_eq!(status, 201);
        assert_eq!(put("/alice", None).await, (412, None));
        let session = guest.get("/alice").await.unwrap();
        assert_eq!(session.headers()["content-type"].as_bytes(), b"text/tailored");
        assert!(session.headers().contains_key("cache-control"));
        let (status, newer) = put("/alice", etag.as_deref()).await;
        assert!(status == 200 && newer != etag);
        assert_eq!(put("/alice", etag.as_deref()).await, (412, None));
        assert_eq!(put("/alice", Some("\"no version\"")).await.0, 500);
        assert_eq!(guest.ask("GET", "/", "").await, (200, "alice\n".into()));
        for counted in 1..=3 {
            assert_eq!(guest.ask("POST", "/alice?ttl=600000", "").await, (200, format!("{counted}\n")));
        }
        put("/bob?ttl=1", None).await;
        until("it has ended", async || guest.ask("GET", "/bob", "").await.0 == 404).await;
        assert_eq!(guest.ask("DELETE", "/alice", "").await.0, 204);
        assert_eq!(guest.ask("GET", "/", "").await, (200, String::new()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_told_which_backend_is_away_and_nothing_else_of_it() {
    for mut keeper in Keeper::all().into_iter().filter(|keeper| keeper.server.is_some()) {
        let guest = keeper.guest("session").await;
        assert_eq!(guest.ask("GET", "/a", "").await.0, 404);
        keeper.server.as_mut().unwrap().kill();
        let told = async || guest.ask("GET", "/a", "").await;
        until("it is told", async || told().await == (500, "store: Error::Other(\"backend x is away\")\n".into()))
            .await;
        keeper.server.as_mut().unwrap().resume();
        until("it is there again", async || told().await.0 == 404).await;
    }
}
