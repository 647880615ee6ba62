//! The handshake of TLS over TCP, by the rule of the name that a client asks for.

use std::io;
use std::sync::Arc;

use rustls::server::Acceptor;
use selvage_certs::FrontServers;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use crate::names::Session;

/// Shakes hands. The session is told only where names differ.
pub(super) async fn handshake(
    servers: &FrontServers,
    tcp: TcpStream,
) -> io::Result<(TlsStream<TcpStream>, Option<Arc<Session>>)> {
    if let Some(only) = servers.only() {
        return Ok((TlsAcceptor::from(Arc::clone(only)).accept(tcp).await?, None));
    }
    let start = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
    let (server, rule) = servers.choose(&start.client_hello());
    let rule = rule.cloned();
    let tls = start.into_stream(server).await?;
    let shown = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let session = Session::new(rule, shown);
    Ok((tls, Some(Arc::new(session))))
}
