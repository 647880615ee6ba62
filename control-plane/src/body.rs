//! Request bodies: bounded in size, and in how long the sender may be silent.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::time::timeout;

/// Longest silence within a body.
const IDLE: Duration = Duration::from_secs(30);
/// Longest time for a body that is read whole.
const WHOLE: Duration = Duration::from_secs(120);

/// A body that was not received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the body has more than {max} bytes")]
    Large { max: usize },
    #[error("the body did not come in time")]
    Slow,
    #[error("the body broke off")]
    Broken,
}

/// A body as it comes in.
pub(crate) struct Incoming {
    stream: BodyDataStream,
    idle: Duration,
}

impl Incoming {
    pub(crate) fn new(body: Body) -> Self {
        Self { stream: body.into_data_stream(), idle: IDLE }
    }

    /// The next piece; none at the end.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, BodyError>> {
        match timeout(self.idle, self.stream.next()).await {
            Err(_) => Some(Err(BodyError::Slow)),
            Ok(piece) => piece.map(|piece| piece.map_err(|_| BodyError::Broken)),
        }
    }
}

/// The whole of a body of at most `max` bytes.
pub(crate) async fn whole(body: Body, max: usize) -> Result<Bytes, BodyError> {
    let mut incoming = Incoming::new(body);
    let read = async {
        let mut bytes = BytesMut::new();
        while let Some(piece) = incoming.next().await {
            let piece = piece?;
            if bytes.len() + piece.len() > max {
                return Err(BodyError::Large { max });
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    };
    timeout(WHOLE, read).await.unwrap_or(Err(BodyError::Slow))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_over_its_limit_is_refused() {
        assert_eq!(whole(Body::from("12345"), 5).await.unwrap(), "12345");
        assert!(matches!(whole(Body::from("123456"), 5).await, Err(BodyError::Large { max: 5 })));
    }

    #[tokio::test]
    async fn a_silent_sender_is_given_up() {
        let silent = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        let mut incoming = Incoming { idle: Duration::from_millis(1), ..Incoming::new(silent) };
        assert!(matches!(incoming.next().await, Some(Err(BodyError::Slow))));
    }
}
