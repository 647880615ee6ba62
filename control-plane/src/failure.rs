//! A request to the API that failed: one status, one sentence, one hint.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::RETRY_AFTER;
use http::{HeaderValue, StatusCode};
use selvage_certs::LateError;
use selvage_config::app::AppError;
use selvage_config::app::variables::TemplateError;

use crate::answers::Problem;
use crate::body::BodyError;
use crate::fleet::{MemberError, RevokeError, StatusError};
use crate::joining::JoinError;
use crate::journal::JournalError;
use crate::registry::RegistryError;
use crate::releases::ReleaseError;
use crate::state::StateError;

/// After how many seconds somebody may ask again who was turned away for the time being.
const RETRY_SECONDS: &str = "2";

/// A request that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    pub(crate) error: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    #[expect(clippy::needless_pass_by_value, reason = "callers hand over errors that they are done with")]
    pub(crate) fn new(status: StatusCode, error: impl ToString) -> Self {
        Self { status, error: error.to_string(), hint: None }
    }

    pub(crate) fn bad(error: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    pub(crate) fn hint(self, hint: &str) -> Self {
        Self { hint: Some(hint.to_owned()), ..self }
    }

    /// Something of ours broke. What exactly is for the log.
    pub(crate) fn internal(error: &dyn std::error::Error) -> Self {
        let source = error.source().map(ToString::to_string).unwrap_or_default();
        tracing::error!(%error, source, "request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the control plane could not do this").hint("its log says why")
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        retry_later((self.status, Json(Problem { error: self.error, hint: self.hint })).into_response())
    }
}

/// Whoever is turned away for a while is told for how long (RFC 9110 15.6.4).
pub(crate) fn retry_later(mut answer: Response) -> Response {
    if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
        answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(RETRY_SECONDS));
    }
    answer
}

/// What clients are told of a journal that is away: where it is, is for the log.
pub(crate) fn away(error: &StateError) -> &'static str {
    match error {
        StateError::Journal(JournalError::Unsettled) => {
            "the state that control planes share did not answer: whether the change was made is seen when it is back"
        }
        _ => "the state that control planes share is out of reach: nothing was changed",
    }
}

impl From<&StateError> for Failure {
    fn from(error: &StateError) -> Self {
        match error {
            StateError::Journal(JournalError::Away(_) | JournalError::Unsettled | JournalError::Stale) => {
                tracing::warn!(%error, "a change waits");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, away(error)).hint("try again in some seconds")
            }
            _ => Self::internal(error),
        }
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::from(&error)
    }
}

impl From<BodyError> for Failure {
    fn from(error: BodyError) -> Self {
        let status = match error {
            BodyError::Large { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            BodyError::Slow => StatusCode::REQUEST_TIMEOUT,
            BodyError::Broken => StatusCode::BAD_REQUEST,
        };
        Self::new(status, error)
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::bad(format!("the body is not the expected JSON: {error}"))
    }
}

impl From<AppError> for Failure {
    fn from(error: AppError) -> Self {
        let text = match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, text).hint("build and push the app again with this version")
    }
}

impl From<TemplateError> for Failure {
    fn from(error: TemplateError) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, error)
            .hint("give exactly the variables that the app declares and that have no default")
    }
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self::new(error.status(), error.message())
    }
}

impl From<ReleaseError> for Failure {
    fn from(error: ReleaseError) -> Self {
        let (status, hint) = match &error {
            ReleaseError::Host { .. } => (StatusCode::CONFLICT, "take the host out of one of the two apps"),
            ReleaseError::NoApp { .. } => (StatusCode::NOT_FOUND, "make a release of it first"),
            ReleaseError::NoRelease { .. } => {
                (StatusCode::NOT_FOUND, "list the app's releases for those that are kept")
            }
            ReleaseError::Oldest { .. } => (StatusCode::CONFLICT, "there is nothing to go back to"),
            ReleaseError::Apps | ReleaseError::Plan { .. } => (StatusCode::CONFLICT, "remove apps that are not needed"),
            ReleaseError::Alone { .. } => (StatusCode::CONFLICT, "deploy a first release for everybody"),
            ReleaseError::Percent { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "give a whole number from 0 to 100"),
            ReleaseError::Waves => (StatusCode::UNPROCESSABLE_ENTITY, "give fewer waves, or let it come at once"),
            ReleaseError::Moving { .. } => (StatusCode::CONFLICT, "wait for its end, or roll it back"),
            ReleaseError::Current { .. } => (StatusCode::CONFLICT, "it serves every visitor already"),
            ReleaseError::NoSplit { .. } => (StatusCode::NOT_FOUND, "there is nothing to end"),
            ReleaseError::Secret { .. } => {
                (StatusCode::UNPROCESSABLE_ENTITY, "name a variable as the app declares it, like api_token")
            }
            ReleaseError::Numbers { .. } => (StatusCode::CONFLICT, "give the app another name"),
            ReleaseError::Variables { .. } => {
                (StatusCode::UNPROCESSABLE_ENTITY, "put large values into a file of the app")
            }
            ReleaseError::State(error) => return error.into(),
        };
        Self::new(status, error).hint(hint)
    }
}

impl From<RevokeError> for Failure {
    fn from(error: RevokeError) -> Self {
        match error {
            RevokeError::State(error) => error.into(),
            full @ RevokeError::Full => Self::new(StatusCode::CONFLICT, full),
        }
    }
}

impl From<StatusError> for Failure {
    fn from(error: StatusError) -> Self {
        let status = match &error {
            StatusError::Node { .. } | StatusError::Region { .. } => StatusCode::FORBIDDEN,
            StatusError::Generation { .. } => StatusCode::BAD_REQUEST,
            StatusError::Nodes | StatusError::Alive { .. } => StatusCode::CONFLICT,
            StatusError::NoNode { .. } => StatusCode::NOT_FOUND,
            StatusError::Unwritten => StatusCode::SERVICE_UNAVAILABLE,
            // RFC 9110 15.5.13: it is on top of a status that is not the one known here. What has grown too long is asked
            // for as a whole too, and that is refused for its length.
            StatusError::Changed(_) | StatusError::Grown { .. } => StatusCode::PRECONDITION_FAILED,
            StatusError::State(error) => return error.into(),
        };
        Self::new(status, error)
    }
}

impl From<MemberError> for Failure {
    fn from(error: MemberError) -> Self {
        let (status, hint) = match &error {
            MemberError::NoNode(_) => (StatusCode::NOT_FOUND, "`selvage nodes` lists those that are known"),
            MemberError::NoToken(_) => (StatusCode::NOT_FOUND, "it was used, has ended, or was never made"),
            MemberError::Joins => (StatusCode::CONFLICT, "take join tokens back that nobody will use"),
            MemberError::Members => (StatusCode::CONFLICT, "forget nodes that are gone"),
            MemberError::Labels => (StatusCode::UNPROCESSABLE_ENTITY, "write labels like tier=canary"),
            MemberError::Token => (StatusCode::FORBIDDEN, "ask for another join token"),
            MemberError::Name(_) => (StatusCode::FORBIDDEN, "join with the name that the token was made for"),
            MemberError::Taken(_) => (StatusCode::CONFLICT, "take another name, or a token that is made for this one"),
            MemberError::State(error) => return error.into(),
        };
        Self::new(status, error).hint(hint)
    }
}

impl From<JoinError> for Failure {
    fn from(error: JoinError) -> Self {
        let (status, hint) = match error {
            JoinError::Member(error) => return error.into(),
            JoinError::Roots(_) | JoinError::Random | JoinError::Authority(_) => return Self::internal(&error),
            JoinError::Late(LateError::Key | LateError::Identity(_)) => {
                (StatusCode::BAD_REQUEST, "ask for the key of the certificate")
            }
            JoinError::Late(_) | JoinError::NotNode | JoinError::Unregistered(_) => {
                (StatusCode::FORBIDDEN, "join again: `selvage nodes invite --node NAME`")
            }
            JoinError::NoAuthority => (StatusCode::CONFLICT, "set `authority` in the control plane's configuration"),
            JoinError::Ttl => (StatusCode::UNPROCESSABLE_ENTITY, "give a time from 1 second to a week"),
            JoinError::Request(_) => (StatusCode::BAD_REQUEST, "send a PKCS #10 request, DER in base64"),
        };
        Self::new(status, error).hint(hint)
    }
}
