//! What nodes are told is the same whichever control plane tells it, and neither tells it anew because of the other.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::plan::{Peer, Plan};
use selvage_config::root::Root;
use selvage_config::signature::Envelope;
use selvage_config::snapshot::Snapshot;
use serde_json::{Value, json};

use super::fleet::{Fleet, until};
use super::server::Server;
use crate::freshness;
use crate::world::{Asker, json_of, status};

/// Nodes that come at once: more than are told of one by one.
const NODES: u16 = 80;
/// For how long nothing may change that nobody changes: longer than peers wait to be told.
const QUIET: Duration = Duration::from_millis(200);

async fn plan(at: &Asker, node: &str) -> Plan {
    at.get(&format!("/api/v1/plans/{node}")).await.json().await.unwrap()
}

/// The generation that all of these have, once none makes another.
async fn steady(fleet: &[&Asker], node: &str) -> u64 {
    let mut last = 0;
    until("nobody makes generations", async || {
        let mut seen = Vec::new();
        for at in fleet {
            seen.push(plan(at, node).await.generation);
        }
        tokio::time::sleep(QUIET).await;
        for at in fleet {
            seen.push(plan(at, node).await.generation);
        }
        last = seen[0];
        seen.iter().all(|generation| *generation == last)
    })
    .await;
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_come_to_both_at_once_are_told_by_both_and_so_is_one_that_moved() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    let mut coming = tokio::task::JoinSet::new();
    for number in 0..NODES {
        let name = format!("n-{number}");
        let node = fleet.node(&name, if number % 2 == 0 { &a } else { &b });
        coming.spawn(async move {
            let told = status(&name, 0, Some(7000 + number), vec![]);
            // As a node does: where the journal takes too long on a busy machine, it tells again.
            loop {
                match node.tell(&told).await.status() {
                    StatusCode::NO_CONTENT => return,
                    StatusCode::SERVICE_UNAVAILABLE => tokio::time::sleep(QUIET).await,
                    other => panic!("{name}: {other}"),
                }
            }
        });
    }
    tokio::time::timeout(Duration::from_secs(60), coming.join_all()).await.unwrap();
    // One moves to the other control plane and to another address, and one gets an admin listener.
    let (n_2, moved) = (fleet.node("n-2", &b), status("n-2", 0, Some(9002), vec![]));
    until("it has moved", async || n_2.tell(&moved).await.status() == StatusCode::NO_CONTENT).await;
    let admin = (Ipv4Addr::LOCALHOST, 9103).into();
    let told = selvage_config::plan::Status { admin: Some(admin), ..status("n-3", 0, Some(7003), vec![]) };
    let n_3 = fleet.node("n-3", &a);
    until("it has told", async || n_3.tell(&told).await.status() == StatusCode::NO_CONTENT).await;
    let is_known = |peers: &[Peer]| {
        let of = |name: &str| peers.iter().find(|peer| peer.node.as_str() == name);
        peers.len() == usize::from(NODES) - 1
            && of("n-2").is_some_and(|peer| peer.address.port() == 9002)
            && of("n-3").is_some_and(|peer| peer.admin == Some(admin))
    };
    until("both tell of all", async || {
        is_known(&plan(&a, "n-0").await.peers) && is_known(&plan(&b, "n-0").await.peers)
    })
    .await;
    let generation = steady(&[&a, &b], "n-0").await;
    assert!(generation <= 2 * u64::from(NODES), "{generation}");
    assert_eq!(plan(&a, "n-0").await.peers, plan(&b, "n-0").await.peers);
    // It is in the journal: who comes later knows it, and so does who was away.
    let c = fleet.start("c").await;
    fleet.stop_one("a").await;
    let a = fleet.start("a").await;
    for at in [&a, &c] {
        assert!(is_known(&plan(at, "n-0").await.peers));
    }
    fleet.stop().await;
}

/// Whom nodes let in, as this control plane says it, and by which generation.
async fn operators(node: &Asker, root: &Root) -> (Vec<String>, u64) {
    let envelope: Envelope = node.get("/api/v1/snapshot").await.json().await.unwrap();
    let snapshot = Snapshot::signed(&envelope, root).unwrap();
    (snapshot.operators.unwrap_or_default().into_keys().collect(), snapshot.version)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_files_with_other_operators_the_one_that_was_read_last_is_told_and_is_told_once() {
    let Some(server) = Server::start() else { return };
    let (world, root) = freshness::signing().await;
    let mut fleet = Fleet::over(world, &server).await;
    let a = fleet.start("a").await;
    let at_a = fleet.node("fra-1", &a);
    until("its operators are told", async || operators(&at_a, &root).await.0 == ["ada", "ops"]).await;
    let first = operators(&at_a, &root).await.1;
    let mut other = fleet.config("b");
    other.operators.retain(|operator| operator.name != "ada");
    let b = fleet.start_as("b", other).await;
    let at_b = fleet.node("fra-1", &b);
    let expected = (vec!["ops".to_owned()], first + 1);
    until("both tell of those of the second", async || {
        operators(&at_a, &root).await == expected && operators(&at_b, &root).await == expected
    })
    .await;
    assert_eq!(steady(&[&a, &b], "fra-1").await, first + 1);
    // The first one is started again.
    fleet.stop_one("a").await;
    let a = fleet.start("a").await;
    let at_a = fleet.node("fra-1", &a);
    let expected = (vec!["ada".to_owned(), "ops".to_owned()], first + 2);
    until("both tell of those of the first", async || {
        operators(&at_a, &root).await == expected && operators(&at_b, &root).await == expected
    })
    .await;
    assert_eq!(steady(&[&a, &b], "fra-1").await, first + 2);
    // Whoever comes with what is told already changes nothing.
    let c = fleet.start("c").await;
    assert_eq!(steady(&[&a, &b, &c], "fra-1").await, first + 2);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_wait_for_the_journal_and_a_control_plane_starts_without_it() {
    let Some(mut server) = Server::start() else { return };
    let (world, root) = freshness::signing().await;
    let mut fleet = Fleet::over(world, &server).await;
    let a = fleet.start("a").await;
    let before = {
        let node = fleet.node("fra-1", &a);
        until("its operators are told", async || operators(&node, &root).await.0 == ["ada", "ops"]).await;
        operators(&node, &root).await
    };
    fleet.stop_one("a").await;
    server.kill();
    let mut other = fleet.config("a");
    other.operators.retain(|operator| operator.name != "ada");
    let a = fleet.start_as("a", other).await;
    let node = fleet.node("fra-1", &a);
    assert_eq!(operators(&node, &root).await, before, "what the journal has not is told to nobody");
    server.resume();
    until("they are told", async || operators(&node, &root).await == (vec!["ops".to_owned()], before.1 + 1)).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_control_plane_sees_which_authorities_a_node_knows() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    let node = fleet.node("fra-1", &a);
    let tell = async |known: &str| {
        let request = node.ask(Method::PUT, "/api/v1/nodes/fra-1").json(&status("fra-1", 0, None, vec![]));
        let answer = request.header("selvage-authorities", known).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        answer.headers()["selvage-authorities"].to_str().unwrap().to_owned()
    };
    let fleets = tell("nothing").await;
    let issuing = fleets.split_once(' ').unwrap().1;
    let old = format!("{} {issuing}", Digest::of(b"old"));
    let cases: BTreeMap<&str, (Value, Value)> =
        [(fleets.as_str(), (json!(true), json!(true))), (old.as_str(), (json!(false), json!(true)))].into();
    for (known, expected) in cases {
        until("the other sees it", async || {
            tell(known).await;
            let nodes = json_of(b.get("/api/v1/nodes").await, StatusCode::OK).await;
            (nodes[0]["believes_authorities"].clone(), nodes[0]["certificate_is_current"].clone()) == expected
        })
        .await;
    }
    fleet.stop().await;
}
