//! Putting a backup back, into a state directory that is not there yet.
//!
//! All of it is built beside that directory and takes its name in one step at the end, when every sum was right and the
//! records could be read: a restore that is broken off leaves nothing that a control plane would start with.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use selvage_certs::Seal;
use selvage_config::control_plane::ControlPlaneConfig;
use serde::Serialize;

use super::read::{Part, read};
use super::{AUDIT, BackupError, Contents, FLEET, REGISTRY, Row};
use crate::audit::Audit;
use crate::registry::Registry;
use crate::state::State;

/// How far a restore moves the generation on. Nodes refuse what is not newer than all that they have taken, and they have
/// taken what came after the backup, which nobody else may know any more: no fleet makes a million changes between two
/// backups. If one did, the operator's next change goes past what nodes tell.
pub const ADVANCE: u64 = 1 << 20;
/// Bytes of one row: an app with all its releases.
const ROW_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Where the sealing key lies in a state directory whose configuration does not say otherwise.
const SEALING_KEY: &str = "sealing.key";

/// What was put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// What the backup held.
    #[serde(flatten)]
    pub contents: Contents,
    /// The generation that the control plane begins with.
    pub begins_with: u64,
    /// Join tokens that were not put back: one that was used since would be good again.
    pub join_tokens_dropped: usize,
    /// Where.
    pub state_dir: PathBuf,
}

/// Puts a backup back where `config` has its state. `sealing_key` is the file of the key, unless the configuration names
/// one. With `hold` the generation stays as it was: nodes keep what they run until an operator changes something.
///
/// # Errors
/// [`BackupError`]; then the state directory is as it was.
pub fn restore(
    file: &Path,
    config: &ControlPlaneConfig,
    sealing_key: Option<&Path>,
    hold: bool,
) -> Result<Restored, BackupError> {
    let state_dir = &config.state_dir;
    refuse_occupied(state_dir)?;
    let name = state_dir.file_name().unwrap_or_default().to_string_lossy();
    let aside = state_dir.with_file_name(format!("{name}.restoring"));
    match DirBuilder::new().mode(0o700).create(&aside) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(BackupError::Left(aside)),
        made => made.map_err(failed(&aside))?,
    }
    let built = build(file, config, sealing_key, hold, &aside);
    let restored = match built {
        Ok(restored) => restored,
        Err(error) => {
            // It is ours, and nothing in it counts.
            let _ = fs::remove_dir_all(&aside);
            return Err(error);
        }
    };
    // Over an empty directory, never over one that holds something (rename(2)).
    fs::rename(&aside, state_dir).map_err(failed(state_dir))?;
    let parent = state_dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync(parent)?;
    Ok(restored)
}

fn refuse_occupied(state_dir: &Path) -> Result<(), BackupError> {
    match fs::read_dir(state_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(BackupError::File { path: state_dir.to_owned(), source }),
        Ok(entries) => match entries.count() {
            0 => Ok(()),
            _ => Err(BackupError::Occupied(state_dir.to_owned())),
        },
    }
}

fn build(
    file: &Path,
    config: &ControlPlaneConfig,
    sealing_key: Option<&Path>,
    hold: bool,
    aside: &Path,
) -> Result<Restored, BackupError> {
    let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path));
    let (blobs, uploads) = (aside.join("blobs/sha256"), aside.join("uploads"));
    make(&blobs)?;
    make(&uploads)?;
    let mut seal = None;
    let mut rows: (Vec<Row>, Vec<Row>) = Default::default();
    let contents = read(
        file,
        |contents| {
            seal = Some(place_key(contents, config.sealing_key.as_deref(), sealing_key, aside)?);
            Ok(())
        },
        |part, from| {
            match part {
                Part::Fleet => rows.0 = read_rows(from, FLEET)?,
                Part::Registry => rows.1 = read_rows(from, REGISTRY)?,
                Part::Audit(place) => write_file(&aside.join(AUDIT[place]), from)?,
                Part::Blob(digest) => write_file(&blobs.join(digest.hex()), from)?,
            }
            Ok(())
        },
    )?;
    sync(&blobs)?;
    let seal = seal.ok_or(BackupError::Cut)?;
    let begins_with = if hold { contents.generation } else { contents.generation.saturating_add(ADVANCE) };
    let state = Arc::new(State::open(&aside.join("db"), seal)?);
    let join_tokens_dropped = state.fill(rows.0.into_iter().map(|Row(key, value)| (key, value)), begins_with)?;
    for Row(key, value) in rows.1 {
        state.catalog().insert(key, value)?;
    }
    state.flush()?;
    // What can't be read would not start either.
    state.load()?;
    let registry = Registry::open(blobs, &uploads, state, config.registry.clone());
    let registry = registry.map_err(failed(&uploads))?;
    if let Some(digest) = registry.missing()? {
        return Err(BackupError::Blob(digest));
    }
    let audit = aside.join(AUDIT[1]);
    let audit = Audit::open(&audit).map_err(failed(&audit))?;
    let before = format!("a backup of generation {}, made at {} ms", contents.generation, contents.made_ms);
    audit.note_restore(before, format!("generation {begins_with}")).map_err(failed(aside))?;
    sync(aside)?;
    Ok(Restored { contents, begins_with, join_tokens_dropped, state_dir: config.state_dir.clone() })
}

/// Finds the sealing key, and puts it where the control plane will look for it.
fn place_key(
    contents: &Contents,
    configured: Option<&Path>,
    given: Option<&Path>,
    aside: &Path,
) -> Result<Seal, BackupError> {
    let path = configured.or(given).ok_or_else(|| BackupError::NoKey(contents.sealing_key.clone()))?;
    // `Seal::open` makes a key where there is none.
    let bytes = fs::read(path).map_err(failed(path))?;
    let seal = Seal::open(path).map_err(failed(path))?;
    if seal.id() != contents.sealing_key {
        let (sealed, given) = (contents.sealing_key.clone(), seal.id().to_owned());
        return Err(BackupError::Key { sealed, given, path: path.to_owned() });
    }
    if configured.is_none() {
        write_file(&aside.join(SEALING_KEY), &mut bytes.as_slice())?;
    }
    Ok(seal)
}

fn read_rows(from: &mut dyn Read, name: &str) -> Result<Vec<Row>, BackupError> {
    let mut from = BufReader::new(from);
    let mut rows = Vec::new();
    loop {
        let mut line = Vec::new();
        (&mut from).take(ROW_BYTES_MAX).read_until(b'\n', &mut line).map_err(|_| BackupError::Cut)?;
        if line.is_empty() {
            return Ok(rows);
        }
        let form = |_| BackupError::Form { name: name.to_owned(), wrong: "can't be read" };
        rows.push(serde_json::from_slice(&line).map_err(form)?);
    }
}

fn write_file(path: &Path, from: &mut dyn Read) -> Result<(), BackupError> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed(path))?;
    io::copy(from, &mut file).and_then(|_| file.flush()).map_err(failed(path))?;
    file.sync_all().map_err(failed(path))
}

fn sync(directory: &Path) -> Result<(), BackupError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(failed(directory))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    |source| BackupError::File { path, source }
}
