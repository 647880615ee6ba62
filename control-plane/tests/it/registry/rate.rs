//! How fast a large component comes and goes, beside Debian's docker-registry in the same run.
//!
//! `.ci/tools` installs it by package. Without it the test is skipped with a loud line; never in CI.

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::header::LOCATION;
use reqwest::{Method, StatusCode};
use selvage_config::Digest;

use crate::shared::is_there;
use crate::world::{Asker, World};

/// A large component.
const BYTES: usize = 20 << 20;
/// Rounds of each, one after the other; the best of each counts, since others use this machine too.
const ROUNDS: u8 = 3;

struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// docker-registry over TLS, with its blobs on the same disk.
async fn other(world: &World) -> Option<(Other, Asker)> {
    if !is_there("docker-registry") {
        return None;
    }
    let path = |name: &str| world.directory.path().join(name);
    let identity = world.authority.issue_server(&[], &[Ipv4Addr::LOCALHOST.into()]).unwrap();
    identity.save(path("other.pem"), path("other.key")).unwrap();
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let config = format!(
        "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
         storage: {{ filesystem: {{ rootdirectory: {:?} }} }}\n\
         http: {{ addr: \"127.0.0.1:{port}\", tls: {{ certificate: {:?}, key: {:?} }} }}\n",
        path("other"),
        path("other.pem"),
        path("other.key"),
    );
    std::fs::write(path("other.yml"), config).unwrap();
    let mut command = Command::new("docker-registry");
    let command = command.arg("serve").arg(path("other.yml")).stdout(Stdio::null()).stderr(Stdio::null());
    let other = Other(command.spawn().unwrap());
    let asker = world.stranger().at(&format!("https://127.0.0.1:{port}"));
    let begun = Instant::now();
    while asker.ask(Method::GET, "/v2/").send().await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(60), "docker-registry does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Some((other, asker))
}

/// Time to push `bytes`, and time to pull them.
async fn there_and_back(registry: &Asker, bytes: &[u8]) -> (Duration, Duration) {
    let (digest, begun) = (Digest::of(bytes), Instant::now());
    let answer = registry.ask(Method::POST, "/v2/acme/large/blobs/uploads/").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let location = answer.headers()[LOCATION].to_str().unwrap().to_owned();
    let location = location.strip_prefix(registry.url()).unwrap_or(&location).to_owned();
    let put = registry.ask(Method::PUT, &location).query(&[("digest", digest.to_string())]).body(bytes.to_vec());
    assert_eq!(put.send().await.unwrap().status(), StatusCode::CREATED);
    let pushed = begun.elapsed();
    let begun = Instant::now();
    let pulled = registry.get(&format!("/v2/acme/large/blobs/{digest}")).await.bytes().await.unwrap();
    let took = begun.elapsed();
    assert_eq!(Digest::of(&pulled), digest);
    (pushed, took)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_component_is_pushed_and_pulled_beside_another_registry() {
    let world = World::start().await;
    let ours = world.ops();
    let Some((_running, theirs)) = other(&world).await else { return };
    let mut best = [(Duration::MAX, Duration::MAX); 2];
    for round in 0..ROUNDS {
        // Other bytes each time: what is there already need not be kept again.
        let bytes: Vec<u8> = (0..BYTES).map(|n| n.to_le_bytes()[n % 3] ^ round).collect();
        for (best, registry) in best.iter_mut().zip([&ours, &theirs]) {
            let (pushed, pulled) = there_and_back(registry, &bytes).await;
            *best = (best.0.min(pushed), best.1.min(pulled));
        }
    }
    let [ours, theirs] = best;
    let rate = |took: Duration| BYTES as f64 / took.as_secs_f64() / f64::from(1 << 20);
    let ratio = (theirs.0 + theirs.1).as_secs_f64() / (ours.0 + ours.1).as_secs_f64();
    eprintln!(
        "20 MiB: pushed {:.0} MiB/s, pulled {:.0}; docker-registry {:.0} and {:.0}; {ratio:.2} of its rate",
        rate(ours.0),
        rate(ours.1),
        rate(theirs.0),
        rate(theirs.1),
    );
}
