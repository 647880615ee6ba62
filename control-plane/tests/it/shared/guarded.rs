//! TLS to the server, and every way to show who one is; and that nobody else gets in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::StatusCode;
use selvage_config::control_plane::ControlPlaneConfig;
use selvage_control_plane::{ControlPlane, StartError};

use super::fleet::{Fleet, until};
use super::guard::{Kind, Nkey, operator, tls};
use super::server::Server;
use crate::world::app;

/// A fleet of two over a server with TLS agrees; whom `others` make of the file is let in nowhere.
async fn agrees(settings: impl FnOnce(&Path) -> (String, String), others: &[fn(&Path, &mut ControlPlaneConfig)]) {
    let mut place = PathBuf::new();
    let Some(server) = Server::start_with(|dir| {
        place = dir.to_owned();
        let (of_server, of_client) = tls(dir);
        let (more, entry) = settings(dir);
        (format!("{of_server}{more}"), format!("{of_client}{entry}"))
    }) else {
        return;
    };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    a.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(a.release("hello", "v1").await.status(), StatusCode::CREATED);
    until("the other knows it", async || b.get("/v2/apps/hello/manifests/v1").await.status() == StatusCode::OK).await;
    let refused = others.iter().enumerate().map(|(number, change)| {
        let mut config = fleet.config(&format!("other-{number}"));
        config.nats.as_mut().unwrap().request_ms = 1_000;
        change(&place, &mut config);
        async move {
            let begun = tokio::time::timeout(Duration::from_secs(60), ControlPlane::start(config)).await.unwrap();
            assert!(matches!(begun.err(), Some(StartError::Shared(_))), "{number}");
        }
    });
    futures_util::future::join_all(refused).await;
    // Those who are in go on.
    assert_eq!(b.get("/api/v1/apps").await.status(), StatusCode::OK);
    fleet.stop().await;
}

/// The public authorities do not vouch for the server, and neither does another one of ours.
fn another_authority(place: &Path, config: &mut ControlPlaneConfig) {
    let other = place.join("other-ca.pem");
    std::fs::write(&other, selvage_certs::Authority::create("other").unwrap().certificate_pem()).unwrap();
    config.nats.as_mut().unwrap().roots = Some(other);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_a_key_over_tls_and_by_no_other_key_or_authority() {
    let user = Nkey::new(Kind::User);
    let settings = |dir: &Path| {
        std::fs::write(dir.join("user.nk"), user.seed()).unwrap();
        let settings = format!("server_name: one\nauthorization {{ users: [ {{ nkey: {} }} ] }}\n", user.public());
        (settings, format!("nkey_file = {:?}\n", dir.join("user.nk")))
    };
    let another_key = |place: &Path, config: &mut ControlPlaneConfig| {
        let other = place.join("other.nk");
        std::fs::write(&other, Nkey::new(Kind::User).seed()).unwrap();
        config.nats.as_mut().unwrap().nkey_file = Some(other);
    };
    let nobody = |_: &Path, config: &mut ControlPlaneConfig| config.nats.as_mut().unwrap().nkey_file = None;
    agrees(settings, &[another_authority, another_key, nobody]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_the_credentials_that_an_operator_gave_and_by_no_others() {
    let (settings, credentials) = operator();
    let settings = |dir: &Path| {
        std::fs::write(dir.join("user.creds"), credentials).unwrap();
        (settings, format!("credentials_file = {:?}\n", dir.join("user.creds")))
    };
    let of_another_operator = |place: &Path, config: &mut ControlPlaneConfig| {
        let other = place.join("other.creds");
        std::fs::write(&other, operator().1).unwrap();
        config.nats.as_mut().unwrap().credentials_file = Some(other);
    };
    agrees(settings, &[of_another_operator]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_a_token_over_tls_and_by_no_other_word() {
    let settings = |dir: &Path| {
        std::fs::write(dir.join("token"), "a-token\n").unwrap();
        let settings = "server_name: one\nauthorization { token: \"a-token\" }\n".to_owned();
        (settings, format!("token_file = {:?}\n", dir.join("token")))
    };
    let another_token = |place: &Path, config: &mut ControlPlaneConfig| {
        std::fs::write(place.join("other"), "b-token\n").unwrap();
        config.nats.as_mut().unwrap().token_file = Some(place.join("other"));
    };
    agrees(settings, &[another_token]).await;
}
