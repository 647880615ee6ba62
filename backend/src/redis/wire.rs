//! The way to a Redis server: TCP or TLS, and who the node is there.

use std::path::PathBuf;
use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisConnectionInfo, RedisError};
use rustls_pki_types::ServerName;
use selvage_config::node::{KvBackend, RedisAddress};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;

use crate::contact::Wire;
use crate::error::OpenError;
use crate::secret;
use crate::tls::tls_of;

/// A connection: requests go out as they come, and answers come in their order.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(super) line: MultiplexedConnection,
    _driven: Arc<Driven>,
}

/// The task that reads and writes ends with the last handle of its connection.
struct Driven(AbortHandle);

impl Drop for Driven {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where the server is, and who the node is there.
pub(crate) struct RedisWire {
    address: RedisAddress,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    user: Option<String>,
    password_file: Option<PathBuf>,
}

impl RedisWire {
    pub(super) fn new(name: &str, config: &KvBackend) -> Result<Self, OpenError> {
        let backend = || name.to_owned();
        let address = config.redis_address().ok_or_else(|| OpenError::Address { backend: backend() })?;
        if let Some(path) = &config.password_file {
            let (field, path) = ("password_file", path.clone());
            secret::read(&path).map_err(|source| OpenError::Secret { backend: backend(), field, path, source })?;
        }
        let mut tls = None;
        if address.is_tls {
            let named = ServerName::try_from(address.host.clone());
            let named = named.map_err(|_| OpenError::Address { backend: backend() })?;
            tls = Some((TlsConnector::from(Arc::new(tls_of(name, config)?)), named));
        }
        Ok(Self { address, tls, user: config.user.clone(), password_file: config.password_file.clone() })
    }

    async fn log_in<S>(&self, stream: S) -> Result<(Connection, oneshot::Receiver<String>), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut info = RedisConnectionInfo { db: self.address.database, ..RedisConnectionInfo::default() };
        if let Some(path) = &self.password_file {
            info.password = Some(secret::read_aside(path).await?);
        }
        info.username.clone_from(&self.user);
        // Who waits sets the bound: there is none here.
        let entered = MultiplexedConnection::new(&info, stream).await;
        let (mut line, driver) = entered.map_err(|error| why(&error))?;
        let (tell, gone) = oneshot::channel();
        let task = tokio::spawn(async move {
            driver.await;
            // Nobody hears it where the connection was given up before.
            let _ = tell.send("the server closed the connection".to_owned());
        });
        let driven = Arc::new(Driven(task.abort_handle()));
        // A server that wants a password says so only now.
        redis::cmd("PING").exec_async(&mut line).await.map_err(|error| why(&error))?;
        Ok((Connection { line, _driven: driven }, gone))
    }
}

impl Wire for RedisWire {
    type Connection = Connection;

    async fn connect(&self) -> Result<(Connection, oneshot::Receiver<String>), String> {
        let connected = TcpStream::connect((self.address.host.as_str(), self.address.port)).await;
        let tcp = connected.map_err(|error| format!("connect: {error}"))?;
        tcp.set_nodelay(true).map_err(|error| format!("connect: {error}"))?;
        match &self.tls {
            None => self.log_in(tcp).await,
            Some((connector, named)) => {
                let stream = connector.connect(named.clone(), tcp).await;
                self.log_in(stream.map_err(|error| format!("TLS: {error}"))?).await
            }
        }
    }

    async fn ping(&self, connection: &Connection) -> Result<(), String> {
        redis::cmd("PING").exec_async(&mut connection.line.clone()).await.map_err(|error| why(&error))
    }
}

/// Why the server would not have us: its code, never its words, which may repeat what was sent.
fn why(error: &RedisError) -> String {
    match error.kind() {
        ErrorKind::IoError => format!("connection: {error}"),
        kind => {
            let code = error.code().map_or_else(|| format!("{kind:?}"), str::to_owned);
            format!("the server refuses to let this node in ({code})")
        }
    }
}
