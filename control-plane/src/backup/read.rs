//! Reading a backup: every byte against its sum, and nothing that does not belong there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use ring::digest::{Context, SHA256};
use selvage_config::Digest;
use tar::{Archive, EntryType};

use super::write::{Hashing, digest};
use super::{AUDIT, BLOBS, BackupError, CONTENTS, Contents, FLEET, FORMAT, REGISTRY, SUMS};

/// Bytes of what a backup says of itself.
const CONTENTS_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Bytes of the sums: a million blobs.
const SUMS_BYTES_MAX: u64 = 160 * 1024 * 1024;
/// Bytes that are read at once.
const PIECE_BYTES: usize = 256 * 1024;

/// What stands in a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Fleet,
    Registry,
    /// Of the log's files, the one at this place of [`AUDIT`].
    Audit(usize),
    Blob(Digest),
}

/// Reads a whole backup and compares every sum, and touches nothing.
///
/// # Errors
/// What is wrong with it.
pub fn check(file: &Path) -> Result<Contents, BackupError> {
    read(file, |_| Ok(()), |_, _| Ok(()))
}

/// Reads a backup. `begin` is told what it holds, `take` each part, before it is known whether the sums are right: what
/// they make of it counts only if this function returns well.
pub(super) fn read(
    file: &Path,
    begin: impl FnOnce(&Contents) -> Result<(), BackupError>,
    mut take: impl FnMut(Part, &mut dyn Read) -> Result<(), BackupError>,
) -> Result<Contents, BackupError> {
    let opened = File::open(file).map_err(|source| BackupError::File { path: file.to_owned(), source })?;
    let mut archive = Archive::new(BufReader::with_capacity(PIECE_BYTES, opened));
    let mut entries = archive.entries().map_err(BackupError::Read)?;
    let mut sums = BTreeMap::new();
    let first = entries.next().ok_or(BackupError::Cut)?.map_err(BackupError::Read)?;
    if name_of(&first)? != CONTENTS {
        return Err(BackupError::Form { name: name_of(&first)?, wrong: "stands where the backup tells what it holds" });
    }
    let contents = contents_of(first, &mut sums)?;
    begin(&contents)?;
    let mut blobs = 0;
    loop {
        let entry = entries.next().ok_or(BackupError::Cut)?.map_err(|_| BackupError::Cut)?;
        let name = name_of(&entry)?;
        let mut entry = Hashing { from: entry, hash: Context::new(&SHA256), bytes: 0 };
        if name == SUMS {
            compare(&mut entry, sums)?;
            break;
        }
        let part = part(&name)?;
        take(part, &mut entry)?;
        blobs += usize::from(matches!(part, Part::Blob(_)));
        // What was not taken counts for the sum too.
        io::copy(&mut entry, &mut io::sink()).map_err(|_| BackupError::Cut)?;
        let found = digest(entry.hash);
        if matches!(part, Part::Blob(digest) if digest != found) {
            return Err(BackupError::Sum { name });
        }
        if sums.insert(name.clone(), found).is_some() {
            return Err(BackupError::Form { name, wrong: "is there twice" });
        }
    }
    if entries.next().is_some() {
        return Err(BackupError::Form { name: SUMS.to_owned(), wrong: "is not the last" });
    }
    if blobs != contents.blobs {
        return Err(BackupError::Form { name: BLOBS.to_owned(), wrong: "are not as many as it says" });
    }
    Ok(contents)
}

fn name_of<R: Read>(entry: &tar::Entry<'_, R>) -> Result<String, BackupError> {
    let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    match entry.header().entry_type() {
        EntryType::Regular => Ok(name),
        _ => Err(BackupError::Form { name, wrong: "is no file" }),
    }
}

fn contents_of(entry: impl Read, sums: &mut BTreeMap<String, Digest>) -> Result<Contents, BackupError> {
    let mut bytes = Vec::new();
    entry.take(CONTENTS_BYTES_MAX).read_to_end(&mut bytes).map_err(BackupError::Read)?;
    #[derive(serde::Deserialize)]
    struct Any {
        format: u32,
    }
    let wrong = "can't be read";
    // Of another format only its number is known.
    let any: Any =
        serde_json::from_slice(&bytes).map_err(|_| BackupError::Form { name: CONTENTS.to_owned(), wrong })?;
    if any.format != FORMAT {
        return Err(BackupError::Format { found: any.format });
    }
    sums.insert(CONTENTS.to_owned(), Digest::of(&bytes));
    serde_json::from_slice(&bytes).map_err(|_| BackupError::Form { name: CONTENTS.to_owned(), wrong })
}

fn part(name: &str) -> Result<Part, BackupError> {
    if let Some(place) = AUDIT.iter().position(|own| *own == name) {
        return Ok(Part::Audit(place));
    }
    let blob = |hex: &str| format!("sha256:{hex}").parse().ok().map(Part::Blob);
    let part = match name {
        FLEET => Some(Part::Fleet),
        REGISTRY => Some(Part::Registry),
        other => other.strip_prefix(BLOBS).and_then(blob),
    };
    part.ok_or_else(|| BackupError::Form { name: name.chars().take(100).collect(), wrong: "does not belong there" })
}

/// Each line is `<hash>  <name>`; every part has one, and every line a part.
fn compare(entry: &mut impl Read, mut sums: BTreeMap<String, Digest>) -> Result<(), BackupError> {
    let mut text = String::new();
    entry.take(SUMS_BYTES_MAX).read_to_string(&mut text).map_err(|_| BackupError::Cut)?;
    for line in text.lines() {
        let pair = line.split_once("  ").and_then(|(hex, name)| Some((format!("sha256:{hex}").parse().ok()?, name)));
        let (sum, name): (Digest, &str) = pair.ok_or_else(|| BackupError::Sum { name: SUMS.to_owned() })?;
        if sums.remove(name) != Some(sum) {
            return Err(BackupError::Sum { name: name.to_owned() });
        }
    }
    match sums.into_keys().next() {
        None => Ok(()),
        Some(name) => Err(BackupError::Form { name, wrong: "has no sum" }),
    }
}
