//! Three servers that keep every change on all of them: the one that leads is killed while changes are made.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::json;

use super::fleet::{Fleet, until};
use super::server::{Server, free_port, is_there};
use super::{number, said};
use crate::world::{Asker, app, json_of};

/// Changes of each kind that each writer makes.
const EACH: usize = 10;

pub(super) struct Cluster {
    servers: Vec<Server>,
}

impl Cluster {
    /// Three servers that know each other. None: there is no program.
    fn start() -> Option<Self> {
        if !is_there("nats-server") {
            return None;
        }
        let ports = [free_port(), free_port(), free_port()];
        let routes: Vec<String> = ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        let routes = routes.join(", ");
        let servers = ports.iter().enumerate().map(|(number, port)| {
            let settings = format!(
                "server_name: n{number}\ncluster {{ name: fleet, listen: \"127.0.0.1:{port}\", routes: [{routes}] }}\n"
            );
            Server::prepared(|_| (settings, String::new()))
        });
        let mut servers: Vec<Server> = servers.collect();
        for server in &mut servers {
            server.resume();
        }
        Some(Self { servers })
    }

    fn config(&self) -> String {
        let servers: Vec<String> =
            self.servers.iter().map(|server| format!("\"nats://127.0.0.1:{}\"", server.port())).collect();
        format!("servers = [{}]\nreplicas = 3\nrequest_ms = 5000\nbaseline_after = 64\n", servers.join(", "))
    }

    async fn client(&self) -> async_nats::Client {
        let servers: Vec<async_nats::ServerAddr> =
            self.servers.iter().map(|server| format!("nats://127.0.0.1:{}", server.port()).parse().unwrap()).collect();
        async_nats::connect(servers).await.unwrap()
    }

    /// Until they have a leader among them, and streams can be made.
    async fn is_ready(&self) {
        let context = async_nats::jetstream::new(self.client().await);
        until("the servers have found each other", async || context.query_account().await.is_ok()).await;
    }

    /// Who leads the journal.
    async fn leader(&self) -> usize {
        let context = async_nats::jetstream::new(self.client().await);
        let stream = context.get_stream("selvage-journal").await.unwrap();
        let leader = stream.cached_info().cluster.as_ref().and_then(|cluster| cluster.leader.clone()).unwrap();
        leader.strip_prefix('n').unwrap().parse().unwrap()
    }
}

/// Asks for changes one after the other, each until it is acknowledged; from the half on when somebody says so.
async fn change(ops: &Asker, who: &str, made: &AtomicUsize, may_go_on: &AtomicBool) {
    for n in 0..EACH {
        if n == EACH / 2 {
            until("the other half may come", async || may_go_on.load(Ordering::SeqCst)).await;
        }
        let version = format!("{who}-{n}");
        until("a change is taken", async || {
            let path = format!("/api/v1/apps/{who}/secrets/x{n}");
            let answer = ops.ask(Method::PUT, &path).json(&json!({ "value": version })).send().await.unwrap();
            let status = answer.status();
            assert!(matches!(status, StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE), "{status}");
            status == StatusCode::OK
        })
        .await;
        // The release of a tag that is current already is no other one, so it may be asked for again.
        until("a release is taken", async || {
            let status = ops.release(who, &version).await.status();
            let is_known = matches!(status, StatusCode::OK | StatusCode::CREATED | StatusCode::SERVICE_UNAVAILABLE);
            assert!(is_known, "{status}");
            status != StatusCode::SERVICE_UNAVAILABLE
        })
        .await;
        made.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_under_writes_and_no_acknowledged_change_is_lost_or_doubled() {
    let Some(mut cluster) = Cluster::start() else { return };
    cluster.is_ready().await;
    let mut fleet = Fleet::with(cluster.config()).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    for who in ["a", "b"] {
        let pushed = (0..EACH).map(|n| format!("{who}-{n}")).chain(["first".to_owned()]);
        for version in pushed {
            a.push_app(&format!("apps/{who}"), &version, &app(who, &version, &[])).await;
        }
        assert_eq!(a.release(who, "first").await.status(), StatusCode::CREATED);
    }
    until("both know the pushes", async || said(&a).await == said(&b).await).await;
    let (made, may_go_on) = (AtomicUsize::new(0), AtomicBool::new(false));
    let killing = async {
        until("half of the changes are made", async || made.load(Ordering::SeqCst) >= EACH).await;
        let leader = cluster.leader().await;
        may_go_on.store(true, Ordering::SeqCst);
        // Somewhere in the changes that come now, or in the first of them: whichever it is, all must be there in the end.
        tokio::time::sleep(Duration::from_millis(60)).await;
        cluster.servers[leader].kill();
        leader
    };
    let (leader, (), ()) =
        tokio::join!(killing, change(&a, "a", &made, &may_go_on), change(&b, "b", &made, &may_go_on));
    // Two of three keep the state, and say the same of it.
    until("both say the same", async || said(&a).await == said(&b).await).await;
    for who in ["a", "b"] {
        let secrets = json_of(b.get(&format!("/api/v1/apps/{who}/secrets")).await, StatusCode::OK).await;
        assert_eq!(secrets.as_array().unwrap().len(), EACH);
        let releases = json_of(a.get(&format!("/api/v1/apps/{who}/releases")).await, StatusCode::OK).await;
        let numbers: Vec<u64> = releases.as_array().unwrap().iter().filter_map(number).collect();
        let different: BTreeSet<u64> = numbers.iter().copied().collect();
        assert_eq!((numbers.len(), different.last().copied()), (EACH + 1, Some(EACH as u64 + 1)), "{releases}");
    }
    // The third comes back, and a control plane that is new takes all of it from them.
    cluster.servers[leader].resume();
    let later = fleet.start("later").await;
    until("the third says the same", async || said(&later).await == said(&a).await).await;
    fleet.stop().await;
}
