//! A node that is killed at any moment while it is told new releases: what it serves after is one whole release that was
//! made, none from before the one that it had told of, also where its disk was changed meanwhile; and it follows on.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use selvage_certs::roots_from_pem;
use serde_json::{Value, json};

use crate::by_hand::Fleet;
use crate::program::{example, http, well};

/// Rounds of one run; `SELVAGE_TEST_ROUNDS=200` is the long one.
const ROUNDS: u64 = 4;
/// Releases of each round, which come as fast as they are taken.
const EACH: u64 = 3;
/// How long a condition may take to come true on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// The control plane, asked by the operator's token.
struct ControlPlane {
    client: Client,
    url: String,
}

impl ControlPlane {
    /// Makes a release for everybody at once, and answers its number.
    async fn release(&self, reference: &str, greeting: &str) -> u64 {
        let body = json!({
            "repository": "hello", "reference": reference, "variables": { "greeting": greeting }, "rollout": "at_once",
        });
        let request = self.client.post(format!("{}/api/v1/apps/hello/releases", self.url)).bearer_auth(Fleet::TOKEN);
        let answer = request.json(&body).send().await.unwrap();
        let status = answer.status();
        let told: Value = answer.json().await.unwrap();
        assert_eq!(status, StatusCode::CREATED, "{told}");
        number(told["release"]["id"].as_str().unwrap())
    }

    /// The release that the node has told that it serves.
    async fn told(&self) -> u64 {
        let request = self.client.get(format!("{}/api/v1/nodes", self.url)).bearer_auth(Fleet::TOKEN);
        let nodes: Value = request.send().await.unwrap().json().await.unwrap();
        let apps = nodes[0]["status"]["apps"].as_array().or_else(|| nodes[0]["apps"].as_array()).unwrap().clone();
        apps.first().and_then(|app| app["serving"]["release"].as_str()).map_or(0, number)
    }
}

fn number(release: &str) -> u64 {
    release.strip_prefix("hello@").unwrap().parse().unwrap()
}

/// What the node says, once it serves the app at all.
async fn says(front: &str) -> String {
    let begun = Instant::now();
    loop {
        let asked = http().get(format!("http://{front}/env")).header("host", "hello.localhost").send().await;
        if let Ok(answer) = asked {
            let status = answer.status();
            let text = answer.text().await.unwrap_or_default();
            if status == StatusCode::OK {
                return text.trim().to_owned();
            }
            // Not there yet; anything else would be half of something.
            assert!(matches!(status, StatusCode::NOT_FOUND | StatusCode::SERVICE_UNAVAILABLE), "{status}: {text}");
        }
        assert!(begun.elapsed() < PATIENCE, "the app is not served");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Changes the last byte of every file below a directory.
fn tamper(directory: &Path) -> usize {
    let mut changed = 0;
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            changed += tamper(&path);
        } else if let Ok(mut bytes) = std::fs::read(&path)
            && let Some(last) = bytes.last_mut()
        {
            *last ^= 1;
            std::fs::write(&path, bytes).unwrap();
            changed += 1;
        }
    }
    changed
}

/// Pushes and signs an app like no other before, and answers its digest: a release that is killed three times while it is
/// new would be quarantined.
fn push(fleet: &Fleet, round: u64) -> String {
    let directory = fleet.path("source");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::copy(example("hello").join("hello.wasm"), directory.join("hello.wasm")).unwrap();
    let manifest = std::fs::read_to_string(example("hello").join("spin.toml")).unwrap();
    std::fs::write(directory.join("spin.toml"), manifest.replace("0.1.0", &format!("0.1.{round}"))).unwrap();
    let pushed = fleet.selvage(&["push", "-f", "source/spin.toml", "-o", "json"]);
    well("push", &pushed);
    let pushed: Value = serde_json::from_slice(&pushed.stdout).unwrap();
    let digest = pushed["manifest"].as_str().unwrap().to_owned();
    well("sign", &fleet.selvage(&["sign", &format!("hello@{digest}"), "--key", "release.key"]));
    digest
}

#[test]
fn a_node_killed_at_any_moment_serves_one_whole_release_and_none_from_before_what_it_told() {
    let rounds = std::env::var("SELVAGE_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let mut fleet = Fleet::start();
    let roots = roots_from_pem(fleet.path("certs/ca.pem")).unwrap();
    let client = Client::builder().use_preconfigured_tls(selvage_certs::client(&roots)).no_proxy().build().unwrap();
    let control_plane = ControlPlane { client, url: format!("https://{}", fleet.registry()) };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut made: BTreeMap<String, u64> = BTreeMap::new();
    // Not random, and never the same twice: the moments are spread over what a node does with a plan.
    for round in 0..rounds {
        let digest = push(&fleet, round);
        runtime.block_on(async {
            for n in 0..EACH {
                let greeting = format!("round {round}, release {n}");
                made.insert(greeting.clone(), control_plane.release(&digest, &greeting).await);
            }
            if round == 0 {
                // There is something to go back to.
                says(&fleet.front()).await;
            }
            tokio::time::sleep(Duration::from_millis(round * 97 % 400)).await;
        });
        fleet.kill_node();
        let told = runtime.block_on(control_plane.told());
        if round % 2 == 1 {
            let changed = tamper(&fleet.path("node/blobs")) + tamper(&fleet.path("node/compiled"));
            assert!(changed > 2, "there was nothing to change");
        }
        fleet.start_node();
        runtime.block_on(async {
            let newest = made.values().max().copied().unwrap();
            let begun = Instant::now();
            let mut least = told;
            loop {
                let text = says(&fleet.front()).await;
                let serves = made.get(&text).copied().unwrap_or_else(|| panic!("nobody released {text:?}"));
                assert!(serves >= least, "round {round}: {serves} after {least}");
                least = serves;
                if serves == newest {
                    break;
                }
                assert!(begun.elapsed() < PATIENCE, "round {round}: {serves} of {newest}");
            }
        });
    }
}
