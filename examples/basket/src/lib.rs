//! JSON in, JSON out: adds its total to a basket.

use serde_json::Value;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wasip2::io::streams::StreamError;

/// Largest basket, bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

struct Basket;
wasip2::http::proxy::export!(Basket);

impl Guest for Basket {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match body_of(&request).and_then(|body| priced(&body)) {
            Some(basket) => answer(out, 200, "application/json", &basket.to_string()),
            None => answer(out, 400, "text/plain", "expected a basket: {\"items\":[{\"count\":2,\"price\":350}]}\n"),
        }
    }
}

/// The basket with its `total`. `None` if it is no basket.
fn priced(body: &[u8]) -> Option<Value> {
    let mut basket: Value = serde_json::from_slice(body).ok()?;
    let price_of = |item: &Value| item["count"].as_u64()?.checked_mul(item["price"].as_u64()?);
    let items = basket.get("items")?.as_array()?;
    let total = items.iter().try_fold(0_u64, |total, item| total.checked_add(price_of(item)?))?;
    basket["total"] = total.into();
    Some(basket)
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

fn answer(out: ResponseOutparam, status: u16, kind: &str, text: &str) {
    let fields = Fields::new();
    fields.append("content-type", kind.as_bytes()).expect("a valid field");
    let response = OutgoingResponse::new(fields);
    response.set_status_code(status).expect("a valid status");
    let body = response.body().expect("a response's body can be taken once");
    ResponseOutparam::set(out, Ok(response));

    let stream = body.write().expect("a body's stream can be taken once");
    // The host takes 4 KiB at a time.
    for chunk in text.as_bytes().chunks(4096) {
        stream.blocking_write_and_flush(chunk).expect("the client is still there");
    }
    drop(stream); // before the body that it belongs to
    OutgoingBody::finish(body, None).expect("the client is still there");
}
