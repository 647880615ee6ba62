//! An app: what is signed, published and run. Content-addressed: every file of it is named by its digest.

pub mod isolation;
pub mod jwt;
pub mod outbound;
pub mod route;
pub mod variables;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::limits::Limits;
use crate::{AppName, ComponentName, Digest, StoreLabel};
use isolation::Isolation;
use route::Pattern;
use variables::{Template, Values, Variable};

/// Largest app document, bytes. It may hold JWK sets, but no component.
pub const APP_BYTES_MAX: usize = 1024 * 1024;

/// Most routes of an app.
pub const ROUTES_MAX: usize = 1_000;

/// An app, as its author wrote it in `spin.toml`, checked, with every file replaced by its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// The name. A node answers for it at `<name>.<domain of the node>`.
    pub name: AppName,
    /// The author's version, for people.
    #[serde(default)]
    pub version: Option<String>,
    /// Further host names, lower case, without port.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Variables that templates may use.
    #[serde(default)]
    pub variables: BTreeMap<String, Variable>,
    /// Issuers of tokens, by the names that rules use.
    #[serde(default)]
    pub issuers: BTreeMap<String, jwt::Issuer>,
    /// Routes; the most specific one wins whatever the order.
    pub routes: Vec<Route>,
    /// Components by name.
    pub components: BTreeMap<ComponentName, Component>,
}

/// A route: a pattern and who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Which paths.
    pub pattern: Pattern,
    /// Who answers.
    pub target: Target,
}

/// Who answers a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// A component of the app.
    Component(ComponentName),
    /// A fixed answer, without a guest.
    Static(StaticResponse),
}

/// A fixed answer (`static_response` in `spin.toml`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticResponse {
    /// Status code, 200 to 599. Default 200.
    #[serde(default = "ok")]
    pub status_code: u16,
    /// Header fields.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// The body.
    #[serde(default)]
    pub body: Option<String>,
}

fn ok() -> u16 {
    200
}

/// A component: its code and what it may use. What is not named here is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Component {
    /// The wasm.
    pub digest: Digest,
    /// Variables as the guest sees them.
    #[serde(default)]
    pub variables: BTreeMap<String, Template>,
    /// Environment as the guest sees it.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Files as the guest sees them, read-only: path without leading `/` → content.
    #[serde(default)]
    pub files: BTreeMap<String, Digest>,
    /// Destinations of outgoing requests, each a template of an [`outbound::AllowedHost`].
    #[serde(default)]
    pub allowed_outbound_hosts: Vec<Template>,
    /// Stores that it may open.
    #[serde(default)]
    pub key_value_stores: Vec<StoreLabel>,
    /// The token that its routes demand.
    #[serde(default)]
    pub jwt: Option<jwt::Rule>,
    /// What one request may use.
    #[serde(default)]
    pub limits: Limits,
    /// What its requests may share.
    #[serde(default, skip_serializing_if = "Isolation::is_fresh")]
    pub isolation: Isolation,
    /// Whether its requests carry the fields that Spin adds (`spin-*`). Older nodes always add them.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub spin_headers: bool,
    /// Whether they carry `x-forwarded-for`, `-proto` and `-host`. If the author says nothing, they do where they don't
    /// carry Spin's, which tell the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forwarded_headers: Option<bool>,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands it over so")]
fn is_yes(value: &bool) -> bool {
    *value
}

/// An app document that contradicts itself.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Too large.
    #[error("app document has {bytes} bytes, the most is {APP_BYTES_MAX}")]
    Large {
        /// Its size.
        bytes: usize,
    },
    /// Not of the schema.
    #[error("read app document")]
    Json(#[source] serde_json::Error),
    /// A name that nothing carries.
    #[error("{from} names {kind} {name:?}, which the app does not have")]
    Dangling {
        /// Who names it.
        from: String,
        /// What it should be.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// A value that can't be used.
    #[error("{field}: {reason}")]
    Value {
        /// Where.
        field: String,
        /// Why not.
        reason: String,
    },
}

impl App {
    /// Reads an app document as it stands in a release, and checks it: it may come from anyone.
    ///
    /// # Errors
    /// [`AppError`], naming what is wrong.
    pub fn from_json(bytes: &[u8]) -> Result<Self, AppError> {
        if bytes.len() > APP_BYTES_MAX {
            return Err(AppError::Large { bytes: bytes.len() });
        }
        let app: Self = serde_json::from_slice(bytes).map_err(AppError::Json)?;
        app.check()?;
        Ok(app)
    }

    /// The document for a release. Deterministic: equal apps give equal bytes.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an app has only string keys and no failing serializer")
    }

    /// One component without a manifest: it answers every path and is granted nothing.
    pub fn of_component(name: AppName, component: ComponentName, digest: Digest) -> Self {
        let route = Route { pattern: Pattern::everything(), target: Target::Component(component.clone()) };
        let component = (component, Component::granted_nothing(digest));
        Self {
            name,
            version: None,
            hosts: Vec::new(),
            variables: BTreeMap::new(),
            issuers: BTreeMap::new(),
            routes: vec![route],
            components: [component].into(),
        }
    }

    /// Every digest that the app needs besides its own document.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        self.components.values().flat_map(|c| std::iter::once(c.digest).chain(c.files.values().copied()))
    }

    /// What serde can't see: names that must exist, values that must make sense.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn check(&self) -> Result<(), AppError> {
        let value = |field: &str, reason: &str| AppError::Value { field: field.to_owned(), reason: reason.to_owned() };
        if self.routes.len() > ROUTES_MAX {
            return Err(value("routes", "more than 1,000"));
        }
        for host in &self.hosts {
            if !is_host(host) {
                return Err(AppError::Value {
                    field: "hosts".into(),
                    reason: format!("{host:?} is no lower-case host name"),
                });
            }
        }
        for route in &self.routes {
            match &route.target {
                Target::Component(name) if !self.components.contains_key(name) => {
                    let from = format!("route {}", route.pattern);
                    return Err(AppError::Dangling { from, kind: "component", name: name.to_string() });
                }
                Target::Static(answer) if !(200..=599).contains(&answer.status_code) => {
                    return Err(value("static_response.status_code", "must be 200 to 599"));
                }
                _ => {}
            }
        }
        for (name, issuer) in &self.issuers {
            if issuer.audiences.is_empty() || issuer.algorithms.is_empty() {
                return Err(value(&format!("issuers.{name}"), "audiences and algorithms must not be empty"));
            }
        }
        self.components.iter().try_for_each(|(name, component)| self.check_component(name, component))
    }

    fn check_component(&self, name: &ComponentName, component: &Component) -> Result<(), AppError> {
        let from = format!("component {name}");
        if let Some(rule) = component.jwt.as_ref().filter(|rule| !self.issuers.contains_key(&rule.issuer)) {
            return Err(AppError::Dangling { from, kind: "issuer", name: rule.issuer.clone() });
        }
        let templates = component.variables.values().chain(&component.allowed_outbound_hosts);
        if let Some(unknown) = templates.flat_map(Template::variables).find(|v| !self.variables.contains_key(*v)) {
            return Err(AppError::Dangling { from, kind: "variable", name: unknown.to_owned() });
        }
        if let Some(field) = component.limits.zero() {
            return Err(AppError::Value { field: format!("{from} limits.{field}"), reason: "must not be 0".into() });
        }
        if let Isolation::Reuse(reuse) = component.isolation
            && let Some((name, reason)) = reuse.mistake()
        {
            return Err(AppError::Value { field: format!("{from} reuse.{name}"), reason });
        }
        if let Some(path) = component.files.keys().find(|path| !is_inner_path(path)) {
            return Err(AppError::Value {
                field: format!("{from} files"),
                reason: format!("{path:?} leaves its directory"),
            });
        }
        Ok(())
    }
}

impl Component {
    /// Code that may use nothing.
    pub fn granted_nothing(digest: Digest) -> Self {
        Self {
            digest,
            variables: BTreeMap::new(),
            environment: BTreeMap::new(),
            files: BTreeMap::new(),
            allowed_outbound_hosts: Vec::new(),
            key_value_stores: Vec::new(),
            jwt: None,
            limits: Limits::default(),
            isolation: Isolation::Fresh,
            spin_headers: true,
            forwarded_headers: None,
        }
    }

    /// Whether its requests carry `x-forwarded-*`.
    pub fn tells_forwarded(&self) -> bool {
        self.forwarded_headers.unwrap_or(!self.spin_headers)
    }

    /// The allowed destinations with `values` filled in. An entry that becomes empty is skipped, as Spin does.
    ///
    /// # Errors
    /// The entry that is not of the grammar once filled, as text.
    pub fn outbound(&self, values: &Values) -> Result<Vec<outbound::AllowedHost>, String> {
        let filled = self.allowed_outbound_hosts.iter().map(|t| t.resolve(values).map_err(|e| e.to_string()));
        let kept = filled.filter(|entry| entry.as_ref().is_ok_and(|text| !text.is_empty()) || entry.is_err());
        kept.map(|entry| entry?.parse().map_err(|e: outbound::OutboundError| e.to_string())).collect()
    }
}

/// Whether `text` is a host name as routes hold it: labels of RFC 1123 2.1, lower case, at most 253 bytes.
pub fn is_host(text: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

/// Whether `path` stays below the directory it is joined to.
fn is_inner_path(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 1_024
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', '\0']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> App {
        App::of_component("hello".parse().unwrap(), "hello".parse().unwrap(), Digest::of(b"wasm"))
    }

    #[test]
    fn an_app_survives_its_document() {
        assert_eq!(App::from_json(&app().to_json()).unwrap(), app());
    }

    #[test]
    fn isolation_stands_in_the_document_only_if_it_was_chosen() {
        let mut app = app();
        let fresh = String::from_utf8(app.to_json()).unwrap();
        assert!(!fresh.contains("isolation") && !fresh.contains("_headers"), "{fresh}");
        app.components.values_mut().next().unwrap().isolation = Isolation::Reuse(isolation::Reuse::default());
        let reused = app.to_json();
        assert_ne!(reused, fresh.as_bytes());
        assert_eq!(App::from_json(&reused).unwrap(), app);
    }

    #[test]
    fn a_document_that_contradicts_itself_is_refused() {
        let mut dangling = app();
        dangling.components.clear();
        let mut escaping = app();
        let files = &mut escaping.components.values_mut().next().unwrap().files;
        files.insert("../etc/passwd".into(), Digest::of(b""));
        let mut unruled = app();
        let rule = jwt::Rule { issuer: "nobody".into(), exempt: Vec::new() };
        unruled.components.values_mut().next().unwrap().jwt = Some(rule);
        let mut shouting = app();
        shouting.hosts.push("Example.com".into());
        let mut endless = app();
        let reuse = isolation::Reuse { requests_max: 0, ..isolation::Reuse::default() };
        endless.components.values_mut().next().unwrap().isolation = Isolation::Reuse(reuse);
        for bad in [dangling, escaping, unruled, shouting, endless] {
            assert!(App::from_json(&bad.to_json()).is_err(), "{bad:?}");
        }
        assert!(matches!(App::from_json(&vec![b' '; APP_BYTES_MAX + 1]), Err(AppError::Large { .. })));
        assert!(App::from_json(b"{\"name\":\"a\",\"routes\":[],\"components\":{},\"surprise\":1}").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = App::from_json(&bytes);
        }
    }
}
