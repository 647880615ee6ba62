//! Sessions that end by themselves, written only if nobody wrote before, and requests that are counted for a while.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wasip2::io::streams::StreamError;

mod bindings {
    wit_bindgen::generate!({ path: "wit/selvage-keyvalue.wit", world: "imports" });
}
use bindings::selvage::keyvalue::store::{self, Bucket, Condition, Terms};

/// The store's label in spin.toml.
const STORE: &str = "default";

/// Sessions live under this prefix, counts under the other.
const SESSIONS: &str = "session:";
const COUNTS: &str = "count:";

/// Largest session, bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Requests of one name within the life of its count.
const REQUESTS_MAX: i64 = 5;

/// Names on one page.
const PAGE: u32 = 1000;

struct Session;
wasip2::http::proxy::export!(Session);

/// What is answered.
struct Answer {
    status: u16,
    fields: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, fields: Vec::new(), body: body.into() }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((name, value.into()));
        self
    }
}

impl Guest for Session {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let answer = serve(&request).unwrap_or_else(|error| Answer::new(500, format!("store: {error:?}\n")));
        send(out, answer);
    }
}

fn serve(request: &IncomingRequest) -> Result<Answer, store::Error> {
    let target = request.path_with_query().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let name = path.trim_start_matches('/');
    let Ok(ttl_ms) = query.split('&').find_map(|pair| pair.strip_prefix("ttl=")).map(str::parse).transpose() else {
        return Ok(Answer::new(400, "ttl is a number of milliseconds\n"));
    };
    let bucket = store::open(STORE)?;
    match request.method() {
        Method::Get if name.is_empty() => names(&bucket),
        Method::Get => read(&bucket, name),
        Method::Put => write(&bucket, name, request, ttl_ms),
        Method::Post => count(&bucket, name, ttl_ms),
        Method::Delete => {
            bucket.delete(&format!("{SESSIONS}{name}"))?;
            Ok(Answer::new(204, ""))
        }
        _ => Ok(Answer::new(405, "method not allowed\n")),
    }
}

/// The names of all sessions, a line each.
fn names(bucket: &Bucket) -> Result<Answer, store::Error> {
    let (mut lines, mut cursor) = (String::new(), None);
    loop {
        let page = bucket.list_keys(SESSIONS, cursor.as_deref(), PAGE)?;
        for key in &page.keys {
            lines += key.strip_prefix(SESSIONS).unwrap_or(key);
            lines.push('\n');
        }
        cursor = page.cursor;
        if cursor.is_none() {
            return Ok(Answer::new(200, lines));
        }
    }
}

fn read(bucket: &Bucket, name: &str) -> Result<Answer, store::Error> {
    let Some(entry) = bucket.get(&format!("{SESSIONS}{name}"))? else { return Ok(Answer::new(404, "not found\n")) };
    let mut answer = Answer::new(200, entry.value).with("etag", format!("\"{}\"", entry.version));
    if let Some(ttl_ms) = entry.ttl_ms {
        answer = answer.with("cache-control", format!("max-age={}", ttl_ms / 1000));
    }
    // The content type lies beside the value.
    let kind = String::from_utf8(entry.metadata).unwrap_or_default();
    Ok(if kind.is_empty() { answer } else { answer.with("content-type", kind) })
}

/// Writes a session: with `if-match` the one that was read, else only one that does not exist.
fn write(bucket: &Bucket, name: &str, request: &IncomingRequest, ttl_ms: Option<u64>) -> Result<Answer, store::Error> {
    let header = |name: &str| request.headers().get(name).into_iter().next();
    let seen = header("if-match").and_then(|value| String::from_utf8(value).ok());
    let condition = match &seen {
        Some(etag) => Condition::Version(etag.trim_matches('"').to_owned()),
        None => Condition::Absent,
    };
    let Some(body) = body_of(request) else { return Ok(Answer::new(413, "a session has at most 64 KiB\n")) };
    let terms = Terms { ttl_ms, metadata: header("content-type").unwrap_or_default() };
    let status = if seen.is_some() { 200 } else { 201 };
    let version = bucket.set_if(&format!("{SESSIONS}{name}"), &body, &terms, &condition)?;
    Ok(match version {
        Some(version) => Answer::new(status, "").with("etag", format!("\"{version}\"")),
        None => Answer::new(412, "somebody wrote before\n"),
    })
}

/// Counts a request; too many within the life of the count are refused.
fn count(bucket: &Bucket, name: &str, ttl_ms: Option<u64>) -> Result<Answer, store::Error> {
    let counted = bucket.increment(&format!("{COUNTS}{name}"), 1, ttl_ms)?;
    Ok(Answer::new(if counted > REQUESTS_MAX { 429 } else { 200 }, format!("{counted}\n")))
}

/// The whole body. `None` if it breaks off or is too large.
fn body_of(request: &IncomingRequest) -> Option<Vec<u8>> {
    let incoming = request.consume().ok()?;
    let stream = incoming.stream().ok()?;
    let mut body = Vec::new();
    loop {
        match stream.blocking_read(BODY_BYTES_MAX as u64) {
            Ok(bytes) => body.extend_from_slice(&bytes),
            Err(StreamError::Closed) => return Some(body),
            Err(StreamError::LastOperationFailed(_)) => return None,
        }
        if body.len() > BODY_BYTES_MAX {
            return None;
        }
    }
}

fn send(out: ResponseOutparam, answer: Answer) {
    let fields = Fields::new();
    for (name, value) in &answer.fields {
        fields.append(name, value.as_bytes()).expect("a valid field");
    }
    let response = OutgoingResponse::new(fields);
    response.set_status_code(answer.status).expect("a valid status");
    let body = response.body().expect("a response's body can be taken once");
    ResponseOutparam::set(out, Ok(response));
    let stream = body.write().expect("a body's stream can be taken once");
    // The host takes 4 KiB at a time.
    for chunk in answer.body.chunks(4096) {
        stream.blocking_write_and_flush(chunk).expect("the client is still there");
    }
    drop(stream); // before the body that it belongs to
    OutgoingBody::finish(body, None).expect("the client is still there");
}
