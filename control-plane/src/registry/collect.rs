//! Letting go of what nothing refers to.
//!
//! What a tag, a release or a live index leads to lives, with all that it names; what is about something that lives
//! does too: signatures. The rest goes once it is old enough. Whoever pushes makes things young: a blob that was
//! pushed, mounted or asked for, and a manifest that a release asked for, are safe until its next step. Every
//! repository is looked at and swept under the lock that a manifest is taken under, so there is no moment at which a
//! manifest is taken and what it names goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use selvage_config::Digest;
use selvage_config::oci::Repository;
use serde::Serialize;

use super::catalog::ManifestRecord;
use super::{Registry, RegistryError};

/// What was let go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Collected {
    pub(crate) manifests: usize,
    pub(crate) blobs: usize,
    /// Bytes that the disk got back.
    pub(crate) bytes: u64,
}

impl Registry {
    /// Lets go of what nothing refers to and nobody touched since `before_ms`. `kept` tells which manifests releases
    /// need; it is asked for each repository anew, under the lock.
    pub(crate) fn collect(
        &self,
        before_ms: u64,
        kept: impl Fn() -> BTreeSet<(Repository, Digest)>,
    ) -> Result<Collected, RegistryError> {
        let bytes_before = self.blobs.bytes();
        let mut repositories = Vec::new();
        self.catalog.repositories("", |name| {
            repositories.push(name.clone());
            true
        })?;
        let mut collected = Collected::default();
        for repository in &repositories {
            // Each step of it is on what is so then: a change of another control plane in between begins it anew.
            self.change(|| {
                let kept: BTreeSet<Digest> =
                    kept().into_iter().filter(|(name, _)| name == repository).map(|(_, digest)| digest).collect();
                self.collect_from(repository, before_ms, kept, &mut collected)
            })?;
        }
        self.collect_files(before_ms)?;
        self.collect_objects()?;
        collected.bytes = bytes_before.saturating_sub(self.blobs.bytes());
        Ok(collected)
    }

    /// The lock must be held.
    fn collect_from(
        &self,
        repository: &Repository,
        before_ms: u64,
        kept: BTreeSet<Digest>,
        collected: &mut Collected,
    ) -> Result<(), RegistryError> {
        let manifests: BTreeMap<Digest, ManifestRecord> = self.catalog.manifests(repository)?.into_iter().collect();
        let tags = self.catalog.tagged(repository)?;
        let live = live(&manifests, &tags, kept, before_ms);
        for digest in manifests.keys().filter(|digest| !live.contains(digest)) {
            if let Some(held) = self.catalog.remove_manifest(repository, digest)? {
                self.let_go(digest, held)?;
                collected.manifests += 1;
            }
        }
        let named: BTreeSet<Digest> =
            live.iter().filter_map(|digest| manifests.get(digest)).flat_map(|m| m.references.iter().copied()).collect();
        for (digest, blob) in self.catalog.blobs(repository)? {
            if blob.touched_ms >= before_ms || named.contains(&digest) {
                continue;
            }
            if let Some(held) = self.catalog.remove_blob(repository, &digest)? {
                self.let_go(&digest, held)?;
                collected.blobs += 1;
            }
        }
        Ok(())
    }

    /// Files that no repository has: a crash may leave one between its own name and its record.
    fn collect_files(&self, before_ms: u64) -> Result<(), RegistryError> {
        for entry in fs::read_dir(self.blobs.directory())? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok()) else {
                continue;
            };
            let age = entry.metadata()?.modified()?;
            let written_ms = age.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis());
            if written_ms >= u128::from(before_ms) {
                continue;
            }
            let _changing = self.changing();
            if !self.catalog.is_held(&digest)? {
                self.blobs.remove(&digest)?;
            }
        }
        Ok(())
    }
}

/// The manifests that stay.
fn live(
    manifests: &BTreeMap<Digest, ManifestRecord>,
    tags: &[(String, Digest)],
    kept: BTreeSet<Digest>,
    before_ms: u64,
) -> BTreeSet<Digest> {
    let mut todo: Vec<Digest> = kept.into_iter().collect();
    let mut about: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
    for (tag, digest) in tags {
        match subject_of(tag) {
            Some(subject) => about.entry(subject).or_default().push(*digest),
            None => todo.push(*digest),
        }
    }
    for (digest, record) in manifests {
        if let Some((subject, _)) = &record.subject {
            about.entry(*subject).or_default().push(*digest);
        }
        if record.touched_ms >= before_ms {
            todo.push(*digest);
        }
    }
    let mut live = BTreeSet::new();
    while let Some(digest) = todo.pop() {
        let Some(record) = manifests.get(&digest) else { continue };
        if live.insert(digest) {
            todo.extend(record.references.iter().filter(|named| manifests.contains_key(named)));
            todo.extend(about.get(&digest).into_iter().flatten());
        }
    }
    live
}

/// What a tag like `sha256-<hex>` or `sha256-<hex>.sig` is about: how clients note referrers where they trust no
/// registry to.
fn subject_of(tag: &str) -> Option<Digest> {
    let (hex, rest) = tag.strip_prefix("sha256-")?.split_at_checked(64)?;
    if !rest.is_empty() && !rest.starts_with('.') {
        return None;
    }
    format!("sha256:{hex}").parse().ok()
}

#[cfg(test)]
mod tests {
    use selvage_config::oci::{Descriptor, MANIFEST};

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn record(references: &[&str], subject: Option<&str>, touched_ms: u64) -> ManifestRecord {
        let subject = subject.map(|name| (digest(name), Descriptor::of(MANIFEST, name.as_bytes())));
        let references = references.iter().map(|name| digest(name)).collect();
        ManifestRecord { media_type: MANIFEST.into(), size: 1, references, subject, touched_ms }
    }

    #[test]
    fn what_is_led_to_lives_and_the_rest_goes() {
        let manifests: BTreeMap<Digest, ManifestRecord> = [
            ("tagged", record(&["index child"], None, 0)),
            ("index child", record(&["blob"], None, 0)),
            ("signature", record(&[], Some("index child"), 0)),
            ("signature of the signature", record(&[], Some("signature"), 0)),
            ("released", record(&[], None, 0)),
            ("young", record(&[], None, 10)),
            ("old", record(&["other"], None, 9)),
            ("signature of the old", record(&[], Some("old"), 9)),
            ("early signature", record(&[], Some("not pushed yet"), 10)),
            ("tag scheme", record(&[], None, 0)),
            ("tag scheme of the old", record(&[], None, 0)),
        ]
        .map(|(name, record)| (digest(name), record))
        .into();
        let scheme = |of: &str| format!("sha256-{}.sig", digest(of).hex());
        let tags = [
            ("v1".to_owned(), digest("tagged")),
            (scheme("tagged"), digest("tag scheme")),
            (scheme("old"), digest("tag scheme of the old")),
        ];
        let live = live(&manifests, &tags, [digest("released")].into(), 10);
        let gone: Vec<&str> = ["old", "signature of the old", "tag scheme of the old"].into();
        assert_eq!(live.len(), manifests.len() - gone.len());
        for name in gone {
            assert!(!live.contains(&digest(name)), "{name}");
        }
    }

    #[test]
    fn a_tag_is_about_a_digest_only_if_it_is_written_so() {
        let hex = digest("a").hex();
        assert_eq!(subject_of(&format!("sha256-{hex}")), Some(digest("a")));
        assert_eq!(subject_of(&format!("sha256-{hex}.att")), Some(digest("a")));
        for other in ["v1", "sha256-", &format!("sha256-{hex}0"), &format!("sha256-{}", &hex[1..])] {
            assert_eq!(subject_of(other), None, "{other}");
        }
    }
}
