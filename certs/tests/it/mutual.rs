//! Nodes, the control plane and operators among themselves.

use rustls::{AlertDescription, CertificateError, Error, ProtocolVersion};
use rustls_pki_types::UnixTime;
use selvage_certs::{
    ClientAuth, Enrolment, TlsError, client, mutual_client, mutual_server, peer_of, peer_role, roots_of,
};

use super::*;

struct Fleet {
    authority: Authority,
    roots: RootCertStore,
    server: Arc<ServerConfig>,
}

/// A control plane that wants a certificate, or takes one.
fn fleet(auth: ClientAuth) -> Fleet {
    let authority = Authority::create("fleet").unwrap();
    let roots = roots(&authority);
    let server = mutual_server(&identity(&authority, &Role::ControlPlane), &roots, auth).unwrap();
    Fleet { authority, roots, server }
}

fn role_seen(handshake: &Handshake) -> Option<Role> {
    let (_, connection) = handshake.server.as_ref().unwrap().get_ref();
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    peer_of(connection.peer_certificates()).unwrap()
}

#[tokio::test]
async fn both_ends_learn_who_the_other_is() {
    let fleet = fleet(ClientAuth::Required);
    let operator = Role::Operator { name: "ada".parse().unwrap() };
    for role in [node("fra-1"), Role::ControlPlane, operator] {
        let client = mutual_client(&identity(&fleet.authority, &role), &fleet.roots).unwrap();
        let handshake = handshake(&client, &fleet.server, &Role::ControlPlane.tls_name()).await;
        assert_eq!(role_seen(&handshake), Some(role));
        assert_eq!(peer_role(&handshake.shown()).unwrap(), Role::ControlPlane);
    }
}

#[tokio::test]
async fn a_server_is_reached_by_its_address_its_name_or_its_role() {
    let fleet = fleet(ClientAuth::Required);
    let client = mutual_client(&identity(&fleet.authority, &node("a")), &fleet.roots).unwrap();
    for name in ["127.0.0.1", "localhost", "control-plane.selvage.internal"] {
        assert!(handshake(&client, &fleet.server, name).await.client.is_ok(), "{name}");
    }
    for name in ["127.0.0.2", "a.node.selvage.internal", "other.test"] {
        let refused = handshake(&client, &fleet.server, name).await;
        let error = refused.client_error();
        let expected = matches!(
            error,
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            )
        );
        assert!(expected && refused.is_refused(), "{name}: {error:?}");
    }
}

#[tokio::test]
async fn a_client_of_another_authority_is_refused() {
    for auth in [ClientAuth::Required, ClientAuth::Optional] {
        let fleet = fleet(auth);
        // It bears the same name, so only the key tells them apart.
        let other = Authority::create("fleet").unwrap();
        let client = mutual_client(&identity(&other, &Role::ControlPlane), &fleet.roots).unwrap();
        let refused = handshake(&client, &fleet.server, "localhost").await;
        assert!(matches!(refused.server_error(), Error::InvalidCertificate(_)));
        assert!(refused.is_refused());
    }
}

#[tokio::test]
async fn a_server_of_another_authority_is_refused() {
    let fleet = fleet(ClientAuth::Optional);
    let other = Authority::create("other").unwrap();
    let with = mutual_client(&identity(&fleet.authority, &node("a")), &roots(&other)).unwrap();
    for client in [with, Arc::new(client(&roots(&other)))] {
        let refused = handshake(&client, &fleet.server, "localhost").await;
        let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        assert_eq!(refused.client_error(), unknown);
        assert!(refused.is_refused());
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused_where_one_is_required() {
    let fleet = fleet(ClientAuth::Required);
    let client = Arc::new(client(&fleet.roots));
    let refused = handshake(&client, &fleet.server, "localhost").await;
    assert_eq!(refused.server_error(), Error::NoCertificatesPresented);
    assert_eq!(refused.client_error(), Error::AlertReceived(AlertDescription::CertificateRequired));
}

#[tokio::test]
async fn a_client_without_a_certificate_is_nobody_where_one_is_optional() {
    let fleet = fleet(ClientAuth::Optional);
    let without = Arc::new(client(&fleet.roots));
    assert_eq!(role_seen(&handshake(&without, &fleet.server, "localhost").await), None);
    let with = mutual_client(&identity(&fleet.authority, &node("a")), &fleet.roots).unwrap();
    assert_eq!(role_seen(&handshake(&with, &fleet.server, "localhost").await), Some(node("a")));
}

#[tokio::test]
async fn a_public_servers_certificate_is_no_clients() {
    let fleet = fleet(ClientAuth::Optional);
    let public = server_identity(&fleet.authority, "shop.test");
    let client = mutual_client(&public, &fleet.roots).unwrap();
    let refused = handshake(&client, &fleet.server, "localhost").await;
    assert!(matches!(refused.server_error(), Error::InvalidCertificate(_)));
    assert!(refused.is_refused());
}

#[tokio::test]
async fn an_operator_is_no_server() {
    let fleet = fleet(ClientAuth::Required);
    let operator = Role::Operator { name: "ada".parse().unwrap() };
    let server = mutual_server(&identity(&fleet.authority, &operator), &fleet.roots, ClientAuth::Optional).unwrap();
    let refused = handshake(&Arc::new(client(&fleet.roots)), &server, &operator.tls_name()).await;
    assert!(matches!(refused.client_error(), Error::InvalidCertificate(_)));
    assert!(refused.is_refused());
}

#[tokio::test]
async fn an_enrolled_node_is_let_in() {
    let fleet = fleet(ClientAuth::Required);
    let enrolment = Enrolment::create().unwrap();
    let chain = fleet.authority.certify(enrolment.request(), &node("new"), &[], &[]).unwrap();
    let client = mutual_client(&enrolment.finish(chain).unwrap(), &fleet.roots).unwrap();
    assert_eq!(role_seen(&handshake(&client, &fleet.server, "localhost").await), Some(node("new")));
}

#[tokio::test]
async fn an_authority_that_was_opened_again_is_trusted_as_before() {
    let directory = tempfile::tempdir().unwrap();
    let before = Authority::open_or_create(directory.path()).unwrap();
    let server = mutual_server(&identity(&before, &Role::ControlPlane), &roots(&before), ClientAuth::Required).unwrap();
    let after = Authority::open_or_create(directory.path()).unwrap();
    let client = mutual_client(&identity(&after, &node("a")), &roots(&after)).unwrap();
    assert_eq!(role_seen(&handshake(&client, &server, "localhost").await), Some(node("a")));
}

#[tokio::test]
async fn two_authorities_are_trusted_while_one_follows_the_other() {
    let (old, new) = (Authority::create("fleet").unwrap(), Authority::create("fleet").unwrap());
    let both = roots_of(&[old.certificate_der(), new.certificate_der()]).unwrap();
    let server = mutual_server(&identity(&old, &Role::ControlPlane), &both, ClientAuth::Required).unwrap();
    for authority in [&old, &new] {
        let client = mutual_client(&identity(authority, &node("a")), &both).unwrap();
        assert_eq!(role_seen(&handshake(&client, &server, "localhost").await), Some(node("a")));
    }
}

#[tokio::test]
async fn nothing_is_resumed() {
    let fleet = fleet(ClientAuth::Required);
    let client = mutual_client(&identity(&fleet.authority, &node("a")), &fleet.roots).unwrap();
    for _ in 0..3 {
        let handshake = handshake(&client, &fleet.server, "localhost").await;
        let (_, connection) = handshake.client.as_ref().unwrap().get_ref();
        assert_eq!(connection.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(connection.tls13_tickets_received(), 0);
    }
}

#[test]
fn without_roots_there_is_no_configuration() {
    let identity = identity(&Authority::create("fleet").unwrap(), &node("a"));
    let none = RootCertStore::empty();
    assert!(matches!(mutual_client(&identity, &none), Err(TlsError::NoRoots)));
    assert!(matches!(mutual_server(&identity, &none, ClientAuth::Optional), Err(TlsError::NoRoots)));
    assert!(matches!(roots_of(&[]), Err(TlsError::NoRoots)));
    let nonsense = CertificateDer::from(vec![0; 8]);
    assert!(matches!(roots_of(&[nonsense]), Err(TlsError::Root { position: 1, .. })));
}

/// Clocks of a fleet may differ by minutes when a certificate is new, and by no more.
#[test]
fn a_certificate_that_is_valid_later_by_a_clock_that_is_behind_is_taken_for_five_minutes_of_it() {
    let authority = Authority::create("fleet").unwrap();
    let roots = Arc::new(roots(&authority));
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots, selvage_certs::provider()).build();
    let (verifier, identity) = (verifier.unwrap(), identity(&authority, &node("a")));
    let by_a_clock_behind = |seconds: u64| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let shown = UnixTime::since_unix_epoch(now - std::time::Duration::from_secs(seconds));
        verifier.verify_client_cert(&identity.chain()[0], &[], shown)
    };
    assert!(by_a_clock_behind(0).is_ok() && by_a_clock_behind(240).is_ok());
    for seconds in [360, 3_600, 30 * 86_400] {
        let refused = by_a_clock_behind(seconds).unwrap_err();
        let is_early = matches!(
            refused,
            Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. })
        );
        assert!(is_early, "{seconds}: {refused:?}");
    }
}
