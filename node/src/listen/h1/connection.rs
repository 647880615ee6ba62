//! A connection of HTTP/1.1. Its parser, with 16 KiB of buffers, is there while it is used: most connections wait for their
//! client's next request most of the time.

use std::error::Error;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::HttpService;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::super::body::Outbound;
use super::super::drive::Drain;
use super::super::stream::Stream;

/// One connection, to be driven to its end.
pub(in super::super) struct Connection<S, V: HttpService<Incoming>> {
    parser: http1::Builder,
    state: State<S, V>,
}

enum State<S, V: HttpService<Incoming>> {
    /// The parser reads.
    Awake(Box<http1::Connection<TokioIo<Stream<S>>, V>>),
    /// Nothing has come since it was at rest.
    Asleep(Box<(Stream<S>, V)>),
    /// Never seen: while one takes the place of the other.
    Between,
}

impl<S, V> Connection<S, V>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: HttpService<Incoming, ResBody = Outbound>,
    V::Error: Into<Box<dyn Error + Send + Sync>>,
{
    pub(in super::super) fn new(parser: http1::Builder, stream: Stream<S>, service: V) -> Self {
        let mut connection = Self { parser, state: State::Asleep(Box::new((stream, service))) };
        connection.wake();
        connection
    }

    fn wake(&mut self) {
        self.state = match mem::replace(&mut self.state, State::Between) {
            State::Asleep(rested) => {
                let (stream, service) = *rested;
                State::Awake(Box::new(self.parser.serve_connection(TokioIo::new(stream), service)))
            }
            state => state,
        };
    }
}

impl<S, V> Future for Connection<S, V>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: HttpService<Incoming, ResBody = Outbound>,
    V::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Output = hyper::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        if let State::Asleep(rested) = &mut self.state {
            ready!(rested.0.poll_woken(cx));
            self.wake();
        }
        match &mut self.state {
            State::Awake(connection) => Pin::new(connection.as_mut()).poll(cx),
            State::Asleep(_) | State::Between => Poll::Ready(Ok(())),
        }
    }
}

impl<S, V> Drain for Connection<S, V>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: HttpService<Incoming, ResBody = Outbound>,
    V::Error: Into<Box<dyn Error + Send + Sync>>,
{
    fn drain(mut self: Pin<&mut Self>) {
        // The parser knows how to take its leave.
        self.wake();
        if let State::Awake(connection) = &mut self.state {
            Pin::new(connection.as_mut()).graceful_shutdown();
        }
    }

    fn rest(mut self: Pin<&mut Self>) {
        self.state = match mem::replace(&mut self.state, State::Between) {
            State::Awake(connection) => {
                let http1::Parts { io, read_buf, service, .. } = connection.into_parts();
                let mut stream = io.into_inner();
                stream.unread(&read_buf);
                State::Asleep(Box::new((stream, service)))
            }
            state => state,
        };
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use bytes::Bytes;
    use futures_util::poll;
    use http_body_util::BodyExt as _;
    use hyper::service::service_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::super::super::activity::Activity;
    use super::super::super::patience::Patience;
    use super::super::super::stream::Judge;
    use super::super::Messages;
    use super::super::head::Bounds;
    use super::*;
    use crate::request::full;

    const POST: &[u8] = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";

    /// A connection that says the body that it was told, and its other end.
    fn echo() -> (impl Drain + Unpin, DuplexStream, Activity) {
        let (near, far) = duplex(4_096);
        let (activity, patience) = (Activity::new(), Patience::new(Duration::from_secs(60), 1));
        let bounds = Bounds { head_bytes_max: 16_384, target_bytes_max: 8_192, fields_max: 100 };
        let judge = Judge::Messages(Messages::new(bounds));
        let stream = Stream::new((near, |_| ()), Bytes::new(), judge, activity.clone(), patience);
        let seen = activity.clone();
        let service = service_fn(move |request: http::Request<Incoming>| {
            let activity = seen.clone();
            async move {
                let (busy, _) = activity.begin();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                Ok::<_, Infallible>(http::Response::new(Outbound::new(full(body), activity, busy)))
            }
        });
        (Connection::new(http1::Builder::new(), stream, service), far, activity)
    }

    async fn told(far: &mut DuplexStream) -> String {
        let mut bytes = vec![0; 4_096];
        let read = far.read(&mut bytes).await.unwrap();
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    }

    #[tokio::test]
    async fn a_connection_that_rested_answers_as_before() {
        let (mut connection, mut far, activity) = echo();
        for _ in 0..3 {
            far.write_all(POST).await.unwrap();
            assert!(poll!(&mut connection).is_pending());
            assert!(told(&mut far).await.ends_with("abc"));
            assert!(activity.is_at_rest(Duration::ZERO));
            for _ in 0..2 {
                Pin::new(&mut connection).rest();
                assert!(poll!(&mut connection).is_pending(), "nothing came");
            }
        }
    }

    #[tokio::test]
    async fn a_request_in_pieces_wakes_it_with_the_first() {
        let (mut connection, mut far, activity) = echo();
        assert!(poll!(&mut connection).is_pending());
        Pin::new(&mut connection).rest();
        for piece in POST.chunks(7) {
            far.write_all(piece).await.unwrap();
            assert!(poll!(&mut connection).is_pending());
            let is_last = POST.as_ptr_range().end == piece.as_ptr_range().end;
            assert_eq!(activity.is_at_rest(Duration::ZERO), is_last, "part of a message is here");
        }
        assert!(told(&mut far).await.ends_with("abc"));
    }

    #[tokio::test]
    async fn while_an_answer_waits_for_its_client_nothing_rests() {
        let (mut connection, mut far, activity) = echo();
        let body = vec![b'x'; 8_192];
        far.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8192\r\n\r\n").await.unwrap();
        for piece in body.chunks(2_048) {
            assert!(poll!(&mut connection).is_pending());
            far.write_all(piece).await.unwrap();
        }
        assert!(poll!(&mut connection).is_pending());
        assert!(!activity.is_at_rest(Duration::ZERO), "4 KiB fit between the two");
        let mut read = 0;
        while read < body.len() {
            read += told(&mut far).await.len();
            assert!(poll!(&mut connection).is_pending());
        }
        assert!(activity.is_at_rest(Duration::ZERO));
    }

    #[tokio::test]
    async fn who_leaves_while_it_rests_ends_it_and_so_does_a_drain() {
        for leaves in [true, false] {
            let (mut connection, mut far, _) = echo();
            assert!(poll!(&mut connection).is_pending());
            Pin::new(&mut connection).rest();
            assert!(poll!(&mut connection).is_pending());
            if leaves {
                far.shutdown().await.unwrap();
            } else {
                Pin::new(&mut connection).drain();
            }
            // Shut, it lingers for a client that still sends.
            let ended = tokio::spawn(connection);
            assert_eq!(told(&mut far).await, "");
            drop(far);
            ended.await.unwrap().unwrap();
        }
    }
}
