//! Atomic counters and raw keys in the key-value store `default`.

use futures::StreamExt;
use spin_sdk::http::{IncomingRequest, IntoResponse, Method, Response};
use spin_sdk::http_component;
use spin_sdk::key_value::Store;
// The SDK carries the bindings of wasi:keyvalue 0.2.0-draft2 but has no wrapper for them yet.
use spin_sdk::wit::wasi::keyvalue::{atomics, store as keyvalue};

/// The store's label in spin.toml.
const STORE: &str = "default";

/// Counters live under this prefix, so that they and the raw keys do not meet by accident.
const COUNTER_PREFIX: &str = "count:";

/// The longest value that PUT takes; a longer one is refused with 413.
const VALUE_BYTES_MAX: usize = 1024 * 1024;

/// Why a request was not answered as asked.
enum Refused {
    NotFound,
    Method,
    TooLarge,
    Body(String),
    Store(String),
}

#[http_component]
async fn serve(request: IncomingRequest) -> Response {
    let method = request.method();
    let path_with_query = request.path_with_query().unwrap_or_default();
    let path = path_with_query.split('?').next().unwrap_or_default();
    let answer = match path.strip_prefix('/').unwrap_or(path).split_once('/') {
        Some(("count", name)) if !name.is_empty() => count(&method, name),
        Some(("kv", key)) if !key.is_empty() => kv(&method, key, request).await,
        None if path == "/keys" => keys(&method),
        _ => Err(Refused::NotFound),
    };
    answer.unwrap_or_else(IntoResponse::into_response)
}

/// POST adds one and answers the new count; GET answers the count.
fn count(method: &Method, name: &str) -> Result<Response, Refused> {
    let bucket = keyvalue::open(STORE)?;
    let key = format!("{COUNTER_PREFIX}{name}");
    let count = match method {
        Method::Post => atomics::increment(&bucket, &key, 1)?,
        // How a counter is laid out is the host's business, so it is read by adding nothing.
        Method::Get if bucket.exists(&key)? => atomics::increment(&bucket, &key, 0)?,
        Method::Get => return Err(Refused::NotFound),
        _ => return Err(Refused::Method),
    };
    Ok(Response::new(200, format!("{count}\n")))
}

/// GET, PUT and DELETE of one raw value. The key is what follows `/kv/`, as it is written in the path.
async fn kv(method: &Method, key: &str, request: IncomingRequest) -> Result<Response, Refused> {
    let store = Store::open(STORE)?;
    match method {
        Method::Get => {
            let value = store.get(key)?.ok_or(Refused::NotFound)?;
            let response =
                Response::builder().status(200).header("content-type", "application/octet-stream").body(value).build();
            Ok(response)
        }
        Method::Put => {
            store.set(key, &value(request).await?)?;
            Ok(Response::new(204, ()))
        }
        Method::Delete => {
            store.delete(key)?;
            Ok(Response::new(204, ()))
        }
        _ => Err(Refused::Method),
    }
}

/// All keys of the store, counters included, as a sorted JSON array.
fn keys(method: &Method) -> Result<Response, Refused> {
    if !matches!(method, Method::Get) {
        return Err(Refused::Method);
    }
    let mut keys = Store::open(STORE)?.get_keys()?;
    keys.sort_unstable();
    let response = Response::builder()
        .status(200)
        .header("content-type", "application/json")
        .body(serde_json::json!(keys).to_string())
        .build();
    Ok(response)
}

async fn value(request: IncomingRequest) -> Result<Vec<u8>, Refused> {
    let mut value = Vec::new();
    let mut chunks = request.into_body_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| Refused::Body(error.to_debug_string()))?;
        if value.len() + chunk.len() > VALUE_BYTES_MAX {
            return Err(Refused::TooLarge);
        }
        value.extend_from_slice(&chunk);
    }
    Ok(value)
}

impl From<spin_sdk::key_value::Error> for Refused {
    fn from(error: spin_sdk::key_value::Error) -> Self {
        Self::Store(error.to_string())
    }
}

impl From<keyvalue::Error> for Refused {
    fn from(error: keyvalue::Error) -> Self {
        Self::Store(error.to_string())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        match self {
            Self::NotFound => Response::new(404, "not found\n"),
            Self::Method => Response::new(405, "method not allowed\n"),
            Self::TooLarge => Response::new(413, format!("a value has at most {VALUE_BYTES_MAX} bytes\n")),
            Self::Body(error) => {
                eprintln!("counter: request body: {error}");
                Response::new(400, "the request's body broke off\n")
            }
            Self::Store(error) => {
                eprintln!("counter: store {STORE}: {error}");
                Response::new(500, format!("store: {error}\n"))
            }
        }
    }
}
