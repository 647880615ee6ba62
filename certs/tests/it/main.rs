//! Handshakes with what this crate makes, over a pipe in memory.

#![allow(clippy::unwrap_used)]

mod front;
mod mutual;

use std::io;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use selvage_certs::{Authority, Identity, Role};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Bytes in the pipe: more than a handshake's longest flight.
const PIPE_BYTES: usize = 64 * 1024;

type Pipe = tokio::io::DuplexStream;

/// Both ends of a handshake, each with how it went there.
struct Handshake {
    client: io::Result<client::TlsStream<Pipe>>,
    server: io::Result<server::TlsStream<Pipe>>,
}

async fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, name: &str) -> Handshake {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    // In TLS 1.3 a client is done before the server has judged its certificate, so a byte goes both ways.
    let connect = async {
        let mut stream = TlsConnector::from(Arc::clone(client)).connect(name, near).await?;
        stream.write_all(b"?").await?;
        stream.flush().await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let accept = async {
        let mut stream = TlsAcceptor::from(Arc::clone(server)).accept(far).await?;
        stream.read_u8().await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(stream)
    };
    let (client, server) = tokio::join!(connect, accept);
    Handshake { client, server }
}

impl Handshake {
    fn is_refused(&self) -> bool {
        self.client.is_err() && self.server.is_err()
    }

    /// The end-entity certificate that the client was shown.
    fn shown(&self) -> CertificateDer<'static> {
        let (_, connection) = self.client.as_ref().unwrap().get_ref();
        connection.peer_certificates().unwrap()[0].clone().into_owned()
    }

    /// What made the server refuse.
    fn server_error(&self) -> rustls::Error {
        let error = self.server.as_ref().unwrap_err();
        error.get_ref().unwrap().downcast_ref::<rustls::Error>().unwrap().clone()
    }

    /// What made the client refuse.
    fn client_error(&self) -> rustls::Error {
        let error = self.client.as_ref().unwrap_err();
        error.get_ref().unwrap().downcast_ref::<rustls::Error>().unwrap().clone()
    }
}

fn node(name: &str) -> Role {
    Role::Node { region: "fra".parse().unwrap(), node: name.parse().unwrap() }
}

fn roots(authority: &Authority) -> RootCertStore {
    selvage_certs::roots_of(&[authority.certificate_der()]).unwrap()
}

fn identity(authority: &Authority, role: &Role) -> Identity {
    authority.issue_identity(role, &[[127, 0, 0, 1].into()], &["localhost".to_owned()]).unwrap()
}

fn server_identity(authority: &Authority, name: &str) -> Identity {
    authority.issue_server(&[name.to_owned()], &[]).unwrap()
}
