//! One answer as it goes. Nothing of a body is copied on its way to QUIC's packets.

use std::cell::RefCell;
use std::future::{Future as _, poll_fn};
use std::pin::pin;
use std::sync::{Arc, LazyLock};
use std::task::Poll;
use std::time::SystemTime;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::header::{CONTENT_LENGTH, DATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt as _;
use time::OffsetDateTime;
use time::format_description::{OwnedFormatItem, parse_owned};

use super::code::Code;
use super::priority::Priority;
use super::shared::Shared;
use super::{frames, integer, section};
use crate::listen::patience::Patience;
use crate::request::{BodyError, Response};

/// Room for a head that most answers fit in.
const HEAD_BYTES: usize = 512;
/// Bytes of a frame's header whose length is written afterwards, in the form of four bytes.
const HEADER_BYTES: usize = 5;
/// The field of RFC 9218.
const PRIORITY: HeaderName = HeaderName::from_static("priority");

/// The form of Date (RFC 9110 5.6.7). TCP's parser sets it by itself.
static DATE_FORM: LazyLock<OwnedFormatItem> = LazyLock::new(|| {
    parse_owned::<2>("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT")
        .expect("a constant that any test parses")
});

thread_local! {
    /// The second that was told last, and how.
    static DATE_TOLD: RefCell<(i64, HeaderValue)> = const { RefCell::new((i64::MIN, HeaderValue::from_static(""))) };
}

/// Why an answer is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// The client does not want it any more, or is gone.
    #[error("client went away")]
    Gone(#[from] quinn::WriteError),
    /// The client takes it too slowly.
    #[error(transparent)]
    Slow(std::io::Error),
    /// There is no more of it.
    #[error("body failed")]
    Body(#[from] BodyError),
}

/// The sending half of a request's stream. Dropped before its end it is reset, so that no client takes a part for the
/// whole.
pub(super) struct Sending {
    stream: Option<quinn::SendStream>,
    shared: Arc<Shared>,
    id: u64,
    /// What the request said, if no frame says otherwise.
    priority: Option<Priority>,
    /// What was said by its answer.
    by_server: Option<HeaderValue>,
    /// Changes of priorities that have been looked at.
    changes: u64,
    patience: Patience,
}

impl Sending {
    pub(super) fn new(stream: quinn::SendStream, shared: Arc<Shared>) -> Self {
        let id = u64::from(quinn::VarInt::from(stream.id()));
        let patience = shared.patience_with_answer();
        Self { stream: Some(stream), shared, id, priority: None, by_server: None, changes: 0, patience }
    }

    /// The request said how urgent it is.
    pub(super) fn prioritise(&mut self, priority: Option<Priority>) {
        self.priority = priority;
        if priority.is_some() {
            self.order();
        }
    }

    /// Waits until the client does not want the answer any more.
    pub(super) async fn unwanted(&self) {
        match &self.stream {
            Some(stream) => drop(stream.stopped().await),
            None => std::future::pending().await,
        }
    }

    /// Gives the answer up.
    pub(super) fn reset(&mut self, code: Code) {
        if let Some(mut stream) = self.stream.take() {
            // Fails only where there is nothing to reset.
            let _ = stream.reset(code.into());
        }
    }

    /// Sends all of an answer.
    pub(super) async fn answer(&mut self, response: Response) -> Result<(), SendError> {
        let (mut head, mut body) = response.into_parts();
        head.headers.entry(DATE).or_insert_with(date);
        if let Some(length) = http_body::Body::size_hint(&body).exact().filter(|length| *length > 0) {
            head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
        }
        self.by_server = head.headers.get(PRIORITY).cloned();
        if self.by_server.is_some() {
            self.order();
        }
        let mut out = BytesMut::with_capacity(HEAD_BYTES);
        write_fields(&mut out, |out| section::encode_head(head.status, &head.headers, out));
        // What is there already goes with the head.
        let mut next = body.frame().now_or_never();
        loop {
            let data = match next.take() {
                Some(None) => break,
                Some(Some(frame)) => put(frame?, &mut out),
                None => Bytes::new(),
            };
            self.write([out.split().freeze(), data]).await?;
            if http_body::Body::is_end_stream(&body) {
                break;
            }
            next = Some(body.frame().await);
        }
        if !out.is_empty() {
            self.write([out.freeze(), Bytes::new()]).await?;
        }
        self.finish();
        Ok(())
    }

    /// Sends an answer without a body.
    pub(super) async fn answer_bare(&mut self, status: StatusCode) -> Result<(), SendError> {
        let mut out = BytesMut::new();
        let fields = HeaderMap::from_iter([(DATE, date()), (CONTENT_LENGTH, HeaderValue::from_static("0"))]);
        write_fields(&mut out, |out| section::encode_head(status, &fields, out));
        self.write([out.freeze(), Bytes::new()]).await?;
        self.finish();
        Ok(())
    }

    fn finish(&mut self) {
        if let Some(mut stream) = self.stream.take() {
            // Fails only where the client stopped it, which is as good.
            let _ = stream.finish();
            self.shared.answered();
            self.shared.deliver(stream);
        }
    }

    async fn write(&mut self, mut bytes: [Bytes; 2]) -> Result<(), SendError> {
        let changes = self.shared.changes();
        if changes != self.changes {
            self.changes = changes;
            self.order();
        }
        let Self { stream: Some(stream), patience, .. } = self else { return Ok(()) };
        let mut left = bytes[0].len() + bytes[1].len();
        let mut first = if bytes[0].is_empty() { 1 } else { 0 };
        while left > 0 {
            let mut writing = pin!(stream.write_chunks(&mut bytes[first..]));
            let written = poll_fn(|cx| match writing.as_mut().poll(cx) {
                Poll::Ready(written) => Poll::Ready(written.map_err(SendError::Gone)),
                Poll::Pending => patience.poll_wait(cx).map(|slow| Err(SendError::Slow(slow))),
            });
            let written = written.await?;
            patience.moved(written.bytes);
            first += written.chunks;
            left -= written.bytes;
        }
        Ok(())
    }

    /// Tells quinn how urgent this is: the last frame counts, or else the request, and over both the answer (RFC 9218 8).
    fn order(&self) {
        let Some(stream) = &self.stream else { return };
        let priority = self.shared.priority(self.id).or(self.priority).unwrap_or_default();
        let priority = self.by_server.as_ref().map_or(priority, |value| priority.merged(value));
        // Fails only where nothing is sent any more.
        let _ = stream.set_priority(priority.order());
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.reset(Code::Internal);
    }
}

/// Writes the header of a frame of data, or a frame of trailers. Returns the data.
fn put(frame: Frame<Bytes>, out: &mut BytesMut) -> Bytes {
    match frame.into_data() {
        Ok(data) if data.is_empty() => data,
        Ok(data) => {
            integer::write(frames::DATA, out);
            integer::write(data.len() as u64, out);
            data
        }
        Err(frame) => {
            if let Ok(trailers) = frame.into_trailers() {
                write_fields(out, |out| section::encode_trailers(&trailers, out));
            }
            Bytes::new()
        }
    }
}

/// Writes a HEADERS frame.
fn write_fields(out: &mut BytesMut, encode: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_bytes(0, HEADER_BYTES);
    encode(out);
    let length = u32::try_from(out.len() - start - HEADER_BYTES).unwrap_or(u32::MAX) & (u32::MAX >> 2);
    let mut header = &mut out[start..start + HEADER_BYTES];
    integer::write(frames::HEADERS, &mut header);
    // RFC 9000 16: a length need not have its shortest form.
    header.put_u32(0x8000_0000 | length);
}

/// Now, as Date tells it.
fn date() -> HeaderValue {
    let now = OffsetDateTime::from(SystemTime::now());
    DATE_TOLD.with_borrow_mut(|(second, told)| {
        if *second != now.unix_timestamp() {
            let text = now.format(&*DATE_FORM).unwrap_or_default();
            *told = HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""));
            *second = now.unix_timestamp();
        }
        told.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_has_the_form_of_the_standard() {
        let when = OffsetDateTime::from_unix_timestamp(784_111_777).unwrap();
        assert_eq!(when.format(&*DATE_FORM).unwrap(), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date().len(), 29);
        assert_eq!(date(), HeaderValue::try_from(date().to_str().unwrap()).unwrap());
    }

    #[test]
    fn frames_have_their_lengths() {
        let mut out = BytesMut::new();
        write_fields(&mut out, |out| out.put_slice(b"abc"));
        assert_eq!(put(Frame::data(Bytes::from_static(b"hello")), &mut out), "hello");
        assert_eq!(out[..], *b"\x01\x80\x00\x00\x03abc\x00\x05");
        assert_eq!(frames::header(&out), Some((frames::HEADERS, 3, HEADER_BYTES)));
        let mut out = BytesMut::new();
        put(Frame::data(Bytes::new()), &mut out);
        assert!(out.is_empty());
        put(Frame::trailers(HeaderMap::from_iter([(DATE, HeaderValue::from_static("x"))])), &mut out);
        assert_eq!(out[..], *b"\x01\x80\x00\x00\x05\0\0\x56\x01x");
    }
}
