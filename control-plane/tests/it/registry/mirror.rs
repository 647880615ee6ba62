//! Mirrors of another registry: here, another control plane.

use std::net::Ipv4Addr;

use reqwest::StatusCode;
use selvage_certs::{ClientAuth, mutual_server};
use selvage_config::Digest;
use selvage_config::control_plane::{ControlPlaneConfig, Operator, OperatorRole, RegistryConfig, Upstream};
use selvage_config::node::IdentityFiles;
use selvage_config::oci::{BUNDLE, Descriptor, EMPTY, Index, MANIFEST};
use selvage_control_plane::ControlPlane;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::world::{Asker, TOKEN, World, app, manifest, refusal};

/// A second control plane of the same authority that mirrors the world's own at `up`.
async fn mirror(world: &World, tag_seconds: u64) -> (ControlPlane, Asker) {
    mirror_of(world, world.url(), tag_seconds).await
}

async fn mirror_of(world: &World, url: &str, tag_seconds: u64) -> (ControlPlane, Asker) {
    let path = |name: &str| world.directory.path().join(name);
    std::fs::write(path("password"), TOKEN).unwrap();
    let upstream = Upstream {
        prefix: "up".parse().unwrap(),
        url: url.to_owned(),
        username: Some("ops".into()),
        password_file: Some(path("password")),
        roots: Some(path("roots.pem")),
        hosts: Vec::new(),
        tag_seconds,
    };
    let config = ControlPlaneConfig {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        state_dir: path("mirror"),
        identity: IdentityFiles { certificate: path("c.pem"), key: path("k.pem"), roots: path("roots.pem") },
        operators: vec![Operator {
            name: "ops".into(),
            token_digest: Some(Digest::of(TOKEN.as_bytes())),
            role: OperatorRole::Admin,
            apps: None,
        }],
        plans: None,
        authority: None,
        sealing_key: None,
        registry: RegistryConfig { upstreams: vec![upstream], ..RegistryConfig::default() },
        nats: None,
        stores: Default::default(),
        placements: Default::default(),
    };
    let control_plane = ControlPlane::start(config).await.unwrap();
    let asker = world.ops().at(&format!("https://{}", control_plane.address()));
    (control_plane, asker)
}

#[tokio::test]
async fn what_is_asked_for_is_fetched_with_its_signatures_and_served_on_when_the_upstream_is_gone() {
    let mut world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    ops.push_blob("apps/hello", b"{}").await;
    ops.push_blob("apps/hello", b"signature").await;
    let subject = ops.get(&format!("/v2/apps/hello/manifests/{digest}")).await.bytes().await.unwrap();
    let mut signature = manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(BUNDLE, b"signature")]);
    signature.subject = Some(Descriptor::of(MANIFEST, &subject));
    let signed = Digest::of(&serde_json::to_vec(&signature).unwrap());
    ops.put_manifest("apps/hello", &signed.to_string(), &signature).await;

    let (control_plane, near) = mirror(&world, 0).await;
    let path = |reference: &str| format!("/v2/up/apps/hello/manifests/{reference}");
    let answer = near.get(&path("v1")).await;
    assert_eq!(answer.headers()["docker-content-digest"], digest.to_string());
    let referrers: Index = near.get(&format!("/v2/up/apps/hello/referrers/{digest}")).await.json().await.unwrap();
    assert_eq!(referrers.manifests.iter().map(|found| found.digest).collect::<Vec<_>>(), [signed]);
    assert_eq!(refusal(near.get(&path("v9")).await, StatusCode::NOT_FOUND).await, "MANIFEST_UNKNOWN");
    assert_eq!(
        near.get(&format!("/v2/up/apps/hello/blobs/{}", Digest::of(b"x"))).await.status(),
        StatusCode::NOT_FOUND
    );
    // The tag moves there, and here.
    let next = ops.push_app("apps/hello", "v1", &app("hello", "2", &[])).await;
    assert_eq!(near.get(&path("v1")).await.headers()["docker-content-digest"], next.to_string());

    world.stop().await;
    for reference in ["v1".to_owned(), digest.to_string(), signed.to_string()] {
        assert_eq!(near.get(&path(&reference)).await.status(), StatusCode::OK, "{reference}");
    }
    let blob = format!("/v2/up/apps/hello/blobs/{}", Digest::of(b"signature"));
    assert_eq!(near.get(&blob).await.text().await.unwrap(), "signature");
    // What was never asked for can't be told apart from what is not there; it is the gateway's fault.
    assert_eq!(near.get(&path("v2")).await.status(), StatusCode::BAD_GATEWAY);
    control_plane.stop().await;
}

#[tokio::test]
async fn a_mirror_is_not_pushed_to_and_a_tag_is_believed_for_a_while() {
    let world = World::start().await;
    let ops = world.ops();
    let first = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    let (control_plane, near) = mirror(&world, 3_600).await;
    let path = "/v2/up/apps/hello/manifests/v1";
    assert_eq!(near.get(path).await.status(), StatusCode::OK);
    ops.push_app("apps/hello", "v1", &app("hello", "2", &[])).await;
    assert_eq!(near.get(path).await.headers()["docker-content-digest"], first.to_string());
    let refused = near.ask(reqwest::Method::POST, "/v2/up/apps/hello/blobs/uploads/").send().await.unwrap();
    assert_eq!(refusal(refused, StatusCode::FORBIDDEN).await, "DENIED");
    // What is not below the prefix is its own.
    near.push_blob("upper", b"content").await;
    // A release of what is mirrored runs it as any other.
    let request = serde_json::json!({ "repository": "up/apps/hello", "reference": "v1" });
    assert_eq!(near.post("/api/v1/apps/hello/releases", &request).await.status(), StatusCode::CREATED);
    control_plane.stop().await;
}

/// An upstream that answers every request alike.
async fn answering(world: &World, answer: String) -> (u16, JoinSet<()>) {
    let identity = world.authority.issue_server(&[], &[Ipv4Addr::LOCALHOST.into()]).unwrap();
    let tls = mutual_server(&identity, &world.roots(), ClientAuth::Optional).unwrap();
    let (acceptor, listener) = (TlsAcceptor::from(tls), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let mut asked = [0; 4_096];
            let _ = stream.read(&mut asked).await;
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    (port, tasks)
}

#[tokio::test]
async fn an_upstream_can_not_make_the_control_plane_ask_hosts_that_nobody_named() {
    let world = World::start().await;
    let victim = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let place = victim.local_addr().unwrap();
    let redirect = |to: String| {
        format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    };
    let challenge = |realm: String| {
        format!(
            "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer realm=\"{realm}\",service=\"x\"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
    };
    let lies = [
        redirect(format!("https://{place}/v2/up/x")),
        redirect(format!("http://{place}/latest/meta-data")),
        redirect(format!("https://localhost:{}/", place.port())),
        challenge(format!("https://{place}/token")),
        challenge(format!("http://{place}/token")),
    ];
    for lie in lies {
        let (port, _answering) = answering(&world, lie.clone()).await;
        let (control_plane, near) = mirror_of(&world, &format!("https://127.0.0.1:{port}"), 0).await;
        for path in ["/v2/up/x/manifests/v1", &format!("/v2/up/x/blobs/{}", Digest::of(b"secret"))] {
            let status = near.get(path).await.status();
            assert!(!status.is_success(), "{status} for {lie}");
        }
        control_plane.stop().await;
    }
    let accepted = tokio::time::timeout(std::time::Duration::from_millis(100), victim.accept()).await;
    assert!(accepted.is_err(), "somebody came");
}
