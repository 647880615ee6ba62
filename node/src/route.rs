//! Which app has this host, and which of its routes this path.
//!
//! The table is immutable: another one is built whole and swapped in, so a request sees the apps of before a change or
//! of after it. Patterns are tried in the order of [`Pattern`]: the most specific first.

pub mod fields;
pub mod split;
pub(crate) mod tally;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use selvage_config::app::route::{Captures, Pattern};
use selvage_config::app::{App, StaticResponse, Target as TargetDocument, jwt::Rule};
use selvage_config::release::ReleaseId;
use selvage_config::{AppName, ComponentName, Digest};
use serde::Serialize;

use crate::admit::Held;
use crate::fault::{ClientFault, Fault};
use crate::jwt::Issuer;
use crate::metrics::{AppCounters, Metrics};
use crate::pool::Pool;
use crate::request::{Response, full};

use self::fields::OfRoute;
use self::split::{Second, Visitor};
use self::tally::Tally;

/// Paths that every app has and no guest sees (Spin's health check and app information).
const RESERVED: &str = "/.well-known/spin";

/// Why an app can't serve.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// A route names a component that has no pool.
    #[error("route {route} needs component {component}, which has no pool")]
    Pool {
        /// The route.
        route: Pattern,
        /// The component.
        component: ComponentName,
    },
    /// A component's rule names an issuer that is not there.
    #[error("component {component} needs issuer {issuer:?}")]
    Issuer {
        /// The component.
        component: ComponentName,
        /// The issuer.
        issuer: String,
    },
    /// A fixed answer that can't be sent.
    #[error("static response of route {route}: {what} can't be sent")]
    Static {
        /// The route.
        route: Pattern,
        /// Which part of it.
        what: String,
    },
}

/// Two apps want the same host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("apps {first} and {second} both answer for host {host}")]
pub struct TableError {
    /// The host.
    pub host: String,
    /// The app that came first.
    pub first: AppName,
    /// The other.
    pub second: AppName,
}

/// An app that serves: its document, and everything that its routes need.
#[derive(Debug)]
pub struct ActiveApp {
    app: App,
    release: Option<ReleaseId>,
    manifest: Digest,
    routes: Vec<Route>,
    counters: OnceLock<AppCounters>,
    held: Held,
    tally: Tally,
}

#[derive(Debug)]
struct Route {
    pattern: Pattern,
    /// What its guest is told of it.
    fields: OfRoute,
    target: Target,
}

/// Who answers a route.
#[derive(Debug)]
pub enum Target {
    /// A guest.
    Component(ComponentTarget),
    /// A fixed answer.
    Static(Fixed),
}

/// A guest, and what its caller must show.
pub struct ComponentTarget {
    /// Its name.
    pub component: ComponentName,
    /// Its instances.
    pub pool: Arc<Pool>,
    /// The token that it demands and who issues it.
    pub policy: Option<(Rule, Arc<Issuer>)>,
}

impl std::fmt::Debug for ComponentTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ComponentTarget").field("component", &self.component).finish_non_exhaustive()
    }
}

/// A fixed answer, ready to be sent.
#[derive(Debug, Clone)]
pub struct Fixed {
    status: StatusCode,
    fields: HeaderMap,
    body: Bytes,
}

impl Fixed {
    fn new(route: &Pattern, document: &StaticResponse) -> Result<Self, RouteError> {
        let unfit = |what: String| RouteError::Static { route: route.clone(), what };
        let status = StatusCode::from_u16(document.status_code)
            .map_err(|_| unfit(format!("status {}", document.status_code)))?;
        let mut fields = HeaderMap::new();
        for (name, value) in &document.headers {
            let field = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok());
            let (name, value) = field.ok_or_else(|| unfit(format!("header {name:?}")))?;
            fields.append(name, value);
        }
        // The length is the transport's to tell.
        fields.remove(header::CONTENT_LENGTH);
        Ok(Self { status, fields, body: Bytes::from(document.body.clone().unwrap_or_default()) })
    }

    /// The answer.
    pub fn response(&self) -> Response {
        let mut response = Response::new(full(self.body.clone()));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.fields.clone();
        response
    }
}

impl ActiveApp {
    /// An app that is ready to serve. Of two equal patterns the last one wins, as in Spin.
    ///
    /// # Errors
    /// A route that names something that is not given.
    pub fn new(
        app: App,
        release: Option<ReleaseId>,
        manifest: Digest,
        pools: &BTreeMap<ComponentName, Arc<Pool>>,
        issuers: &BTreeMap<String, Arc<Issuer>>,
    ) -> Result<Self, RouteError> {
        let mut routes: BTreeMap<Pattern, Target> = BTreeMap::new();
        for route in &app.routes {
            let target = match &route.target {
                TargetDocument::Static(answer) => Target::Static(Fixed::new(&route.pattern, answer)?),
                TargetDocument::Component(component) => {
                    let missing = || RouteError::Pool { route: route.pattern.clone(), component: component.clone() };
                    let pool = Arc::clone(pools.get(component).ok_or_else(missing)?);
                    let policy = policy(&app, component, issuers)?;
                    Target::Component(ComponentTarget { component: component.clone(), pool, policy })
                }
            };
            if routes.insert(route.pattern.clone(), target).is_some() {
                tracing::warn!(app = %app.name, route = %route.pattern, "route is there twice, the last one counts");
            }
        }
        let route = |(pattern, target)| {
            let component = match &target {
                Target::Component(target) => app.components.get(&target.component),
                Target::Static(_) => None,
            };
            Route { fields: OfRoute::new(&pattern, component), pattern, target }
        };
        let routes = routes.into_iter().map(route).collect();
        Ok(Self {
            app,
            release,
            manifest,
            routes,
            counters: OnceLock::new(),
            held: Held::default(),
            tally: Tally::default(),
        })
    }

    /// The app's document.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// Which release this is. Without a control plane there is none.
    pub fn release(&self) -> Option<&ReleaseId> {
        self.release.as_ref()
    }

    /// The digest of its manifest.
    pub fn manifest(&self) -> Digest {
        self.manifest
    }

    /// Gives up what no request needs: instances that wait, and code. The next request finds both again.
    pub(crate) fn rest(&self) {
        self.components().for_each(|target| target.pool.rest_now());
    }

    /// Gets ready for the requests that `before` has now.
    pub(crate) async fn warm_like(&self, before: &Self) {
        let old: BTreeMap<_, _> = before.components().map(|target| (&target.component, &target.pool)).collect();
        let new: BTreeMap<_, _> = self.components().map(|target| (&target.component, &target.pool)).collect();
        for (name, pool) in new {
            if let Some(old) = old.get(name) {
                pool.warm_like(old).await;
            }
        }
    }

    fn components(&self) -> impl Iterator<Item = &ComponentTarget> {
        self.routes.iter().filter_map(|route| match &route.target {
            Target::Component(target) => Some(target),
            Target::Static(_) => None,
        })
    }

    /// The places that its requests have on the node.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// What this release has answered.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// What is counted of this app, looked up once.
    pub(crate) fn counters(&self, metrics: &Metrics) -> &AppCounters {
        self.counters.get_or_init(|| metrics.of_app(self.app.name.as_str()))
    }

    fn find(self: &Arc<Self>, path: &str) -> Result<Found, Fault> {
        let place = match reserved(path) {
            Some("/health") => Place::Health,
            Some("/info") => Place::Info,
            Some(_) => return Err(Fault::Client(ClientFault::NotFound)),
            None => {
                let captured = |(index, route): (usize, &Route)| Some((index, route.pattern.captures(path)?));
                let found = self.routes.iter().enumerate().find_map(captured);
                let (index, captures) = found.ok_or(Fault::Client(ClientFault::NotFound))?;
                Place::Route { index, captures }
            }
        };
        Ok(Found { app: Arc::clone(self), place, is_split: false })
    }
}

fn policy(
    app: &App,
    component: &ComponentName,
    issuers: &BTreeMap<String, Arc<Issuer>>,
) -> Result<Option<(Rule, Arc<Issuer>)>, RouteError> {
    let Some(rule) = app.components.get(component).and_then(|document| document.jwt.as_ref()) else { return Ok(None) };
    let missing = || RouteError::Issuer { component: component.clone(), issuer: rule.issuer.clone() };
    let issuer = issuers.get(&rule.issuer).ok_or_else(missing)?;
    Ok(Some((rule.clone(), Arc::clone(issuer))))
}

/// What follows the reserved prefix, if `path` is in it.
fn reserved(path: &str) -> Option<&str> {
    path.strip_prefix(RESERVED).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What was found for a host and a path.
#[derive(Debug)]
pub struct Found {
    app: Arc<ActiveApp>,
    place: Place,
    /// Whether another release of the app serves beside this one.
    is_split: bool,
}

#[derive(Debug)]
enum Place {
    Route { index: usize, captures: Captures },
    Health,
    Info,
}

/// What Spin tells at `/.well-known/spin/info`.
#[derive(Debug, Serialize)]
struct Info<'a> {
    name: &'a AppName,
    version: Option<&'a str>,
    oci_image_digest: String,
}

impl Found {
    /// The app.
    pub fn app(&self) -> &Arc<ActiveApp> {
        &self.app
    }

    /// The release that answers, where that is one of two.
    pub fn split_release(&self) -> Option<&ReleaseId> {
        self.app.release().filter(|_| self.is_split)
    }

    /// What the guest that answers is told of its route, what the route captured, and the guest. `None` if no guest
    /// answers.
    pub fn guest(&self) -> Option<(&OfRoute, &Captures, &ComponentTarget)> {
        let Place::Route { index, captures } = &self.place else { return None };
        let Route { fields, target, .. } = &self.app.routes[*index];
        match target {
            Target::Component(component) => Some((fields, captures, component)),
            Target::Static(_) => None,
        }
    }

    /// The answer, where no guest is asked.
    pub fn fixed(&self) -> Option<Response> {
        match &self.place {
            Place::Health => Some(Response::new(full("OK"))),
            Place::Info => Some(self.info()),
            Place::Route { index, .. } => match &self.app.routes[*index].target {
                Target::Static(fixed) => Some(fixed.response()),
                Target::Component(_) => None,
            },
        }
    }

    fn info(&self) -> Response {
        let app = &self.app.app;
        let info =
            Info { name: &app.name, version: app.version.as_deref(), oci_image_digest: self.app.manifest.to_string() };
        let json = serde_json::to_vec(&info).expect("three strings are JSON");
        let mut response = Response::new(full(json));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

/// Every app that serves, by host.
#[derive(Debug, Default)]
pub struct Table {
    apps: Vec<Arc<ActiveApp>>,
    hosts: HashMap<String, Arc<ActiveApp>>,
    any: Option<Arc<ActiveApp>>,
    /// Second releases, by app.
    seconds: HashMap<AppName, Second>,
}

impl Table {
    /// The table of `apps`: each answers at the hosts that it names and at `<app>.<domain>`.
    ///
    /// # Errors
    /// Two apps claim one host.
    pub fn new(apps: Vec<Arc<ActiveApp>>, domain: &str) -> Result<Self, TableError> {
        let mut hosts: HashMap<String, Arc<ActiveApp>> = HashMap::new();
        for active in &apps {
            let own = format!("{}.{domain}", active.app.name);
            for host in active.app.hosts.iter().chain([&own]).filter_map(|host| host_key(host).map(Cow::into_owned)) {
                match hosts.get(&host) {
                    Some(first) if !Arc::ptr_eq(first, active) => {
                        let (first, second) = (first.app.name.clone(), active.app.name.clone());
                        return Err(TableError { host, first, second });
                    }
                    _ => hosts.insert(host, Arc::clone(active)),
                };
            }
        }
        Ok(Self { apps, hosts, any: None, seconds: HashMap::new() })
    }

    /// The table of one app that answers for every host.
    pub fn alone(app: Arc<ActiveApp>) -> Self {
        Self { apps: vec![Arc::clone(&app)], hosts: HashMap::new(), any: Some(app), seconds: HashMap::new() }
    }

    /// The same with second releases beside some of its apps. They answer at the hosts of the first.
    #[must_use]
    pub fn with_seconds(self, seconds: impl IntoIterator<Item = Second>) -> Self {
        let seconds = seconds.into_iter().map(|second| (second.release.app.clone(), second)).collect();
        Self { seconds, ..self }
    }

    /// The second releases.
    pub fn seconds(&self) -> impl Iterator<Item = &Second> {
        self.seconds.values()
    }

    /// A table without an app.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The apps.
    pub fn apps(&self) -> &[Arc<ActiveApp>] {
        &self.apps
    }

    /// Whether some app says that `host` is one of its own.
    pub fn declares(&self, host: &str) -> bool {
        host_key(host).is_some_and(|host| self.hosts.contains_key(&*host))
    }

    /// Who answers this visitor: as [`Table::find`], but of two releases the one that the visitor belongs to.
    ///
    /// # Errors
    /// No app has the host, or it has no route for the path.
    pub fn find_for(&self, host: &str, path: &str, visitor: Visitor<'_>) -> Result<Found, Fault> {
        if self.seconds.is_empty() {
            return self.find(host, path);
        }
        let app = self.any.as_ref().or_else(|| self.hosts.get(&*host_key(host)?));
        let app = app.ok_or(Fault::Client(ClientFault::NotFound))?;
        let Some(second) = self.seconds.get(&app.app.name) else { return app.find(path) };
        let chosen = if second.takes(app, visitor) { &second.app } else { app };
        Ok(Found { is_split: true, ..chosen.find(path)? })
    }

    /// Who answers `path` (without query) at `host`, which may have a port and a trailing dot.
    ///
    /// # Errors
    /// No app has the host, or it has no route for the path.
    pub fn find(&self, host: &str, path: &str) -> Result<Found, Fault> {
        let app = self.any.as_ref().or_else(|| self.hosts.get(&*host_key(host)?));
        app.ok_or(Fault::Client(ClientFault::NotFound))?.find(path)
    }
}

/// A host as the table holds it: lower case, without port and trailing dot. `None` if nothing is left.
fn host_key(host: &str) -> Option<Cow<'_, str>> {
    let name = match host.rfind(':') {
        // In an IPv6 literal the last ':' before ']' is part of the address.
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_lower = !name.bytes().any(|byte| byte.is_ascii_uppercase());
    (!name.is_empty()).then(|| if is_lower { name.into() } else { name.to_ascii_lowercase().into() })
}

#[cfg(test)]
pub(crate) mod tests {
    use http_body_util::BodyExt;
    use selvage_config::app;

    use super::*;

    /// An app without guests: each route answers with its own pattern.
    pub(crate) fn fixed_app(name: &str, hosts: &[&str], patterns: &[&str]) -> ActiveApp {
        let route = |text: &&str| app::Route {
            pattern: text.parse().unwrap(),
            target: TargetDocument::Static(StaticResponse {
                status_code: 200,
                headers: [("x-route".to_owned(), (*text).to_owned())].into(),
                body: Some(format!("{name} {text}")),
            }),
        };
        let app = App {
            name: name.parse().unwrap(),
            version: Some("1.2.3".into()),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            variables: BTreeMap::new(),
            issuers: BTreeMap::new(),
            routes: patterns.iter().map(route).collect(),
            components: BTreeMap::new(),
        };
        ActiveApp::new(app, None, Digest::of(b"manifest"), &BTreeMap::new(), &BTreeMap::new()).unwrap()
    }

    async fn body(found: &Found) -> String {
        let bytes = found.fixed().unwrap().into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    fn table() -> Table {
        let hello = fixed_app("hello", &["www.example.com"], &["/...", "/a", "/a/:x"]);
        let other = fixed_app("other", &[], &["/only"]);
        Table::new(vec![Arc::new(hello), Arc::new(other)], "edge.example").unwrap()
    }

    #[tokio::test]
    async fn the_host_chooses_the_app_and_the_path_the_route() {
        let table = table();
        for (host, path, want) in [
            ("hello.edge.example", "/", "hello /..."),
            ("HELLO.Edge.Example", "/a", "hello /a"),
            ("hello.edge.example:8443", "/a/b", "hello /a/:x"),
            ("www.example.com.", "/a/b/c", "hello /..."),
            ("www.example.com.:443", "/a", "hello /a"),
            ("other.edge.example", "/only", "other /only"),
        ] {
            assert_eq!(body(&table.find(host, path).unwrap()).await, want, "{host}{path}");
        }
    }

    #[test]
    fn an_unknown_host_or_path_is_not_found() {
        let table = table();
        for (host, path) in [
            ("", "/"),
            (".", "/"),
            (":443", "/"),
            ("edge.example", "/"),
            ("example.com", "/"),
            ("a.hello.edge.example", "/"),
            ("hello.edge.example..", "/"),
            ("[::1]:443", "/"),
            ("other.edge.example", "/"),
            ("other.edge.example", "/only/more"),
        ] {
            let fault = table.find(host, path).unwrap_err();
            assert_eq!(fault, Fault::Client(ClientFault::NotFound), "{host}{path}");
        }
        assert!(Table::empty().find("hello.edge.example", "/").is_err());
    }

    #[tokio::test]
    async fn spins_own_paths_never_reach_the_app() {
        let table = Table::alone(Arc::new(fixed_app("hello", &[], &["/..."])));
        assert_eq!(body(&table.find("x", "/.well-known/spin/health").unwrap()).await, "OK");
        let info = body(&table.find("x", "/.well-known/spin/info").unwrap()).await;
        let digest = Digest::of(b"manifest");
        let want = format!(r#"{{"name":"hello","version":"1.2.3","oci_image_digest":"{digest}"}}"#);
        assert_eq!(info, want);
        for hidden in
            ["/.well-known/spin", "/.well-known/spin/", "/.well-known/spin/health/x", "/.well-known/spin/other"]
        {
            assert!(table.find("x", hidden).is_err(), "{hidden}");
        }
        assert_eq!(body(&table.find("x", "/.well-known/spinner").unwrap()).await, "hello /...");
    }

    #[test]
    fn two_apps_with_one_host_are_refused_by_name() {
        let one = Arc::new(fixed_app("one", &["same.example"], &["/"]));
        let two = Arc::new(fixed_app("two", &["same.example"], &["/"]));
        let error = Table::new(vec![one, Arc::clone(&two)], "edge").unwrap_err();
        assert_eq!(error.to_string(), "apps one and two both answer for host same.example");
        let thief = Arc::new(fixed_app("thief", &["two.edge"], &["/"]));
        assert!(Table::new(vec![two, thief], "edge").is_err());
        let twice = Arc::new(fixed_app("twice", &["twice.edge"], &["/"]));
        assert!(Table::new(vec![twice], "edge").is_ok(), "an app may name its own host");
    }

    #[tokio::test]
    async fn of_two_equal_routes_the_last_one_wins() {
        let mut app = fixed_app("a", &[], &["/x", "/x"]).app;
        let TargetDocument::Static(answer) = &mut app.routes[1].target else { unreachable!("all are static") };
        answer.body = Some("last".into());
        let active = ActiveApp::new(app, None, Digest::of(b""), &BTreeMap::new(), &BTreeMap::new()).unwrap();
        assert_eq!(body(&Table::alone(Arc::new(active)).find("h", "/x").unwrap()).await, "last");
    }

    #[test]
    fn an_app_that_lacks_something_is_refused() {
        let with = |change: &dyn Fn(&mut StaticResponse)| {
            let mut app = fixed_app("a", &[], &["/x"]).app;
            let TargetDocument::Static(answer) = &mut app.routes[0].target else { unreachable!("all are static") };
            change(answer);
            ActiveApp::new(app, None, Digest::of(b""), &BTreeMap::new(), &BTreeMap::new())
        };
        assert!(with(&|_| ()).is_ok());
        let bad_value = with(&|answer| drop(answer.headers.insert("a".into(), "b\r\nc: d".into())));
        assert!(matches!(bad_value, Err(RouteError::Static { .. })));
        let bad_name = with(&|answer| drop(answer.headers.insert("a b".into(), "c".into())));
        assert!(matches!(bad_name, Err(RouteError::Static { .. })));
        let app = App::of_component("a".parse().unwrap(), "c".parse().unwrap(), Digest::of(b""));
        let poolless = ActiveApp::new(app, None, Digest::of(b""), &BTreeMap::new(), &BTreeMap::new());
        assert!(matches!(poolless, Err(RouteError::Pool { .. })));
    }

    proptest::proptest! {
        #[test]
        fn no_host_or_path_panics(host in ".*", path in ".*") {
            let _ = table().find(&host, &path);
        }
    }
}
