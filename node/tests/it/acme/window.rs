//! What Debian's pebble does not have: an authority that says when it wants a certificate to be renewed (ARI, RFC 9773).

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use selvage_certs::provider;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::pebble::curl;

/// Where it says so, before the certificate's number.
const PATH: &str = "/renewal-info";

/// A directory that is another authority's with one address more. Of the first certificate that it is asked about it says
/// that it should have been renewed already, of all others that they have time.
#[derive(Clone)]
pub(super) struct Window {
    port: u16,
    /// The numbers of the certificates that it was asked about.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Window {
    /// Listens, with the certificate that lies in `dir`, beside the authority whose directory is at `other`.
    pub(super) async fn open(dir: &Path, other: String) -> Self {
        let chain = CertificateDer::pem_file_iter(dir.join("own.pem")).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(dir.join("own.key")).unwrap();
        let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
        let config = config.with_no_client_auth().with_single_cert(chain, key).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let window = Self { port: listener.local_addr().unwrap().port(), asked: Arc::default() };
        let (served, roots) = (window.clone(), dir.join("roots.pem"));
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, window, roots, other) = (acceptor.clone(), served.clone(), roots.clone(), other.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let answer = service_fn(async |request: http::Request<hyper::body::Incoming>| {
                        Ok::<_, Infallible>(window.answer(request.uri().path(), &roots, &other).await)
                    });
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(tls), answer).await;
                });
            }
        });
        window
    }

    /// Where its directory is.
    pub(super) fn directory(&self) -> String {
        format!("https://127.0.0.1:{}/dir", self.port)
    }

    /// The numbers of the certificates that it was asked about, each once.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    async fn answer(&self, path: &str, roots: &Path, other: &str) -> http::Response<Full<Bytes>> {
        let Some(number) = path.strip_prefix(PATH) else {
            // While the other authority is away, so is this one.
            let Ok(text) = curl(&["--cacert", roots.to_str().unwrap(), other]).await else {
                return http::Response::builder().status(503).body(Full::default()).unwrap();
            };
            let mut directory: serde_json::Value = serde_json::from_slice(&text).unwrap();
            directory["renewalInfo"] = format!("https://127.0.0.1:{}{PATH}", self.port).into();
            return http::Response::new(Full::from(directory.to_string()));
        };
        let place = {
            let mut asked = self.asked.lock().unwrap();
            let place = asked.iter().position(|known| known == number);
            place.unwrap_or_else(|| {
                asked.push(number.to_owned());
                asked.len() - 1
            })
        };
        let day = Duration::from_secs(86_400);
        let start = if place == 0 { SystemTime::now() - 2 * day } else { SystemTime::now() + 20 * day };
        let text = |moment: SystemTime| OffsetDateTime::from(moment).format(&Rfc3339).unwrap();
        let said = serde_json::json!({ "suggestedWindow": { "start": text(start), "end": text(start + day) } });
        http::Response::builder().header("retry-after", "21600").body(Full::from(said.to_string())).unwrap()
    }
}
