//! A refusal as OCI clients read it (distribution-spec 1.1, "Error codes").

use std::io;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use crate::body::BodyError;
use crate::failure::retry_later;
use crate::journal::JournalError;
use crate::state::StateError;

/// Why the registry did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error("{message}")]
    Refused { status: StatusCode, code: &'static str, message: String },
    #[error("use the registry's files")]
    Io(#[from] io::Error),
    #[error("use the registry's database")]
    Database(#[from] sled::Error),
    #[error("{0} in the registry's database is malformed")]
    Record(&'static str),
    #[error("the file of {0} does not have its digest")]
    Corrupt(selvage_config::Digest),
    #[error(transparent)]
    State(StateError),
    /// What the catalog is about to name is not in the object store.
    #[error("the blob is not in the object store yet")]
    NoObject,
}

impl From<StateError> for RegistryError {
    fn from(error: StateError) -> Self {
        match &error {
            StateError::Journal(JournalError::Away(_) | JournalError::Unsettled) => {
                tracing::warn!(%error, "a change of the registry waits");
                Self::unavailable(crate::failure::away(&error))
            }
            _ => Self::State(error),
        }
    }
}

impl From<JournalError> for RegistryError {
    fn from(error: JournalError) -> Self {
        StateError::from(error).into()
    }
}

macro_rules! refusals {
    ($($name:ident = $status:ident $code:literal;)*) => {
        impl RegistryError {
            $(pub(crate) fn $name(message: impl ToString) -> Self {
                Self::Refused { status: StatusCode::$status, code: $code, message: message.to_string() }
            })*
        }
    };
}

refusals! {
    blob_unknown = NOT_FOUND "BLOB_UNKNOWN";
    upload_invalid = BAD_REQUEST "BLOB_UPLOAD_INVALID";
    upload_unknown = NOT_FOUND "BLOB_UPLOAD_UNKNOWN";
    upload_busy = CONFLICT "BLOB_UPLOAD_INVALID";
    range_invalid = RANGE_NOT_SATISFIABLE "BLOB_UPLOAD_INVALID";
    digest_invalid = BAD_REQUEST "DIGEST_INVALID";
    manifest_blob_unknown = BAD_REQUEST "MANIFEST_BLOB_UNKNOWN";
    manifest_invalid = BAD_REQUEST "MANIFEST_INVALID";
    manifest_unknown = NOT_FOUND "MANIFEST_UNKNOWN";
    name_invalid = BAD_REQUEST "NAME_INVALID";
    name_unknown = NOT_FOUND "NAME_UNKNOWN";
    not_found = NOT_FOUND "UNSUPPORTED";
    query_invalid = BAD_REQUEST "UNSUPPORTED";
    unsupported = METHOD_NOT_ALLOWED "UNSUPPORTED";
    too_large = PAYLOAD_TOO_LARGE "SIZE_INVALID";
    slow = REQUEST_TIMEOUT "BLOB_UPLOAD_INVALID";
    in_use = CONFLICT "DENIED";
    denied = FORBIDDEN "DENIED";
    too_many = TOO_MANY_REQUESTS "TOOMANYREQUESTS";
    over_quota = FORBIDDEN "DENIED";
    immutable = CONFLICT "DENIED";
    upstream = BAD_GATEWAY "UNKNOWN";
    unauthorized_for = UNAUTHORIZED "UNAUTHORIZED";
    unavailable = SERVICE_UNAVAILABLE "UNKNOWN";
}

impl RegistryError {
    /// Nobody has proved to be somebody.
    pub(crate) fn unauthorized() -> Self {
        let message = "show an operator's name and token, or a certificate of the fleet".to_owned();
        Self::Refused { status: StatusCode::UNAUTHORIZED, code: "UNAUTHORIZED", message }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Refused { status, .. } => *status,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What the client is told: nothing of our inside, which goes to the log instead.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Refused { message, .. } => message.clone(),
            broken => {
                let source = std::error::Error::source(broken).map(ToString::to_string).unwrap_or_default();
                tracing::error!(error = %broken, source, "the registry failed");
                "the registry could not do this".to_owned()
            }
        }
    }
}

impl From<BodyError> for RegistryError {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::Large { .. } => Self::too_large(error),
            BodyError::Slow => Self::slow(error),
            BodyError::Broken => Self::upload_invalid(error),
        }
    }
}

impl IntoResponse for RegistryError {
    fn into_response(self) -> Response {
        let code = match &self {
            Self::Refused { code, .. } => *code,
            _ => "UNKNOWN",
        };
        let body = json!({ "errors": [{ "code": code, "message": self.message() }] });
        retry_later((self.status(), Json(body)).into_response())
    }
}
