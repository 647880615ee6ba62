//! From a request to its answer: the one function that names the steps is [`answer`].
//!
//! [`serve`] goes round it: faults become answers, every request is counted and logged once, when the last byte of its
//! answer is out or given up.

mod ids;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use selvage_certs::{Challenges, NameRules};
use selvage_config::front::Front;
use selvage_config::plan::ReleaseLoad;
use selvage_config::{AppName, Limits, NodeName, Region};

use self::ids::Ids;
use crate::acme;
use crate::admit::{Admission, Permit};
use crate::fault::{ClientFault, Fault, GuestFault};
use crate::jwt;
use crate::line::{Crowded, InTurns, Late};
use crate::listen::head;
use crate::metrics::{Counted, Metrics, NO_APP, Outcome};
use crate::names;
use crate::pool::Pool;
use crate::request::{Body, BodyError, Protocol, Request, Response, empty};
use crate::route::fields::Told;
use crate::route::split::{RELEASE, Visitor};
use crate::route::tally::Went;
use crate::route::{Found, Table, fields};

/// What every answer says that it was sent by.
const SERVER: HeaderValue = HeaderValue::from_static("selvage");
/// The field that names the node.
const NODE: HeaderName = HeaderName::from_static("selvage-node");
/// The field that names its region.
const REGION: HeaderName = HeaderName::from_static("selvage-region");
/// Fields that every answer has of the node, and of the transport.
const TOLD: usize = 8;
/// Prefix of the fields that only the node sets on an answer.
const OURS: &str = "selvage-";

/// What a request needs of the node.
#[derive(Debug)]
pub struct Parts {
    /// Who answers which host and path. Swapped whole.
    pub table: ArcSwap<Table>,
    /// How many requests may be under way.
    pub admission: Admission,
    /// What is counted.
    pub metrics: Metrics,
    /// What is taken from one client, and who is believed.
    pub front: Arc<Front>,
    /// What an ACME authority is answered that looks whether a name leads here.
    challenges: Challenges,
    /// Names whose connections carry no request for others, and the other way round.
    rules: Arc<NameRules>,
    node: NodeName,
    region: Region,
    /// The two as fields of every answer.
    names: [(HeaderName, HeaderValue); 2],
    ids: Ids,
    draining: AtomicBool,
    /// Whether the plan says so.
    told_to_drain: AtomicBool,
}

impl Parts {
    /// Parts with an empty table.
    pub fn new(node: NodeName, region: Region, requests_max: u32, metrics: Metrics) -> Self {
        let name = |text: &str| HeaderValue::from_str(text).expect("a name has only letters, digits and '-'");
        Self {
            names: [(NODE, name(node.as_str())), (REGION, name(region.as_str()))],
            table: ArcSwap::from_pointee(Table::empty()),
            admission: Admission::new(requests_max),
            metrics,
            front: Arc::default(),
            challenges: Challenges::default(),
            rules: Arc::default(),
            node,
            region,
            ids: Ids::new(),
            draining: AtomicBool::new(false),
            told_to_drain: AtomicBool::new(false),
        }
    }

    /// The same parts with other bounds of the front.
    #[must_use]
    pub fn with_front(self, front: Front) -> Self {
        Self { front: Arc::new(front), ..self }
    }

    /// The same parts, which answer these challenges.
    #[must_use]
    pub fn with_challenges(self, challenges: Challenges) -> Self {
        Self { challenges, ..self }
    }

    /// The same parts, which keep these names apart.
    #[must_use]
    pub fn with_rules(self, rules: Arc<NameRules>) -> Self {
        Self { rules, ..self }
    }

    /// The node's name.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// Where it stands.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Whether a load balancer should send requests here: there is an app, and the node is not about to leave.
    pub fn is_ready(&self) -> bool {
        !self.draining.load(Ordering::Relaxed)
            && !self.told_to_drain.load(Ordering::Relaxed)
            && !self.table.load().apps().is_empty()
    }

    /// The node is about to leave: it is not ready any more.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Operators want no more requests here, or want them again. Those that come all the same are answered.
    pub fn tell_to_drain(&self, drain: bool) {
        if self.told_to_drain.swap(drain, Ordering::Relaxed) != drain {
            tracing::info!(drain, "the plan says whether requests shall come here");
        }
    }

    /// How the releases of some apps have done here.
    pub fn load_of(&self, apps: &[AppName]) -> Vec<ReleaseLoad> {
        let table = self.table.load();
        let actives = table.apps().iter().chain(table.seconds().map(|second| &second.app));
        let watched = actives.filter(|active| apps.contains(&active.app().name));
        watched.filter_map(|active| Some(active.tally().load(active.release()?.clone()))).collect()
    }
}

/// Answers a request. It never fails: a fault is an answer too.
pub async fn serve(parts: &Arc<Parts>, request: Request) -> Response {
    let method = request.http.method().clone();
    let mut record = Record::new(Arc::clone(parts), &request);
    let mut response = match answer(parts, request, &mut record).await {
        Ok(response) => response,
        Err(fault) => {
            record.outcome = Outcome::from(&fault);
            record.detail = fault.detail().map(str::to_owned);
            if let Fault::Overload(_) = fault {
                record.permit = None;
                Box::pin(parts.admission.hold_back(record.started)).await;
            }
            fault.response()
        }
    };
    finish_head(parts, &record, &mut response);
    leave_out_body(&method, &mut response);
    record.status = response.status();
    response.map(|body| Tracked::new(body, record).boxed_unsync())
}

/// Answers a request that is refused before any step is taken.
pub(crate) fn refuse(parts: &Arc<Parts>, request: &Request, fault: &Fault) -> Response {
    let mut record = Record::new(Arc::clone(parts), request);
    record.outcome = Outcome::from(fault);
    let mut response = fault.response();
    finish_head(parts, &record, &mut response);
    leave_out_body(request.http.method(), &mut response);
    record.status = response.status();
    response.map(|body| Tracked::new(body, record).boxed_unsync())
}

/// The steps.
async fn answer(parts: &Arc<Parts>, mut request: Request, record: &mut Record) -> Result<Response, Fault> {
    let table = parts.table.load();
    let head::Checked { authority, wanted } = head::check(&parts.front, &mut request)?;
    record.client = request.client;
    if let Some(answer) = acme::answer(&parts.challenges, &request, &authority) {
        return Ok(answer);
    }
    names::check(&parts.rules, &mut request, &authority)?;
    let (fields, address) = (request.http.headers(), request.client.ip());
    let visitor = Visitor { wanted: wanted.as_ref(), fields, address };
    let found = table.find_for(authority.as_str(), request.http.uri().path(), visitor)?;
    drop(table);
    let found = record.found.insert(found);
    record.permit = Some(parts.admission.admit(found.app().held())?);
    if let Some(fixed) = found.fixed() {
        return Ok(fixed);
    }
    let (arrived, pool) = (request.arrived, found.guest().map(|(_, _, target)| &target.pool));
    let pool = pool.filter(|pool| pool.line().is_on(&pool.grants.spent, arrived));
    // In a box: a request that needs no guest would carry the room for one through every move of its task.
    let guest = Box::pin(answer_by_guest(request, &authority, found, &record.id));
    match pool {
        None => guest.await,
        Some(pool) => {
            parts.metrics.request_in_line(found.app().app().name.as_str());
            Box::pin(in_turns(pool, arrived, guest)).await
        }
    }
}

/// The same where the core is full and others want it too.
async fn in_turns(
    pool: &Pool,
    arrived: Instant,
    guest: impl Future<Output = Result<Response, Fault>> + Unpin,
) -> Result<Response, Fault> {
    let deadline = arrived + Duration::from_millis(pool.limits().wall_ms);
    let turns = InTurns::begin(pool.line(), &pool.grants.spent, deadline, guest);
    let turns = turns.map_err(|Crowded| Fault::Overload("line"))?;
    turns.await.unwrap_or_else(|Late| Err(Fault::Overload("line-deadline")))
}

/// The steps of a request that a guest answers.
async fn answer_by_guest(
    mut request: Request,
    authority: &Authority,
    found: &Found,
    id: &HeaderValue,
) -> Result<Response, Fault> {
    let (of_route, captures, target) = found.guest().ok_or_else(|| Fault::Node("route without a target".into()))?;
    let limits = target.pool.limits();
    refuse_large(&request, limits)?;
    let claims = match &target.policy {
        Some((rule, issuer)) => {
            let (path, fields) = (request.http.uri().path(), request.http.headers());
            jwt::authorize(rule, issuer, path, fields, SystemTime::now(), request.arrived).await?
        }
        None => None,
    };
    let claims = claims.as_ref();
    fields::tell_guest(&mut request, &Told { authority, id, of_route, captures, claims });
    let deadline = request.arrived + Duration::from_millis(limits.wall_ms);
    let lease = target.pool.lease(deadline).await?;
    checked(lease.call(request).await?)
}

/// A body that says how large it is need not be read to be refused. One that lies is cut off by the lease.
fn refuse_large(request: &Request, limits: &Limits) -> Result<(), Fault> {
    let length = request.http.headers().get(header::CONTENT_LENGTH).and_then(head::content_length);
    if length.is_some_and(|length| length > limits.request_body_bytes) {
        return Err(Fault::Client(ClientFault::BodyTooLarge));
    }
    Ok(())
}

/// A guest's answer without what only the node may say.
fn checked(mut response: Response) -> Result<Response, Fault> {
    if response.status().is_informational() {
        return Err(Fault::Guest(GuestFault::BadResponse));
    }
    fields::strip(response.headers_mut(), |name| name.starts_with(OURS));
    Ok(response)
}

fn finish_head(parts: &Parts, record: &Record, response: &mut Response) {
    let fields = response.headers_mut();
    fields::strip_hop_by_hop(fields);
    fields.reserve(TOLD);
    fields.insert(header::SERVER, SERVER);
    for (name, value) in &parts.names {
        fields.insert(name, value.clone());
    }
    fields.insert(fields::REQUEST_ID, record.id.clone());
    // Of two releases, which one answered: to see a split work, and to name it in a complaint.
    if let Some(release) = record.found.as_ref().and_then(Found::split_release)
        && let Ok(value) = HeaderValue::try_from(release.to_string())
    {
        fields.insert(RELEASE, value);
    }
}

/// RFC 9110 6.4.1: these answers have no body, but the first kind tells how long it would have been.
fn leave_out_body(method: &Method, response: &mut Response) {
    let length = response.body().size_hint().exact().filter(|length| *length > 0);
    if *method == Method::HEAD {
        if let Some(length) = length {
            response.headers_mut().entry(header::CONTENT_LENGTH).or_insert_with(|| length.into());
        }
    } else if !matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return;
    }
    *response.body_mut() = empty();
}

/// What is logged and counted of a request, once, when it is dropped.
struct Record {
    parts: Arc<Parts>,
    id: HeaderValue,
    started: Instant,
    protocol: Protocol,
    client: std::net::SocketAddr,
    method: Method,
    host: Option<HeaderValue>,
    target: Uri,
    found: Option<Found>,
    permit: Option<Permit>,
    _under_way: Counted,
    status: StatusCode,
    outcome: Outcome,
    detail: Option<String>,
    sent_bytes: u64,
}

impl Record {
    fn new(parts: Arc<Parts>, request: &Request) -> Self {
        Self {
            id: parts.ids.next(),
            started: request.arrived,
            protocol: request.protocol,
            client: request.client,
            method: request.http.method().clone(),
            host: request.http.headers().get(header::HOST).cloned(),
            target: request.http.uri().clone(),
            found: None,
            permit: None,
            _under_way: parts.metrics.request_under_way(),
            status: StatusCode::INTERNAL_SERVER_ERROR,
            // What a request is that is dropped before it is answered.
            outcome: Outcome::ABORTED,
            detail: None,
            sent_bytes: 0,
            parts,
        }
    }

    /// How it went, as far as its release is answerable for that: neither the client's doing is, nor a full node.
    fn went(&self) -> Went {
        match self.outcome.fault {
            "guest" => Went::Trapped,
            "client" | "overload" => Went::Well,
            _ if self.status.is_server_error() => Went::Badly,
            _ => Went::Well,
        }
    }

    /// `host[:port]` as the client wrote it.
    fn host(&self) -> &str {
        let field = || self.host.as_ref()?.to_str().ok();
        self.target.authority().map(Authority::as_str).or_else(field).unwrap_or_default()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let seconds = took.as_secs_f64();
        let metrics = &self.parts.metrics;
        let active = self.found.as_ref().map(Found::app);
        if let Some(active) = active {
            active.tally().count(took, self.went());
        }
        let app = active.map_or(NO_APP, |active| active.app().name.as_str());
        match active {
            Some(active) if self.outcome == Outcome::OK => {
                active.counters(metrics).request_ended_well(self.protocol, seconds);
            }
            _ => metrics.request_ended(app, self.protocol, self.outcome, seconds),
        }
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    id = self.id.to_str().unwrap_or_default(),
                    client = %self.client,
                    protocol = self.protocol.as_str(),
                    method = %self.method,
                    host = self.host(),
                    // Without the query, which may hold what no log should.
                    path = self.target.path(),
                    app,
                    component = self.found.as_ref().and_then(Found::guest).map(|(_, _, guest)| guest.component.as_str()),
                    status = self.status.as_u16(),
                    fault = self.outcome.fault,
                    outcome = self.outcome.outcome,
                    detail = self.detail,
                    bytes = self.sent_bytes,
                    ms = seconds * 1_000.0,
                    "request"
                )
            };
        }
        match self.outcome.fault {
            "node" => line!(error),
            "overload" | "guest" | "upstream" => line!(info),
            _ => line!(debug),
        }
    }
}

/// An answer's body, which knows how it ended.
struct Tracked {
    body: Body,
    record: Record,
    /// What the head announced.
    length: Option<u64>,
    ended: bool,
    /// The fault that was answered, or that all is well if the body gets through.
    in_the_end: Outcome,
}

impl Tracked {
    fn new(body: Body, record: Record) -> Self {
        let in_the_end = if record.outcome == Outcome::ABORTED { Outcome::OK } else { record.outcome };
        Self { length: body.size_hint().exact(), body, record, ended: false, in_the_end }
    }

    fn is_out(&self) -> bool {
        self.ended || self.body.is_end_stream() || self.length == Some(self.record.sent_bytes)
    }
}

impl http_body::Body for Tracked {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            None => self.ended = true,
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                self.record.sent_bytes += length as u64;
            }
            Some(Err(error)) => {
                self.in_the_end = match error {
                    BodyError::Guest { outcome } => Outcome { fault: "guest", outcome },
                    BodyError::TooLarge { .. } => Outcome::from(&Fault::Client(ClientFault::BodyTooLarge)),
                    BodyError::Transport(_) => Outcome::TRANSPORT,
                };
                self.record.detail = Some(error.to_string());
                self.ended = true;
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if self.is_out() {
            self.record.outcome = self.in_the_end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::full;
    use crate::route::tests::fixed_app;

    fn parts(requests_max: u32) -> Arc<Parts> {
        let parts = Parts::new("fra-1".parse().unwrap(), "fra".parse().unwrap(), requests_max, Metrics::new());
        parts.table.store(Arc::new(Table::alone(Arc::new(fixed_app("hello", &[], &["/a", "/b/..."])))));
        Arc::new(parts)
    }

    fn request(method: &str, uri: &str) -> Request {
        Request {
            http: http::Request::builder().method(method).uri(uri).header("host", "a").body(empty()).unwrap(),
            client: "192.0.2.7:4711".parse().unwrap(),
            protocol: Protocol::H1,
            secure: false,
            arrived: Instant::now(),
        }
    }

    fn counted(parts: &Parts, fault: &str, outcome: &str, app: &str) -> bool {
        let labels = format!(r#"{{app="{app}",fault="{fault}",outcome="{outcome}",protocol="h1"}} 1"#);
        parts.metrics.text().contains(&labels)
    }

    #[tokio::test]
    async fn an_answer_names_its_node_and_is_counted_when_it_is_out() {
        let parts = parts(1);
        let response = serve(&parts, request("GET", "/a?secret=1")).await;
        let fields = response.headers();
        assert_eq!(
            (&fields["server"], &fields["selvage-node"], &fields["selvage-region"]),
            (&SERVER, &HeaderValue::from_static("fra-1"), &HeaderValue::from_static("fra"))
        );
        assert!(fields.contains_key("selvage-request-id"));
        assert!(parts.metrics.text().contains("selvage_requests_under_way 1"));
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello /a");
        assert!(counted(&parts, "", "ok", "hello"), "{}", parts.metrics.text());
        assert!(parts.metrics.text().contains("selvage_requests_under_way 0"));
    }

    #[tokio::test]
    async fn an_answer_that_nobody_takes_is_an_aborted_one() {
        let parts = parts(1);
        drop(serve(&parts, request("GET", "/a")).await);
        assert!(counted(&parts, "client", "aborted", "hello"), "{}", parts.metrics.text());
    }

    #[tokio::test]
    async fn a_fault_is_an_answer() {
        let parts = parts(1);
        for (method, uri, status, outcome) in [
            ("GET", "/none", 404, "not-found"),
            ("TRACE", "/a", 405, "bad-method"),
            ("GET", "http://a@b/a", 400, "bad-host"),
        ] {
            let response = serve(&parts, request(method, uri)).await;
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()["selvage-outcome"], outcome);
            assert!(response.headers().contains_key("selvage-node"));
            response.into_body().collect().await.unwrap();
            assert!(counted(&parts, "client", outcome, ""), "{}", parts.metrics.text());
        }
    }

    #[tokio::test]
    async fn a_place_is_taken_until_the_answer_is_out() {
        let parts = parts(1);
        let first = serve(&parts, request("GET", "/a")).await;
        let second = serve(&parts, request("GET", "/a")).await;
        assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 503));
        assert_eq!(second.headers()["retry-after"], "1");
        first.into_body().collect().await.unwrap();
        assert_eq!(serve(&parts, request("GET", "/a")).await.status(), 200);
    }

    #[tokio::test]
    async fn head_has_a_length_and_no_body() {
        let parts = parts(1);
        let response = serve(&parts, request("HEAD", "/a")).await;
        assert_eq!(response.headers()["content-length"], "8");
        assert!(response.body().is_end_stream());
        drop(response);
        assert!(counted(&parts, "", "ok", "hello"), "{}", parts.metrics.text());
    }

    #[test]
    fn a_guest_can_not_speak_for_the_node() {
        let mut response = Response::new(full("x"));
        response.headers_mut().insert("selvage-node", HeaderValue::from_static("forged"));
        response.headers_mut().insert("selvage-outcome", HeaderValue::from_static("ok"));
        response.headers_mut().insert("x-own", HeaderValue::from_static("1"));
        let names: Vec<_> = checked(response).unwrap().headers().keys().map(ToString::to_string).collect();
        assert_eq!(names, ["x-own"]);
        let mut early = Response::new(full(""));
        *early.status_mut() = StatusCode::CONTINUE;
        assert_eq!(checked(early).unwrap_err(), Fault::Guest(GuestFault::BadResponse));
    }

    #[test]
    fn a_body_that_is_announced_too_large_is_refused_unread() {
        let limits = Limits { request_body_bytes: 10, ..Limits::default() };
        let sized = |length: &str| {
            let mut request = request("POST", "/a");
            request.http.headers_mut().insert("content-length", HeaderValue::from_str(length).unwrap());
            refuse_large(&request, &limits)
        };
        assert_eq!(sized("10"), Ok(()));
        assert_eq!(sized("11"), Err(Fault::Client(ClientFault::BodyTooLarge)));
    }
}
