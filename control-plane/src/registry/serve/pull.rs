//! Reading blobs and manifests.

use std::io::SeekFrom;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::Repository;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::io::ReaderStream;

use super::{Asked, CONTENT_DIGEST, empty};
use crate::Parts;
use crate::disk;
use crate::registry::{Reference, RegistryError};

/// Bytes of a file read at once.
const PIECE_BYTES: usize = 64 * 1024;

/// Which bytes of a blob are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Span {
    Whole,
    /// From this byte, so many.
    Part(u64, u64),
    /// None that the blob has.
    Outside,
}

/// RFC 9110 14.2 for one range. Anything else, several ranges too, asks for the whole.
fn span(range: Option<&str>, size: u64) -> Span {
    let Some((first, last)) = range.and_then(|text| text.strip_prefix("bytes=")).and_then(|text| text.split_once('-'))
    else {
        return Span::Whole;
    };
    let (first, last) = (first.trim(), last.trim());
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match (is_number(first), is_number(last), first.is_empty(), last.is_empty()) {
        (true, true, ..) | (true, _, _, true) => {
            // A number that is too long for u64 is past every end.
            let first = first.parse().unwrap_or(u64::MAX);
            let last = if last.is_empty() { u64::MAX } else { last.parse().unwrap_or(u64::MAX) };
            if last < first {
                Span::Whole
            } else if first >= size {
                Span::Outside
            } else {
                Span::Part(first, last.min(size - 1) - first + 1)
            }
        }
        (_, true, true, _) => match last.parse().unwrap_or(u64::MAX).min(size) {
            0 => Span::Outside,
            length => Span::Part(size - length, length),
        },
        _ => Span::Whole,
    }
}

/// GET and HEAD of a blob (end-2).
pub(super) async fn blob(
    parts: &Arc<Parts>,
    repository: Repository,
    digest: Digest,
    asked: &Asked,
) -> Result<Response, RegistryError> {
    let (registry, name) = (Arc::clone(&parts.registry), repository.clone());
    let unknown = move || RegistryError::blob_unknown(format!("{name} has no blob {digest}"));
    let is_head = asked.method == Method::HEAD;
    let found = disk::wait(move || {
        // Whoever asks whether a blob is there may be about to name it in a manifest.
        let size = if is_head {
            registry.touch_blob(&repository, &digest)?
        } else {
            registry.catalog.blob(&repository, &digest)?
        };
        if size.is_some() && !is_head {
            registry.bring(&digest)?;
        }
        Ok::<_, RegistryError>(size.map(|size| (size, registry.blobs.path(&digest))))
    })
    .await?;
    let (size, path) = found.ok_or_else(&unknown)?;
    let span = if asked.method == Method::GET { span(asked.header(RANGE), size) } else { Span::Whole };
    let (status, start, length) = match span {
        Span::Whole => (StatusCode::OK, 0, size),
        Span::Part(start, length) => (StatusCode::PARTIAL_CONTENT, start, length),
        Span::Outside => {
            let range = (CONTENT_RANGE, format!("bytes */{size}"));
            return Ok(empty(StatusCode::RANGE_NOT_SATISFIABLE, [range]));
        }
    };
    let mut answer = empty(
        status,
        [
            (CONTENT_TYPE, "application/octet-stream".to_owned()),
            (CONTENT_LENGTH, length.to_string()),
            (CONTENT_DIGEST, digest.to_string()),
            (ACCEPT_RANGES, "bytes".to_owned()),
        ],
    );
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {start}-{}/{size}", start + length - 1);
        answer.headers_mut().insert(CONTENT_RANGE, range.parse().expect("digits are a header value"));
    }
    if asked.method == Method::GET {
        // Between the look at the catalog and this the blob may have been deleted.
        let gone = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => unknown(),
            _ => error.into(),
        };
        let mut file = tokio::fs::File::open(path).await.map_err(gone)?;
        file.seek(SeekFrom::Start(start)).await?;
        *answer.body_mut() = Body::from_stream(ReaderStream::with_capacity(file.take(length), PIECE_BYTES));
    }
    Ok(answer)
}

/// GET and HEAD of a manifest (end-3).
pub(super) async fn manifest(
    parts: &Arc<Parts>,
    repository: Repository,
    reference: Reference,
    asked: &Asked,
) -> Result<Response, RegistryError> {
    let registry = Arc::clone(&parts.registry);
    let is_get = asked.method == Method::GET;
    let (digest, record, bytes) = disk::wait(move || {
        let digest = registry.resolve(&repository, &reference)?;
        let record = registry.record(&repository, &digest)?;
        let bytes = if is_get { registry.read(&digest)? } else { Vec::new() };
        Ok::<_, RegistryError>((digest, record, bytes))
    })
    .await?;
    let mut answer = empty(
        StatusCode::OK,
        [
            (CONTENT_TYPE, record.media_type),
            (CONTENT_LENGTH, record.size.to_string()),
            (CONTENT_DIGEST, digest.to_string()),
        ],
    );
    if is_get {
        *answer.body_mut() = Body::from(bytes);
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_understood() {
        assert_eq!(span(None, 10), Span::Whole);
        assert_eq!(span(Some("bytes=0-0"), 10), Span::Part(0, 1));
        assert_eq!(span(Some("bytes=2-"), 10), Span::Part(2, 8));
        assert_eq!(span(Some("bytes=2-99"), 10), Span::Part(2, 8));
        assert_eq!(span(Some("bytes=-3"), 10), Span::Part(7, 3));
        assert_eq!(span(Some("bytes=-99"), 10), Span::Part(0, 10));
        for outside in ["bytes=10-", "bytes=10-12", "bytes=-0", "bytes=99999999999999999999-"] {
            assert_eq!(span(Some(outside), 10), Span::Outside, "{outside}");
        }
        assert_eq!(span(Some("bytes=0-"), 0), Span::Outside);
        assert_eq!(span(Some("bytes=-5"), 0), Span::Outside);
        for whole in ["bytes=5-2", "bytes=0-1,3-4", "bytes=", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=+1-2"] {
            assert_eq!(span(Some(whole), 10), Span::Whole, "{whole}");
        }
    }
}
