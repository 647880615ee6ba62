//! How an ACME authority is asked: HTTPS with bounds, and nothing else.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Collected, Full};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use reqwest::Client;
use rustls::{ClientConfig, RootCertStore};
use selvage_certs::{FileError, roots_from_pem};
use selvage_config::node::Acme as Settings;

/// Time to reach the authority, and for one answer of it.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Bytes of one answer. A chain of certificates has a few thousand.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Why an authority can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The file of its roots.
    #[error("acme.roots")]
    Roots(#[from] FileError),
    /// TLS can't be set up.
    #[error("set up TLS for the certificate authority")]
    Tls(#[source] rustls::Error),
    /// The client can't be set up.
    #[error("set up the client of the certificate authority")]
    Client(#[source] reqwest::Error),
}

/// An answer has more bytes than we take.
#[derive(Debug, thiserror::Error)]
#[error("answer of the certificate authority is larger than {ANSWER_BYTES_MAX} bytes")]
struct TooLarge;

/// The way to an authority. Clones share its connections.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    client: Client,
}

impl Directory {
    pub(super) fn new(settings: &Settings) -> Result<Self, DirectoryError> {
        let roots = match &settings.roots {
            Some(path) => roots_from_pem(path)?,
            None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
        };
        let mut tls = ClientConfig::builder_with_provider(selvage_certs::provider())
            .with_safe_default_protocol_versions()
            .map_err(DirectoryError::Tls)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let client = Client::builder()
            .use_preconfigured_tls(tls)
            .https_only(true)
            .connect_timeout(CONNECT_MAX)
            .timeout(ANSWER_MAX)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        Ok(Self { client: client.build().map_err(DirectoryError::Client)? })
    }
}

impl HttpClient for Directory {
    fn request(
        &self,
        request: http::Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let client = self.client.clone();
        Box::pin(async move {
            let failed = |error: reqwest::Error| Error::Other(Box::new(error));
            let (parts, body) = request.into_parts();
            let body = body.collect().await.map_or_else(|never| match never {}, Collected::to_bytes);
            let asking = client.request(parts.method, parts.uri.to_string()).headers(parts.headers).body(body);
            let mut answer = asking.send().await.map_err(failed)?;
            let mut bytes = BytesMut::new();
            while let Some(more) = answer.chunk().await.map_err(failed)? {
                if bytes.len() + more.len() > ANSWER_BYTES_MAX {
                    return Err(Error::Other(Box::new(TooLarge)));
                }
                bytes.extend_from_slice(&more);
            }
            let mut whole = http::Response::new(Full::new(bytes.freeze()));
            *whole.status_mut() = answer.status();
            *whole.headers_mut() = std::mem::take(answer.headers_mut());
            Ok(BytesResponse::from(whole))
        })
    }
}
