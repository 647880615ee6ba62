//! The cache: what it takes, and what it must never take.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use selvage_config::Digest;
use selvage_config::app::App;

use super::*;
use crate::engine::EngineOptions;
use crate::release::fetch::Fetched;
use crate::release::verify::{Policy, verify};

const HANDLER: &str = r#"(component (instance $h) (export "wasi:http/incoming-handler@0.2.0" (instance $h)))"#;

fn engines() -> Engines {
    Engines::new(&EngineOptions::of_instances(1)).unwrap()
}

fn compile_text(engines: &Engines, cache: &CompileCache, text: &str) -> Result<Compiled, CompileError> {
    let bytes = Bytes::from(wat::parse_str(text).unwrap());
    let digest = Digest::of(&bytes);
    let app = App::of_component("test".parse().unwrap(), "guest".parse().unwrap(), digest);
    let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, bytes)]));
    let verified = verify(fetched, &Policy::LocalFiles.into()).unwrap();
    compile(engines, cache, &verified.component(&"guest".parse().unwrap()).unwrap())
}

/// The files of entries.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut entries: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|e| e == "cwasm")).collect();
    entries.sort();
    entries
}

fn only_entry(dir: &Path) -> PathBuf {
    let entries = entries(dir);
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries[0].clone()
}

#[test]
fn what_was_compiled_once_is_loaded_the_next_time() {
    let dir = tempfile::tempdir().unwrap();
    let engines = engines();
    compile_text(&engines, &CompileCache::open(dir.path()).unwrap(), HANDLER).unwrap();
    let written = std::fs::metadata(only_entry(dir.path())).unwrap().modified().unwrap();
    // Another start of the node: the key is read from its file.
    let cache = CompileCache::open(dir.path()).unwrap();
    let bytes = wat::parse_str(HANDLER).unwrap();
    let entry = cache.entry(Digest::of(&bytes), &engines.fingerprint());
    assert!(entry.load(engines.engine(Generation::P2)).is_some());
    assert_eq!(compile_text(&engines, &cache, HANDLER).unwrap().generation(), Generation::P2);
    assert_eq!(std::fs::metadata(only_entry(dir.path())).unwrap().modified().unwrap(), written);
    let leftovers = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(leftovers, 2, "the key and the entry");
}

#[test]
fn an_entry_with_any_byte_changed_is_compiled_again() {
    let dir = tempfile::tempdir().unwrap();
    let engines = engines();
    let cache = CompileCache::open(dir.path()).unwrap();
    compile_text(&engines, &cache, HANDLER).unwrap();
    let path = only_entry(dir.path());
    let good = std::fs::read(&path).unwrap();
    let entry = cache.entry(Digest::of(&wat::parse_str(HANDLER).unwrap()), &engines.fingerprint());
    for at in [0, 31, good.len() / 2, good.len() - 33, good.len() - 32, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert!(entry.load(engines.engine(Generation::P2)).is_none(), "byte {at}");
        assert!(!path.exists(), "a bad entry is deleted");
    }
    for length in [0, 31, 32, good.len() - 1] {
        std::fs::write(&path, &good[..length]).unwrap();
        assert!(entry.load(engines.engine(Generation::P2)).is_none(), "length {length}");
    }
    compile_text(&engines, &cache, HANDLER).unwrap();
    assert!(entry.load(engines.engine(Generation::P2)).is_some());
}

#[test]
fn code_can_be_loaded_again_whatever_became_of_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let engines = engines();
    let compiled = compile_text(&engines, &CompileCache::open(dir.path()).unwrap(), HANDLER).unwrap();
    let path = only_entry(dir.path());
    let on_disk = compiled.on_disk().expect("what was just written is mapped");
    std::fs::remove_file(&path).unwrap();
    assert!(on_disk.load(engines.engine(Generation::P2)).is_ok());
    // Another file of that name is not what is loaded.
    std::fs::write(&path, b"else").unwrap();
    assert!(on_disk.load(engines.engine(Generation::P2)).is_ok());
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
    let error = CompileCache::open(dir.path()).err().unwrap();
    assert!(matches!(error, CacheError::Writable { .. }), "{error}");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(CompileCache::open(dir.path()).is_ok());
    let made = dir.path().join("made/here");
    assert!(CompileCache::open(&made).is_ok());
    assert_eq!(std::fs::metadata(made).unwrap().permissions().mode() & 0o777, 0o700, "whatever the umask");
}

#[test]
fn an_entry_in_the_place_of_another_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let engines = engines();
    let cache = CompileCache::open(dir.path()).unwrap();
    compile_text(&engines, &cache, HANDLER).unwrap();
    let good = std::fs::read(only_entry(dir.path())).unwrap();
    let other = Digest::of(b"another component");
    let fingerprint = engines.fingerprint();
    std::fs::write(dir.path().join(format!("{}-{fingerprint}.cwasm", other.hex())), good).unwrap();
    assert!(cache.entry(other, &fingerprint).load(engines.engine(Generation::P2)).is_none());
}

#[test]
fn an_entry_of_other_engines_is_not_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let engines = engines();
    let cache = CompileCache::open(dir.path()).unwrap();
    compile_text(&engines, &cache, HANDLER).unwrap();
    let digest = Digest::of(&wat::parse_str(HANDLER).unwrap());
    assert!(cache.entry(digest, "0000000000000000").load(engines.engine(Generation::P2)).is_none());
    assert_eq!(entries(dir.path()).len(), 1, "theirs stays");
}

#[test]
fn an_entry_of_another_node_is_not_taken() {
    let (mine, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engines = engines();
    compile_text(&engines, &CompileCache::open(theirs.path()).unwrap(), HANDLER).unwrap();
    let entry = only_entry(theirs.path());
    let cache = CompileCache::open(mine.path()).unwrap();
    std::fs::copy(&entry, mine.path().join(entry.file_name().unwrap())).unwrap();
    let digest = Digest::of(&wat::parse_str(HANDLER).unwrap());
    assert!(cache.entry(digest, &engines.fingerprint()).load(engines.engine(Generation::P2)).is_none());
}

#[test]
fn the_key_is_the_nodes_own() {
    let dir = tempfile::tempdir().unwrap();
    CompileCache::open(dir.path()).unwrap();
    let key = dir.path().join("cache.key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(CompileCache::open(dir.path()), Err(CacheError::Key { .. })));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&key, b"short").unwrap();
    assert!(matches!(CompileCache::open(dir.path()), Err(CacheError::Key { .. })));
}

#[test]
fn the_generation_is_the_released_one() {
    for (export, want) in [
        ("wasi:http/incoming-handler@0.2.0", Some(Generation::P2)),
        ("wasi:http/incoming-handler@0.2.12", Some(Generation::P2)),
        ("wasi:http/handler@0.3.0", Some(Generation::P3)),
        ("wasi:http/handler@0.3.2", Some(Generation::P3)),
        ("wasi:http/incoming-handler@0.2.0-rc-2023-11-10", None),
        ("wasi:http/handler@0.3.0-rc-2026-03-15", None),
        ("wasi:http/incoming-handler@0.3.0", None),
        ("wasi:http/handler@0.2.0", None),
        ("wasi:http/incoming-handler", None),
        ("wasi:cli/run@0.2.0", None),
    ] {
        assert_eq!(generation(export), want, "{export}");
    }
}
