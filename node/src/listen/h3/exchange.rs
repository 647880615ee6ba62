//! One request and its answer, on a stream of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tokio::time::timeout;

use super::code::{Code, Wrong};
use super::message::Head;
use super::receive::{Lost, Opened, Receiving, Streamed, Unread};
use super::send::{SendError, Sending};
use super::shared::Shared;
use crate::fault::{ClientFault, Fault};
use crate::listen::forwarded::believe;
use crate::request::{Body, Protocol, Request, empty, full};
use crate::serve::{refuse, serve};

/// RFC 8470 5.1.
const EARLY_DATA: HeaderName = HeaderName::from_static("early-data");
/// Bytes of a request that nobody wanted that are read over after its answer, and how long that may take.
const READ_OVER_BYTES_MAX: usize = 256 * 1024;
const READ_OVER_MAX: Duration = Duration::from_secs(1);

/// Takes one request and answers it.
pub(super) async fn exchange(shared: Arc<Shared>, send: quinn::SendStream, receive: quinn::RecvStream) {
    let is_early = receive.is_0rtt() && !shared.proof.is_there();
    let mut sending = Sending::new(send, Arc::clone(&shared));
    let mut receiving = Receiving::new(receive, Arc::clone(&shared));
    let head_max = Duration::from_millis(shared.parts.front.head_ms);
    let head = match timeout(head_max, receiving.head()).await {
        Ok(Ok(Opened::Head(head))) => head,
        Ok(Ok(Opened::TooLarge)) => {
            // RFC 9114 4.2.2. The rest is not worth reading.
            let _ = sending.answer_bare(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE).await;
            return receiving.refuse(Wrong::stream(Code::ExcessiveLoad, "field section is too large"));
        }
        Ok(Err(lost)) => return give_up(&mut sending, &mut receiving, lost),
        Err(_) => {
            let slow = Wrong::stream(Code::RequestIncomplete, "head did not come in time");
            return give_up(&mut sending, &mut receiving, slow.into());
        }
    };
    if let Err(lost) = receiving.look_ahead().await {
        return give_up(&mut sending, &mut receiving, lost);
    }
    sending.prioritise(head.priority);
    let (mut request, unread) = request(&shared, *head, receiving);
    if is_early {
        early(&shared, &mut request).await;
    }
    answer(&shared, request, unread, &mut sending).await;
}

/// A request that came in front of the handshake's end may have been sent before, by another one: what does no harm when it
/// is done twice is answered, and the app is told (RFC 8470 5.1); all else waits for the end.
async fn early(shared: &Shared, request: &mut Request) {
    let is_harmless = request.http.method().is_safe() && request.http.body().is_end_stream();
    shared.parts.metrics.early(is_harmless);
    if is_harmless {
        request.http.headers_mut().insert(EARLY_DATA, HeaderValue::from_static("1"));
    } else {
        shared.proof.come().await;
    }
}

fn give_up(sending: &mut Sending, receiving: &mut Receiving, lost: Lost) {
    match lost {
        Lost::Wrong(wrong) => {
            receiving.refuse(wrong);
            sending.reset(wrong.code);
        }
        Lost::Gone => {
            receiving.stop(Code::RequestCancelled);
            sending.reset(Code::RequestCancelled);
            receiving.taken_back();
        }
    }
}

/// The request for the steps above, and a way back for the rest of its stream.
fn request(shared: &Arc<Shared>, head: Head, mut receiving: Receiving) -> (Request, Option<Unread>) {
    let (body, unread): (Body, Option<Unread>) = match receiving.whole() {
        Some(data) if data.is_empty() => (empty(), None),
        Some(data) => (full(data), None),
        None => {
            let (body, unread) = Streamed::new(receiving, shared.patience_with_body());
            (body.boxed_unsync(), Some(unread))
        }
    };
    let mut request = Request {
        http: http::Request::from_parts(head.parts, body),
        client: shared.quic.remote_address(),
        protocol: Protocol::H3,
        secure: true,
        arrived: Instant::now(),
    };
    believe(&shared.parts.front, &mut request);
    (request, unread)
}

async fn answer(shared: &Arc<Shared>, request: Request, mut unread: Option<Unread>, sending: &mut Sending) {
    // Dropping the loser: whoever does not want an answer any more ends the request; nobody watches an answer that is there.
    let serving = async {
        if shared.may_ask(request.client.ip()) {
            serve(&shared.parts, request).await
        } else {
            refuse(&shared.parts, &request, &Fault::Client(ClientFault::TooMany))
        }
    };
    let response = tokio::select! {
        biased;
        response = serving => response,
        () = sending.unwanted() => {
            sending.reset(Code::RequestCancelled);
            return shared.glitch();
        }
    };
    let wrong = |unread: &Option<Unread>| unread.as_ref().and_then(Unread::wrong);
    if let Some(wrong) = wrong(&unread) {
        return sending.reset(wrong.code);
    }
    match sending.answer(response).await {
        Ok(()) => {}
        Err(SendError::Gone(_)) => {
            sending.reset(Code::RequestCancelled);
            return shared.glitch();
        }
        Err(error) => {
            tracing::debug!(client = %shared.quic.remote_address(), error = format!("{:#}", anyhow::Error::new(error)), "answer given up");
            // An answer that follows its request ends with it.
            return sending.reset(wrong(&unread).map_or(Code::Internal, |wrong| wrong.code));
        }
    }
    if let Some(receiving) = unread.as_mut().and_then(Unread::back) {
        read_over(receiving).await;
    }
}

/// After the whole answer: what the client still sends is read over for a while, then it is asked to stop (RFC 9114 4.1).
async fn read_over(mut receiving: Receiving) {
    let mut read = 0;
    let reading = async {
        while read < READ_OVER_BYTES_MAX {
            match std::future::poll_fn(|cx| receiving.poll_data(cx)).await {
                Ok(Some(data)) => read += Bytes::len(&data),
                Ok(None) | Err(_) => return,
            }
        }
    };
    let _ = timeout(READ_OVER_MAX, reading).await;
}
