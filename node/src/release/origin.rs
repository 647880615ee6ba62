//! The control plane as a node reaches it: mTLS, bounded in bytes and time, and asked again with patience. Where several
//! control planes have one state, one of them is asked until it does not answer, and then the next.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT, CONTENT_RANGE, HeaderValue, LINK, RANGE};
use reqwest::{Method, StatusCode};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::ClientConfig;
use selvage_certs::Role;
use selvage_config::join::{AUTHORITIES_FIELD, Authorities};
use serde::Serialize;
use tokio::time::timeout;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for the head of an answer, besides what the question itself asks to wait.
const HEAD: Duration = Duration::from_secs(15);
/// Longest pause within an answer.
const PAUSE: Duration = Duration::from_secs(15);
/// Longest time for one answer.
const WHOLE: Duration = Duration::from_secs(600);
/// How often one thing is asked for before that counts as failed.
const ATTEMPTS: u32 = 4;
/// First and longest pause between attempts.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Characters of an error's body that are repeated.
const BODY_SHOWN_MAX: usize = 200;

/// The control plane, or several with one state.
#[derive(Debug, Clone)]
pub struct Origin {
    endpoints: Arc<[Endpoint]>,
    /// Which of them is asked.
    current: Arc<AtomicUsize>,
}

/// One control plane.
#[derive(Debug)]
struct Endpoint {
    client: reqwest::Client,
    base: String,
    address: String,
}

/// One answer of a list that may have more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// It.
    pub bytes: Bytes,
    /// The path of the next one.
    pub next: Option<String>,
}

/// RFC 8288, as the distribution specification writes it: `</v2/…>; rel="next"`. Only a path here leads on.
fn next_page(link: &HeaderValue) -> Option<String> {
    let (path, relation) = link.to_str().ok()?.strip_prefix('<')?.split_once('>')?;
    let is_next = relation.split(';').any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next"));
    (is_next && path.starts_with('/') && !path.starts_with("//")).then(|| path.to_owned())
}

/// Why the control plane did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The address is not `host:port`.
    #[error("{0:?} is no host:port")]
    Address(String),
    /// The client can't be made.
    #[error("make client")]
    Client(#[source] reqwest::Error),
    /// No answer.
    #[error("ask the control plane for {path}")]
    Unreachable {
        /// What was asked for.
        path: String,
        /// Why there is none.
        #[source]
        source: reqwest::Error,
    },
    /// No answer in time.
    #[error("no answer in time to {0}")]
    Slow(String),
    /// Another answer than hoped for.
    #[error("{path} is answered {status}: {body}")]
    Status {
        /// What was asked for.
        path: String,
        /// The answer.
        status: StatusCode,
        /// How its body begins.
        body: String,
    },
    /// More bytes than allowed.
    #[error("{path} has more than {bytes_max} bytes")]
    Large {
        /// What was asked for.
        path: String,
        /// The most.
        bytes_max: u64,
    },
}

/// Pauses between attempts: each twice the last, up to a bound, with jitter, so that a fleet does not return at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, first, longest }
    }

    /// The next pause.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = jittered(self.next);
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    /// It went well: the next failure begins anew.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Between a half and the whole of `duration`.
pub(crate) fn jittered(duration: Duration) -> Duration {
    let mut random = [0; 2];
    // Without random bytes the pause is merely predictable.
    let _ = SystemRandom::new().fill(&mut random);
    duration / 2 + duration / 2 * u32::from(u16::from_le_bytes(random)) / u32::from(u16::MAX)
}

/// Resolves whatever name to the configured address: the name is the one in the control plane's certificate.
struct Fixed(String);

impl Resolve for Fixed {
    fn resolve(&self, _: Name) -> Resolving {
        let address = self.0.clone();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host(address).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

impl Origin {
    /// The control planes at `addresses` (`host:port`). `tls` shows who the node is and trusts the fleet's authority;
    /// the name verified is the control plane's own, whatever the address.
    ///
    /// # Errors
    /// [`OriginError::Address`], [`OriginError::Client`].
    pub fn new(addresses: &[String], tls: &ClientConfig) -> Result<Self, OriginError> {
        Self::of(&Role::ControlPlane, addresses, tls)
    }

    /// Others of the fleet at `addresses`, whose certificates must be of `role`.
    ///
    /// # Errors
    /// [`OriginError::Address`], [`OriginError::Client`].
    pub(crate) fn of(role: &Role, addresses: &[String], tls: &ClientConfig) -> Result<Self, OriginError> {
        let endpoint = |address: &String| Endpoint::new(role, address, tls);
        let endpoints: Vec<Endpoint> = addresses.iter().map(endpoint).collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(OriginError::Address(String::new()));
        }
        Ok(Self { endpoints: endpoints.into(), current: Arc::default() })
    }

    /// Who is asked now.
    fn endpoint(&self) -> (usize, &Endpoint) {
        let current = self.current.load(Ordering::Relaxed) % self.endpoints.len();
        (current, &self.endpoints[current])
    }

    /// What was asked of this one was not answered: the next is asked from now on, unless somebody else found so first.
    fn pass_by<T>(&self, asked: usize, result: Result<T, OriginError>) -> Result<T, OriginError> {
        if matches!(result, Err(OriginError::Unreachable { .. } | OriginError::Slow(_))) && self.endpoints.len() > 1 {
            let next = (asked + 1) % self.endpoints.len();
            if self.current.compare_exchange(asked, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                let (from, to) = (&self.endpoints[asked].address, &self.endpoints[next].address);
                tracing::warn!(%from, %to, "a control plane does not answer, the next is asked");
            }
        }
        result
    }

    /// Asks for `path`, again when the control plane fails. `None`: there is no such thing.
    ///
    /// # Errors
    /// The last attempt's.
    pub async fn get(&self, path: &str, accept: &str, bytes_max: u64) -> Result<Option<Bytes>, OriginError> {
        Ok(self.get_page(path, accept, bytes_max).await?.map(|page| page.bytes))
    }

    /// Asks once for `path`, which may be answered after `wait` only. `None`: not found, or not changed.
    ///
    /// # Errors
    /// [`OriginError`].
    pub async fn get_once(
        &self,
        path: &str,
        accept: &str,
        bytes_max: u64,
        wait: Duration,
    ) -> Result<Option<Bytes>, OriginError> {
        Ok(self.page_once(path, accept, bytes_max, wait).await?.map(|page| page.bytes))
    }

    /// Asks for a blob of `size` bytes, again when the answer fails, and from where it broke off. `None`: there is none.
    ///
    /// # Errors
    /// The last attempt's.
    pub async fn get_blob(&self, path: &str, size: u64) -> Result<Option<Bytes>, OriginError> {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut bytes = BytesMut::new();
        for _ in 1..ATTEMPTS {
            match self.rest_once(path, size, &mut bytes).await {
                Err(error) if error.may_pass() => tokio::time::sleep(backoff.pause()).await,
                other => return Ok(other?.then(|| bytes.freeze())),
            }
        }
        Ok(self.rest_once(path, size, &mut bytes).await?.then(|| bytes.freeze()))
    }

    /// Asks once for what follows `bytes`. Whether there is such a blob; then all of it is there.
    async fn rest_once(&self, path: &str, size: u64, bytes: &mut BytesMut) -> Result<bool, OriginError> {
        let (asked, endpoint) = self.endpoint();
        let mut request = endpoint.client.get(format!("{}{path}", endpoint.base)).header(ACCEPT, "*/*");
        if !bytes.is_empty() {
            request = request.header(RANGE, format!("bytes={}-", bytes.len()));
        }
        let response = self.pass_by(asked, answer(path, request.send(), HEAD).await)?;
        match response.status() {
            StatusCode::NOT_FOUND => return Ok(false),
            StatusCode::PARTIAL_CONTENT if continues(&response, bytes.len()) => {}
            StatusCode::OK => bytes.clear(),
            _ => {
                bytes.clear();
                return Err(refused(path, response).await);
            }
        }
        let whole = timeout(WHOLE, body_into(path, response, size, bytes)).await;
        self.pass_by(asked, whole.unwrap_or_else(|_| Err(OriginError::Slow(path.to_owned())))).map(|()| true)
    }

    /// Asks for one page of a list, again when the control plane fails. `None`: there is no such list.
    ///
    /// # Errors
    /// The last attempt's.
    pub async fn get_page(&self, path: &str, accept: &str, bytes_max: u64) -> Result<Option<Page>, OriginError> {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        for _ in 1..ATTEMPTS {
            match self.page_once(path, accept, bytes_max, Duration::ZERO).await {
                Err(error) if error.may_pass() => tokio::time::sleep(backoff.pause()).await,
                other => return other,
            }
        }
        self.page_once(path, accept, bytes_max, Duration::ZERO).await
    }

    async fn page_once(
        &self,
        path: &str,
        accept: &str,
        bytes_max: u64,
        wait: Duration,
    ) -> Result<Option<Page>, OriginError> {
        let (asked, endpoint) = self.endpoint();
        let sending = endpoint.client.get(format!("{}{path}", endpoint.base)).header(ACCEPT, accept).send();
        let response = self.pass_by(asked, answer(path, sending, wait + HEAD).await)?;
        if matches!(response.status(), StatusCode::NOT_FOUND | StatusCode::NOT_MODIFIED) {
            return Ok(None);
        }
        if response.status() != StatusCode::OK {
            return Err(refused(path, response).await);
        }
        let next = response.headers().get(LINK).and_then(next_page);
        let whole = timeout(WHOLE, body(path, response, bytes_max)).await;
        let bytes = self.pass_by(asked, whole.unwrap_or_else(|_| Err(OriginError::Slow(path.to_owned()))))?;
        Ok(Some(Page { bytes, next }))
    }

    /// Puts a document, or patches one (`method`), with the authorities that this node knows; answered are those of the
    /// fleet, if the control plane tells them.
    ///
    /// # Errors
    /// [`OriginError`].
    pub async fn tell(
        &self,
        method: Method,
        path: &str,
        document: &impl Serialize,
        own: Option<Authorities>,
    ) -> Result<Option<Authorities>, OriginError> {
        let (asked, endpoint) = self.endpoint();
        let mut request = endpoint.client.request(method, format!("{}{path}", endpoint.base)).json(document);
        if let Some(own) = own {
            request = request.header(AUTHORITIES_FIELD, own.to_string());
        }
        let response = self.pass_by(asked, answer(path, request.send(), HEAD).await)?;
        if !response.status().is_success() {
            return Err(refused(path, response).await);
        }
        let field = response.headers().get(AUTHORITIES_FIELD);
        Ok(field.and_then(|field| field.to_str().ok()?.parse().ok()))
    }

    /// Posts a document, and reads what is answered.
    ///
    /// # Errors
    /// [`OriginError`].
    pub async fn post(&self, path: &str, document: &impl Serialize, bytes_max: u64) -> Result<Bytes, OriginError> {
        let (asked, endpoint) = self.endpoint();
        let sending = endpoint.client.post(format!("{}{path}", endpoint.base)).json(document).send();
        let response = self.pass_by(asked, answer(path, sending, HEAD).await)?;
        if !response.status().is_success() {
            return Err(refused(path, response).await);
        }
        let whole = timeout(WHOLE, body(path, response, bytes_max)).await;
        whole.unwrap_or_else(|_| Err(OriginError::Slow(path.to_owned())))
    }
}

impl Endpoint {
    fn new(role: &Role, address: &str, tls: &ClientConfig) -> Result<Self, OriginError> {
        let port = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        let (_, port) =
            port.filter(|(host, _)| !host.is_empty()).ok_or_else(|| OriginError::Address(address.into()))?;
        let client = reqwest::Client::builder()
            .use_preconfigured_tls(tls.clone())
            .dns_resolver(Arc::new(Fixed(address.to_owned())))
            .https_only(true)
            .no_proxy()
            // A redirect would lead away from the one host that is trusted.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .build()
            .map_err(OriginError::Client)?;
        let base = format!("https://{}:{port}", role.tls_name());
        Ok(Self { client, base, address: address.to_owned() })
    }
}

async fn answer(
    path: &str,
    sending: impl Future<Output = Result<reqwest::Response, reqwest::Error>>,
    longest: Duration,
) -> Result<reqwest::Response, OriginError> {
    let response = timeout(longest, sending).await.map_err(|_| OriginError::Slow(path.to_owned()))?;
    response.map_err(|source| OriginError::Unreachable { path: path.to_owned(), source: source.without_url() })
}

/// Whether an answer goes on after so many bytes (RFC 9110 14.4).
fn continues(response: &reqwest::Response, after: usize) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let begin = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse::<usize>().ok());
    begin == Some(after)
}

/// Reads a body, which must not be larger than told nor than allowed.
async fn body(path: &str, response: reqwest::Response, bytes_max: u64) -> Result<Bytes, OriginError> {
    let mut bytes = BytesMut::new();
    body_into(path, response, bytes_max, &mut bytes).await?;
    Ok(bytes.freeze())
}

/// The same behind what is there. What came before it broke off stays.
async fn body_into(
    path: &str,
    mut response: reqwest::Response,
    bytes_max: u64,
    bytes: &mut BytesMut,
) -> Result<(), OriginError> {
    let large = || OriginError::Large { path: path.to_owned(), bytes_max };
    let room = bytes_max.saturating_sub(bytes.len() as u64);
    if response.content_length().is_some_and(|length| length > room) {
        return Err(large());
    }
    loop {
        let chunk = timeout(PAUSE, response.chunk()).await.map_err(|_| OriginError::Slow(path.to_owned()))?;
        let unreachable =
            |source: reqwest::Error| OriginError::Unreachable { path: path.to_owned(), source: source.without_url() };
        let Some(chunk) = chunk.map_err(unreachable)? else { return Ok(()) };
        if (bytes.len() + chunk.len()) as u64 > bytes_max {
            return Err(large());
        }
        bytes.extend_from_slice(&chunk);
    }
}

async fn refused(path: &str, mut response: reqwest::Response) -> OriginError {
    let chunk = timeout(PAUSE, response.chunk()).await.ok().and_then(Result::ok).flatten().unwrap_or_default();
    let body = String::from_utf8_lossy(&chunk).chars().take(BODY_SHOWN_MAX).collect();
    OriginError::Status { path: path.to_owned(), status: response.status(), body }
}

impl OriginError {
    /// Whether the same question may be answered later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Slow(_) => true,
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            Self::Address(_) | Self::Client(_) | Self::Large { .. } => false,
        }
    }
}

/// An error with everything behind it, for people.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_begin_anew() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_millis(350));
        let mut backoff = Backoff::new(first, longest);
        for expected in [100, 200, 350, 350] {
            let (pause, expected) = (backoff.pause(), Duration::from_millis(expected));
            assert!(pause >= expected / 2 && pause <= expected, "{pause:?} of {expected:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= first);
    }

    #[test]
    fn the_next_page_of_a_list_is_a_path_here() {
        let next = |link: &'static str| next_page(&HeaderValue::from_static(link));
        assert_eq!(next("</v2/a/referrers/x?last=y>; rel=\"next\"").as_deref(), Some("/v2/a/referrers/x?last=y"));
        for other in
            ["", "</v2/a>", "</v2/a>; rel=\"prev\"", "<https://evil.example/>; rel=\"next\"", "<//evil/>; rel=next"]
        {
            assert_eq!(next(other), None, "{other}");
        }
    }

    #[test]
    fn an_address_needs_a_host_and_a_port() {
        for bad in ["", "host", ":1", "host:", "host:http", "host:70000"] {
            let tls = selvage_certs::client(&rustls::RootCertStore::empty());
            assert!(matches!(Origin::new(&[bad.to_owned()], &tls), Err(OriginError::Address(_))), "{bad}");
        }
    }

    #[test]
    fn who_does_not_answer_is_passed_by_once() {
        let tls = selvage_certs::client(&rustls::RootCertStore::empty());
        let origin = Origin::new(&["a:1".into(), "b:2".into(), "c:3".into()], &tls).unwrap();
        let slow = || Err::<(), _>(OriginError::Slow("/".into()));
        let at = || origin.endpoint().1.address.clone();
        assert_eq!(at(), "a:1");
        // Two questions that waited for the same one move on by one place.
        assert!(origin.pass_by(0, slow()).is_err() && origin.pass_by(0, slow()).is_err());
        assert_eq!(at(), "b:2");
        let busy = OriginError::Status { path: "/".into(), status: StatusCode::SERVICE_UNAVAILABLE, body: "".into() };
        assert!(origin.pass_by(1, Err::<(), _>(busy)).is_err());
        assert_eq!(at(), "b:2");
        assert!(origin.pass_by(1, slow()).is_err() && origin.pass_by(2, slow()).is_err());
        assert_eq!(at(), "a:1");
    }
}
