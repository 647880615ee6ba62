//! The clients that send as many requests as go: `h2load`, and one of our own for HTTP/3.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::{Buf, Bytes};
use h3::client::SendRequest;
use h3_quinn::OpenStreams;
use quinn::crypto::rustls::QuicClientConfig;
use tokio::task::JoinSet;

use super::{HOST, Kind, LARGE_BYTES, MIB_PATH, SMALL_BYTES, shakes};
use crate::figures::CLIENT_CORE;

/// A version of HTTP, over TLS or QUIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    H1,
    H2,
    H3,
}

impl Version {
    pub(crate) const ALL: [Self; 3] = [Self::H1, Self::H2, Self::H3];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::H1 => "HTTP/1.1, TLS",
            Self::H2 => "HTTP/2, TLS",
            Self::H3 => "HTTP/3",
        }
    }

    /// Whether this server speaks it. Debian's nginx has no HTTP/3.
    pub(crate) fn is_of(self, kind: Kind) -> bool {
        kind != Kind::Rustls && (self != Self::H3 || kind != Kind::Nginx)
    }

    /// Connections, and requests of each at once, for small answers and for large ones.
    fn crowd(self, is_large: bool) -> (usize, usize) {
        match (self, is_large) {
            (Self::H1, false) => (64, 1),
            (Self::H1, true) => (8, 1),
            (_, false) => (4, 32),
            (_, true) => (4, 2),
        }
    }
}

/// A client of one server.
pub(crate) struct Client<'a> {
    pub(crate) version: Version,
    pub(crate) port: u16,
    pub(crate) path: &'a str,
}

impl Client<'_> {
    /// Sends for so long. Returns how many requests were answered well, which must be all.
    pub(crate) fn run(&self, duration: Duration) -> anyhow::Result<f64> {
        let (connections, streams) = self.version.crowd(self.path == MIB_PATH);
        if self.version == Version::H3 {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            return runtime.block_on(self.run_h3(duration, connections, streams));
        }
        let seconds = duration.as_secs_f64().ceil();
        let mut command = Command::new("taskset");
        command.args(["-c", CLIENT_CORE, "h2load", "-D", &seconds.to_string(), "-c", &connections.to_string()]);
        command.args(["-m", &streams.to_string(), &format!("--connect-to=127.0.0.1:{}", self.port)]);
        if self.version == Version::H1 {
            command.arg("--h1");
        }
        let output = command.arg(format!("https://{HOST}:{}{}", self.port, self.path)).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "h2load: {}", String::from_utf8_lossy(&output.stderr));
        let line = text.lines().find_map(|line| line.strip_prefix("requests: ")).context("h2load counts nothing")?;
        let count = |what: &str| -> anyhow::Result<f64> {
            let part = line.split(", ").find_map(|part| part.strip_suffix(what)).context("h2load counts otherwise")?;
            Ok(part.trim().parse()?)
        };
        let (done, well) = (count(" done")?, count(" succeeded")?);
        ensure!(done > 0.0 && (done - well).abs() < 0.5, "h2load: {line}");
        // It counts for whole seconds.
        Ok(well * duration.as_secs_f64() / seconds)
    }

    async fn run_h3(&self, duration: Duration, connections: usize, streams: usize) -> anyhow::Result<f64> {
        let crypto = QuicClientConfig::try_from(shakes::client(&selvage_certs::provider(), b"h3")?)?;
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let bytes = if self.path == MIB_PATH { LARGE_BYTES } else { SMALL_BYTES };
        let uri: http::Uri = format!("https://{HOST}{}", self.path).parse()?;
        let end = Instant::now() + duration;
        let (mut asking, mut endpoints) = (JoinSet::new(), Vec::new());
        for _ in 0..connections {
            let endpoint = quinn::Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into())?;
            let quic = endpoint.connect_with(config.clone(), server, HOST)?.await?;
            let quic = h3_quinn::Connection::new(quic);
            let (mut driver, sender) = h3::client::builder().send_grease(false).build(quic).await?;
            // Ends with its connection.
            tokio::spawn(async move { driver.wait_idle().await });
            for _ in 0..streams {
                asking.spawn(ask(sender.clone(), uri.clone(), bytes, end));
            }
            endpoints.push(endpoint);
        }
        let mut count = 0.0;
        while let Some(asked) = asking.join_next().await {
            count += asked??;
        }
        for endpoint in endpoints {
            endpoint.close(0x100_u32.into(), b"");
            endpoint.wait_idle().await;
        }
        Ok(count)
    }
}

/// One request after the other, until the end.
async fn ask(
    mut sender: SendRequest<OpenStreams, Bytes>,
    uri: http::Uri,
    bytes: usize,
    end: Instant,
) -> anyhow::Result<f64> {
    let mut count = 0.0;
    while Instant::now() < end {
        let mut stream = sender.send_request(http::Request::get(uri.clone()).body(())?).await?;
        stream.finish().await?;
        let response = stream.recv_response().await?;
        let mut got = 0;
        while let Some(data) = stream.recv_data().await? {
            got += data.remaining();
        }
        ensure!(response.status() == 200 && got == bytes, "{}, {got} bytes", response.status());
        count += 1.0;
    }
    Ok(count)
}
