//! Lists of tags and of referrers, in pages.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, LINK};
use http::{HeaderName, HeaderValue};
use selvage_config::Digest;
use selvage_config::oci::{Descriptor, INDEX, Index, MANIFEST_BYTES_MAX, Repository, is_tag};
use serde_json::json;

use super::Asked;
use crate::Parts;
use crate::access::Caller;
use crate::disk;
use crate::registry::RegistryError;
use crate::registry::target::parse_digest;

/// Tags, or repositories, on a page.
const TAGS_MAX: usize = 1_000;
/// Referrers on a page.
const REFERRERS_MAX: usize = 500;
/// Bytes of referrers on a page: clients read it as they read a manifest.
const REFERRERS_BYTES_MAX: usize = MANIFEST_BYTES_MAX / 2;
/// Which filters were applied (distribution-spec 1.1, "Listing Referrers").
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");

/// GET of tags (end-8).
pub(super) async fn tags(parts: &Arc<Parts>, repository: Repository, asked: &Asked) -> Result<Response, RegistryError> {
    let max = page(asked)?;
    let last = asked.query("last").unwrap_or_default().to_owned();
    if !last.is_empty() && !is_tag(&last) {
        return Err(RegistryError::query_invalid("last is no tag"));
    }
    let (registry, name) = (Arc::clone(&parts.registry), repository.clone());
    let (tags, more) = disk::wait(move || {
        if !registry.catalog.has_repository(&name)? {
            return Err(RegistryError::name_unknown(format!("there is no repository {name}")));
        }
        if max == 0 { Ok((Vec::new(), false)) } else { registry.catalog.tags(&name, &last, max) }
    })
    .await?;
    let next = tags.last().filter(|_| more).map(|last| format!("/v2/{repository}/tags/list?n={max}&last={last}"));
    Ok(linked(Json(json!({ "name": repository, "tags": tags })).into_response(), next))
}

/// GET of the repositories that whoever asks may pull from.
pub(super) async fn repositories(parts: &Arc<Parts>, asked: &Asked) -> Result<Response, RegistryError> {
    let max = page(asked)?;
    let last = asked.query("last").unwrap_or_default().to_owned();
    let (registry, caller) = (Arc::clone(&parts.registry), asked.caller.clone());
    let (names, more) = disk::wait(move || {
        let mut names = Vec::new();
        let more = registry.catalog.repositories(&last, |name| {
            let fits = names.len() < max;
            let may = match &caller {
                Caller::Operator(operator) => operator.sees(name),
                Caller::Node { .. } => true,
            };
            if fits && may {
                names.push(name.clone());
            }
            fits
        })?;
        Ok::<_, RegistryError>((names, more))
    })
    .await?;
    let next = names.last().filter(|_| more).map(|last| format!("/v2/_catalog?n={max}&last={last}"));
    Ok(linked(Json(json!({ "repositories": names })).into_response(), next))
}

/// How many a page shall have.
fn page(asked: &Asked) -> Result<usize, RegistryError> {
    match asked.query("n") {
        None => Ok(TAGS_MAX),
        Some(text) => {
            Ok(text.parse::<usize>().map_err(|_| RegistryError::query_invalid("n is no number"))?.min(TAGS_MAX))
        }
    }
}

/// GET of what refers to a manifest (end-12). A manifest that is not there has no referrers or some: both are a list.
pub(super) async fn referrers(
    parts: &Arc<Parts>,
    repository: Repository,
    subject: Digest,
    asked: &Asked,
) -> Result<Response, RegistryError> {
    // A '+' that a client did not encode arrives as a space, which no media type has.
    let wanted = asked.query("artifactType").map(|text| text.replace(' ', "+"));
    let last = asked.query("last").map(parse_digest).transpose()?;
    let (registry, name, filter) = (Arc::clone(&parts.registry), repository.clone(), wanted.clone());
    let (manifests, more) = disk::wait(move || {
        let (mut manifests, mut bytes) = (Vec::<Descriptor>::new(), 0);
        let more = registry.catalog.referrers(&name, &subject, last.as_ref(), |descriptor| {
            if filter.is_some() && filter != descriptor.artifact_type {
                return true;
            }
            bytes += serde_json::to_vec(&descriptor).map_or(0, |bytes| bytes.len());
            // The first of a page is always on it, or there would be no getting past it.
            let fits = manifests.is_empty() || (manifests.len() < REFERRERS_MAX && bytes <= REFERRERS_BYTES_MAX);
            if fits {
                manifests.push(descriptor);
            }
            fits
        })?;
        Ok::<_, RegistryError>((manifests, more))
    })
    .await?;
    let next = manifests.last().filter(|_| more).map(|last| {
        let filter = wanted.as_deref().map(|wanted| format!("&artifactType={}", encoded(wanted))).unwrap_or_default();
        format!("/v2/{repository}/referrers/{subject}?last={}{filter}", last.digest)
    });
    let index = Index { schema_version: 2, media_type: Some(INDEX.to_owned()), manifests };
    let mut answer = linked(Json(index).into_response(), next);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(INDEX));
    if wanted.is_some() {
        answer.headers_mut().insert(FILTERS_APPLIED, HeaderValue::from_static("artifactType"));
    }
    Ok(answer)
}

/// RFC 8288: where the next page is.
fn linked(mut answer: Response, next: Option<String>) -> Response {
    if let Some(link) = next.and_then(|next| HeaderValue::from_str(&format!("<{next}>; rel=\"next\"")).ok()) {
        answer.headers_mut().insert(LINK, link);
    }
    answer
}

/// RFC 3986 2.1 for a value in a query.
fn encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(encode).collect()
}
