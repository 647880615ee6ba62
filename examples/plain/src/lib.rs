//! One text for every request, with nothing but the bindings of WASI 0.2.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

/// What everyone is told.
const TEXT: &[u8] = b"hello, world\n";

struct Plain;
wasip2::http::proxy::export!(Plain);

impl Guest for Plain {
    fn handle(_: IncomingRequest, out: ResponseOutparam) {
        let fields = Fields::new();
        fields.append("content-type", b"text/plain").expect("a valid field");
        let response = OutgoingResponse::new(fields);
        let body = response.body().expect("a response's body can be taken once");
        ResponseOutparam::set(out, Ok(response));

        let stream = body.write().expect("a body's stream can be taken once");
        stream.blocking_write_and_flush(TEXT).expect("the client is still there");
        drop(stream); // before the body that it belongs to
        OutgoingBody::finish(body, None).expect("the client is still there");
    }
}
