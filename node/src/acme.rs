//! Certificates that the node gets by itself (ACME, RFC 8555).
//!
//! One task owns what is known of each name: its certificate, when it is due, and how often it failed. Orders run beside
//! it, a few at once. Nothing of a request waits for any of this: what is there is shown, and what fails leaves it be.
//! Until there is a first certificate for a name, a handshake for it ends as for any name that is not served here.

mod held;

mod directory;
mod hook;
mod order;
mod place;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::uri::Authority;
use http::{HeaderValue, Method, header};
use instant_acme::Account;
use selvage_certs::{Backoff, Certificates, Challenges, FileError, Identity, IssuedFiles, Resolver, Window};
use selvage_config::node::{Acme as Settings, CertificateName, TlsProvider};
use tokio::sync::mpsc;
use tokio::task::{Id, JoinError, JoinSet};

use self::directory::Directory;
pub use self::directory::DirectoryError;
use self::held::Held;
use self::hook::Record;
use self::order::{OrderError, Orders};
pub use self::place::Place;
use crate::metrics::Metrics;
use crate::release::origin::chain;
use crate::request::{Request, Response, full};
use crate::serve::Parts;

/// Orders under way at once.
const ORDERS_MAX: usize = 4;
/// Names that clients asked for and that wait to be looked at; more are asked for again.
const ASKED_MAX: usize = 64;
/// How long nothing is looked at: not always, and not for long, since the clock may be set meanwhile.
const SLEEP_MIN: Duration = Duration::from_millis(10);
const SLEEP_MAX: Duration = Duration::from_secs(60);
/// How often it is looked what other nodes of the place got.
const PLACE_LOOK: Duration = Duration::from_secs(2);
/// How often it is looked whether an app still has a host whose certificate would be renewed.
const UNDECLARED_PAUSE: Duration = Duration::from_secs(3_600);
/// How long to wait where the authority says that it is asked too much.
const RATE_LIMITED_PAUSE: Duration = Duration::from_secs(3_600);

/// Why certificates can't be got at all.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    /// What was kept can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The authority can't be asked.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
}

/// Gets certificates and renews them.
pub struct Acme {
    settings: Arc<Settings>,
    files: IssuedFiles,
    directory: Directory,
    resolver: Arc<Resolver>,
    provider: TlsProvider,
    held: BTreeMap<CertificateName, Held>,
    account: Opening,
    /// Where other nodes order for this one too.
    place: Option<Arc<Place>>,
}

/// The account with the authority.
#[derive(Default)]
struct Opening {
    account: Option<Account>,
    is_busy: bool,
    pause: Option<SystemTime>,
    failures: u32,
}

/// What was done.
enum Done {
    Opened(Result<Account, OrderError>),
    Ordered(CertificateName, Result<Box<Identity>, OrderError>),
    /// It is another node's turn to order.
    Waits(CertificateName),
    Looked(CertificateName, Option<(Window, Duration)>),
}

type Jobs = JoinSet<Done>;

fn is_over(moment: Option<SystemTime>, now: SystemTime) -> bool {
    moment.is_none_or(|moment| moment <= now)
}

impl Acme {
    /// Reads what was kept, and shows it by `resolver`. It blocks on the disk.
    ///
    /// # Errors
    /// [`AcmeError`]. A damaged certificate is none: another one is ordered.
    pub fn open(
        settings: Settings,
        state_dir: &Path,
        resolver: Arc<Resolver>,
        provider: TlsProvider,
    ) -> Result<Self, AcmeError> {
        let files = IssuedFiles::at(state_dir, settings.directory());
        files.make()?;
        let directory = Directory::new(&settings)?;
        let mut held: BTreeMap<CertificateName, Held> = BTreeMap::new();
        let kept = if settings.on_demand { files.names()? } else { Vec::new() };
        for name in settings.names().cloned().chain(kept) {
            let identity = files.load(&name).and_then(|identity| {
                let signing = |identity: Identity| identity.signing_with(&selvage_certs::provider_of(provider));
                identity.map(signing).transpose().map_err(|source| {
                    let path = files.directory().to_owned();
                    FileError::Identity { certificate: path.clone(), key: path, source }
                })
            });
            let identity = identity.unwrap_or_else(|error| {
                tracing::error!(%name, error = chain(&error), "kept certificate can't be used, another one is ordered");
                None
            });
            let is_configured = settings.names().any(|configured| *configured == name);
            held.entry(name).or_insert_with(|| Held { is_configured, ..Held::of(identity) });
        }
        let settings = Arc::new(settings);
        let acme =
            Self { settings, files, directory, resolver, provider, held, account: Opening::default(), place: None };
        acme.show();
        Ok(acme)
    }

    /// The same for a node of this place: it orders for the others, and they for it.
    #[must_use]
    pub fn of_place(self, place: Place) -> Self {
        let place = Arc::new(place);
        let asked = Arc::clone(&place);
        self.resolver.challenges().ask_elsewhere(move |host, token| asked.answer(host, token));
        Self { place: Some(place), ..self }
    }

    /// Gets certificates for as long as it is polled.
    pub async fn run(mut self, parts: Arc<Parts>) {
        let (asking, mut asked) = mpsc::channel(ASKED_MAX);
        if self.settings.on_demand {
            let seen = Arc::clone(&parts);
            self.resolver.on_unknown(move |name| {
                if seen.table.load().declares(name)
                    && let Ok(name) = CertificateName::try_from(name.to_owned())
                {
                    // Who finds no place asks again with the next handshake.
                    let _ = asking.try_send(name);
                }
            });
        }
        Record::take_all_away(&self.settings, &self.files).await;
        let mut jobs = Jobs::new();
        let mut doing: HashMap<Id, Option<CertificateName>> = HashMap::new();
        loop {
            self.take_given(&parts.metrics);
            self.tell(&parts.metrics);
            self.begin(&parts, &mut jobs, &mut doing);
            let rest = self.rest(jobs.len());
            // Every branch may be dropped: a job stays in its set, a name in its channel.
            tokio::select! {
                Some(done) = jobs.join_next_with_id() => self.take(done, &mut doing, &parts.metrics),
                Some(name) = asked.recv() => self.ask(name),
                () = tokio::time::sleep(rest) => {}
            }
        }
    }

    /// Starts what is due, as far as there is room.
    fn begin(&mut self, parts: &Parts, jobs: &mut Jobs, doing: &mut HashMap<Id, Option<CertificateName>>) {
        let now = SystemTime::now();
        let due = |held: &Held| !held.is_busy && held.next(now).is_none();
        if !self.held.values().any(due) {
            return;
        }
        let (settings, place) = (Arc::clone(&self.settings), self.place.clone());
        let orders = Orders { settings, files: self.files.clone(), place };
        let Some(account) = self.account.account.clone() else {
            if !self.account.is_busy && is_over(self.account.pause, now) {
                self.account.is_busy = true;
                let directory = self.directory.clone();
                let job = jobs.spawn(async move { Done::Opened(orders.open(directory).await) });
                doing.insert(job.id(), None);
            }
            return;
        };
        let is_declared = |name: &CertificateName| parts.table.load().declares(name.as_str());
        self.held.retain(|name, held| {
            if !due(held) || jobs.len() >= ORDERS_MAX {
                return true;
            }
            let account = account.clone();
            let wanted = name.clone();
            if !held.is_configured && !is_declared(name) {
                held.pause = Some(now + UNDECLARED_PAUSE);
                held.look = None;
                return !held.has_ended(now) || self.files.remove(name).is_err();
            }
            let looks = held.look.is_some_and(|look| look <= now);
            let job = match held.identity.clone() {
                Some(identity) if looks => {
                    let looking = async move { Done::Looked(wanted, order::window(&account, &identity).await) };
                    jobs.spawn(looking)
                }
                old => {
                    let (orders, provider) = (orders.clone(), self.provider);
                    let challenges = self.resolver.challenges().clone();
                    jobs.spawn(async move {
                        match orders.has_turn(&wanted, old.as_ref()).await {
                            Ok(true) => {}
                            Ok(false) => return Done::Waits(wanted),
                            Err(error) => return Done::Ordered(wanted, Err(error)),
                        }
                        let ordered = orders.order(&account, &wanted, old.as_ref(), (&challenges, provider)).await;
                        Done::Ordered(wanted, ordered.map(Box::new))
                    })
                }
            };
            doing.insert(job.id(), Some(name.clone()));
            held.is_busy = true;
            true
        });
    }

    fn take(
        &mut self,
        done: Result<(Id, Done), JoinError>,
        doing: &mut HashMap<Id, Option<CertificateName>>,
        metrics: &Metrics,
    ) {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let whose = doing.remove(&id);
        match done.map(|(_, done)| done) {
            Ok(Done::Opened(opened)) => self.opened(opened, metrics),
            Ok(Done::Ordered(name, Ok(identity))) => self.renewed(&name, *identity, metrics),
            Ok(Done::Ordered(name, Err(error))) => self.failed(&name, &error, metrics),
            Ok(Done::Waits(name)) => self.waits(&name),
            Ok(Done::Looked(name, window)) => self.looked(&name, window),
            // A job that ended by a panic is a failure of its name.
            Err(_) => match whose.flatten() {
                Some(name) => self.failed(&name, &OrderError::Ended, metrics),
                None => self.opened(Err(OrderError::Ended), metrics),
            },
        }
    }

    fn backoff(&self) -> Backoff {
        let most = Duration::from_millis(self.settings.retry_ms_max);
        Backoff { first: Duration::from_millis(self.settings.retry_ms), most }
    }

    fn opened(&mut self, opened: Result<Account, OrderError>, metrics: &Metrics) {
        let backoff = self.backoff();
        let Opening { account, is_busy, pause, failures } = &mut self.account;
        *is_busy = false;
        match opened {
            Ok(opened) => {
                tracing::info!(account = opened.id(), "account with the certificate authority");
                (*account, *pause, *failures) = (Some(opened), None, 0);
            }
            Err(error) => {
                *failures = failures.saturating_add(1);
                let time = backoff.pause(*failures, chance());
                *pause = Some(SystemTime::now() + time);
                metrics.acme_failed("", error.cause());
                tracing::error!(
                    error = chain(&error),
                    again_in_s = time.as_secs(),
                    "no account with the certificate authority"
                );
            }
        }
    }

    fn renewed(&mut self, name: &CertificateName, identity: Identity, metrics: &Metrics) {
        let pause = SystemTime::now() + self.backoff().first;
        let Some(held) = self.held.get_mut(name) else { return };
        metrics.acme_issued(name.as_str());
        tracing::info!(%name, ends = %date(identity.not_after()), "new certificate");
        // However soon the authority wants another one.
        let seen = std::mem::take(&mut held.seen);
        *held = Held { is_configured: held.is_configured, pause: Some(pause), seen, ..Held::of(Some(identity)) };
        self.show();
    }

    /// Another node orders it: what comes of that is looked for.
    fn waits(&mut self, name: &CertificateName) {
        let Some(held) = self.held.get_mut(name) else { return };
        held.is_busy = false;
        held.pause = Some(SystemTime::now() + PLACE_LOOK);
    }

    /// Takes what other nodes of the place got.
    fn take_given(&mut self, metrics: &Metrics) {
        let Some(place) = &self.place else { return };
        let mut has_taken = false;
        for (name, held) in &mut self.held {
            let Some(sealed) = place.given(&self.files, name).filter(|sealed| held.seen != *sealed) else { continue };
            if held.is_busy {
                continue;
            }
            held.seen = sealed.clone();
            let Some(given) = place.opened(&self.files, name, &sealed) else { continue };
            let is_newer = held.identity.as_ref().is_none_or(|own| own.not_after() < given.not_after());
            if !is_newer || given.not_after() <= SystemTime::now() {
                continue;
            }
            let Ok(given) = given.signing_with(&selvage_certs::provider_of(self.provider)) else { continue };
            if let Err(error) = self.files.save(name, &given) {
                tracing::error!(%name, error = chain(&error), "certificate of another node can't be kept");
            }
            tracing::info!(%name, ends = %date(given.not_after()), "new certificate, from another node of the place");
            metrics.acme_taken(name.as_str());
            *held = Held { is_configured: held.is_configured, seen: sealed, ..Held::of(Some(given)) };
            has_taken = true;
        }
        if has_taken {
            self.show();
        }
    }

    fn failed(&mut self, name: &CertificateName, error: &OrderError, metrics: &Metrics) {
        let backoff = self.backoff();
        if error.is_account_unknown() {
            self.account = Opening::default();
            if let Err(error) = self.files.remove_account() {
                tracing::error!(error = chain(&error), "account can't be forgotten");
            }
        }
        let Some(held) = self.held.get_mut(name) else { return };
        held.is_busy = false;
        held.failures = held.failures.saturating_add(1);
        let mut time = backoff.pause(held.failures, chance());
        if error.is_rate_limited() {
            time = time.max(RATE_LIMITED_PAUSE);
        }
        let now = SystemTime::now();
        held.pause = Some(now + time);
        metrics.acme_failed(name.as_str(), error.cause());
        let (error, again_in_s) = (chain(error), time.as_secs());
        if held.has_ended(now) {
            tracing::error!(%name, error, again_in_s, failures = held.failures, "no certificate");
        } else {
            let ends = held.identity.as_ref().map(|identity| date(identity.not_after()).to_string());
            tracing::warn!(%name, error, again_in_s, failures = held.failures, ends, "certificate is not renewed, the old one stays");
        }
    }

    fn looked(&mut self, name: &CertificateName, found: Option<(Window, Duration)>) {
        let Some(held) = self.held.get_mut(name) else { return };
        held.is_busy = false;
        let (window, asked) = found.map_or((None, Duration::MAX), |(window, asked)| (Some(window), asked));
        held.look = Some(SystemTime::now() + Window::look_after(asked));
        // A moment is chosen once for a window, or it would be chosen until it is a near one.
        if let Some(window) = window.filter(|window| held.window != Some(*window)) {
            held.window = Some(window);
            held.renew = Some(window.choose(chance()));
        }
    }

    /// A client asked for the host of an app.
    fn ask(&mut self, name: CertificateName) {
        let on_demand = self.held.values().filter(|held| !held.is_configured).count();
        if self.held.contains_key(&name) || on_demand >= self.settings.on_demand_max as usize {
            return;
        }
        tracing::info!(%name, "a client asks for the host of an app, a certificate is ordered");
        self.held.insert(name, Held::of(None));
    }

    /// How long there is nothing to do.
    fn rest(&self, under_way: usize) -> Duration {
        // A job that ends wakes the loop.
        if under_way >= ORDERS_MAX || self.account.is_busy {
            return if self.place.is_some() { PLACE_LOOK } else { SLEEP_MAX };
        }
        let now = SystemTime::now();
        let account = self.account.pause.filter(|_| self.account.account.is_none());
        let waits = self.held.values().filter(|held| !held.is_busy).map(|held| {
            let next = held.next(now).max(account).unwrap_or(now);
            next.duration_since(now).unwrap_or(Duration::ZERO)
        });
        let most = if self.place.is_some() { PLACE_LOOK } else { SLEEP_MAX };
        waits.min().unwrap_or(most).clamp(SLEEP_MIN, most)
    }

    fn show(&self) {
        let all = self.held.iter().filter_map(|(name, held)| Some((name.as_str(), held.identity.as_ref()?)));
        match Certificates::by_name(all) {
            Ok(table) => self.resolver.swap_issued(table),
            Err(error) => tracing::error!(error = chain(&error), "certificates can't be shown"),
        }
    }

    fn tell(&self, metrics: &Metrics) {
        let ends =
            self.held.iter().filter_map(|(name, held)| Some((name.as_str(), held.identity.as_ref()?.not_after())));
        metrics.certificates("acme", ends);
    }
}

/// Between 0 and 1.
fn chance() -> f64 {
    // The standard library's hash keys are random; the same source as for ids.
    let random = u32::try_from(RandomState::new().hash_one(0_u8) >> 32).unwrap_or(0);
    f64::from(random) / f64::from(u32::MAX)
}

fn date(time: SystemTime) -> impl std::fmt::Display {
    time::OffsetDateTime::from(time)
}

/// Answers a plain request in which an authority looks for a challenge (RFC 8555 8.3). Any other is not ours to answer.
pub(crate) fn answer(challenges: &Challenges, request: &Request, authority: &Authority) -> Option<Response> {
    let path = request.http.uri().path();
    if request.secure || !Challenges::is_http(path) || !matches!(*request.http.method(), Method::GET | Method::HEAD) {
        return None;
    }
    let host = authority.host().to_ascii_lowercase();
    let mut response = Response::new(full(challenges.http(&host, path)?));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Some(response)
}

#[cfg(test)]
mod tests {
    use instant_acme::{Error, Problem};
    use selvage_certs::Authority as CertificateAuthority;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn name() -> CertificateName {
        "a.test".to_owned().try_into().unwrap()
    }

    /// One that holds a new certificate for [`name`], or none.
    fn acme(dir: &tempfile::TempDir, has_one: bool) -> Acme {
        let text = "directory = 'https://ca.test/dir'\nterms_agreed = true\nnames = ['a.test']";
        let settings: Settings = toml::from_str(text).unwrap();
        let files = IssuedFiles::at(dir.path(), settings.directory());
        files.make().unwrap();
        files.save_account("{}").unwrap();
        if has_one {
            let identity = CertificateAuthority::create("test").unwrap().issue_server(&["a.test".into()], &[]);
            files.save(&name(), &identity.unwrap()).unwrap();
        }
        let resolver = Arc::new(Resolver::new(Certificates::default()));
        Acme::open(settings, dir.path(), resolver, TlsProvider::default()).unwrap()
    }

    /// How long nothing is to be done for the name.
    fn waits(acme: &Acme) -> Duration {
        let now = SystemTime::now();
        acme.held[&name()].next(now).map_or(Duration::ZERO, |next| next.duration_since(now).unwrap())
    }

    fn problem(kind: &str) -> OrderError {
        let problem = serde_json::json!({ "type": format!("urn:ietf:params:acme:error:{kind}") });
        let problem: Problem = serde_json::from_value(problem).unwrap();
        OrderError::Authority { step: "order a certificate", source: Error::Api(problem) }
    }

    #[test]
    fn a_kept_certificate_is_renewed_when_its_authority_says_so_and_by_age_if_it_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut acme = acme(&dir, true);
        assert!(!acme.held[&name()].has_ended(SystemTime::now()));
        assert_eq!(waits(&acme), Duration::ZERO, "the authority is asked first");
        acme.looked(&name(), None);
        let by_age = acme.held[&name()].renew.unwrap();
        assert!(by_age > SystemTime::now() + HOUR && waits(&acme) <= HOUR * 24);

        let now = SystemTime::now();
        let later = Window { start: now + HOUR * 2, end: now + HOUR * 3 };
        acme.looked(&name(), Some((later, HOUR * 6)));
        let chosen = acme.held[&name()].renew.unwrap();
        assert!((later.start..=later.end).contains(&chosen));
        acme.looked(&name(), Some((later, HOUR * 6)));
        assert_eq!(acme.held[&name()].renew, Some(chosen), "it is chosen once");
        acme.looked(&name(), Some((Window { start: now - HOUR, end: now - HOUR }, HOUR * 6)));
        assert_eq!(waits(&acme), Duration::ZERO, "it is revoked");
    }

    #[test]
    fn a_failure_pauses_and_no_window_ends_the_pause() {
        let dir = tempfile::tempdir().unwrap();
        let mut acme = acme(&dir, false);
        assert_eq!(waits(&acme), Duration::ZERO);
        let metrics = Metrics::new();
        let mut before = Duration::ZERO;
        for _ in 0..4 {
            acme.failed(&name(), &OrderError::Slow, &metrics);
            let pause = waits(&acme);
            assert!(pause > before.mul_f64(0.9) && pause > Duration::from_secs(59), "{pause:?} after {before:?}");
            before = pause;
        }
        let past = SystemTime::now() - HOUR;
        acme.looked(&name(), Some((Window { start: past, end: past }, HOUR)));
        assert!(waits(&acme) > Duration::from_secs(59));
        assert!(metrics.text().contains(r#"selvage_acme_orders_total{name="a.test",outcome="slow"} 4"#));
    }

    #[test]
    fn an_authority_that_is_asked_too_much_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut acme = acme(&dir, false);
        acme.failed(&name(), &problem("rateLimited"), &Metrics::new());
        assert!(waits(&acme) > HOUR - Duration::from_secs(9));
        assert!(acme.files.account().unwrap().is_some());
    }

    #[test]
    fn an_account_that_its_authority_forgot_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut acme = acme(&dir, false);
        acme.failed(&name(), &problem("accountDoesNotExist"), &Metrics::new());
        assert!(acme.files.account().unwrap().is_none());
    }

    #[test]
    fn hosts_of_apps_have_so_many_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let mut acme = acme(&dir, false);
        let mut settings = Settings::clone(&acme.settings);
        settings.on_demand_max = 2;
        acme.settings = Arc::new(settings);
        for number in 0..5 {
            acme.ask(format!("{number}.test").try_into().unwrap());
            acme.ask(name());
        }
        assert_eq!(acme.held.len(), 3);
        assert!(acme.held[&name()].is_configured);
    }

    #[test]
    fn a_damaged_certificate_is_ordered_anew() {
        let dir = tempfile::tempdir().unwrap();
        let files = acme(&dir, true).files;
        std::fs::write(files.directory().join("a.test.pem"), "half").unwrap();
        let again = acme(&dir, false);
        assert!(again.held[&name()].identity.is_none() && waits(&again) == Duration::ZERO);
    }
}
