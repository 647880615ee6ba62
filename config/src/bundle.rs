//! A bundle: an app with all its files, as it lies on a developer's disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::app::jwt::{Issuer, KeySource};
use crate::app::{App, Component};
use crate::invalid::{Invalid, Problems};
use crate::manifest::{ComponentDraft, FilesDraft, IssuerDraft, KeyDraft, Manifest, Placed};
use crate::oci::COMPONENT_BYTES_MAX;
use crate::{AppName, ComponentName, Digest};

/// Largest manifest, bytes.
const MANIFEST_BYTES_MAX: u64 = 1024 * 1024;
/// Largest JWK set, bytes.
const KEYS_BYTES_MAX: u64 = 64 * 1024;
/// Largest file for a guest, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Most files of a component: each is a layer of the published app.
const FILES_MAX: usize = 400;

/// An app and the content of every digest that it names.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The app.
    pub app: App,
    /// Content by digest.
    pub blobs: BTreeMap<Digest, Bytes>,
}

impl Bundle {
    /// Reads an app from `path`: a `spin.toml`, a directory that has one, or one `.wasm` file.
    ///
    /// # Errors
    /// Every mistake with its place: in the manifest, or in a file that it names.
    pub fn load(path: &Path) -> Result<Self, Invalid> {
        let path = if path.is_dir() { path.join("spin.toml") } else { path.to_owned() };
        match path.extension().and_then(|e| e.to_str()) {
            Some("wasm") => Self::of_component(&path),
            Some("toml") => Self::of_manifest(&path),
            _ => {
                let hint = "give a spin.toml, a directory with one, or a .wasm file";
                Err(Invalid::whole(&path, "neither a manifest nor a component", Some(hint)))
            }
        }
    }

    fn of_component(path: &Path) -> Result<Self, Invalid> {
        let whole = |message: String| Invalid::whole(path, message, None);
        let wasm = read_wasm(path).map_err(whole)?;
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        let name = stem.to_ascii_lowercase().replace(['_', '.', ' '], "-");
        let named = name.parse::<AppName>().ok().zip(name.parse::<ComponentName>().ok());
        let (app, component) = named.ok_or_else(|| {
            let hint = "rename the file to letters, digits and '-'";
            Invalid::whole(path, format!("{stem:?} gives no app name"), Some(hint))
        })?;
        let digest = Digest::of(&wasm);
        Ok(Self { app: App::of_component(app, component, digest), blobs: [(digest, wasm)].into() })
    }

    fn of_manifest(path: &Path) -> Result<Self, Invalid> {
        let hint = "name the manifest with -f, or run this where spin.toml is";
        let text = read(path, MANIFEST_BYTES_MAX).map_err(|message| Invalid::whole(path, message, Some(hint)))?;
        let text = String::from_utf8(text.into()).map_err(|_| Invalid::whole(path, "is not UTF-8", None))?;
        let manifest = Manifest::parse(path, &text)?;
        let base = path.parent().unwrap_or(Path::new("")).to_owned();
        let mut loading = Loading { base, blobs: BTreeMap::new(), problems: Problems::default() };
        let app = loading.app(manifest);
        if loading.problems.is_empty()
            && let Err(error) = app.check()
        {
            loading.problems.add(None, "", error, None);
        }
        loading.problems.settle(path, &text, Some(Self { app, blobs: loading.blobs }))
    }
}

/// Reads what a manifest names, and notes what can't be read.
struct Loading {
    base: PathBuf,
    blobs: BTreeMap<Digest, Bytes>,
    problems: Problems,
}

impl Loading {
    fn app(&mut self, manifest: Manifest) -> App {
        let issuers = manifest.issuers.into_iter().filter_map(|(name, draft)| Some((name, self.issuer(draft)?)));
        let issuers = issuers.collect();
        let components = manifest.components.into_iter();
        let components = components.filter_map(|(name, draft)| Some((name, self.component(draft)?))).collect();
        App {
            name: manifest.name,
            version: manifest.version,
            hosts: manifest.hosts,
            variables: manifest.variables,
            issuers,
            routes: manifest.routes,
            components,
        }
    }

    fn issuer(&mut self, draft: IssuerDraft) -> Option<Issuer> {
        let keys = match draft.keys {
            KeyDraft::Url(url) => KeySource::Url(url),
            KeyDraft::File(file) => {
                let bytes = read(&self.base.join(&file.value), KEYS_BYTES_MAX);
                let json = bytes.and_then(|bytes| {
                    let text = String::from_utf8(bytes.into()).map_err(|_| "is not UTF-8".to_owned())?;
                    let set: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
                    set.get("keys")
                        .is_some_and(serde_json::Value::is_array)
                        .then_some(text)
                        .ok_or("has no \"keys\"".into())
                });
                KeySource::Inline(self.noted(&file, json)?)
            }
        };
        let IssuerDraft { issuer, audiences, algorithms, leeway_seconds, .. } = draft;
        Some(Issuer { issuer, audiences, keys, algorithms, leeway_seconds })
    }

    fn component(&mut self, draft: ComponentDraft) -> Option<Component> {
        let wasm = read_wasm(&self.base.join(&draft.source.value));
        let wasm = self.noted(&draft.source, wasm)?;
        let files = self.files(&draft);
        Some(Component {
            digest: self.blob(wasm),
            variables: draft.variables,
            environment: draft.environment,
            files,
            allowed_outbound_hosts: draft.allowed_outbound_hosts,
            key_value_stores: draft.key_value_stores,
            jwt: draft.jwt,
            limits: draft.limits,
            isolation: draft.isolation,
            spin_headers: draft.spin_headers,
            forwarded_headers: draft.forwarded_headers,
        })
    }

    fn blob(&mut self, bytes: Bytes) -> Digest {
        let digest = Digest::of(&bytes);
        self.blobs.insert(digest, bytes);
        digest
    }

    /// `result`'s value; a mistake is noted where the manifest names the file.
    fn noted<T, P: AsRef<Path>>(&mut self, placed: &Placed<P>, result: Result<T, String>) -> Option<T> {
        let path = placed.value.as_ref().display();
        let note = |message| self.problems.add(placed.span.clone(), &placed.field, format!("{path}: {message}"), None);
        result.map_err(note).ok()
    }

    fn files(&mut self, draft: &ComponentDraft) -> BTreeMap<String, Digest> {
        let mut files = BTreeMap::new();
        for placed in &draft.files {
            let found = match &placed.value {
                FilesDraft::Glob(pattern) => globbed(&self.base, pattern),
                FilesDraft::Directory { source, destination } => below(&self.base.join(source), destination),
            };
            let found = found.and_then(|found| if found.is_empty() { Err("no file fits".into()) } else { Ok(found) });
            let found = found.map_err(|message| self.problems.add(placed.span.clone(), &placed.field, message, None));
            for (guest_path, path) in found.unwrap_or_default() {
                if is_excluded(&self.base, &path, &draft.exclude_files) {
                    continue;
                }
                match read(&path, FILE_BYTES_MAX) {
                    Ok(bytes) => drop(files.insert(guest_path, self.blob(bytes))),
                    Err(error) => {
                        let message = format!("{}: {error}", path.display());
                        self.problems.add(placed.span.clone(), &placed.field, message, None);
                    }
                }
            }
        }
        if files.len() > FILES_MAX {
            let message = format!("{} files, the most is {FILES_MAX}", files.len());
            self.problems.add(draft.source.span.clone(), draft.source.field.replace("source", "files"), message, None);
        }
        files
    }
}

/// Files that fit a glob below `base`, at their own paths.
fn globbed(base: &Path, pattern: &str) -> Result<Vec<(String, PathBuf)>, String> {
    let full = Path::new(&glob::Pattern::escape(&base.to_string_lossy())).join(pattern);
    let paths = glob::glob(&full.to_string_lossy()).map_err(|e| e.to_string())?;
    let files = paths.filter_map(Result::ok).filter(|path| path.is_file());
    files
        .map(|path| Ok((inner(path.strip_prefix(base).map_err(|_| "leaves the app's directory".to_owned())?)?, path)))
        .collect()
}

/// The file `source` at `destination`, or every file below the directory `source`.
fn below(source: &Path, destination: &str) -> Result<Vec<(String, PathBuf)>, String> {
    let destination = destination.trim_matches('/');
    if source.is_file() {
        return Ok(vec![(destination.to_owned(), source.to_owned())]);
    }
    let mut found = globbed(source, "**/*")?;
    for (guest_path, _) in &mut found {
        *guest_path = format!("{destination}/{guest_path}").trim_start_matches('/').to_owned();
    }
    Ok(found)
}

fn inner(path: &Path) -> Result<String, String> {
    let parts = path.components().map(|part| match part {
        std::path::Component::Normal(part) => part.to_str().ok_or_else(|| "has a name that is not UTF-8".to_owned()),
        _ => Err("leaves the app's directory".to_owned()),
    });
    Ok(parts.collect::<Result<Vec<_>, _>>()?.join("/"))
}

fn is_excluded(base: &Path, path: &Path, patterns: &[String]) -> bool {
    let relative = path.strip_prefix(base).unwrap_or(path);
    patterns.iter().any(|p| glob::Pattern::new(p).is_ok_and(|pattern| pattern.matches_path(relative)))
}

fn read_wasm(path: &Path) -> Result<Bytes, String> {
    let bytes = read(path, COMPONENT_BYTES_MAX)?;
    if bytes.starts_with(b"\0asm") { Ok(bytes) } else { Err("is not WebAssembly".into()) }
}

fn read(path: &Path, bytes_max: u64) -> Result<Bytes, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > bytes_max {
        return Err(format!("has {size} bytes, the most is {bytes_max}"));
    }
    fs::read(path).map(Bytes::from).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "spin_manifest_version = 2\n[application]\nname = \"a\"\n[[trigger.http]]\nroute = \"/...\"\ncomponent = \"c\"\n[component.c]\nsource = \"c.wasm\"\n";

    fn directory(manifest: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("spin.toml"), manifest).unwrap();
        fs::write(directory.path().join("c.wasm"), b"\0asm....").unwrap();
        fs::create_dir_all(directory.path().join("www/css")).unwrap();
        fs::write(directory.path().join("www/index.html"), b"<p>").unwrap();
        fs::write(directory.path().join("www/css/a.css"), b"p{}").unwrap();
        directory
    }

    #[test]
    fn a_bundle_holds_every_blob_that_the_app_names() {
        let directory = directory(&format!("{MANIFEST}files = [\"www/**/*\"]\nexclude_files = [\"www/css/*\"]\n"));
        let bundle = Bundle::load(directory.path()).unwrap();
        assert!(bundle.app.digests().all(|digest| bundle.blobs.contains_key(&digest)));
        let files: Vec<_> = bundle.app.components.values().flat_map(|c| c.files.keys()).collect();
        assert_eq!(files, ["www/index.html"]);
    }

    #[test]
    fn a_directory_can_be_placed_elsewhere() {
        let files =
            "files = [{ source = \"www\", destination = \"/\" }, { source = \"c.wasm\", destination = \"/x/c\" }]\n";
        let bundle = Bundle::load(directory(&format!("{MANIFEST}{files}")).path()).unwrap();
        let files: Vec<_> = bundle.app.components.values().flat_map(|c| c.files.keys()).collect();
        assert_eq!(files, ["css/a.css", "index.html", "x/c"]);
    }

    #[test]
    fn a_missing_file_is_told_where_the_manifest_names_it() {
        let directory = directory(&MANIFEST.replace("c.wasm", "missing.wasm"));
        let places = Bundle::load(directory.path()).unwrap_err().places();
        assert_eq!((places[0].line, places[0].field.as_str()), (Some(8), "component.c.source"));
        assert!(places[0].message.contains("missing.wasm"), "{places:?}");
    }

    #[test]
    fn a_file_that_is_no_wasm_is_refused() {
        let directory = directory(MANIFEST);
        fs::write(directory.path().join("c.wasm"), b"#!/bin/sh").unwrap();
        assert!(Bundle::load(directory.path()).unwrap_err().to_string().contains("not WebAssembly"));
    }

    #[test]
    fn files_do_not_leave_the_app() {
        let directory = directory(&format!("{MANIFEST}files = [\"../*/spin.toml\"]\n"));
        assert!(Bundle::load(directory.path()).is_err());
    }

    #[test]
    fn one_component_is_an_app() {
        let directory = directory(MANIFEST);
        let bundle = Bundle::load(&directory.path().join("c.wasm")).unwrap();
        assert_eq!(bundle.app.name.as_str(), "c");
    }
}
