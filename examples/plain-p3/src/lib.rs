//! One text for every request, on wasi:http 0.3.

use bytes::Bytes;
use spin_sdk::http::{FullBody, Request, Response};
use spin_sdk::http_service;

/// What everyone is told.
const TEXT: &[u8] = b"hello, world\n";

#[http_service]
async fn serve(_: Request) -> Response<FullBody<Bytes>> {
    Response::new(FullBody::new(Bytes::from_static(TEXT)))
}
