//! The public listener, as clients of any name see it.

use rustls::NamedGroup;
use rustls::version::{TLS12, TLS13};
use rustls::{AlertDescription, Error, HandshakeKind, ProtocolVersion, SupportedProtocolVersion};
use selvage_certs::{
    Certificates, FrontSecret, FrontTls, PemFiles, Reload, Resolver, TlsVersions, front_server, provider, provider_of,
};
use selvage_config::node::TlsProvider;

use super::*;

const ALPN: &[&[u8]] = &[b"h2", b"http/1.1"];

/// A browser: it offers what `versions` says and trusts `authority`.
fn browser(authority: &Authority, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots(authority))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2".to_vec()];
    Arc::new(config)
}

fn front(table: Certificates, versions: TlsVersions) -> Arc<ServerConfig> {
    front_server(&tls(Arc::new(Resolver::new(table)), FrontSecret::random().unwrap()), ALPN, versions).unwrap()
}

fn tls(resolver: Arc<Resolver>, secret: FrontSecret) -> FrontTls {
    FrontTls {
        resolver,
        provider: TlsProvider::default(),
        secret,
        versions: TlsVersions::Only13,
        has_challenges: false,
        has_early_data: false,
        rules: Arc::default(),
    }
}

#[tokio::test]
async fn every_name_is_shown_its_own_certificate() {
    let authority = Authority::create("public").unwrap();
    let exact = server_identity(&authority, "a.shop.test");
    let wildcard = server_identity(&authority, "*.shop.test");
    let server = front(Certificates::of([&exact, &wildcard]).unwrap(), TlsVersions::Only13);
    let client = browser(&authority, &[&TLS13]);
    for (name, identity) in [("a.shop.test", &exact), ("A.SHOP.TEST", &exact), ("b.shop.test", &wildcard)] {
        let handshake = handshake(&client, &server, name).await;
        assert_eq!(handshake.shown(), identity.chain()[0], "{name}");
        let (_, connection) = handshake.server.as_ref().unwrap().get_ref();
        assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
    }
}

#[tokio::test]
async fn an_unknown_name_has_no_handshake() {
    let authority = Authority::create("public").unwrap();
    let wildcard = server_identity(&authority, "*.shop.test");
    let server = front(Certificates::of([&wildcard]).unwrap(), TlsVersions::From12);
    let client = browser(&authority, &[&TLS13, &TLS12]);
    for name in ["shop.test", "a.b.shop.test", "other.test", "127.0.0.1"] {
        let refused = handshake(&client, &server, name).await;
        let alert = refused.client_error();
        assert!(matches!(alert, Error::AlertReceived(AlertDescription::AccessDenied)), "{name}: {alert:?}");
        assert!(refused.is_refused());
    }
}

#[tokio::test]
async fn a_client_without_a_name_is_shown_the_default() {
    let authority = Authority::create("public").unwrap();
    let default = authority.issue_server(&[], &[[127, 0, 0, 1].into()]).unwrap();
    let table = Certificates::of([&server_identity(&authority, "shop.test")]).unwrap();
    let server = front(table.with_default(&default), TlsVersions::Only13);
    let handshake = handshake(&browser(&authority, &[&TLS13]), &server, "127.0.0.1").await;
    assert_eq!(handshake.shown(), default.chain()[0]);
}

#[tokio::test]
async fn tls_1_2_is_spoken_only_where_it_is_allowed() {
    let authority = Authority::create("public").unwrap();
    let table = Certificates::of([&server_identity(&authority, "shop.test")]).unwrap();
    let old = browser(&authority, &[&TLS12]);
    let refused = handshake(&old, &front(table.clone(), TlsVersions::Only13), "shop.test").await;
    assert!(matches!(refused.server_error(), Error::PeerIncompatible(_)));
    assert!(refused.is_refused());
    let server = front(table, TlsVersions::From12);
    for (client, version) in
        [(old, ProtocolVersion::TLSv1_2), (browser(&authority, &[&TLS12, &TLS13]), ProtocolVersion::TLSv1_3)]
    {
        let handshake = handshake(&client, &server, "shop.test").await;
        let (_, connection) = handshake.client.as_ref().unwrap().get_ref();
        assert_eq!(connection.protocol_version(), Some(version));
    }
}

#[tokio::test]
async fn a_session_is_resumed_but_takes_no_early_data() {
    let authority = Authority::create("public").unwrap();
    let table = Certificates::of([&server_identity(&authority, "shop.test")]).unwrap();
    let server = front(table, TlsVersions::Only13);
    let mut client = Arc::unwrap_or_clone(browser(&authority, &[&TLS13]));
    client.enable_early_data = true;
    let client = Arc::new(client);
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let handshake = handshake(&client, &server, "shop.test").await;
        let (_, connection) = handshake.client.as_ref().unwrap().get_ref();
        assert_eq!(connection.handshake_kind(), Some(expected));
        assert!(!connection.is_early_data_accepted());
    }
    let name = ServerName::try_from("shop.test").unwrap();
    let mut again = rustls::ClientConnection::new(client, name).unwrap();
    assert!(again.early_data().is_none());
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_a_bad_one_is_not() {
    let authority = Authority::create("public").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = PemFiles { certificate: directory.path().join("shop.pem"), key: directory.path().join("shop-key.pem") };
    let (first, second) = (server_identity(&authority, "shop.test"), server_identity(&authority, "shop.test"));
    first.save(&files.certificate, &files.key).unwrap();
    let mut reload = Reload::open(vec![files.clone()], None, TlsProvider::default()).unwrap();
    let tls = tls(reload.resolver(), FrontSecret::random().unwrap());
    let server = front_server(&tls, ALPN, TlsVersions::Only13).unwrap();
    // A new client each time, so that no session is resumed.
    let shown = async || handshake(&browser(&authority, &[&TLS13]), &server, "shop.test").await.shown();
    assert_eq!(shown().await, first.chain()[0]);

    std::fs::write(&files.certificate, "nonsense").unwrap();
    reload.reload().unwrap_err();
    assert_eq!(shown().await, first.chain()[0]);

    second.save(&files.certificate, &files.key).unwrap();
    reload.reload().unwrap();
    assert_eq!(shown().await, second.chain()[0]);
}

/// How the handshakes of one client with these servers, one after the other, went.
async fn kinds(client: &Arc<ClientConfig>, servers: &[&Arc<ServerConfig>]) -> Vec<HandshakeKind> {
    let mut kinds = Vec::new();
    for server in servers {
        let handshake = handshake(client, server, "shop.test").await;
        kinds.push(handshake.client.as_ref().unwrap().get_ref().1.handshake_kind().unwrap());
    }
    kinds
}

#[tokio::test]
async fn a_session_is_resumed_at_every_node_with_the_same_secret_and_at_no_other() {
    let authority = Authority::create("public").unwrap();
    let table = Certificates::of([&server_identity(&authority, "shop.test")]).unwrap();
    let secret = FrontSecret::random().unwrap();
    let server = |secret: &FrontSecret, versions| {
        let tls = tls(Arc::new(Resolver::new(table.clone())), secret.clone());
        front_server(&tls, ALPN, versions).unwrap()
    };
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let of = |secret| server(secret, TlsVersions::From12);
        let (one, other, stranger) = (of(&secret), of(&secret), of(&FrontSecret::random().unwrap()));
        let client = browser(&authority, versions);
        use HandshakeKind::{Full, Resumed};
        assert_eq!(kinds(&client, &[&one, &other, &one, &stranger]).await, [Full, Resumed, Resumed, Full]);
    }
}

#[tokio::test]
async fn a_ticket_of_one_name_is_not_taken_for_another() {
    let authority = Authority::create("public").unwrap();
    let server = front(Certificates::of([&server_identity(&authority, "*.shop.test")]).unwrap(), TlsVersions::Only13);
    let client = browser(&authority, &[&TLS13]);
    for name in ["a.shop.test", "b.shop.test"] {
        let handshake = handshake(&client, &server, name).await;
        let (_, connection) = handshake.server.as_ref().unwrap().get_ref();
        assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full), "{name}");
    }
}

#[tokio::test]
async fn the_hybrid_group_is_agreed_on_where_both_have_it() {
    let authority = Authority::create("public").unwrap();
    let table = Certificates::of([&server_identity(&authority, "shop.test")]).unwrap();
    for (server, client, group) in [
        (TlsProvider::AwsLcRs, TlsProvider::AwsLcRs, NamedGroup::X25519MLKEM768),
        (TlsProvider::AwsLcRs, TlsProvider::Ring, NamedGroup::X25519),
        (TlsProvider::Ring, TlsProvider::AwsLcRs, NamedGroup::X25519),
    ] {
        let resolver = Arc::new(Resolver::new(table.clone()));
        let tls = FrontTls { provider: server, ..tls(resolver, FrontSecret::random().unwrap()) };
        let server = front_server(&tls, ALPN, TlsVersions::Only13).unwrap();
        let client = ClientConfig::builder_with_provider(provider_of(client))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots(&authority))
            .with_no_client_auth();
        let handshake = handshake(&Arc::new(client), &server, "shop.test").await;
        let (_, connection) = handshake.server.as_ref().unwrap().get_ref();
        assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), group);
    }
}
