//! `spin.toml`: an unmodified Spin app, version 2, with HTTP triggers.
//!
//! Rules that only Selvage has stand under `[application.tool.selvage]` and `[component.X.tool.selvage]`, which Spin
//! ignores. This module is pure: [`Manifest::parse`] takes text. [`Bundle`](crate::bundle::Bundle) reads the files.

mod raw;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;

use crate::app::isolation::{Isolation, Reuse};
use crate::app::jwt::{Algorithm, Rule};
use crate::app::outbound::AllowedHost;
use crate::app::route::Pattern;
use crate::app::variables::{Template, Variable, is_variable_name};
use crate::app::{Route, Target, is_host};
use crate::invalid::{Invalid, Problems};
use crate::limits::Limits;
use crate::{AppName, ComponentName, StoreLabel};

/// Clock difference forgiven when a rule names none, seconds.
const LEEWAY_SECONDS_DEFAULT: u64 = 30;
/// Most that a rule may forgive, seconds.
const LEEWAY_SECONDS_MAX: u64 = 300;

/// A manifest that has been checked as far as its text goes.
#[derive(Debug)]
pub struct Manifest {
    pub(crate) name: AppName,
    pub(crate) version: Option<String>,
    pub(crate) hosts: Vec<String>,
    pub(crate) variables: BTreeMap<String, Variable>,
    pub(crate) issuers: BTreeMap<String, IssuerDraft>,
    pub(crate) routes: Vec<Route>,
    pub(crate) components: BTreeMap<ComponentName, ComponentDraft>,
}

/// A value and where it stands, for mistakes that only the file system shows.
#[derive(Debug)]
pub(crate) struct Placed<T> {
    pub(crate) value: T,
    pub(crate) span: Range<usize>,
    pub(crate) field: String,
}

/// An issuer whose key file has not been read.
#[derive(Debug)]
pub(crate) struct IssuerDraft {
    pub(crate) issuer: String,
    pub(crate) audiences: Vec<String>,
    pub(crate) keys: KeyDraft,
    pub(crate) algorithms: Vec<Algorithm>,
    pub(crate) leeway_seconds: u64,
}

/// Where an issuer's keys will come from.
#[derive(Debug)]
pub(crate) enum KeyDraft {
    File(Placed<PathBuf>),
    Url(String),
}

/// A component whose files have not been read.
#[derive(Debug)]
pub(crate) struct ComponentDraft {
    pub(crate) source: Placed<PathBuf>,
    pub(crate) variables: BTreeMap<String, Template>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) files: Vec<Placed<FilesDraft>>,
    pub(crate) exclude_files: Vec<String>,
    pub(crate) allowed_outbound_hosts: Vec<Template>,
    pub(crate) key_value_stores: Vec<StoreLabel>,
    pub(crate) jwt: Option<Rule>,
    pub(crate) limits: Limits,
    pub(crate) isolation: Isolation,
    pub(crate) spin_headers: bool,
    pub(crate) forwarded_headers: Option<bool>,
}

/// Files that a guest will see.
#[derive(Debug)]
pub(crate) enum FilesDraft {
    /// Each at its own path.
    Glob(String),
    /// A file or directory at another path.
    Directory { source: PathBuf, destination: String },
}

impl Manifest {
    /// Reads the text of `file`.
    ///
    /// # Errors
    /// Every mistake with its place.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Invalid> {
        let raw: raw::Manifest = toml::from_str(text).map_err(|e| Invalid::of_toml(file, text, &e))?;
        let mut problems = Problems::default();
        let manifest = Reading { problems: &mut problems }.manifest(raw);
        problems.settle(file, text, manifest)
    }
}

/// One pass over a manifest that notes mistakes and goes on.
struct Reading<'a> {
    problems: &'a mut Problems,
}

impl Reading<'_> {
    fn manifest(&mut self, raw: raw::Manifest) -> Option<Manifest> {
        if raw.version.get_ref().as_integer() != Some(2) {
            let hint = "write spin_manifest_version = 2; `spin doctor` converts older manifests";
            self.problems.add(raw.version.span(), "spin_manifest_version", "only version 2 is understood", Some(hint));
        }
        let variables = self.variables(raw.variables);
        let rules = raw.application.tool.selvage;
        let (hosts, issuers) = match rules {
            Some(rules) => (self.hosts(rules.hosts), self.issuers(rules.jwt)),
            None => (Vec::new(), BTreeMap::new()),
        };
        let mut components = BTreeMap::new();
        for (name, component) in raw.component {
            let field = format!("component.{}", name.get_ref());
            let parsed = self.parsed::<ComponentName>(&name, &field);
            let component = self.component(component, &field, &variables, &issuers);
            if let Some(name) = parsed {
                components.insert(name, component);
            }
        }
        let routes = self.routes(raw.trigger.http, &components);
        if routes.is_empty() {
            let hint = "add [[trigger.http]] with route = \"/...\" and component = \"…\"";
            self.problems.add(None, "trigger.http", "the app has no route, so it could answer nothing", Some(hint));
        }
        let name = self.parsed::<AppName>(&raw.application.name, "application.name")?;
        let issuers = issuers.into_iter().filter_map(|(name, issuer)| Some((name, issuer?))).collect();
        let components = components.into_iter().filter_map(|(name, component)| Some((name, component?))).collect();
        Some(Manifest { name, version: raw.application.version, hosts, variables, issuers, routes, components })
    }

    /// `text` as a `T`; a mistake is noted.
    fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
        &mut self,
        text: &Spanned<String>,
        field: &str,
    ) -> Option<T> {
        let parsed = text.get_ref().parse();
        parsed.map_err(|error| self.problems.add(text.span(), field, error, None)).ok()
    }

    fn all<T: std::str::FromStr<Err: std::fmt::Display>>(&mut self, texts: &[Spanned<String>], field: &str) -> Vec<T> {
        texts.iter().filter_map(|text| self.parsed(text, field)).collect()
    }

    fn variables(&mut self, raw: BTreeMap<Spanned<String>, raw::Variable>) -> BTreeMap<String, Variable> {
        let mut variables = BTreeMap::new();
        for (name, variable) in raw {
            let field = format!("variables.{}", name.get_ref());
            if !is_variable_name(name.get_ref()) {
                let message = "a variable's name has lower-case letters, digits and single inner '_'";
                self.problems.add(name.span(), field, message, None);
            } else if variable.required == variable.default.is_some() {
                let message = "a variable has either required = true or a default";
                self.problems.add(name.span(), field, message, Some("add default = \"…\" or required = true"));
            }
            variables.insert(name.into_inner(), Variable { default: variable.default, secret: variable.secret });
        }
        variables
    }

    fn hosts(&mut self, raw: Vec<Spanned<String>>) -> Vec<String> {
        let mut hosts = Vec::new();
        for host in raw {
            if is_host(host.get_ref()) {
                hosts.push(host.into_inner());
            } else {
                let message = format!("{:?} is no lower-case host name", host.get_ref());
                self.problems.add(host.span(), "application.tool.selvage.hosts", message, None);
            }
        }
        hosts
    }

    /// The issuers by name; `None` for one with a mistake, so that a rule that names it is not called wrong as well.
    fn issuers(&mut self, raw: Vec<raw::Issuer>) -> BTreeMap<String, Option<IssuerDraft>> {
        const FIELD: &str = "application.tool.selvage.jwt";
        let mut issuers = BTreeMap::new();
        for issuer in raw {
            let (span, name) = (issuer.name.span(), issuer.name.get_ref().clone());
            let field = |key: &str| format!("{FIELD}.{name}.{key}");
            let algorithms = issuer.algorithms.as_ref().map_or(Algorithm::ALL.to_vec(), |a| a.get_ref().clone());
            let leeway_seconds = issuer.leeway_seconds.unwrap_or(LEEWAY_SECONDS_DEFAULT);
            if issuer.audiences.get_ref().is_empty() {
                let message = "a token without an audience rule is good anywhere: name at least one";
                self.problems.add(issuer.audiences.span(), field("audiences"), message, None);
            }
            if algorithms.is_empty() {
                self.problems.add(span.clone(), field("algorithms"), "must not be empty", None);
            }
            if leeway_seconds > LEEWAY_SECONDS_MAX {
                let message = format!("the most is {LEEWAY_SECONDS_MAX}");
                self.problems.add(span.clone(), field("leeway_seconds"), message, None);
            }
            let draft = self.keys(&issuer, &span, &field("jwks_file")).map(|keys| {
                let (issuer, audiences) = (issuer.issuer.into_inner(), issuer.audiences.into_inner());
                IssuerDraft { issuer, audiences, keys, algorithms, leeway_seconds }
            });
            if issuers.insert(name.clone(), draft).is_some() {
                self.problems.add(span, FIELD, format!("issuer {name:?} is there twice"), None);
            }
        }
        issuers
    }

    fn keys(&mut self, issuer: &raw::Issuer, span: &Range<usize>, field: &str) -> Option<KeyDraft> {
        match (&issuer.jwks_file, &issuer.jwks_url) {
            (Some(file), None) => {
                let value = PathBuf::from(file.get_ref());
                Some(KeyDraft::File(Placed { value, span: file.span(), field: field.to_owned() }))
            }
            (None, Some(url)) if is_key_url(url.get_ref()) => Some(KeyDraft::Url(url.get_ref().clone())),
            (None, Some(url)) => {
                let message = "jwks_url must be https (http only to a loopback address)";
                self.problems.add(url.span(), field.replace("jwks_file", "jwks_url"), message, None);
                None
            }
            _ => {
                self.problems.add(span.clone(), field, "give either jwks_file or jwks_url", None);
                None
            }
        }
    }

    fn component(
        &mut self,
        raw: raw::Component,
        field: &str,
        variables: &BTreeMap<String, Variable>,
        issuers: &BTreeMap<String, Option<IssuerDraft>>,
    ) -> Option<ComponentDraft> {
        self.refuse_what_is_not_offered(&raw, field);
        let templates = raw.variables.iter().filter_map(|(name, text)| {
            let template = self.template(text, &format!("{field}.variables.{name}"), variables)?;
            Some((name.clone(), template))
        });
        let templates: BTreeMap<_, _> = templates.collect();
        let allowed_outbound_hosts = self.outbound(&raw.allowed_outbound_hosts, field, variables);
        let key_value_stores = self.all(&raw.key_value_stores, &format!("{field}.key_value_stores"));
        let told = raw.tool.selvage.as_ref();
        let spin_headers = told.and_then(|rules| rules.spin_headers).unwrap_or(true);
        let forwarded_headers = told.and_then(|rules| rules.forwarded_headers);
        let (jwt, limits, isolation) = self.rules(raw.tool.selvage, field, issuers);
        let files = raw.files.into_iter().map(|files| {
            let (span, field) = (files.span(), format!("{field}.files"));
            let value = match files.into_inner() {
                raw::Files::Glob(glob) => FilesDraft::Glob(glob),
                raw::Files::Placed { source, destination } => {
                    FilesDraft::Directory { source: source.into(), destination }
                }
            };
            Placed { value, span, field }
        });
        let files = files.collect();
        let span = raw.source.span();
        let raw::Source::File(source) = raw.source.into_inner() else {
            let hint = "download the component and write source = \"file.wasm\"";
            self.problems.add(span, format!("{field}.source"), "only a file can be a source", Some(hint));
            return None;
        };
        Some(ComponentDraft {
            source: Placed { value: source.into(), span, field: format!("{field}.source") },
            variables: templates,
            environment: raw.environment,
            files,
            exclude_files: raw.exclude_files.into_iter().map(Spanned::into_inner).collect(),
            allowed_outbound_hosts,
            key_value_stores,
            jwt,
            limits,
            isolation,
            spin_headers,
            forwarded_headers,
        })
    }

    /// Keys of Spin's that ask for something Selvage has not: silence would let the app fail later.
    fn refuse_what_is_not_offered(&mut self, raw: &raw::Component, field: &str) {
        let mut refuse = |name: &str, span: Range<usize>, hint: &str| {
            self.problems.add(span, format!("{field}.{name}"), "not offered here", Some(hint));
        };
        if let Some(list) = raw.sqlite_databases.as_ref().filter(|list| !list.get_ref().is_empty()) {
            refuse("sqlite_databases", list.span(), "use key_value_stores, or a database over outbound HTTP");
        }
        if let Some(list) = raw.ai_models.as_ref().filter(|list| !list.get_ref().is_empty()) {
            refuse("ai_models", list.span(), "call a model over outbound HTTP");
        }
        if let Some(list) = &raw.allowed_http_hosts {
            refuse("allowed_http_hosts", list.span(), "write allowed_outbound_hosts = [\"https://host\"]");
        }
        if let Some(list) = raw.dependencies.as_ref().filter(|list| !list.get_ref().is_empty()) {
            refuse("dependencies", list.span(), "compose the component first, for example with `wac plug`");
        }
    }

    fn template(
        &mut self,
        text: &Spanned<String>,
        field: &str,
        variables: &BTreeMap<String, Variable>,
    ) -> Option<Template> {
        let template: Template = self.parsed(text, field)?;
        if let Some(unknown) = template.variables().find(|name| !variables.contains_key(*name)) {
            let hint = format!("add {unknown} = {{ default = \"…\" }} under [variables]");
            self.problems.add(text.span(), field, format!("variable {unknown:?} is not declared"), Some(&hint));
        }
        Some(template)
    }

    fn outbound(
        &mut self,
        raw: &[Spanned<String>],
        field: &str,
        variables: &BTreeMap<String, Variable>,
    ) -> Vec<Template> {
        let field = format!("{field}.allowed_outbound_hosts");
        let mut hosts = Vec::new();
        for text in raw {
            let Some(template) = self.template(text, &field, variables) else { continue };
            // An entry with a variable in it can be judged only when the variable has its value.
            if template.variables().next().is_none() {
                self.parsed::<AllowedHost>(text, &field);
            }
            hosts.push(template);
        }
        hosts
    }

    fn rules(
        &mut self,
        raw: Option<raw::ComponentRules>,
        field: &str,
        issuers: &BTreeMap<String, Option<IssuerDraft>>,
    ) -> (Option<Rule>, Limits, Isolation) {
        let Some(raw) = raw else { return (None, Limits::default(), Isolation::Fresh) };
        let field = format!("{field}.tool.selvage");
        let exempt = self.all(&raw.jwt_exempt, &format!("{field}.jwt_exempt"));
        if let (None, Some(first)) = (&raw.jwt, raw.jwt_exempt.first()) {
            let message = "paths are exempt from a rule that is not there";
            self.problems.add(first.span(), format!("{field}.jwt_exempt"), message, Some("add jwt = \"<issuer>\""));
        }
        let isolation = self.isolation(raw.isolation, raw.reuse, &field);
        let rule = raw.jwt.map(|name| {
            if !issuers.contains_key(name.get_ref()) {
                let hint = "add it as [[application.tool.selvage.jwt]]";
                let message = format!("no issuer is named {:?}", name.get_ref());
                self.problems.add(name.span(), format!("{field}.jwt"), message, Some(hint));
            }
            Rule { issuer: name.into_inner(), exempt }
        });
        let limits = raw.limits.map(|limits| {
            if let Some(zero) = limits.get_ref().zero() {
                self.problems.add(limits.span(), format!("{field}.limits.{zero}"), "must not be 0", None);
            }
            limits.into_inner()
        });
        (rule, limits.unwrap_or_default(), isolation)
    }

    fn isolation(&mut self, raw: Option<Spanned<String>>, reuse: Option<Spanned<Reuse>>, field: &str) -> Isolation {
        if let Some(reuse) = &reuse
            && let Some((name, reason)) = reuse.get_ref().mistake()
        {
            self.problems.add(reuse.span(), format!("{field}.reuse.{name}"), reason, None);
        }
        match raw.as_ref().map(|raw| raw.get_ref().as_str()) {
            Some("reuse") => Isolation::Reuse(reuse.map(Spanned::into_inner).unwrap_or_default()),
            None | Some("fresh") => {
                // Bounds without the word would silently do nothing.
                if let Some(reuse) = reuse {
                    let message = "bounds of a reuse that was not chosen";
                    let hint = Some("add isolation = \"reuse\"");
                    self.problems.add(reuse.span(), format!("{field}.reuse"), message, hint);
                }
                Isolation::Fresh
            }
            Some(other) => {
                let message = format!("{other:?} is no isolation");
                let hint = Some("write \"fresh\" or \"reuse\"");
                self.problems.add(raw.map_or(0..0, |raw| raw.span()), format!("{field}.isolation"), message, hint);
                Isolation::Fresh
            }
        }
    }

    fn routes(
        &mut self,
        raw: Vec<raw::HttpTrigger>,
        components: &BTreeMap<ComponentName, Option<ComponentDraft>>,
    ) -> Vec<Route> {
        const FIELD: &str = "trigger.http";
        let mut routes: Vec<Route> = Vec::new();
        for trigger in raw {
            let span = trigger.route.span();
            let executor = trigger.executor.as_ref().filter(|e| !matches!(e.get_ref().kind.as_str(), "http" | "spin"));
            if let Some(executor) = executor {
                let message = format!("executor {:?} is not offered", executor.get_ref().kind);
                self.problems.add(executor.span(), format!("{FIELD}.executor"), message, Some("remove the key"));
            }
            let pattern = match trigger.route.get_ref() {
                raw::RouteText::Path(path) => {
                    let text = Spanned::new(span.clone(), path.clone());
                    self.parsed::<Pattern>(&text, &format!("{FIELD}.route"))
                }
                // A private route is reached from inside the app only, never from a socket: no entry in the table.
                raw::RouteText::Private { private: true } => None,
                raw::RouteText::Private { private: false } => {
                    self.problems.add(span.clone(), format!("{FIELD}.route"), "write a path, or private = true", None);
                    None
                }
            };
            let target = self.target(trigger, components, &span);
            let (Some(pattern), Some(target)) = (pattern, target) else { continue };
            if routes.iter().any(|route| route.pattern == pattern) {
                let message = format!("route {pattern} is there twice");
                self.problems.add(span, format!("{FIELD}.route"), message, Some("remove one of them"));
            }
            routes.push(Route { pattern, target });
        }
        routes
    }

    fn target(
        &mut self,
        trigger: raw::HttpTrigger,
        components: &BTreeMap<ComponentName, Option<ComponentDraft>>,
        route: &Range<usize>,
    ) -> Option<Target> {
        const FIELD: &str = "trigger.http.component";
        match (trigger.component, trigger.static_response) {
            (Some(name), None) => {
                let component: ComponentName = self.parsed(&name, FIELD)?;
                if !components.contains_key(&component) {
                    let known: Vec<&str> = components.keys().map(ComponentName::as_str).collect();
                    let hint = format!("the manifest has: {}", known.join(", "));
                    let message = format!("no component is named {component}");
                    self.problems.add(name.span(), FIELD, message, Some(&hint));
                }
                Some(Target::Component(component))
            }
            (None, Some(answer)) => {
                if !(200..=599).contains(&answer.get_ref().status_code) {
                    let field = "trigger.http.static_response.status_code";
                    self.problems.add(answer.span(), field, "must be 200 to 599", None);
                }
                Some(Target::Static(answer.into_inner()))
            }
            _ => {
                let message = "a route has either a component or a static_response";
                self.problems.add(route.clone(), FIELD, message, None);
                None
            }
        }
    }
}

fn is_key_url(url: &str) -> bool {
    let local = ["http://127.0.0.1", "http://[::1]", "http://localhost"];
    url.starts_with("https://")
        || local.iter().any(|prefix| url.strip_prefix(prefix).is_some_and(|rest| rest.starts_with([':', '/'])))
}

#[cfg(test)]
mod tests;
