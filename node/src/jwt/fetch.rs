//! Key sets from URLs: fetched in the background, kept fresh, and never given up for a failed fetch.
//!
//! One task fetches one URL, however many apps and requests use it. A request waits for it in two cases only, and
//! briefly: there are no keys yet, or the token names a key that the set does not have (a rotation). The second kind
//! asks for a new fetch at most once in [`ASK_PAUSE`], or anyone could make the node hammer an issuer.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use reqwest::{Client, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use super::JwtError;
use super::key::{KeySet, KeySetError, SET_BYTES_MAX};
use super::resolve::PublicOnly;

/// Age at which a key set is fetched again.
const REFRESH: Duration = Duration::from_secs(300);
/// Pause after a failed fetch; it doubles with each further one, up to [`REFRESH`].
const RETRY: Duration = Duration::from_secs(5);
/// Time for one fetch.
const FETCH_MAX: Duration = Duration::from_secs(5);
/// Least time between two fetches that unknown keys ask for.
const ASK_PAUSE: Duration = Duration::from_secs(60);
/// Longest that a request waits for keys.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// Bytes of a URL.
const URL_BYTES_MAX: usize = 2_048;

/// Fetches key sets. Clones share what they fetch.
#[derive(Debug, Clone)]
pub struct KeyFetcher {
    client: Client,
    private_networks: bool,
    sources: Arc<Mutex<HashMap<Url, Weak<Source>>>>,
}

/// The keys behind one URL. The last one to drop it ends its task.
#[derive(Debug)]
pub(super) struct Source {
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    url: Url,
    keys: ArcSwapOption<KeySet>,
    state: watch::Sender<State>,
    wanted: Notify,
    asked: Mutex<Option<Instant>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Fetches that ended, well or not.
    ended: u64,
    /// Whether one is under way or about to begin.
    fetching: bool,
}

/// Why a fetch brought no keys.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("fetch")]
    Http(#[from] reqwest::Error),
    #[error("answer has status {0}")]
    Status(StatusCode),
    #[error(transparent)]
    Keys(#[from] KeySetError),
}

impl KeyFetcher {
    /// A fetcher that trusts the public authorities and `roots`. With `private_networks` it also speaks to loopback and
    /// private addresses, and to loopback without TLS.
    ///
    /// # Errors
    /// A certificate that can't be a root.
    pub fn new(roots: &[CertificateDer<'static>], private_networks: bool) -> Result<Self, JwtError> {
        let mut trusted = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        for root in roots {
            trusted.add(root.clone()).map_err(JwtError::Root)?;
        }
        let mut tls = ClientConfig::builder_with_provider(selvage_certs::provider())
            .with_safe_default_protocol_versions()
            .map_err(JwtError::Root)?
            .with_root_certificates(trusted)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let builder = Client::builder()
            .use_preconfigured_tls(tls)
            .timeout(FETCH_MAX)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        let builder = if private_networks { builder } else { builder.dns_resolver(Arc::new(PublicOnly)) };
        let client = builder.build().map_err(JwtError::Client)?;
        Ok(Self { client, private_networks, sources: Arc::default() })
    }

    /// The source of `url`, the one that is there already if somebody uses it. Must be called inside of a runtime.
    pub(super) fn source(&self, url: &str) -> Result<Arc<Source>, JwtError> {
        let url = self.check(url)?;
        let mut sources = lock(&self.sources);
        sources.retain(|_, source| source.strong_count() > 0);
        if let Some(source) = sources.get(&url).and_then(Weak::upgrade) {
            return Ok(source);
        }
        let source = Arc::new(Source::start(self.client.clone(), url.clone()));
        sources.insert(url, Arc::downgrade(&source));
        Ok(source)
    }

    fn check(&self, text: &str) -> Result<Url, JwtError> {
        let refused = |reason| JwtError::Url { url: text.chars().take(URL_BYTES_MAX).collect(), reason };
        let url = Url::parse(text).map_err(|_| refused("is no URL"))?;
        let host = url.host_str().ok_or_else(|| refused("has no host"))?;
        let address: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
        let loopback = host == "localhost" || address.is_some_and(|ip| ip.is_loopback());
        if text.len() > URL_BYTES_MAX || !url.username().is_empty() || url.password().is_some() {
            return Err(refused("is too long or has credentials in it"));
        }
        match url.scheme() {
            "https" if self.private_networks => Ok(url),
            // A name is looked at again when it is resolved.
            "https" if !loopback && address.is_none() => Ok(url),
            "http" if loopback && self.private_networks => Ok(url),
            "https" => Err(refused("names an address, which this node does not allow")),
            _ => Err(refused("must be https")),
        }
    }
}

impl Source {
    fn start(client: Client, url: Url) -> Self {
        let state = watch::Sender::new(State { ended: 0, fetching: true });
        let shared =
            Shared { url, keys: ArcSwapOption::empty(), state, wanted: Notify::new(), asked: Mutex::default() };
        let shared = Arc::new(shared);
        let task = tokio::spawn(keep_fresh(Arc::clone(&shared), client)).abort_handle();
        Self { shared, task }
    }

    /// The newest keys. Waits for the first ones if they are on their way; `None` if they can't be had.
    pub(super) async fn keys(&self) -> Option<Arc<KeySet>> {
        if self.shared.keys.load().is_none() && self.shared.state.borrow().fetching {
            self.next_fetch().await;
        }
        self.shared.keys.load_full()
    }

    /// Keys that are newer than those of before the call, for a token that names none of those. `None` if a fetch was
    /// asked for too recently, or the answer does not come in time.
    pub(super) async fn newer_keys(&self, now: Instant) -> Option<Arc<KeySet>> {
        let before = self.shared.keys.load_full();
        if !self.ask(now) {
            return None;
        }
        self.next_fetch().await;
        let after = self.shared.keys.load_full();
        after.filter(|after| before.is_none_or(|before| !Arc::ptr_eq(&before, after)))
    }

    /// Whether a fetch is under way, which this call may have started.
    fn ask(&self, now: Instant) -> bool {
        if self.shared.state.borrow().fetching {
            return true;
        }
        let mut asked = lock(&self.shared.asked);
        if asked.is_some_and(|asked| now.saturating_duration_since(asked) < ASK_PAUSE) {
            return false;
        }
        *asked = Some(now);
        self.shared.state.send_modify(|state| state.fetching = true);
        self.shared.wanted.notify_one();
        true
    }

    async fn next_fetch(&self) {
        let mut state = self.shared.state.subscribe();
        // Dropping the wait loses nothing: the fetch goes on in its own task.
        let _ = tokio::time::timeout(WAIT_MAX, state.wait_for(|state| !state.fetching)).await;
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep_fresh(shared: Arc<Shared>, client: Client) {
    let mut retry = RETRY;
    loop {
        shared.state.send_modify(|state| state.fetching = true);
        let pause = match fetch(&client, &shared.url).await {
            Ok(keys) => {
                shared.keys.store(Some(Arc::new(keys)));
                retry = RETRY;
                REFRESH
            }
            Err(error) => {
                let kept = shared.keys.load().is_some();
                let error = anyhow::Error::new(error);
                tracing::warn!(url = %shared.url, error = format!("{error:#}"), kept, "key set not fetched");
                let pause = retry;
                retry = (retry * 2).min(REFRESH);
                pause
            }
        };
        shared.state.send_modify(|state| *state = State { ended: state.ended + 1, fetching: false });
        // Both branches are safe to drop: a sleep, and a notification that stays stored until it is taken.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.wanted.notified() => {}
        }
    }
}

async fn fetch(client: &Client, url: &Url) -> Result<KeySet, FetchError> {
    let mut answer =
        client.get(url.clone()).header("accept", "application/jwk-set+json, application/json").send().await?;
    if answer.status() != StatusCode::OK {
        return Err(FetchError::Status(answer.status()));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if bytes.len() + chunk.len() > SET_BYTES_MAX {
            return Err(KeySetError::Large.into());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(KeySet::parse(&bytes)?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in this file panics while it holds a lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use selvage_config::app::jwt::Algorithm;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::jwt::forge::Forger;

    /// An issuer's web server that answers each connection with what it is told.
    struct Server {
        url: String,
        answer: watch::Sender<String>,
        served: watch::Receiver<u32>,
    }

    impl Server {
        async fn start(answer: String) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/keys", listener.local_addr().unwrap());
            let (answer, now) = watch::channel(answer);
            let (count, served) = watch::channel(0);
            tokio::spawn(async move {
                loop {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    let _ = stream.read(&mut [0; 4_096]).await;
                    let text = now.borrow().clone();
                    let _ = stream.write_all(text.as_bytes()).await;
                    let _ = stream.shutdown().await;
                    count.send_modify(|count| *count += 1);
                }
            });
            Self { url, answer, served }
        }

        fn count(&self) -> u32 {
            *self.served.borrow()
        }
    }

    fn ok(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn fetcher() -> KeyFetcher {
        KeyFetcher::new(&[], true).unwrap()
    }

    #[tokio::test]
    async fn keys_are_fetched_once_for_everyone() {
        let server = Server::start(ok(&Forger::ed25519("a").jwks())).await;
        let fetcher = fetcher();
        let (one, two) = (fetcher.source(&server.url).unwrap(), fetcher.clone().source(&server.url).unwrap());
        let (left, right) = tokio::join!(one.keys(), two.keys());
        assert!(left.unwrap().find(Some("a"), Algorithm::EdDSA).is_some());
        assert!(right.is_some());
        assert_eq!(server.count(), 1);
    }

    #[tokio::test]
    async fn an_unknown_key_is_asked_for_once_a_minute() {
        let server = Server::start(ok(&Forger::ed25519("old").jwks())).await;
        let source = fetcher().source(&server.url).unwrap();
        assert!(source.keys().await.unwrap().find(Some("old"), Algorithm::EdDSA).is_some());
        server.answer.send(ok(&Forger::ed25519("new").jwks())).unwrap();
        let start = Instant::now();
        let keys = source.newer_keys(start).await.unwrap();
        assert!(keys.find(Some("new"), Algorithm::EdDSA).is_some());
        for seconds in [0, 1, 59] {
            assert_eq!(source.newer_keys(start + Duration::from_secs(seconds)).await, None);
        }
        assert_eq!(server.count(), 2);
        assert!(source.newer_keys(start + Duration::from_secs(60)).await.is_some());
        assert_eq!(server.count(), 3);
    }

    #[tokio::test]
    async fn old_keys_stay_when_a_fetch_fails() {
        let server = Server::start(ok(&Forger::ed25519("a").jwks())).await;
        let source = fetcher().source(&server.url).unwrap();
        source.keys().await.unwrap();
        let start = Instant::now();
        let huge = ok(&" ".repeat(SET_BYTES_MAX + 1));
        let bad =
            ["HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".into(), ok("{}"), ok("nonsense"), huge, String::new()];
        for (minute, answer) in (0..).zip(bad) {
            server.answer.send(answer).unwrap();
            assert_eq!(source.newer_keys(start + ASK_PAUSE * minute).await, None);
            assert!(source.keys().await.unwrap().find(Some("a"), Algorithm::EdDSA).is_some());
        }
    }

    #[tokio::test]
    async fn without_keys_a_request_is_told_so() {
        let server = Server::start("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n".into()).await;
        let source = fetcher().source(&server.url).unwrap();
        assert_eq!(source.keys().await, None);
        assert_eq!(source.keys().await, None);
        assert_eq!(server.count(), 1, "requests start no fetch of their own");
    }

    #[tokio::test]
    async fn a_redirect_is_not_followed() {
        let good = Server::start(ok(&Forger::ed25519("a").jwks())).await;
        let moved = format!("HTTP/1.1 302 Go\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", good.url);
        let server = Server::start(moved).await;
        assert_eq!(fetcher().source(&server.url).unwrap().keys().await, None);
        assert_eq!(good.count(), 0);
    }

    #[tokio::test]
    async fn only_https_is_fetched_and_plain_http_from_loopback() {
        let (open, closed) = (fetcher(), KeyFetcher::new(&[], false).unwrap());
        for bad in [
            "",
            "keys",
            "http://issuer.example/keys",
            "http://10.0.0.1/",
            "file:///etc/passwd",
            "ftp://127.0.0.1/",
            "https://user:secret@issuer.example/",
        ] {
            assert!(matches!(open.source(bad), Err(JwtError::Url { .. })), "{bad}");
            assert!(matches!(closed.source(bad), Err(JwtError::Url { .. })), "{bad}");
        }
        for private in ["http://127.0.0.1:1/", "http://localhost:1/", "https://10.0.0.1/", "https://[::1]/"] {
            assert!(matches!(closed.source(private), Err(JwtError::Url { .. })), "{private}");
        }
        assert!(open.check("http://[::1]:8080/keys").is_ok());
        assert!(closed.check("https://issuer.example/keys").is_ok());
    }
}
