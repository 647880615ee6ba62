//! Pushing to the control plane's registry (OCI distribution-spec 1.1).

use bytes::Bytes;
use miette::Report;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::{INDEX, MANIFEST, Manifest, Repository, is_tag};

use crate::client::{Client, send};
use crate::output::{failed, failure, wrong};

/// `repository`, `repository:tag` or `repository@sha256:…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The repository.
    pub(crate) repository: Repository,
    /// A tag or a digest. Default `latest`.
    pub(crate) reference: String,
}

impl std::str::FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (repository, reference) = match (text.split_once('@'), text.rsplit_once(':')) {
            (Some((repository, digest)), _) => {
                (repository, digest.parse::<Digest>().map_err(|error| error.to_string())?.to_string())
            }
            (None, Some((repository, tag))) if is_tag(tag) => (repository, tag.to_owned()),
            (None, Some((_, tag))) => return Err(format!("{tag:?} is no tag")),
            (None, None) => (text, "latest".to_owned()),
        };
        Ok(Self {
            repository: repository.parse().map_err(|e: selvage_config::oci::RepositoryError| e.to_string())?,
            reference,
        })
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let separator = if self.reference.starts_with("sha256:") { '@' } else { ':' };
        write!(f, "{}{separator}{}", self.repository, self.reference)
    }
}

/// Uploads a blob unless the registry has it. Whether it had to.
pub(crate) async fn push_blob(client: &Client, repository: &Repository, blob: Bytes) -> Result<bool, Report> {
    let digest = Digest::of(&blob);
    let head = client.request(Method::HEAD, &format!("/v2/{repository}/blobs/{digest}"));
    let head = head.send().await.map_err(|error| failure("ask for a blob", &error, None))?;
    if head.status() == StatusCode::OK {
        return Ok(false);
    }
    let start = client.request(Method::POST, &format!("/v2/{repository}/blobs/uploads/")).header(CONTENT_LENGTH, 0);
    let started = send(start, "start an upload").await?;
    let location = started.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let location = location.ok_or_else(|| failed("start an upload: the registry named no location", None))?;
    let separator = if location.contains('?') { '&' } else { '?' };
    let target = format!("{location}{separator}digest={digest}");
    let put = client.request(Method::PUT, &target).header(CONTENT_TYPE, "application/octet-stream").body(blob);
    send(put, "upload a blob").await?;
    Ok(true)
}

/// Uploads a manifest under its digest, and under `tag` if there is one.
pub(crate) async fn push_manifest(
    client: &Client,
    repository: &Repository,
    manifest: &Manifest,
    tag: Option<&str>,
) -> Result<Digest, Report> {
    let bytes = serde_json::to_vec(manifest).map_err(|error| failure("write the manifest", &error, None))?;
    let digest = Digest::of(&bytes);
    let reference = tag.map_or_else(|| digest.to_string(), str::to_owned);
    let put = client.request(Method::PUT, &format!("/v2/{repository}/manifests/{reference}"));
    send(put.header(CONTENT_TYPE, MANIFEST).body(bytes), "upload the manifest").await?;
    Ok(digest)
}

/// The manifest under a tag, if there is one.
pub(crate) async fn tagged(client: &Client, repository: &Repository, tag: &str) -> Result<Option<Manifest>, Report> {
    let get = client.request(Method::GET, &format!("/v2/{repository}/manifests/{tag}")).header(ACCEPT, MANIFEST);
    let response = get.send().await.map_err(|error| failure("look for a manifest", &error, None))?;
    if response.status() == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    let response = response.error_for_status().map_err(|error| failure("look for a manifest", &error, None))?;
    response.json().await.map(Some).map_err(|error| failure("read a manifest", &error, None))
}

/// The digest of what a reference names now, by own hash, and its size.
pub(crate) async fn resolve(client: &Client, reference: &Reference) -> Result<(Digest, u64), Report> {
    let path = format!("/v2/{}/manifests/{}", reference.repository, reference.reference);
    let get = client.request(Method::GET, &path).header(ACCEPT, format!("{MANIFEST}, {INDEX}"));
    let response = send(get, &format!("look up {reference}")).await?;
    let bytes = response.bytes().await.map_err(|error| failure("read the manifest", &error, None))?;
    let digest = Digest::of(&bytes);
    if reference.reference.starts_with("sha256:") && reference.reference != digest.to_string() {
        return Err(wrong(format!("the registry answered {digest} for {reference}"), None));
    }
    Ok((digest, bytes.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_has_a_tag_or_a_digest() {
        let digest = Digest::of(b"");
        for (text, repository, reference) in [
            ("hello", "hello", "latest".to_owned()),
            ("acme/hello:v1", "acme/hello", "v1".to_owned()),
            (&format!("hello@{digest}"), "hello", digest.to_string()),
        ] {
            let parsed: Reference = text.parse().unwrap();
            assert_eq!((parsed.repository.as_str(), &parsed.reference), (repository, &reference));
        }
        for bad in ["", "Hello", "hello:", "hello:a b", "hello@sha256:0"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
