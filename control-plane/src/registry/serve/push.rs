//! Writing blobs and manifests.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderName, Method, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::{MANIFEST_BYTES_MAX, Repository};

use super::{Asked, CONTENT_DIGEST, empty};
use crate::Parts;
use crate::access::{Action, OperatorId};
use crate::body::{Incoming, whole};
use crate::disk;
use crate::registry::target::{parse_digest, repository as parse_repository};
use crate::registry::uploads::{BLOB_BYTES_MAX, Taken};
use crate::registry::{Reference, RegistryError};

/// What a manifest that was taken is about (distribution-spec 1.1, "Pushing Manifests with Subject").
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// The upload's name, for clients that want it.
const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// POST: begins an upload, or takes a blob at once (end-4a, 4b), or from another repository (end-11).
pub(super) async fn begin(
    parts: &Arc<Parts>,
    repository: Repository,
    asked: &Asked,
    body: Body,
) -> Result<Response, RegistryError> {
    let who = asked.operator(Action::Push, &repository)?;
    if let (Some(digest), Some(from)) = (asked.query("mount"), asked.query("from"))
        && let (digest, from) = (parse_digest(digest)?, parse_repository(from)?)
        && who.over_repository(Action::Pull, &from)
    {
        let (registry, name) = (Arc::clone(&parts.registry), repository.clone());
        if disk::wait(move || registry.mount(&name, &from, &digest)).await? {
            parts.audit.note(&who, "blob.push", &repository, digest).await;
            return Ok(created(&repository, &digest));
        }
        // Not there: the client is to push it, as if it had not asked.
    }
    let digest = asked.query("digest").map(parse_digest).transpose()?;
    check_length(asked)?;
    let registry = Arc::clone(&parts.registry);
    let name = repository.clone();
    let mut upload = disk::wait(move || registry.begin(&name)).await?;
    match digest {
        Some(digest) => match fill(upload, Incoming::new(body)).await {
            (upload, Ok(())) => finish(parts, &who, repository, upload, digest).await,
            (upload, Err(error)) => {
                // Nobody learns its name, so nobody could go on with it.
                upload.end();
                Err(error)
            }
        },
        None => Ok(progress(StatusCode::ACCEPTED, &repository, &mut upload)),
    }
}

/// GET, PATCH, PUT and DELETE of an upload (end-5, 6, 13, 14).
pub(super) async fn upload(
    parts: &Arc<Parts>,
    repository: Repository,
    id: &str,
    asked: &Asked,
    body: Body,
) -> Result<Response, RegistryError> {
    let who = asked.operator(Action::Push, &repository)?;
    let mut upload = parts.registry.uploads.take(&repository, id)?;
    match asked.method {
        Method::GET => Ok(progress(StatusCode::NO_CONTENT, &repository, &mut upload)),
        Method::DELETE => {
            disk::wait(move || upload.end()).await;
            Ok(empty(StatusCode::NO_CONTENT, []))
        }
        Method::PATCH => {
            check_length(asked)?;
            let Some(end) = check_range(asked, upload.written())? else {
                return Ok(progress(StatusCode::RANGE_NOT_SATISFIABLE, &repository, &mut upload));
            };
            let (mut upload, filled) = fill(upload, Incoming::new(body)).await;
            filled?;
            check_end(end, &mut upload)?;
            Ok(progress(StatusCode::ACCEPTED, &repository, &mut upload))
        }
        Method::PUT => {
            let digest = asked.query("digest").ok_or_else(|| RegistryError::digest_invalid("which digest?"))?;
            let digest = parse_digest(digest)?;
            check_length(asked)?;
            let Some(end) = check_range(asked, upload.written())? else {
                return Ok(progress(StatusCode::RANGE_NOT_SATISFIABLE, &repository, &mut upload));
            };
            let (mut upload, filled) = fill(upload, Incoming::new(body)).await;
            filled?;
            check_end(end, &mut upload)?;
            finish(parts, &who, repository, upload, digest).await
        }
        _ => Err(RegistryError::unsupported(format!("{} means nothing here", asked.method))),
    }
}

/// Appends a body to an upload, to the end even if the client is gone: what it does to the file must be known.
pub(crate) async fn fill(mut upload: Taken, body: Incoming) -> (Taken, Result<(), RegistryError>) {
    let appending = tokio::spawn(async move {
        let result = upload.append(body).await;
        (upload, result)
    });
    match appending.await {
        Ok(both) => both,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}

async fn finish(
    parts: &Arc<Parts>,
    who: &OperatorId,
    repository: Repository,
    upload: Taken,
    digest: Digest,
) -> Result<Response, RegistryError> {
    let (registry, name) = (Arc::clone(&parts.registry), repository.clone());
    disk::wait(move || registry.finish(&name, upload, &digest)).await?;
    parts.audit.note(who, "blob.push", &repository, digest).await;
    Ok(created(&repository, &digest))
}

/// PUT of a manifest (end-7).
pub(super) async fn manifest(
    parts: &Arc<Parts>,
    repository: Repository,
    reference: Reference,
    asked: &Asked,
    body: Body,
) -> Result<Response, RegistryError> {
    let who = asked.operator(Action::Push, &repository)?;
    parts.registry.check_ours(&repository)?;
    let content_type = asked.header(CONTENT_TYPE).map(str::to_owned);
    let bytes = whole(body, MANIFEST_BYTES_MAX).await?;
    let registry = Arc::clone(&parts.registry);
    let (name, named) = (repository.clone(), reference.clone());
    let pushed = disk::wait(move || registry.push(&name, &named, content_type.as_deref(), &bytes)).await?;
    parts.audit.note(&who, "manifest.push", format!("{repository}:{reference}"), pushed.digest).await;
    let location = (LOCATION, format!("/v2/{repository}/manifests/{}", pushed.digest));
    let mut answer = empty(StatusCode::CREATED, [location, (CONTENT_DIGEST, pushed.digest.to_string())]);
    if let Some(subject) = pushed.subject {
        answer.headers_mut().insert(SUBJECT, subject.to_string().parse().expect("a digest is a header value"));
    }
    Ok(answer)
}

/// A blob that is too large is refused before it is sent.
fn check_length(asked: &Asked) -> Result<(), RegistryError> {
    match asked.header(CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok()) {
        Some(length) if length > BLOB_BYTES_MAX => {
            Err(RegistryError::too_large(format!("a blob has at most {BLOB_BYTES_MAX} bytes")))
        }
        _ => Ok(()),
    }
}

/// Where a chunk says to end, if it says so. None if it does not begin where the upload stands.
fn check_range(asked: &Asked, written: u64) -> Result<Option<Option<u64>>, RegistryError> {
    let Some(text) = asked.header(CONTENT_RANGE) else { return Ok(Some(None)) };
    // The form is `<first>-<last>`; some clients write it as RFC 9110 14.4 does.
    let range = text.strip_prefix("bytes ").unwrap_or(text);
    let range = range.split_once('/').map_or(range, |(range, _)| range);
    let ends = range.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last): (u64, u64) =
        ends.ok_or_else(|| RegistryError::upload_invalid(format!("Content-Range {text:?} is no range")))?;
    // A chunk of nothing can't be written as a range: clients send 0-0 or one less than the start.
    let end = last.checked_add(1).ok_or_else(|| RegistryError::range_invalid("the range ends past every blob"))?;
    Ok((first == written).then_some(Some(end)))
}

fn check_end(end: Option<u64>, upload: &mut Taken) -> Result<(), RegistryError> {
    let written = upload.written();
    match end {
        Some(end) if end != written => {
            let message = format!("Content-Range ends before byte {end}, the upload has {written} now");
            Err(RegistryError::upload_invalid(message))
        }
        _ => Ok(()),
    }
}

fn progress(status: StatusCode, repository: &Repository, upload: &mut Taken) -> Response {
    let id = upload.id();
    let last = upload.written().saturating_sub(1);
    let location = format!("/v2/{repository}/blobs/uploads/{id}");
    empty(status, [(LOCATION, location), (RANGE, format!("0-{last}")), (UPLOAD_ID, id)])
}

fn created(repository: &Repository, digest: &Digest) -> Response {
    let location = format!("/v2/{repository}/blobs/{digest}");
    empty(StatusCode::CREATED, [(LOCATION, location), (CONTENT_DIGEST, digest.to_string())])
}
