//! A node whose stores are in a Redis server, as docs/BACKENDS.md has it: through the program, with that server gone too.

#[path = "../../../backend/tests/it/server.rs"]
#[allow(dead_code, reason = "the suite of the backends uses all of it")]
mod server;

use std::time::Instant;

use self::server::{Kind, PATIENCE, Server};
use crate::by_hand::Fleet;
use crate::program::{example, finish, http, selvage, well};

async fn ask(fleet: &Fleet, method: reqwest::Method, path: &str, body: &'static str) -> (u16, String) {
    let request = http().request(method, format!("http://{}{path}", fleet.front())).header("host", "counter.localhost");
    let answer = request.body(body).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_keeps_its_values_in_redis_and_is_told_when_that_is_gone() {
    let Some(mut redis) = Server::start(Kind::Redis) else { return };
    let tables = format!(
        "[kv]\nbackend = \"sessions\"\n[kv.backends.sessions]\nkind = \"redis\"\nurl = \"redis://127.0.0.1:{}\"\n\
         [kv.stores.\"hello/default\"]\nbackend = \"mesh\"\n",
        redis.port()
    );
    let fleet = Fleet::start_with_tables(&tables);
    let checked = well("check", &finish(selvage().arg("check").arg(fleet.path("node.toml"))));
    assert!(checked.contains("backend sessions: redis, 0 stores by name, and every store without a rule"), "{checked}");
    let counter = example("counter").display().to_string();
    well("deploy", &fleet.selvage(&["deploy", "-f", &counter, "--key", "release.key"]));
    fleet.deploy_hello();
    let kv = |arguments: &[&str]| fleet.selvage(&[&["kv", "--node", "fra-1"], arguments].concat());

    assert_eq!(ask(&fleet, reqwest::Method::PUT, "/kv/a", "value").await.0, 204);
    assert_eq!(redis.redis(&["HGET", "selvage:{counter/default}:k:a", "v"]), "$5");
    assert_eq!(well("get", &kv(&["get", "counter/default", "a"])), "value");
    well("set", &kv(&["set", "counter/default", "b", "by an operator"]));
    assert_eq!(ask(&fleet, reqwest::Method::GET, "/kv/b", "").await, (200, "by an operator".into()));
    let listed = well("list", &kv(&["list", "counter/default"]));
    assert!(listed.lines().nth(1).unwrap().starts_with("a ") && listed.lines().count() == 3, "{listed}");
    well("delete", &kv(&["delete", "counter/default", "a"]));
    assert_eq!(ask(&fleet, reqwest::Method::GET, "/kv/a", "").await.0, 404);
    let watched = kv(&["watch", "counter/default", "--count", "1"]);
    let told = String::from_utf8_lossy(&watched.stderr).into_owned();
    assert!(!watched.status.success() && told.contains("is in backend sessions"), "{told}");
    // That store is in the mesh, whatever the others are in.
    well("set", &kv(&["set", "hello/default", "k", "v"]));
    assert_eq!(redis.redis(&["EXISTS", "selvage:{hello/default}:k:k"]), ":0");

    redis.kill();
    let begun = Instant::now();
    loop {
        let (status, text) = ask(&fleet, reqwest::Method::GET, "/kv/b", "").await;
        assert_eq!(status, 500, "{text}");
        if text.contains("backend sessions is away") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{text}");
    }
    let away = kv(&["get", "counter/default", "b"]);
    assert!(String::from_utf8_lossy(&away.stderr).contains("backend sessions is away"), "{away:?}");
    // Nothing else of the node notices.
    assert_eq!(well("get", &kv(&["get", "hello/default", "k"])), "v");
    let other = http().get(format!("http://{}/", fleet.front())).header("host", "hello.localhost");
    assert_eq!(other.send().await.unwrap().status(), 200);
    redis.resume();
    while ask(&fleet, reqwest::Method::GET, "/kv/b", "").await != (200, "by an operator".into()) {
        assert!(begun.elapsed() < 2 * PATIENCE, "it is not found again");
    }
    drop(fleet.dismiss());
}
