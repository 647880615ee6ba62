//! One request and its answer, on a stream of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::BodyExt as _;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::code::{Code, Wrong};
use super::message::Head;
use super::receive::{Lost, Opened, Receiving, Streamed};
use super::send::{SendError, Sending};
use super::shared::Shared;
use crate::fault::{ClientFault, Fault};
use crate::listen::body::Inbound;
use crate::listen::forwarded::believe;
use crate::request::{Body, Protocol, Request, empty, full};
use crate::serve::{refuse, serve};

/// Bytes of a request that nobody wanted that are read over after its answer, and how long that may take.
const READ_OVER_BYTES_MAX: usize = 256 * 1024;
const READ_OVER_MAX: Duration = Duration::from_secs(1);

/// Takes one request and answers it.
pub(super) async fn exchange(shared: Arc<Shared>, send: quinn::SendStream, receive: quinn::RecvStream) {
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
    let (request, unread) = request(&shared, *head, receiving);
    answer(&shared, request, unread, &mut sending).await;
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
fn request(shared: &Arc<Shared>, head: Head, mut receiving: Receiving) -> (Request, Unread) {
    let (body, unread): (Body, Unread) = match receiving.whole() {
        Some(data) if data.is_empty() => (empty(), None),
        Some(data) => (full(data), None),
        None => {
            let (body, unread) = Streamed::new(receiving);
            (Inbound::patient(body, shared.patience_with_body()).boxed_unsync(), Some(unread))
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

/// Where the rest of a stream comes back whose body nobody read to its end.
type Unread = Option<oneshot::Receiver<Receiving>>;

async fn answer(shared: &Arc<Shared>, request: Request, mut unread: Unread, sending: &mut Sending) {
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
    let mut back = move || unread.as_mut().and_then(|unread| unread.try_recv().ok());
    let rest = back();
    if let Some(wrong) = rest.as_ref().and_then(Receiving::wrong) {
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
            return sending.reset(Code::Internal);
        }
    }
    if let Some(receiving) = rest.or_else(back) {
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
