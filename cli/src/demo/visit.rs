//! One request over a chosen HTTP version, as the tour's stops make them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use miette::Report;
use quinn::crypto::rustls::QuicClientConfig;
use reqwest::Method;
use selvage_certs::roots_from_pem;

use super::fleet::Fleet;
use crate::output::{failed, failure};

/// Longest time for one visit.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Largest answer that is read, bytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// A version of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    H1,
    H2,
    H3,
}

impl Version {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::H1, Self::H2, Self::H3];
}

/// What came back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// `selvage-outcome`, if the node itself answered.
    pub(super) outcome: Option<String>,
    /// `www-authenticate`.
    pub(super) challenge: Option<String>,
    pub(super) body: String,
}

/// A visitor of a fleet's fronts.
pub(super) struct Visitor {
    tls: rustls::ClientConfig,
}

/// What to ask for.
#[derive(Debug, Clone)]
pub(super) struct Visit<'a> {
    pub(super) version: Version,
    pub(super) method: Method,
    /// The app: its host is `<app>.localhost`.
    pub(super) app: &'a str,
    pub(super) path: &'a str,
    pub(super) token: Option<&'a str>,
    pub(super) body: &'a str,
}

impl<'a> Visit<'a> {
    /// A GET over HTTP/2.
    pub(super) fn get(app: &'a str, path: &'a str) -> Self {
        Self { version: Version::H2, method: Method::GET, app, path, token: None, body: "" }
    }
}

impl Visitor {
    /// A visitor who trusts the fleet's authority.
    pub(super) fn of(fleet: &Fleet) -> Result<Self, Report> {
        let roots = roots_from_pem(fleet.certs().join("ca.pem"));
        let roots = roots.map_err(|error| failure("load the demo's authority", &error, None))?;
        Ok(Self { tls: selvage_certs::client(&roots) })
    }

    /// Makes a visit to the front at `address`.
    pub(super) async fn visit(&self, address: SocketAddr, visit: &Visit<'_>) -> Result<Answer, Report> {
        let made = tokio::time::timeout(TIMEOUT, async {
            match visit.version {
                Version::H3 => self.over_quic(address, visit).await,
                _ => self.over_tcp(address, visit).await,
            }
        });
        made.await.map_err(|_| failed(format!("no answer within {} s", TIMEOUT.as_secs()), None))?
    }

    async fn over_tcp(&self, address: SocketAddr, visit: &Visit<'_>) -> Result<Answer, Report> {
        let failed = |error| {
            failure(&format!("visit {}.localhost over {:?}", visit.app, visit.version), &error as &reqwest::Error, None)
        };
        let mut tls = self.tls.clone();
        let host = format!("{}.localhost", visit.app);
        let builder = reqwest::Client::builder().no_proxy().resolve(&host, address);
        let builder = if visit.version == Version::H1 {
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            builder.http1_only()
        } else {
            tls.alpn_protocols = vec![b"h2".to_vec()];
            builder.http2_prior_knowledge()
        };
        let client = builder.use_preconfigured_tls(tls).build().map_err(failed)?;
        let url = format!("https://{host}:{}{}", address.port(), visit.path);
        let mut request = client.request(visit.method.clone(), url).body(visit.body.to_owned());
        if let Some(token) = visit.token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.map_err(failed)?;
        let field = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (status, outcome) = (response.status().as_u16(), field("selvage-outcome"));
        let challenge = field("www-authenticate");
        let body = response.text().await.map_err(failed)?;
        Ok(Answer { status, outcome, challenge, body })
    }

    async fn over_quic(&self, address: SocketAddr, visit: &Visit<'_>) -> Result<Answer, Report> {
        let made = self.quic(address, visit).await;
        made.map_err(|error| failure(&format!("visit {}.localhost over H3", visit.app), error.as_ref(), None))
    }

    async fn quic(
        &self,
        address: SocketAddr,
        visit: &Visit<'_>,
    ) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        let mut tls = self.tls.clone();
        tls.alpn_protocols = vec![b"h3".to_vec()];
        let mut endpoint = quinn::Endpoint::client(SocketAddr::new(address.ip(), 0))?;
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)));
        let host = format!("{}.localhost", visit.app);
        let connection = endpoint.connect(address, &host)?.await?;
        let (mut driver, mut sender) = h3::client::new(h3_quinn::Connection::new(connection)).await?;
        let driving = tokio::spawn(async move { driver.wait_idle().await });
        let url = format!("https://{host}:{}{}", address.port(), visit.path);
        let mut request = http::Request::builder().method(visit.method.clone()).uri(url);
        if let Some(token) = visit.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut stream = sender.send_request(request.body(())?).await?;
        if !visit.body.is_empty() {
            stream.send_data(Bytes::from(visit.body.to_owned())).await?;
        }
        stream.finish().await?;
        let response = stream.recv_response().await?;
        let mut body = Vec::new();
        while let Some(mut chunk) = stream.recv_data().await? {
            while chunk.has_remaining() {
                let part = chunk.chunk();
                body.extend_from_slice(part);
                let length = part.len();
                chunk.advance(length);
            }
            if body.len() > ANSWER_BYTES_MAX {
                return Err("the answer is too large".into());
            }
        }
        drop(sender);
        driving.abort();
        endpoint.close(0_u32.into(), b"");
        let field = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        Ok(Answer {
            status: response.status().as_u16(),
            outcome: field("selvage-outcome"),
            challenge: field("www-authenticate"),
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}
