//! What nodes are told to run, and when.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use selvage_config::plan::{News, Plan, Told};
use selvage_config::snapshot::Snapshot;
use serde_json::json;

use crate::freshness::signing;
use crate::world::{Asker, World, app, json_of, status};

async fn plan(asker: &Asker, node: &str, query: &str) -> Plan {
    let answer = asker.get(&format!("/api/v1/plans/{node}?{query}")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    answer.json().await.unwrap()
}

#[tokio::test]
async fn a_poll_wakes_when_a_release_is_made() {
    let world = World::start().await;
    let (ops, node) = (world.ops(), world.node("fra-1"));
    let first = plan(&node, "fra-1", "").await;
    assert_eq!((first.generation, first.releases.len()), (0, 0));
    let manifest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;

    let begun = Instant::now();
    let path = format!("/api/v1/plans/fra-1?after={}&wait_ms=20000", first.generation);
    let (polled, released) = tokio::join!(node.get(&path), ops.release("hello", "v1"));
    assert_eq!(released.status(), StatusCode::CREATED);
    let second: Plan = polled.json().await.unwrap();
    assert_eq!((second.generation, second.releases[0].manifest), (1, manifest));
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn a_poll_ends_with_304_when_nothing_changes() {
    let world = World::start().await;
    let node = world.node("fra-1");
    let answer = node.get("/api/v1/plans/fra-1?after=0&wait_ms=50").await;
    assert_eq!(answer.status(), StatusCode::NOT_MODIFIED);
    assert_eq!(node.get("/api/v1/plans/fra-1?after=99").await.status(), StatusCode::NOT_MODIFIED);
    for bad in ["after=x", "after=-1", "wait_ms=soon"] {
        let answer = node.get(&format!("/api/v1/plans/fra-1?{bad}")).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{bad}");
    }
}

#[tokio::test]
async fn a_poll_ends_when_the_control_plane_stops() {
    let mut world = World::start().await;
    let node = world.node("fra-1");
    // A connection that exists, so that the poll is under way before the stop.
    assert_eq!(node.get("/healthz").await.status(), StatusCode::OK);
    let begun = Instant::now();
    let poll = tokio::spawn(async move { node.get("/api/v1/plans/fra-1?after=0&wait_ms=30000").await.status() });
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.stop().await;
    assert_eq!(poll.await.unwrap(), StatusCode::NOT_MODIFIED);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_node_learns_of_peers_and_the_generation_grows_only_with_change() {
    let world = World::start().await;
    let (one, two) = (world.node("fra-1"), world.node("fra-2"));
    one.tell(&status("fra-1", 0, Some(7001), vec![])).await;
    assert_eq!(plan(&two, "fra-2", "after=0").await.generation, 1);
    one.tell(&status("fra-1", 1, Some(7001), vec![])).await;
    two.tell(&status("fra-2", 1, None, vec![])).await;
    let seen = plan(&two, "fra-2", "").await;
    assert_eq!(seen.generation, 1);
    assert_eq!(seen.peers[0].address, "127.0.0.1:7001".parse().unwrap());
    assert_eq!(plan(&one, "fra-1", "").await.peers, []);

    one.tell(&status("fra-1", 1, Some(7002), vec![])).await;
    let moved = plan(&two, "fra-2", "after=1").await;
    assert_eq!((moved.generation, moved.peers[0].address.port()), (2, 7002));
}

#[tokio::test]
async fn a_node_that_listens_everywhere_is_reached_where_it_calls_from() {
    let world = World::start().await;
    let mut told = status("fra-1", 0, None, vec![]);
    told.replication = Some("0.0.0.0:7001".parse().unwrap());
    world.node("fra-1").tell(&told).await;
    let seen = plan(&world.node("fra-2"), "fra-2", "").await;
    assert_eq!(seen.peers[0].address, "127.0.0.1:7001".parse().unwrap());
}

#[tokio::test]
async fn values_of_variables_go_to_nodes_alone() {
    let world = World::start().await;
    let ops = world.ops();
    let mut with_variable = app("hello", "1", &[]);
    let token = selvage_config::app::variables::Variable { default: None, secret: true };
    with_variable.variables.insert("token".into(), token);
    ops.push_app("apps/hello", "v1", &with_variable).await;
    let request = json!({
        "repository": "apps/hello", "reference": "v1", "variables": { "token": "s3cret" },
    });
    let released = json_of(ops.post("/api/v1/apps/hello/releases", &request).await, StatusCode::CREATED).await;
    assert_eq!(released["release"]["variables"]["token"], "***");
    assert_eq!(plan(&world.node("fra-1"), "fra-1", "").await.releases[0].variables["token"], "s3cret");
    for path in ["/api/v1/plans/fra-1", "/api/v1/apps", "/api/v1/releases", "/api/v1/apps/hello/releases"] {
        let text = ops.get(path).await.text().await.unwrap();
        assert!(text.contains("\"***\"") && !text.contains("s3cret"), "{path}: {text}");
    }
    assert!(!world.audit().contains("s3cret"));
}

#[tokio::test]
async fn a_node_that_knows_more_is_told_no_less() {
    let world = World::start().await;
    let (ops, old) = (world.ops(), world.node("fra-1"));
    // This node's plans were made by a control plane whose state was lost.
    old.tell(&status("fra-1", 57, Some(7001), vec![])).await;
    for port in 7002..7006 {
        let name = format!("fra-{port}");
        world.node(&name).tell(&status(&name, 0, Some(port), vec![])).await;
    }
    assert_eq!(old.get("/api/v1/plans/fra-1?after=57").await.status(), StatusCode::NOT_MODIFIED);
    ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    ops.release("hello", "v1").await;
    let next = plan(&old, "fra-1", "after=57").await;
    assert_eq!((next.generation, next.releases.len(), next.peers.len()), (58, 1, 4));
}

async fn news(asker: &Asker, after: u64, nonce: &str) -> News {
    let answer = asker.get(&format!("/api/v1/plans/fra-1?after={after}&nonce={nonce}")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    answer.json().await.unwrap()
}

#[tokio::test]
async fn a_node_that_gives_the_nonce_is_told_what_changed_and_has_the_same_plan_as_if_it_were_told_all() {
    let (mut world, root) = signing().await;
    let (ops, node) = (world.ops(), world.node("fra-1"));
    for name in ["one", "two", "three"] {
        for version in ["1", "2"] {
            ops.push_app(&format!("apps/{name}"), &format!("v{version}"), &app(name, version, &[])).await;
        }
        assert_eq!(ops.release(name, "v1").await.status(), StatusCode::CREATED);
    }
    node.tell(&status("fra-1", 0, Some(7001), vec![])).await;
    let News { mut nonce, plan: Told::Whole(first) } = news(&node, 0, "none").await else {
        panic!("a delta of nothing")
    };
    let mut own = *first;
    let split = json!({ "repository": "apps/two", "reference": "v2", "rollout": { "split": { "percent": 5 } } });
    let waves = json!({ "waves": { "waves": [{ "nodes": "100%", "bake_ms": 600_000 }] } });
    let waves = json!({ "repository": "apps/three", "reference": "v2", "rollout": waves });
    let revoked = json!({ "digests": [selvage_config::Digest::of(b"bad")] });
    let changes = [
        (Method::POST, "/api/v1/apps/one/releases", json!({ "repository": "apps/one", "reference": "v2" })),
        (Method::POST, "/api/v1/apps/two/releases", split),
        (Method::POST, "/api/v1/nodes/fra-1", json!("drain")),
        (Method::POST, "/api/v1/revocations", revoked),
        (Method::POST, "/api/v1/nodes/fra-1", json!("cordon")),
        (Method::POST, "/api/v1/apps/one/rollback", json!({})),
        (Method::POST, "/api/v1/nodes/fra-1", json!("uncordon")),
        (Method::POST, "/api/v1/apps/three/releases", waves),
        (Method::DELETE, "/api/v1/apps/one", json!({})),
    ];
    for (step, (method, path, body)) in changes.into_iter().enumerate() {
        let done = ops.ask(method, path).json(&body).send().await.unwrap();
        assert!(done.status().is_success(), "{path}: {}", done.text().await.unwrap());
        let peer = format!("iad-{step}");
        // Peers come, move and stay.
        world.node(&peer).tell(&status(&peer, 0, Some(8000), vec![])).await;
        world.node("iad-0").tell(&status("iad-0", 0, Some(9000 + u16::try_from(step).unwrap()), vec![])).await;
        let News { nonce: next, plan: told } = news(&node, own.generation, &nonce).await;
        let Told::Delta(delta) = told else { panic!("{path}: told all") };
        own = own.with(*delta).unwrap();
        let whole = plan(&node, "fra-1", "").await;
        if own.generation == whole.generation {
            assert_eq!(own, whole, "{path}");
        }
        Snapshot::signed(own.snapshot.as_ref().unwrap(), &root).unwrap();
        nonce = next;
    }
    assert!(own.releases.len() == 2 && own.drain && own.peers.len() == 9, "{own:?}");
    // Who has no nonce, or one of another run, is told all.
    assert!(matches!(news(&node, own.generation - 1, "none").await.plan, Told::Whole(_)));
    world.restart().await;
    let again = news(&world.node("fra-1"), own.generation - 1, &nonce).await;
    assert!(matches!(again.plan, Told::Whole(_)) && again.nonce != nonce);
}

#[tokio::test]
async fn what_many_nodes_tell_at_once_is_all_written_down() {
    let world = World::start().await;
    let names: Vec<String> = (0..40).map(|number| format!("fra-{number}")).collect();
    let told = names.iter().map(|name| {
        let (node, status) = (world.node(name), status(name, 0, Some(7001), vec![]));
        tokio::spawn(async move { node.tell(&status).await.status() })
    });
    for told in told.collect::<Vec<_>>() {
        assert_eq!(told.await.unwrap(), StatusCode::NO_CONTENT);
    }
    let listed = json_of(world.ops().get("/api/v1/nodes").await, StatusCode::OK).await;
    assert_eq!(listed.as_array().unwrap().len(), names.len());
}
