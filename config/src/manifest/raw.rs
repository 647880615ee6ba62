//! `spin.toml` version 2 as it is written (Spin's manifest reference): every key that Spin knows, checked for spelling only.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::{Spanned, Value};

use crate::app::StaticResponse;
use crate::app::isolation::Reuse;
use crate::app::jwt::Algorithm;
use crate::limits::Limits;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    #[serde(rename = "spin_manifest_version")]
    pub(super) version: Spanned<Value>,
    pub(super) application: Application,
    #[serde(default)]
    pub(super) variables: BTreeMap<Spanned<String>, Variable>,
    #[serde(default)]
    pub(super) trigger: Triggers,
    #[serde(default)]
    pub(super) component: BTreeMap<Spanned<String>, Component>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Application {
    pub(super) name: Spanned<String>,
    pub(super) version: Option<String>,
    #[serde(rename = "description")]
    _description: Option<String>,
    #[serde(rename = "authors")]
    _authors: Option<Vec<String>>,
    #[serde(rename = "targets")]
    _targets: Option<Value>,
    #[serde(rename = "trigger")]
    _trigger: Option<Value>,
    #[serde(default)]
    pub(super) tool: Tool<ApplicationRules>,
}

/// `tool` tables: only ours is read, other tools' are theirs.
#[derive(Debug, Deserialize)]
pub(super) struct Tool<T> {
    pub(super) selvage: Option<T>,
}

impl<T> Default for Tool<T> {
    fn default() -> Self {
        Self { selvage: None }
    }
}

/// `[application.tool.selvage]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApplicationRules {
    #[serde(default)]
    pub(super) hosts: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) jwt: Vec<Issuer>,
}

/// `[[application.tool.selvage.jwt]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Issuer {
    pub(super) name: Spanned<String>,
    pub(super) issuer: Spanned<String>,
    pub(super) audiences: Spanned<Vec<String>>,
    pub(super) jwks_file: Option<Spanned<String>>,
    pub(super) jwks_url: Option<Spanned<String>>,
    pub(super) algorithms: Option<Spanned<Vec<Algorithm>>>,
    pub(super) leeway_seconds: Option<u64>,
}

/// `[component.X.tool.selvage]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ComponentRules {
    pub(super) jwt: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) jwt_exempt: Vec<Spanned<String>>,
    pub(super) limits: Option<Spanned<Limits>>,
    pub(super) isolation: Option<Spanned<String>>,
    pub(super) reuse: Option<Spanned<Reuse>>,
    pub(super) spin_headers: Option<bool>,
    pub(super) forwarded_headers: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Variable {
    #[serde(rename = "description")]
    _description: Option<String>,
    #[serde(default)]
    pub(super) required: bool,
    pub(super) default: Option<String>,
    #[serde(default)]
    pub(super) secret: bool,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Triggers {
    #[serde(default)]
    pub(super) http: Vec<HttpTrigger>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HttpTrigger {
    #[serde(rename = "id")]
    _id: Option<String>,
    pub(super) route: Spanned<RouteText>,
    pub(super) component: Option<Spanned<String>>,
    pub(super) static_response: Option<Spanned<StaticResponse>>,
    pub(super) executor: Option<Spanned<Executor>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a path such as \"/...\" or { private = true }")]
pub(super) enum RouteText {
    Path(String),
    Private { private: bool },
}

#[derive(Debug, Deserialize)]
pub(super) struct Executor {
    #[serde(rename = "type")]
    pub(super) kind: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Component {
    pub(super) source: Spanned<Source>,
    #[serde(rename = "description")]
    _description: Option<String>,
    #[serde(default)]
    pub(super) variables: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    pub(super) environment: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) files: Vec<Spanned<Files>>,
    #[serde(default)]
    pub(super) exclude_files: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) allowed_outbound_hosts: Vec<Spanned<String>>,
    pub(super) allowed_http_hosts: Option<Spanned<Vec<String>>>,
    #[serde(default)]
    pub(super) key_value_stores: Vec<Spanned<String>>,
    pub(super) sqlite_databases: Option<Spanned<Vec<String>>>,
    pub(super) ai_models: Option<Spanned<Vec<String>>>,
    #[serde(rename = "targets")]
    _targets: Option<Value>,
    #[serde(rename = "build")]
    _build: Option<Value>,
    #[serde(default)]
    pub(super) tool: Tool<ComponentRules>,
    pub(super) dependencies: Option<Spanned<BTreeMap<String, Value>>>,
    #[serde(rename = "dependencies_inherit_configuration")]
    _inherit: Option<Value>,
    #[serde(rename = "profile")]
    _profile: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a file name, { url, digest } or { registry, package, version }")]
pub(super) enum Source {
    File(String),
    Elsewhere(#[allow(dead_code)] BTreeMap<String, String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a glob or { source, destination }")]
pub(super) enum Files {
    Glob(String),
    Placed { source: String, destination: String },
}
