//! `selvage up` serves the examples, built with Spin's SDKs 5 and 7.

use crate::program::{Serving, example, finish, http, selvage};

fn from(name: &str) -> [String; 2] {
    ["-f".to_owned(), example(name).display().to_string()]
}

fn up(name: &str, more: &[&str]) -> Serving {
    let [flag, path] = from(name);
    Serving::up(&[&[flag.as_str(), path.as_str()], more].concat())
}

#[tokio::test]
async fn up_serves_an_app_of_sdk_5_with_its_variables() {
    let hello = up("hello", &["--variable", "greeting=Moin"]);
    let body = http().get(hello.url("/")).send().await.unwrap().text().await.unwrap();
    assert!(body.contains("Hello from Selvage"), "{body}");
    let greeting = http().get(hello.url("/env")).send().await.unwrap().text().await.unwrap();
    assert!(greeting.contains("Moin"), "{greeting}");
    assert_eq!(http().get(hello.url("/status/404")).send().await.unwrap().status(), 404);
    assert!(hello.stop(), "SIGTERM drains and ends well");
}

#[tokio::test]
async fn up_serves_an_app_of_sdk_7() {
    let hello = up("hello-p3", &[]);
    let response = http().get(hello.url("/")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let sent = vec![b'x'; 300_000];
    let echo = http().post(hello.url("/echo")).body(sent.clone()).send().await.unwrap();
    assert_eq!(echo.bytes().await.unwrap(), sent);
}

#[tokio::test]
async fn up_keeps_kv_in_its_state_directory() {
    let state = tempfile::tempdir().unwrap();
    let state = state.path().to_str().unwrap();
    let counter = up("counter", &["--state-dir", state, "--key-value", "colour=red"]);
    let red = http().get(counter.url("/kv/colour")).send().await.unwrap().text().await.unwrap();
    assert_eq!(red, "red");
    let client = http();
    for want in ["1", "2"] {
        let count = client.post(counter.url("/count/visits")).send().await.unwrap().text().await.unwrap();
        assert!(count.contains(want), "{count}");
    }
    assert!(counter.stop());
    let again = up("counter", &["--state-dir", state]);
    let count = client.post(again.url("/count/visits")).send().await.unwrap().text().await.unwrap();
    assert!(count.contains('3'), "{count}");
}

#[tokio::test]
async fn up_demands_the_token_that_the_example_gate_demands() {
    let gate = up("gate", &[]);
    let refused = http().get(gate.url("/profile")).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), refused.headers()["www-authenticate"].to_str().unwrap()), (401, "Bearer"));
    let keys = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/gate/test-keys");
    for kid in ["es256", "eddsa", "rs256"] {
        let key = keys.join(format!("{kid}.pem"));
        let mut command = selvage();
        command.arg("token").arg("--key").arg(key).args(["--kid", kid, "--subject", "alice"]);
        let output = finish(command.args(["--issuer", "https://issuer.example", "--audience", "gate"]));
        let token = String::from_utf8(output.stdout).unwrap();
        let asked = http().get(gate.url("/profile")).bearer_auth(token.trim());
        let forged = asked.header("x-jwt-sub", "root").send().await.unwrap();
        assert_eq!(forged.status(), 200, "{kid}");
        let body = forged.text().await.unwrap();
        assert!(body.contains("alice") && !body.contains("root"), "{body}");
    }
}

#[tokio::test]
async fn up_serves_tls_with_every_version() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().to_str().unwrap();
    let made = finish(selvage().args(["certs", "--dir", dir, "server", "hello.localhost", "--address", "127.0.0.1"]));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (cert, key) = (format!("{dir}/server.pem"), format!("{dir}/server.key"));
    let hello = up("hello", &["--tls-cert", &cert, "--tls-key", &key]);
    let url = hello.url("/").replace("127.0.0.1", "hello.localhost");
    let ca = format!("{dir}/ca.pem");
    let load = ["loadtest", &url, "--ca", &ca, "--rate", "60", "--duration", "1", "--lag-ms", "2000", "-o", "json"];
    let output = finish(selvage().args(load));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // On a busy machine the run may not be valid: its requests came later than they were due, and are answered all the same.
    assert_eq!(report["total"]["unexpected_status"], 0, "{report}");
    for protocol in ["h1", "h2", "h3"] {
        let of = &report["protocols"][protocol];
        assert!(of["answered"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(of["answered"], of["requests"], "{report}");
    }
}
