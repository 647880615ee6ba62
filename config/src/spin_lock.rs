//! The locked app that `spin registry push` writes (Spin's `spin-locked-app`, version 1), read as one of ours.
//!
//! Its components and files are layers of the same artifact, by digest; what is small stands in the document itself.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;

use crate::app::route::Pattern;
use crate::app::variables::{Template, Variable};
use crate::app::{APP_BYTES_MAX, App, AppError, Component, Route, Target};
use crate::{AppName, Digest, StoreLabel};

/// Why a locked app can't become one of ours.
#[derive(Debug, thiserror::Error)]
pub enum SpinLockError {
    /// Too large.
    #[error("locked app has {0} bytes, the most is {APP_BYTES_MAX}")]
    Large(usize),
    /// Not of the schema.
    #[error("read locked app")]
    Json(#[source] serde_json::Error),
    /// Something that is not served here.
    #[error("{what} of the app: {reason}")]
    Unfit {
        /// Of what.
        what: String,
        /// Why not.
        reason: String,
    },
    /// It contradicts itself.
    #[error("check the app")]
    App(#[from] AppError),
}

/// A locked app as one of ours, with the contents that stood in it.
#[derive(Debug)]
pub struct SpinApp {
    /// The app.
    pub app: App,
    /// Contents that are no layers.
    pub inline: BTreeMap<Digest, Bytes>,
}

#[derive(Debug, Deserialize)]
struct Locked {
    spin_lock_version: u32,
    metadata: Metadata,
    #[serde(default)]
    variables: BTreeMap<String, LockedVariable>,
    triggers: Vec<Trigger>,
    components: Vec<LockedComponent>,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    version: Option<String>,
}

#[derive(Debug, Deserialize)]
struct LockedVariable {
    #[serde(default)]
    default: Option<String>,
    #[serde(default)]
    secret: bool,
}

#[derive(Debug, Deserialize)]
struct Trigger {
    trigger_type: String,
    #[serde(default)]
    trigger_config: TriggerConfig,
}

#[derive(Debug, Default, Deserialize)]
struct TriggerConfig {
    #[serde(default)]
    component: Option<String>,
    #[serde(default)]
    route: Option<RouteText>,
}

/// A path, or a table that says that the component is only called by others.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum RouteText {
    Path(String),
    Private { private: bool },
}

#[derive(Debug, Deserialize)]
struct LockedComponent {
    id: String,
    #[serde(default)]
    metadata: BTreeMap<String, serde_json::Value>,
    source: Content,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    files: Vec<LockedFile>,
    #[serde(default)]
    config: BTreeMap<String, String>,
    #[serde(default)]
    dependencies: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct LockedFile {
    #[serde(flatten)]
    content: Content,
    path: String,
}

#[derive(Debug, Deserialize)]
struct Content {
    #[serde(default)]
    digest: Option<String>,
    #[serde(default)]
    inline: Option<String>,
}

#[expect(clippy::needless_pass_by_value, reason = "callers hand over errors that they are done with")]
fn unfit(what: impl Into<String>, reason: impl ToString) -> SpinLockError {
    SpinLockError::Unfit { what: what.into(), reason: reason.to_string() }
}

/// Reads a locked app. `name` is what it shall be called here; without it, its own name.
///
/// # Errors
/// [`SpinLockError`]: also for what Spin has and this does not serve, triggers other than HTTP above all.
pub fn read(bytes: &[u8], name: Option<&AppName>) -> Result<SpinApp, SpinLockError> {
    if bytes.len() > APP_BYTES_MAX {
        return Err(SpinLockError::Large(bytes.len()));
    }
    let locked: Locked = serde_json::from_slice(bytes).map_err(SpinLockError::Json)?;
    if !matches!(locked.spin_lock_version, 0 | 1) {
        return Err(unfit("spin_lock_version", format!("{} is not known", locked.spin_lock_version)));
    }
    let name = match name {
        Some(name) => name.clone(),
        None => locked.metadata.name.parse().map_err(|error| unfit("name", error))?,
    };
    let mut inline = BTreeMap::new();
    let mut components = BTreeMap::new();
    for component in locked.components {
        let id = component.id.parse().map_err(|error| unfit("component", error))?;
        components.insert(id, read_component(&component, &mut inline)?);
    }
    let variables = locked.variables.into_iter();
    let variable = |(name, v): (String, LockedVariable)| (name, Variable { default: v.default, secret: v.secret });
    let app = App {
        name,
        version: locked.metadata.version,
        hosts: Vec::new(),
        variables: variables.map(variable).collect(),
        issuers: BTreeMap::new(),
        routes: locked.triggers.into_iter().map(read_route).filter_map(Result::transpose).collect::<Result<_, _>>()?,
        components,
    };
    app.check()?;
    Ok(SpinApp { app, inline })
}

/// None: a component that only others call.
fn read_route(trigger: Trigger) -> Result<Option<Route>, SpinLockError> {
    if trigger.trigger_type != "http" {
        return Err(unfit("trigger", format!("{:?} is not served, only http is", trigger.trigger_type)));
    }
    let TriggerConfig { component, route } = trigger.trigger_config;
    let path = match route {
        Some(RouteText::Path(path)) => path,
        Some(RouteText::Private { private: true }) => return Ok(None),
        _ => return Err(unfit("trigger", "an http trigger has no route")),
    };
    let component = component.ok_or_else(|| unfit(format!("route {path}"), "it names no component"))?;
    let pattern: Pattern = path.parse().map_err(|error| unfit(format!("route {path:?}"), error))?;
    let component = component.parse().map_err(|error| unfit(format!("route {path}"), error))?;
    Ok(Some(Route { pattern, target: Target::Component(component) }))
}

fn read_component(
    component: &LockedComponent,
    inline: &mut BTreeMap<Digest, Bytes>,
) -> Result<Component, SpinLockError> {
    let what = |part: &str| format!("{part} of component {}", component.id);
    if !component.dependencies.is_empty() {
        return Err(unfit(what("dependencies"), "they are not composed: push the app with --compose"));
    }
    let strings = |name: &str| -> Result<Vec<String>, SpinLockError> {
        match component.metadata.get(name) {
            None => Ok(Vec::new()),
            Some(value) => serde_json::from_value(value.clone()).map_err(|error| unfit(what(name), error)),
        }
    };
    for unserved in ["databases", "sqlite_databases", "ai_models"] {
        if !strings(unserved)?.is_empty() {
            return Err(unfit(what(unserved), "this is not served here"));
        }
    }
    let template = |name: &str, text: String| text.parse::<Template>().map_err(|error| unfit(what(name), error));
    let hosts = strings("allowed_outbound_hosts")?.into_iter().map(|text| template("allowed_outbound_hosts", text));
    let stores = strings("key_value_stores")?.into_iter();
    let stores = stores.map(|text| text.parse::<StoreLabel>().map_err(|error| unfit(what("key_value_stores"), error)));
    let variables = component.config.clone().into_iter();
    let mut files = BTreeMap::new();
    for file in &component.files {
        let path = file.path.trim_start_matches('/').to_owned();
        let digest = content(&file.content, inline).map_err(|reason| unfit(what(&path), reason))?;
        files.insert(path, digest);
    }
    let digest = content(&component.source, inline).map_err(|reason| unfit(what("source"), reason))?;
    Ok(Component {
        variables: variables
            .map(|(name, text)| Ok((name.clone(), template(&name, text)?)))
            .collect::<Result<_, SpinLockError>>()?,
        environment: component.env.clone(),
        files,
        allowed_outbound_hosts: hosts.collect::<Result<_, _>>()?,
        key_value_stores: stores.collect::<Result<_, _>>()?,
        ..Component::granted_nothing(digest)
    })
}

/// Where some content is: a layer, or in the document.
fn content(content: &Content, inline: &mut BTreeMap<Digest, Bytes>) -> Result<Digest, String> {
    match (&content.inline, &content.digest) {
        (Some(text), _) => {
            let bytes = Bytes::from(STANDARD.decode(text).map_err(|_| "it is not base64")?);
            let digest = Digest::of(&bytes);
            inline.insert(digest, bytes);
            Ok(digest)
        }
        (None, Some(digest)) => digest.parse().map_err(|error: crate::digest::DigestError| error.to_string()),
        (None, None) => Err("it has neither a digest nor content".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn locked() -> Value {
        let wasm = Digest::of(b"wasm");
        json!({
            "spin_lock_version": 1,
            "metadata": { "name": "hello", "version": "0.1.0", "description": "x", "triggers": {} },
            "variables": { "greeting": { "default": "Hi" }, "token": { "secret": true } },
            "triggers": [
                { "id": "t", "trigger_type": "http", "trigger_config": { "component": "web", "route": "/..." } },
                { "id": "p", "trigger_type": "http", "trigger_config": { "component": "web", "route": { "private": true } } },
            ],
            "components": [{
                "id": "web",
                "metadata": {
                    "description": "x",
                    "allowed_outbound_hosts": ["https://{{ greeting }}.test"],
                    "key_value_stores": ["default"],
                },
                "source": { "content_type": "application/wasm", "digest": wasm },
                "env": { "A": "b" },
                "files": [
                    { "path": "/index.html", "digest": Digest::of(b"large") },
                    { "path": "small", "inline": STANDARD.encode("small") },
                ],
                "config": { "word": "{{ greeting }}" },
            }],
        })
    }

    fn read_value(value: &Value) -> Result<SpinApp, SpinLockError> {
        read(value.to_string().as_bytes(), None)
    }

    #[test]
    fn a_locked_app_becomes_one_of_ours() {
        let SpinApp { app, inline } = read_value(&locked()).unwrap();
        assert_eq!((app.name.as_str(), app.routes.len()), ("hello", 1));
        let component = app.components.values().next().unwrap();
        assert_eq!(component.digest, Digest::of(b"wasm"));
        assert_eq!(component.files["index.html"], Digest::of(b"large"));
        assert_eq!(inline[&component.files["small"]], "small");
        assert_eq!(component.key_value_stores[0].as_str(), "default");
        assert!(app.variables["token"].secret && app.variables["token"].default.is_none());
        assert_eq!(App::from_json(&app.to_json()).unwrap(), app);
        let named = read(locked().to_string().as_bytes(), Some(&"other".parse().unwrap())).unwrap();
        assert_eq!(named.app.name.as_str(), "other");
    }

    #[test]
    fn what_is_not_served_is_refused_and_named() {
        let changes: [(&str, Value, &str); 7] = [
            ("/triggers/0/trigger_type", json!("redis"), "redis"),
            ("/triggers/0/trigger_config/component", json!("nobody"), "nobody"),
            ("/components/0/metadata/sqlite_databases", json!(["default"]), "sqlite_databases"),
            ("/components/0/dependencies", json!({ "a:b": {} }), "--compose"),
            ("/components/0/source", json!({ "content_type": "x" }), "source"),
            ("/components/0/files/0/path", json!("../x"), "leaves"),
            ("/spin_lock_version", json!(7), "7"),
        ];
        for (place, value, part) in changes {
            let mut changed = locked();
            let (parent, name) = place.rsplit_once('/').unwrap();
            changed.pointer_mut(parent).unwrap()[name] = value;
            let error = read_value(&changed).unwrap_err();
            let text = format!("{error} {:?}", std::error::Error::source(&error));
            assert!(text.contains(part), "{place}: {text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = read(&bytes, None);
        }
    }
}
