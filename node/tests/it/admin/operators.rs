//! Who is let in with which certificate: what the signed plan says, and nothing else.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::ServerName;
use selvage_certs::{Authority, ClientAuth, Role, mutual_client, mutual_server, roots_of};
use selvage_config::operator::{OperatorRights, OperatorRole, Operators};
use selvage_config::snapshot::Snapshot;
use selvage_node::admin::{Access, Admin};
use selvage_node::release::ledger::Ledger;
use selvage_node::release::plan::now_ms;
use selvage_node::release::state::State;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{any, parts};
use crate::release::signed::Signed;

/// A node's listener with mTLS, and the ledger of the plans that the node takes.
struct Listening {
    _directories: (TempDir, TempDir),
    authority: Authority,
    roots: RootCertStore,
    signed: Signed,
    ledger: Ledger,
    admin: Admin,
}

fn operator(name: &str) -> Role {
    Role::Operator { name: name.parse().unwrap() }
}

fn node() -> Role {
    Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() }
}

fn list(operators: &[(&str, OperatorRole, Option<&str>)]) -> Operators {
    let rights = |role, app: Option<&str>| OperatorRights { role, apps: app.map(|app| [app.parse().unwrap()].into()) };
    operators.iter().map(|(name, role, app)| ((*name).to_owned(), rights(*role, *app))).collect()
}

impl Listening {
    async fn start(named: Operators) -> Self {
        let authority = Authority::create("test").unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        let identity = authority.issue_identity(&node(), &[], &[]).unwrap();
        let tls = mutual_server(&identity, &roots, ClientAuth::Required).unwrap();
        let (signed, state) = (Signed::new(), tempfile::tempdir().unwrap());
        let ledger = Ledger::open(&signed.sign_root(&signed.root), State::open(state.path()).unwrap()).unwrap();
        let (directory, mut parts) = parts().await;
        parts.access = Access::new(Some(ledger.clone()), named);
        let admin = Admin::bind(any(), Some(tls), parts).await.unwrap();
        Self { _directories: (directory, state), authority, roots, signed, ledger, admin }
    }

    /// The node takes a plan that says this of operators.
    fn takes(&self, version: u64, operators: Option<Operators>) {
        self.takes_snapshot(&Snapshot { operators, ..self.signed.snapshot(version, &[]) });
    }

    fn takes_snapshot(&self, snapshot: &Snapshot) {
        self.ledger.accept(&self.signed.plan(snapshot), now_ms()).unwrap();
    }

    async fn connect(&self, role: &Role) -> SendRequest<Full<Bytes>> {
        let identity = self.authority.issue_identity(role, &[], &[]).unwrap();
        let connector = TlsConnector::from(mutual_client(&identity, &self.roots).unwrap());
        let tcp = TcpStream::connect(self.admin.address()).await.unwrap();
        let stream = connector.connect(ServerName::try_from(node().tls_name()).unwrap(), tcp).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    async fn ask(&self, role: &Role, method: &str, path: &str) -> (u16, String) {
        ask(&mut self.connect(role).await, method, path).await
    }
}

async fn ask(sender: &mut SendRequest<Full<Bytes>>, method: &str, path: &str) -> (u16, String) {
    let body = if path == "/peers/isolation" { r#"{"on":false}"# } else { "v" };
    let request = http::Request::builder().method(method).uri(path).header("host", node().tls_name());
    let answer = sender.send_request(request.body(Full::from(body)).unwrap()).await.unwrap();
    let (head, body) = answer.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (head.status.as_u16(), String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test]
async fn an_operator_may_what_its_role_and_apps_say_and_nothing_else() {
    let listening = Listening::start(Operators::new()).await;
    listening.takes(
        1,
        Some(list(&[
            ("reader", OperatorRole::Read, None),
            ("deployer", OperatorRole::Deploy, None),
            ("admin", OperatorRole::Admin, None),
            ("shopper", OperatorRole::Deploy, Some("shop")),
            ("shop-admin", OperatorRole::Admin, Some("shop")),
            ("shop-reader", OperatorRole::Read, Some("shop")),
        ])),
    );
    let asked = [
        ("GET", "/status"),
        ("GET", "/metrics"),
        ("GET", "/peers"),
        ("PUT", "/kv/shop/default/k"),
        ("GET", "/kv/shop/default/k"),
        ("GET", "/kv/shop/default"),
        ("GET", "/kv/shop/default?watch=now"),
        ("PUT", "/kv/bank/default/k"),
        ("GET", "/kv/bank/default/k"),
        ("GET", "/kv/bank/default"),
        ("DELETE", "/kv/bank/default/k"),
        ("POST", "/peers/isolation"),
    ];
    let _ = listening.ask(&operator("admin"), "PUT", "/kv/shop/default/k").await;
    let (ok, wrote, no) = (200, 204, 403);
    for (name, want) in [
        ("admin", [ok, ok, ok, wrote, ok, ok, ok, wrote, ok, ok, wrote, ok]),
        ("deployer", [ok, ok, ok, wrote, ok, ok, ok, wrote, ok, ok, wrote, no]),
        ("reader", [ok, ok, ok, no, ok, ok, ok, no, 404, ok, no, no]),
        ("shopper", [ok, ok, ok, wrote, ok, ok, ok, no, no, no, no, no]),
        ("shop-admin", [ok, ok, ok, wrote, ok, ok, ok, no, no, no, no, no]),
        ("shop-reader", [ok, ok, ok, no, ok, ok, ok, no, no, no, no, no]),
        ("stranger", [no; 12]),
    ] {
        for ((method, path), want) in asked.iter().zip(want) {
            let (code, text) = listening.ask(&operator(name), method, path).await;
            assert_eq!(code, want, "{name} {method} {path}: {text}");
            assert!(code != no || text.contains(name) && text.contains("hint"), "{text}");
        }
    }
}

#[tokio::test]
async fn a_peer_and_the_control_plane_are_not_let_in() {
    let listening = Listening::start(list(&[("control-plane", OperatorRole::Admin, None)])).await;
    for role in [node(), Role::ControlPlane] {
        for (method, path) in [("GET", "/status"), ("GET", "/healthz"), ("PUT", "/kv/shop/default/k")] {
            assert_eq!(listening.ask(&role, method, path).await.0, 403, "{role} {path}");
        }
    }
}

#[tokio::test]
async fn a_removed_operator_loses_access_with_the_next_plan_on_an_open_connection_too() {
    let listening = Listening::start(list(&[("ada", OperatorRole::Admin, None)])).await;
    listening.takes(1, Some(list(&[("ada", OperatorRole::Admin, None), ("bob", OperatorRole::Read, None)])));
    let mut open = listening.connect(&operator("ada")).await;
    assert_eq!(ask(&mut open, "PUT", "/kv/shop/default/k").await.0, 204);
    listening.takes(2, Some(list(&[("ada", OperatorRole::Read, None)])));
    let (code, text) = ask(&mut open, "PUT", "/kv/shop/default/k").await;
    assert!(code == 403 && text.contains("has the role read, this takes deploy"), "{code} {text}");
    assert_eq!(ask(&mut open, "GET", "/kv/shop/default/k").await.0, 200);
    assert_eq!(listening.ask(&operator("bob"), "GET", "/status").await.0, 403);
    // The node's own file does not bring it back.
    listening.takes(3, Some(Operators::new()));
    assert_eq!(ask(&mut open, "GET", "/status").await.0, 403);
    assert_eq!(listening.ask(&operator("ada"), "GET", "/healthz").await.0, 403);
}

#[tokio::test]
async fn without_a_list_only_those_are_let_in_whom_the_nodes_file_names() {
    let listening = Listening::start(list(&[("ada", OperatorRole::Deploy, Some("shop"))])).await;
    // No plan yet, and then one as control planes wrote them before there were lists.
    for version in [0, 1] {
        if version > 0 {
            listening.takes(version, None);
        }
        let (code, text) = listening.ask(&operator("bob"), "GET", "/status").await;
        assert!(code == 403 && text.contains("no signed plan says yet"), "{code} {text}");
        assert_eq!(listening.ask(&operator("ada"), "PUT", "/kv/shop/default/k").await.0, 204);
        assert_eq!(listening.ask(&operator("ada"), "PUT", "/kv/bank/default/k").await.0, 403);
        assert_eq!(listening.ask(&operator("ada"), "POST", "/peers/isolation").await.0, 403);
    }
    listening.takes(2, Some(list(&[("bob", OperatorRole::Read, None)])));
    assert_eq!(listening.ask(&operator("ada"), "GET", "/status").await.0, 403);
    assert_eq!(listening.ask(&operator("bob"), "GET", "/status").await.0, 200);
}

#[tokio::test]
async fn a_revoked_operators_certificate_is_worth_nothing_whatever_later_lists_say() {
    let listening = Listening::start(Operators::new()).await;
    let operators = Some(list(&[("ada", OperatorRole::Admin, None)]));
    let mut snapshot = Snapshot { operators: operators.clone(), ..listening.signed.snapshot(1, &[]) };
    listening.takes_snapshot(&snapshot);
    assert_eq!(listening.ask(&operator("ada"), "GET", "/status").await.0, 200);
    snapshot.version = 2;
    snapshot.revoked.identities.insert(operator("ada").uri());
    listening.takes_snapshot(&snapshot);
    let (code, text) = listening.ask(&operator("ada"), "GET", "/status").await;
    assert!(code == 403 && text.contains("revoked"), "{code} {text}");
    listening.takes(3, operators);
    assert_eq!(listening.ask(&operator("ada"), "GET", "/status").await.0, 403);
}

#[tokio::test]
async fn the_list_outlives_the_program() {
    let (signed, state) = (Signed::new(), tempfile::tempdir().unwrap());
    let open = || Ledger::open(&signed.sign_root(&signed.root), State::open(state.path()).unwrap()).unwrap();
    let operators = Some(list(&[("ada", OperatorRole::Read, None)]));
    let ledger = open();
    ledger.accept(&signed.plan(&Snapshot { operators, ..signed.snapshot(1, &[]) }), now_ms()).unwrap();
    ledger.keep().unwrap();
    let access = Access::new(Some(open()), list(&[("bob", OperatorRole::Admin, None)]));
    let admitted = |name: &str| access.admit(&name.parse().unwrap(), &http::Method::GET, "/status").is_ok();
    assert_eq!((admitted("ada"), admitted("bob")), (true, false));
}
