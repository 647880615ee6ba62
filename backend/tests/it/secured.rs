//! TLS to the servers, and who is let in; and that no secret is told to anybody.

use std::net::Ipv4Addr;
use std::path::Path;

use selvage_backend::{Backends, OpenError};
use selvage_certs::Authority;

use super::place::{connected, node, parsed, store, table};
use super::server::{Kind, Server, until};

const PASSWORD: &str = "of-a-test";

/// An authority's certificate, and a server's with its key.
fn certificates(dir: &Path) {
    let authority = Authority::create("servers").unwrap();
    let identity = authority.issue_server(&[], &[Ipv4Addr::LOCALHOST.into()]).unwrap();
    identity.save(dir.join("server.pem"), dir.join("server.key")).unwrap();
    std::fs::write(dir.join("ca.pem"), authority.certificate_pem()).unwrap();
    std::fs::write(dir.join("other-ca.pem"), Authority::create("other").unwrap().certificate_pem()).unwrap();
    std::fs::write(dir.join("password"), format!("{PASSWORD}\n")).unwrap();
}

fn settings(kind: Kind, dir: &Path) -> String {
    certificates(dir);
    match kind {
        Kind::Redis => format!(
            "tls-port PORT\nport 0\ntls-cert-file {0}/server.pem\ntls-key-file {0}/server.key\n\
             tls-ca-cert-file {0}/ca.pem\ntls-auth-clients no\nuser default off\n\
             user node on >{PASSWORD} ~selvage:* &* +@all -@dangerous\n",
            dir.display(),
        ),
        Kind::Nats => format!(
            "tls {{ cert_file: {:?}, key_file: {:?} }}\nauthorization {{ user: node, password: {PASSWORD} }}\n",
            dir.join("server.pem"),
            dir.join("server.key"),
        ),
    }
}

/// The table of a backend that is reached by TLS.
fn secured(kind: Kind, server: &Server, roots: &str, password: &str) -> String {
    let dir = server.dir();
    let more = format!("user = 'node'\npassword_file = {:?}\nroots = {:?}\n", dir.join(password), dir.join(roots));
    table(kind, server.port(), &more).replace("redis://", "rediss://").replace("nats://", "tls://")
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_with_the_right_authority_and_password_and_with_no_other() {
    for kind in [Kind::Redis, Kind::Nats] {
        let Some(server) = Server::start_with(kind, |dir| settings(kind, dir)) else { return };
        let (stores, _dir) = node(&secured(kind, &server, "ca.pem", "password")).await;
        connected(&stores).await;
        let at_first = store(&stores);
        until("it is written", async || at_first.set("k", "v".into()).await.is_ok()).await;
        assert_eq!(at_first.list("", None, 1).await.unwrap(), ["k"]);

        let refused = async |kv: &str, says: &str| {
            let (stores, dir) = node(kv).await;
            until(says, async || stores.status()[0].error.as_ref().is_some_and(|error| error.contains(says))).await;
            let told = format!("{:?}", stores.status());
            assert!(!told.contains(PASSWORD) && !told.contains("hunter2"), "{told}");
            (stores, dir)
        };
        refused(&secured(kind, &server, "other-ca.pem", "password"), "ertificate").await;
        let plain = table(kind, server.port(), "");
        refused(&plain, if kind == Kind::Redis { "connection" } else { "ertificate" }).await;
        std::fs::write(server.dir().join("wrong"), "hunter2\n").unwrap();
        let (stores, _dir) = refused(&secured(kind, &server, "ca.pem", "wrong"), "refuses to let this node in").await;
        assert_eq!(store(&stores).get("k").await.unwrap_err().to_string(), "backend x is away");
        // A new password is read with the next try.
        std::fs::write(server.dir().join("wrong"), PASSWORD).unwrap();
        connected(&stores).await;
        assert_eq!(store(&stores).get("k").await.unwrap().as_deref(), Some(&b"v"[..]));
    }
}

#[tokio::test]
async fn files_that_can_not_be_used_are_told_before_anything_is_connected() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("roots"), "no certificate").unwrap();
    std::fs::write(path("large"), vec![b'x'; 16 * 1_024 + 1]).unwrap();
    let open = |kv: &str| match Backends::open(&parsed(kv)) {
        Err(error) => error,
        Ok(_) => panic!("{kv}"),
    };
    for kind in [Kind::Redis, Kind::Nats] {
        for file in ["none", "large"] {
            let more = format!("user = 'u'\npassword_file = {:?}\n", path(file));
            let error = open(&table(kind, 1, &more));
            assert!(matches!(&error, OpenError::Secret { backend, field: "password_file", .. } if backend == "x"));
            assert!(error.to_string().starts_with("kv.backends.x.password_file: read "), "{error}");
        }
        let roots = format!("roots = {:?}\n", path("roots"));
        let table = table(kind, 1, &roots).replace("redis://", "rediss://");
        assert!(matches!(open(&table), OpenError::Roots { .. }));
    }
}
