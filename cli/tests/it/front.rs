//! What a node's file says of its front, seen from outside.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SignatureScheme};

use crate::by_hand::Fleet;
use crate::peers::have;
use crate::program::{finish, well};

const HOST: &str = "hello.localhost";

fn certificate(path: &Path) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(path).unwrap()
}

/// A second certificate for the same name, with a key of RSA: for clients that know nothing else.
fn make_rsa(directory: &Path) {
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=hello.localhost"]);
    command.args(["-addext", "subjectAltName=DNS:hello.localhost", "-addext", "basicConstraints=critical,CA:FALSE"]);
    command.args(["-keyout", "rsa.key", "-out", "rsa.pem"]).current_dir(directory);
    well("openssl", &finish(&mut command));
}

fn is_rsa(scheme: SignatureScheme) -> bool {
    use SignatureScheme::{RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512};
    [RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512].contains(&scheme)
}

/// The certificate that a client is shown which takes signatures of these kinds.
fn shown(front: SocketAddr, root: &CertificateDer<'static>, takes: impl Fn(SignatureScheme) -> bool) -> Vec<u8> {
    let mut provider = (*selvage_certs::provider()).clone();
    let mut algorithms = provider.signature_verification_algorithms;
    let some: Vec<_> = algorithms.mapping.iter().copied().filter(|(scheme, _)| takes(*scheme)).collect();
    algorithms.mapping = some.leak();
    provider.signature_verification_algorithms = algorithms;
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(provider)).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let mut tls = ClientConnection::new(Arc::new(config), ServerName::try_from(HOST).unwrap()).unwrap();
    let mut tcp = TcpStream::connect(front).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    stream.write_all(b"GET / HTTP/1.1\r\nhost: hello.localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    tls.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn a_trusted_proxy_tells_who_the_client_is_and_old_clients_get_the_key_that_they_know() {
    if !have("openssl") {
        return;
    }
    let tables = "[[certificates]]\ncertificate = \"rsa.pem\"\nkey = \"rsa.key\"\n\
                  [front]\nforwarded_from = [\"127.0.0.0/8\"]\n";
    let fleet = Fleet::start_with_front(tables, make_rsa);
    fleet.deploy_hello();

    let front: SocketAddr = fleet.front().parse().unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&fleet.path("front-ca.pem"))).unwrap();
    let client = reqwest::Client::builder().use_preconfigured_tls(selvage_certs::client(&roots)).no_proxy();
    let client = client.resolve(HOST, front).build().unwrap();
    let url = format!("https://{HOST}:{}/headers", front.port());
    // From the end, for as long as it is a trusted one that wrote.
    for (said, proto, want) in [
        ("6.6.6.6, 192.0.2.7", "https", ("192.0.2.7:", "https://")),
        ("192.0.2.7, 127.0.0.9", "http", ("192.0.2.7:", "http://")),
        ("2001:db8::7", "https", ("[2001:db8::7]:", "https://")),
    ] {
        let request = client.get(&url).header("x-forwarded-for", said).header("x-forwarded-proto", proto);
        let seen = request.send().await.unwrap().text().await.unwrap();
        let seen: serde_json::Value = serde_json::from_str(&seen).unwrap();
        let field = |name: &str| seen[name].as_str().unwrap_or_default().to_owned();
        assert!(field("spin-client-addr").starts_with(want.0), "{said}: {seen}");
        assert!(field("spin-full-url").starts_with(want.1), "{said}: {seen}");
    }

    tokio::task::spawn_blocking(move || {
        let (authority, rsa) = (certificate(&fleet.path("front-ca.pem")), certificate(&fleet.path("rsa.pem")));
        let own = certificate(&fleet.path("front.pem"));
        assert_eq!(shown(front, &rsa, is_rsa), rsa.as_ref());
        assert_eq!(shown(front, &authority, |_| true), own.as_ref(), "the key that costs less goes first");
    })
    .await
    .unwrap();
}
