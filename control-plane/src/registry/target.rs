//! What a path under `/v2/` names. Repositories have slashes in their names, so paths are read from the end.

use std::fmt;

use selvage_config::Digest;
use selvage_config::oci::{Repository, is_tag};

use super::RegistryError;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// `/v2/`: whether this is a registry, and whether the client may use it.
    Root,
    Blob(Repository, Digest),
    Uploads(Repository),
    Upload(Repository, String),
    Manifest(Repository, Reference),
    Tags(Repository),
    Referrers(Repository, Digest),
    /// `/v2/_catalog`: which repositories there are. Not of the specification, and asked for all the same.
    Catalog,
}

/// How a manifest is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    Digest(Digest),
    Tag(String),
}

impl Reference {
    /// Reads a digest or a tag.
    pub(crate) fn parse(text: &str) -> Result<Self, RegistryError> {
        if text.contains(':') {
            return parse_digest(text).map(Self::Digest);
        }
        if is_tag(text) {
            return Ok(Self::Tag(text.to_owned()));
        }
        Err(RegistryError::manifest_invalid(format!("{:?} is neither a tag nor a digest", shown(text))))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => digest.fmt(f),
            Self::Tag(tag) => f.write_str(tag),
        }
    }
}

impl Target {
    /// Reads the part of the path after `/v2/`.
    pub(crate) fn parse(path: &str) -> Result<Self, RegistryError> {
        if path.is_empty() {
            return Ok(Self::Root);
        }
        if path == "_catalog" {
            return Ok(Self::Catalog);
        }
        if let Some(name) = path.strip_suffix("/tags/list") {
            return Ok(Self::Tags(repository(name)?));
        }
        if let Some(name) = path.strip_suffix("/blobs/uploads/").or_else(|| path.strip_suffix("/blobs/uploads")) {
            return Ok(Self::Uploads(repository(name)?));
        }
        let no_such = || RegistryError::not_found(format!("{:?} names nothing in a registry", shown(path)));
        let (rest, last) = path.rsplit_once('/').ok_or_else(no_such)?;
        if let Some(name) = rest.strip_suffix("/blobs/uploads") {
            return Ok(Self::Upload(repository(name)?, last.to_owned()));
        }
        if let Some(name) = rest.strip_suffix("/blobs") {
            return Ok(Self::Blob(repository(name)?, parse_digest(last)?));
        }
        if let Some(name) = rest.strip_suffix("/manifests") {
            return Ok(Self::Manifest(repository(name)?, Reference::parse(last)?));
        }
        if let Some(name) = rest.strip_suffix("/referrers") {
            return Ok(Self::Referrers(repository(name)?, parse_digest(last)?));
        }
        Err(no_such())
    }
}

impl Target {
    /// The repository that it is in.
    pub(crate) fn repository(&self) -> Option<&Repository> {
        match self {
            Self::Root | Self::Catalog => None,
            Self::Blob(name, _)
            | Self::Uploads(name)
            | Self::Upload(name, _)
            | Self::Manifest(name, _)
            | Self::Tags(name)
            | Self::Referrers(name, _) => Some(name),
        }
    }
}

pub(crate) fn repository(name: &str) -> Result<Repository, RegistryError> {
    name.parse().map_err(RegistryError::name_invalid)
}

pub(crate) fn parse_digest(text: &str) -> Result<Digest, RegistryError> {
    // distribution-spec 1.1 lets a registry choose; one digest for each thing keeps signatures, plans and files of one mind.
    if text.starts_with("sha512:") {
        return Err(RegistryError::digest_invalid("digests of sha512 are not taken here: name it by its sha256"));
    }
    text.parse().map_err(RegistryError::digest_invalid)
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Repository {
        text.parse().unwrap()
    }

    #[test]
    fn a_digest_of_sha512_is_refused_by_name() {
        let told = parse_digest(&format!("sha512:{}", "0a".repeat(64))).unwrap_err().message();
        assert!(told.contains("sha512") && told.contains("sha256"), "{told}");
    }

    #[test]
    fn a_path_is_read_from_its_end() {
        let digest = Digest::of(b"");
        let cases = [
            (String::new(), Target::Root),
            ("a/b/tags/list".to_owned(), Target::Tags(name("a/b"))),
            ("a/blobs/uploads/".to_owned(), Target::Uploads(name("a"))),
            ("a/blobs/uploads/x".to_owned(), Target::Upload(name("a"), "x".into())),
            (format!("a/blobs/{digest}"), Target::Blob(name("a"), digest)),
            ("a/manifests/v1".to_owned(), Target::Manifest(name("a"), Reference::Tag("v1".into()))),
            (format!("a/manifests/{digest}"), Target::Manifest(name("a"), Reference::Digest(digest))),
            (format!("manifests/manifests/referrers/{digest}"), Target::Referrers(name("manifests/manifests"), digest)),
        ];
        for (path, target) in cases {
            assert_eq!(Target::parse(&path).unwrap(), target, "{path}");
        }
    }

    #[test]
    fn other_paths_name_nothing() {
        for bad in [
            "x",
            "a/",
            "/tags/list",
            "A/tags/list",
            "a/../tags/list",
            "a/blobs/",
            "a/blobs/sha256:00",
            "a/blobs/latest",
            "a/manifests/",
            "a/manifests/.x",
            "a/manifests/sha512:00",
            "a/referrers/v1",
            "tags/list",
            "a/other/v1",
        ] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_path_panics(path in ".*") {
            let _ = Target::parse(&path);
        }
    }
}
