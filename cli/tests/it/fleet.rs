//! A fleet that grows by tokens, and releases that do badly in it: real processes, real requests.

use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::by_hand::Fleet;
use crate::program::{Serving, example, finish, http, selvage, well};

/// How long a condition may take to come true on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn document(what: &str, output: &Output) -> Value {
    assert!(output.status.success(), "{what}: {}", text(output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{what}: {error}: {}", text(output)))
}

/// A second node, which knows nothing but a token.
fn join(fleet: &Fleet) -> Serving {
    let invited = document(
        "invite",
        &fleet.selvage(&["nodes", "invite", "--region", "iad", "--label", "tier=edge", "-o", "json"]),
    );
    let token = invited["token"].as_str().unwrap();
    let address = fleet.registry();
    let wrong = format!("{}{}", &token[..token.len() - 1], if token.ends_with('0') { '1' } else { '0' });
    let ask = |token: &str| {
        let arguments = ["node", "join", "iad-1", "--control-plane", &address, "--token", token, "--dir", "iad"];
        finish(selvage().args(arguments).current_dir(fleet.path("")))
    };
    let refused = ask(&wrong);
    assert!(text(&refused).contains("does not show the token's authority"), "{}", text(&refused));
    well("join", &ask(token));
    let again = ask(token);
    assert!(!again.status.success() && text(&again).contains("403"), "{}", text(&again));

    let path = fleet.path("iad/node.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config.replace("127.0.0.1:8080", "127.0.0.1:0");
    let config = config.replace("keys = []", "keys = [\"../release.pub\"]\nroot = \"../root-1.json\"");
    std::fs::write(&path, config).unwrap();
    Serving::start(selvage().args(["node", "--config", "iad/node.toml"]).current_dir(fleet.path("")))
}

fn nodes(fleet: &Fleet) -> Value {
    document("nodes", &fleet.selvage(&["nodes", "-o", "json"]))
}

/// What every node says that it serves.
fn served(fleet: &Fleet) -> Vec<String> {
    let nodes = nodes(fleet);
    let of = |node: &Value| node["status"]["apps"][0]["serving"]["release"].as_str().unwrap_or("nothing").to_owned();
    nodes.as_array().unwrap().iter().map(of).collect()
}

fn wait_until(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Asks every node for the app, all the time, until it is dropped.
struct Visitors {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Visitors {
    fn start(fleet: &Fleet) -> Self {
        let fronts: Vec<String> = fronts(fleet);
        let over = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let client = http();
                while !done.load(Ordering::Relaxed) {
                    for front in &fronts {
                        let _ = client.get(format!("http://{front}/")).header("host", "hello.localhost").send().await;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            });
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Visitors {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn fronts(fleet: &Fleet) -> Vec<String> {
    let nodes = nodes(fleet);
    nodes.as_array().unwrap().iter().map(|node| node["status"]["front"].as_str().unwrap().to_owned()).collect()
}

fn get(front: &str, release: Option<&str>) -> (u16, Option<String>, String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut request = http().get(format!("http://{front}/env")).header("host", "hello.localhost");
        if let Some(release) = release {
            request = request.header("selvage-release", release);
        }
        let answer = request.send().await.unwrap();
        let told = answer.headers().get("selvage-release").map(|value| value.to_str().unwrap().to_owned());
        (answer.status().as_u16(), told, answer.text().await.unwrap())
    })
}

/// An app of the name `hello` whose component ends every request in a trap.
fn trapping(fleet: &Fleet) -> String {
    let guest = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/tests/guests/trap.wat");
    let directory = fleet.path("bad");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("bad.wasm"), wat::parse_file(guest).unwrap()).unwrap();
    let manifest = "spin_manifest_version = 2\n[application]\nname = \"hello\"\n[[trigger.http]]\nroute = \"/...\"\n\
                    component = \"bad\"\n[component.bad]\nsource = \"bad.wasm\"\n";
    std::fs::write(directory.join("spin.toml"), manifest).unwrap();
    directory.display().to_string()
}

#[test]
fn a_fleet_grows_by_a_token_and_takes_back_what_does_badly_in_its_first_wave() {
    let fleet = Fleet::start();
    let _second = join(&fleet);
    wait_until("the second node did not report", || nodes(&fleet).as_array().unwrap().len() == 2);
    assert_eq!(nodes(&fleet)[1]["labels"]["tier"], "edge");
    let hello = example("hello").display().to_string();
    let deployed = fleet.selvage(&["deploy", "-f", &hello, "--key", "release.key"]);
    let told = well("deploy", &deployed);
    assert!(told.contains("fra-1") && told.contains("iad-1") && told.contains("wave 2 of 2"), "{told}");
    assert_eq!(served(&fleet), ["hello@1", "hello@1"]);

    // Nobody signed it: one node refuses it, and nobody else ever hears of it.
    let pushed = document("push", &fleet.selvage(&["push", "-f", &hello, "--tag", "v2", "-o", "json"]));
    let reference = format!("hello@{}", pushed["manifest"].as_str().unwrap());
    std::fs::write(fleet.path("unsigned.wasm"), b"\0asm\x0d\0\x01\0").unwrap();
    let other =
        document("push", &fleet.selvage(&["push", "-f", "unsigned.wasm", "--repository", "hello", "-o", "json"]));
    let unsigned = format!("hello@{}", other["manifest"].as_str().unwrap());
    let refused = fleet.selvage(&["deploy", &unsigned, "--app", "unsigned"]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    let told = text(&refused);
    assert!(told.contains("was taken back in wave 1 of 2") && told.contains("unsigned"), "{told}");

    // Its code traps: what visitors meet on the first node is what halts it.
    let bad = trapping(&fleet);
    let visitors = Visitors::start(&fleet);
    let arguments = [
        "deploy",
        "-f",
        &bad,
        "--key",
        "release.key",
        "--wave",
        "1%:1h",
        "--gate",
        "requests_min=10",
        "--timeout",
        "60",
    ];
    let halted = fleet.selvage(&arguments);
    drop(visitors);
    let told = text(&halted);
    assert_eq!(halted.status.code(), Some(1), "{told}");
    assert!(told.contains("was taken back in wave 1 of 2 (1%)") && told.contains("old release"), "{told}");
    wait_until("the old release is not back", || served(&fleet) == ["hello@1", "hello@1"]);
    for front in fronts(&fleet) {
        assert_eq!(get(&front, None).0, 200);
    }
    well("audit", &fleet.selvage(&["audit", "verify"]));
    let log = well("audit", &fleet.selvage(&["audit", "list"]));
    assert!(log.contains("halted in wave 1") && log.contains("node.join"), "{log}");
    side_by_side(&fleet, &reference);
}

/// Two releases at once: a visitor's own word, then the percentage, decides which one answers.
fn side_by_side(fleet: &Fleet, reference: &str) {
    let greeting = ["--variable", "greeting=Ahoy", "--percent", "0"];
    let signed = fleet.selvage(&["sign", reference, "--key", "release.key"]);
    well("sign", &signed);
    let released = document("deploy", &fleet.selvage(&[&["deploy", reference, "-o", "json"], &greeting[..]].concat()));
    let release = released["release"].as_str().unwrap().to_owned();
    for front in fronts(fleet) {
        let (status, told, body) = get(&front, None);
        assert_eq!((status, told.as_deref()), (200, Some("hello@1")), "{body}");
        let (status, told, body) = get(&front, Some(&release));
        assert_eq!((status, told.as_deref()), (200, Some(release.as_str())), "{body}");
        assert!(body.contains("Ahoy"), "{body}");
    }
    well("split", &fleet.selvage(&["split", &release, "--percent", "100"]));
    // Nobody asked for more than 0 %: a visitor's word counts no more.
    wait_until("the split did not reach the nodes", || {
        fronts(fleet).iter().all(|front| get(front, Some("hello@1")).1.as_deref() == Some(release.as_str()))
    });
    well("split", &fleet.selvage(&["split", &release, "--percent", "100", "--named"]));
    wait_until("nobody may name a release", || {
        fronts(fleet).iter().all(|front| get(front, Some("hello@1")).1.as_deref() == Some("hello@1"))
    });
    well("rollback", &fleet.selvage(&["rollback", "hello"]));
    wait_until("the split did not end", || fronts(fleet).iter().all(|front| get(front, None).1.is_none()));
}
