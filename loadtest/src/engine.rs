//! Sends requests: one lane per target and protocol, each with its connections.

mod connect;
mod h1;
mod h2;
mod h3;
mod lane;
mod request;
mod shared;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::RootCertStore;
use tokio::task::JoinSet;

use crate::error::{ErrorKind, LoadError};
use crate::options::{Checked, Protocol};
use crate::report::Connections;
use crate::schedule::Due;

use connect::{Drivers, Opener, Tls};
use lane::Lane;
use request::Template;

/// Handshakes at the same time before the run.
const OPENING_MAX: usize = 32;
/// Time for all connections to say goodbye after the run; those that have not are dropped.
const CLOSE_MAX: Duration = Duration::from_millis(500);

/// A whole answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Bytes of the body.
    pub(crate) bytes: u64,
    /// When the request was given to an open connection.
    pub(crate) sent: Instant,
}

/// A request that got no answer from one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Failure {
    kind: ErrorKind,
    /// The server did nothing with it, by what it or the standards say, so sending it on another connection repeats nothing.
    unprocessed: bool,
}

/// Every connection of a run and every request, ready to be sent.
#[derive(Debug)]
pub(crate) struct Engine {
    /// By target, then by protocol; `None` for a protocol outside of the mix.
    lanes: Vec<[Option<Arc<Lane>>; Protocol::ALL.len()]>,
    /// By class, then by target.
    templates: Vec<Vec<Template>>,
    drivers: Arc<Drivers>,
}

impl Engine {
    /// Opens all connections. A lane without a single one is an error; other failures are tried again by the
    /// requests that need the connection, and counted.
    pub(crate) async fn open(options: &Checked) -> Result<Engine, LoadError> {
        let mut templates = Vec::new();
        for class in &options.requests {
            let for_target = options.targets.iter().map(|target| Template::new(class, target));
            templates.push(for_target.collect::<Result<_, _>>()?);
        }
        let mut roots = RootCertStore::empty();
        for (index, root) in options.roots.iter().enumerate() {
            roots.add(root.clone()).map_err(|source| LoadError::Root { index, source })?;
        }
        let tls = Tls::new(&Arc::new(roots)).map_err(LoadError::Tls)?;
        let drivers = Arc::new(Drivers::default());
        let mut lanes = Vec::new();
        for target in &options.targets {
            let mut of_target = [None, None, None];
            for (place, protocol) in of_target.iter_mut().zip(Protocol::ALL) {
                if options.mix.weight(protocol) > 0 {
                    // A connection may take as long as a request, which fails if it has none by then.
                    let (drivers, most) = (Arc::clone(&drivers), options.timeout);
                    let opener = Opener::new(target.clone(), protocol, &tls, drivers, most)?;
                    *place = Some(Arc::new(Lane::new(opener, options.connections)));
                }
            }
            lanes.push(of_target);
        }
        let engine = Engine { lanes, templates, drivers };
        for lane in engine.all() {
            lane.warm(0).await.map_err(|source| lane.opener().unreachable(source))?;
        }
        engine.warm_the_rest(options.connections).await;
        Ok(engine)
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Lane>> {
        self.lanes.iter().flatten().flatten()
    }

    async fn warm_the_rest(&self, connections: usize) {
        let mut opening = JoinSet::new();
        for lane in self.all() {
            for index in 1..connections {
                if opening.len() >= OPENING_MAX {
                    opening.join_next().await;
                }
                let lane = Arc::clone(lane);
                // A failure is counted by the opener.
                opening.spawn(async move { drop(lane.warm(index).await) });
            }
        }
        while opening.join_next().await.is_some() {}
    }

    /// Sends what is due and reads the whole answer. Without a limit of time of its own.
    pub(crate) async fn send(&self, due: Due) -> Result<Answer, ErrorKind> {
        let place = Protocol::ALL.iter().position(|protocol| *protocol == due.protocol);
        let lane = place.and_then(|place| self.lanes[due.target][place].as_ref());
        // The schedule names only protocols with a weight, and each of these has a lane.
        let lane = lane.ok_or(ErrorKind::Connect)?;
        lane.exchange(&self.templates[due.class][due.target]).await
    }

    /// Connections opened so far and attempts that failed.
    pub(crate) fn connections(&self) -> Connections {
        let count = |of: fn(&Opener) -> u64| self.all().map(|lane| of(lane.opener())).sum();
        let resent = self.all().map(|lane| lane.resent()).sum();
        Connections { opened: count(Opener::opened), failed: count(Opener::failed), resent }
    }

    /// Closes all connections as their protocols want it, within a short time.
    pub(crate) async fn close(self) {
        let Engine { lanes, drivers, .. } = self;
        drop(lanes);
        drivers.finish(CLOSE_MAX).await;
    }
}
