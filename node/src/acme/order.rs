//! One order of a certificate, from its account to its chain.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use instant_acme::{
    Account, AuthorizationStatus, CertificateIdentifier, ChallengeHandle, ChallengeType, Error, ExternalAccountKey,
    Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use selvage_certs::{
    Answering, AuthorityError, ChallengeError, Challenges, Enrolment, FileError, Identity, IdentityError, IssuedFiles,
    Window,
};
use selvage_config::node::{Acme as Settings, AcmeChallenge, CertificateName, TlsProvider};

use super::directory::Directory;
use super::hook::{HookError, Record};
use super::place::{Place, PlaceError, Posted};

/// Time for an account, and for an order besides what the program for records takes.
const ACCOUNT_MAX: Duration = Duration::from_secs(60);
const ORDER_MAX: Duration = Duration::from_secs(180);
/// Time in which the authority looks whether the name leads here, and in which it makes the certificate.
const LOOKED_MAX: Duration = Duration::from_secs(90);
/// How a problem's type begins (RFC 8555 6.7).
const PROBLEM: &str = "urn:ietf:params:acme:error:";

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum OrderError {
    #[error("{step}")]
    Authority { step: &'static str, source: Error },
    #[error("the authority does not offer {}", .0.as_str())]
    NotOffered(AcmeChallenge),
    #[error("the authority did not find that the name leads here: {0}")]
    Refused(String),
    #[error(transparent)]
    Challenge(#[from] ChallengeError),
    #[error("put the record")]
    Hook(#[from] HookError),
    #[error("make a request for a certificate")]
    Request(#[from] AuthorityError),
    #[error("use the certificate")]
    Identity(#[from] IdentityError),
    #[error("the certificate is not one for the name, or not for now")]
    Other,
    #[error("keep what was got")]
    File(#[from] FileError),
    #[error("the kept account can't be read")]
    Account(#[source] serde_json::Error),
    #[error("acme.external_account.key is no base64url")]
    ExternalKey(#[source] base64::DecodeError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("the order did not end in time")]
    Slow,
    #[error("the order ended early")]
    Ended,
}

impl OrderError {
    /// The label in the metric.
    pub(super) fn cause(&self) -> &'static str {
        match self {
            Self::Authority { source: Error::Api(_), .. } => "refused",
            Self::Authority { .. } => "directory",
            Self::NotOffered(_) | Self::Refused(_) | Self::Challenge(_) => "challenge",
            Self::Hook(_) => "hook",
            Self::Request(_) | Self::Identity(_) | Self::Other => "certificate",
            Self::File(_) | Self::Account(_) | Self::ExternalKey(_) => "file",
            Self::Place(_) => "place",
            Self::Slow => "slow",
            Self::Ended => "ended",
        }
    }

    fn is_problem(&self, kind: &str) -> bool {
        let Self::Authority { source: Error::Api(problem), .. } = self else { return false };
        problem.r#type.as_deref().and_then(|it| it.strip_prefix(PROBLEM)) == Some(kind)
    }

    /// Whether the authority does not know the account.
    pub(super) fn is_account_unknown(&self) -> bool {
        self.is_problem("accountDoesNotExist")
    }

    /// Whether the authority was asked too much.
    pub(super) fn is_rate_limited(&self) -> bool {
        self.is_problem("rateLimited")
    }
}

/// Which step of an order failed.
fn at(step: &'static str) -> impl FnOnce(Error) -> OrderError {
    move |source| OrderError::Authority { step, source }
}

/// What orders need.
#[derive(Clone)]
pub(super) struct Orders {
    pub(super) settings: Arc<Settings>,
    pub(super) files: IssuedFiles,
    pub(super) place: Option<Arc<Place>>,
}

/// What stands while an authority looks.
enum Proof {
    Answer(#[expect(dead_code, reason = "it answers for as long as it lives")] Answering, Option<Posted>),
    Record(Record),
}

/// When the authority wants this certificate to be renewed, and how long it wants not to be asked again. None: it does
/// not say.
pub(super) async fn window(account: &Account, identity: &Identity) -> Option<(Window, Duration)> {
    let id = CertificateIdentifier::try_from(&identity.chain()[0]).ok()?;
    let asking = tokio::time::timeout(ACCOUNT_MAX, account.renewal_info(&id));
    let (info, again) = asking
        .await
        .ok()?
        .inspect_err(|error| tracing::debug!(%error, "the authority does not say when to renew"))
        .ok()?;
    let window = info.suggested_window;
    Some((Window { start: SystemTime::from(window.start), end: SystemTime::from(window.end) }, again))
}

impl Orders {
    /// The account that was kept, or a new one.
    pub(super) async fn open(self, directory: Directory) -> Result<Account, OrderError> {
        let opening = self.opened(directory);
        tokio::time::timeout(ACCOUNT_MAX, opening).await.map_err(|_| OrderError::Slow)?
    }

    async fn opened(&self, directory: Directory) -> Result<Account, OrderError> {
        let builder = Account::builder_with_http(Box::new(directory));
        if let Some(kept) = self.files.account()? {
            let credentials = serde_json::from_slice(&kept).map_err(OrderError::Account)?;
            return builder.from_credentials(credentials).await.map_err(at("open the account"));
        }
        let contact: Vec<&str> = self.settings.contact().collect();
        // The settings are refused if the terms are not agreed to.
        let wanted = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
        let external = match &self.settings.external_account {
            None => None,
            Some(external) => {
                let read = |source| FileError::Read { path: external.key.clone(), source };
                let text = std::fs::read_to_string(&external.key).map_err(read)?;
                let text = text.trim().trim_end_matches('=');
                let key = URL_SAFE_NO_PAD.decode(text).map_err(OrderError::ExternalKey)?;
                Some(ExternalAccountKey::new(external.id.clone(), &key))
            }
        };
        let made = builder.create(&wanted, self.settings.directory().to_owned(), external.as_ref());
        let (account, credentials) = made.await.map_err(at("make an account"))?;
        let text = serde_json::to_string(&credentials).map_err(OrderError::Account)?;
        self.files.save_account(&text)?;
        Ok(account)
    }

    /// Gets a certificate for `name` and keeps it.
    pub(super) async fn order(
        &self,
        account: &Account,
        name: &CertificateName,
        old: Option<&Identity>,
        (challenges, provider): (&Challenges, TlsProvider),
    ) -> Result<Identity, OrderError> {
        let ordering = self.ordered(account, name, old, (challenges, provider));
        let most = ORDER_MAX + Duration::from_millis(self.settings.dns_hook_ms).saturating_mul(2);
        let identity = tokio::time::timeout(most, ordering).await.map_err(|_| OrderError::Slow)??;
        let identity = identity.signing_with(&selvage_certs::provider_of(provider))?;
        if !identity.names().iter().any(|other| other == name.as_str()) || identity.not_after() <= SystemTime::now() {
            return Err(OrderError::Other);
        }
        let (files, kept_name, kept) = (self.files.clone(), name.clone(), identity.clone());
        let saved = tokio::task::spawn_blocking(move || files.save(&kept_name, &kept));
        saved.await.map_err(|_| OrderError::Ended)??;
        if let Some(place) = &self.place
            && let Err(error) = place.give(&self.files, name, &identity).await
        {
            // It is good here all the same. The others order for themselves when the turn is over.
            tracing::warn!(%name, error = super::chain(&error), "certificate is not given to the place");
        }
        Ok(identity)
    }

    async fn ordered(
        &self,
        account: &Account,
        name: &CertificateName,
        old: Option<&Identity>,
        by: (&Challenges, TlsProvider),
    ) -> Result<Identity, OrderError> {
        let mut order = begin(account, name, old).await?;
        let mut proofs = Vec::new();
        let shown = self.show(&mut order, name, by, &mut proofs).await;
        let looked = match shown {
            Ok(()) => looked_at(&mut order).await,
            Err(error) => Err(error),
        };
        for proof in proofs {
            self.take_away(name, proof).await;
        }
        looked?;
        let enrolment = Enrolment::of_name(name.as_str())?;
        order.finalize_csr(enrolment.request()).await.map_err(at("ask for the certificate"))?;
        let policy = RetryPolicy::new().timeout(LOOKED_MAX);
        let pem = order.poll_certificate(&policy).await.map_err(at("wait for the certificate"))?;
        Ok(enrolment.finish_pem(&pem)?)
    }

    /// Takes away what an authority has looked at, or will not look at any more.
    async fn take_away(&self, name: &CertificateName, proof: Proof) {
        match (proof, &self.place) {
            (Proof::Record(record), _) => {
                if let Err(error) = record.take_away(&self.settings, &self.files).await {
                    tracing::warn!(%name, error = super::chain(&error), "record of a challenge stays");
                }
            }
            (Proof::Answer(_, Some(posted)), Some(place)) => {
                if let Err(error) = place.take_away(posted).await {
                    tracing::debug!(%name, error = super::chain(&error), "the place's answer stays until it ends");
                }
            }
            (Proof::Answer(..), _) => {}
        }
    }

    /// Whether it is this node's turn to order, and nobody else has done so meanwhile.
    pub(super) async fn has_turn(&self, name: &CertificateName, old: Option<&Identity>) -> Result<bool, OrderError> {
        let Some(place) = &self.place else { return Ok(true) };
        if !place.has_turn(name).await? {
            return Ok(false);
        }
        let ends = |identity: &Identity| identity.not_after();
        let given = place.given(&self.files, name).and_then(|sealed| place.opened(&self.files, name, &sealed));
        let is_done = given.as_ref().map(ends) > old.map(ends);
        if is_done {
            place.pass(name).await?;
        }
        Ok(!is_done)
    }

    /// Shows that the name leads here, in each way that the authority asks for, and says so.
    async fn show(
        &self,
        order: &mut Order,
        name: &CertificateName,
        by: (&Challenges, TlsProvider),
        proofs: &mut Vec<Proof>,
    ) -> Result<(), OrderError> {
        let wanted = self.settings.challenge();
        let kind = match wanted {
            AcmeChallenge::Http01 => ChallengeType::Http01,
            AcmeChallenge::TlsAlpn01 => ChallengeType::TlsAlpn01,
            AcmeChallenge::Dns01 => ChallengeType::Dns01,
        };
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization.map_err(at("read what is to be shown"))?;
            if authorization.status == AuthorizationStatus::Valid {
                continue;
            }
            let challenge = authorization.challenge(kind.clone());
            let mut challenge = challenge.ok_or(OrderError::NotOffered(wanted))?;
            proofs.push(self.prove(&challenge, name.host(), by).await?);
            challenge.set_ready().await.map_err(at("have the authority look"))?;
        }
        Ok(())
    }

    /// Has the other nodes of the place answer too.
    async fn post(&self, host: &str, token: Option<&str>, answer: &[u8]) -> Result<Option<Posted>, OrderError> {
        let Some(place) = &self.place else { return Ok(None) };
        Ok(Some(place.post(host, token, answer).await?))
    }

    async fn prove(
        &self,
        challenge: &ChallengeHandle<'_>,
        host: &str,
        (challenges, provider): (&Challenges, TlsProvider),
    ) -> Result<Proof, OrderError> {
        let key = challenge.key_authorization();
        Ok(match self.settings.challenge() {
            AcmeChallenge::Http01 => {
                let own = challenges.answer_http(host, &challenge.token, key.as_str());
                Proof::Answer(own, self.post(host, Some(&challenge.token), key.as_str().as_bytes()).await?)
            }
            AcmeChallenge::TlsAlpn01 => {
                let digest = key.digest();
                let digest = digest.as_ref().try_into().map_err(|_| OrderError::Ended)?;
                let own = challenges.answer_tls(host, digest, provider)?;
                Proof::Answer(own, self.post(host, None, digest).await?)
            }
            AcmeChallenge::Dns01 => {
                Proof::Record(Record::put(&self.settings, &self.files, host, key.dns_value()).await?)
            }
        })
    }
}

/// A new order, which says what it replaces where the authority has use for it (RFC 9773 5).
async fn begin(account: &Account, name: &CertificateName, old: Option<&Identity>) -> Result<Order, OrderError> {
    let identifiers = [Identifier::Dns(name.as_str().to_owned())];
    if let Some(replaced) = old.and_then(|old| CertificateIdentifier::try_from(&old.chain()[0]).ok()) {
        match account.new_order(&NewOrder::new(&identifiers).replaces(replaced)).await {
            Ok(order) => return Ok(order),
            // It may be replaced already, or the authority knows nothing of this: then it is an order like any other.
            Err(error) => tracing::debug!(%name, %error, "order does not say what it replaces"),
        }
    }
    account.new_order(&NewOrder::new(&identifiers)).await.map_err(at("order a certificate"))
}

/// Waits until the authority has looked.
async fn looked_at(order: &mut Order) -> Result<(), OrderError> {
    let policy = RetryPolicy::new().timeout(LOOKED_MAX);
    match order.poll_ready(&policy).await {
        Ok(OrderStatus::Ready) => Ok(()),
        Ok(_) => Err(OrderError::Refused(reason(order).await)),
        // The order tells that it failed, its parts tell why.
        Err(Error::Api(problem)) if order.state().status == OrderStatus::Invalid => {
            let reason = reason(order).await;
            Err(OrderError::Refused(if reason.is_empty() { problem.to_string() } else { reason }))
        }
        Err(error) => Err(at("wait until the authority has looked")(error)),
    }
}

/// What the authority says of challenges that failed.
async fn reason(order: &mut Order) -> String {
    let mut said = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if let Ok(state) = authorization.refresh().await {
            said.extend(state.challenges.iter().filter_map(|it| it.error.as_ref()).map(ToString::to_string));
        }
    }
    said.join("; ")
}
