//! The connections to one target over one protocol, and the way of a request onto one of them.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::error::{ConnectError, ErrorKind};
use crate::options::Protocol;

use super::connect::Opener;
use super::request::Template;
use super::{Answer, Failure, h1, h2, h3, shared::Shared};

/// How often a request that a closing connection gave back unprocessed goes to another connection.
const RESENDS_MAX: usize = 4;

/// Connections to one target over one protocol.
#[derive(Debug)]
pub(super) struct Lane {
    opener: Opener,
    connections: Connections,
    /// Requests so far.
    turn: AtomicUsize,
    resent: AtomicU64,
}

#[derive(Debug)]
enum Connections {
    H1(h1::Pool),
    H2(Shared<h2::Connection>),
    H3(Shared<h3::Connection>),
}

impl Lane {
    pub(super) fn new(opener: Opener, count: usize) -> Lane {
        let connections = match opener.protocol() {
            Protocol::H1 => Connections::H1(h1::Pool::new(count)),
            Protocol::H2 => Connections::H2(Shared::new(count)),
            Protocol::H3 => Connections::H3(Shared::new(count)),
        };
        Lane { opener, connections, turn: AtomicUsize::new(0), resent: AtomicU64::new(0) }
    }

    pub(super) fn opener(&self) -> &Opener {
        &self.opener
    }

    /// Requests that were sent again.
    pub(super) fn resent(&self) -> u64 {
        self.resent.load(Ordering::Relaxed)
    }

    /// Opens the connection of this index ahead of the first request.
    pub(super) async fn warm(&self, index: usize) -> Result<(), ConnectError> {
        match &self.connections {
            Connections::H1(pool) => pool.warm(&self.opener).await,
            Connections::H2(shared) => shared.warm(&self.opener, index).await,
            Connections::H3(shared) => shared.warm(&self.opener, index).await,
        }
    }

    /// Sends one request, opening a connection where there is none.
    pub(super) async fn exchange(&self, template: &Template) -> Result<Answer, ErrorKind> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut resends = 0;
        loop {
            let end = match &self.connections {
                Connections::H1(pool) => pool.exchange(&self.opener, template, resends > 0).await,
                Connections::H2(shared) => shared.exchange(&self.opener, template, turn).await,
                Connections::H3(shared) => shared.exchange(&self.opener, template, turn).await,
            };
            match end {
                Ok(answer) => return Ok(answer),
                Err(Failure { unprocessed: true, .. }) if resends < RESENDS_MAX => {
                    resends += 1;
                    self.resent.fetch_add(1, Ordering::Relaxed);
                }
                Err(Failure { kind, .. }) => return Err(kind),
            }
        }
    }
}

impl From<ConnectError> for Failure {
    /// Without a connection there is no use in trying again at once.
    fn from(_: ConnectError) -> Failure {
        Failure { kind: ErrorKind::Connect, unprocessed: false }
    }
}

/// Names what hyper says went wrong.
pub(super) fn kind_of(error: &hyper::Error) -> ErrorKind {
    if error.is_parse() { ErrorKind::Protocol } else { ErrorKind::Closed }
}
