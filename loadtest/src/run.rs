//! One run: from options to a report.

use std::future::{Future, pending};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout_at};

use crate::engine::Engine;
use crate::error::{ErrorKind, LoadError};
use crate::options::{Checked, Options};
use crate::pacer::Pacer;
use crate::record::{Outcome, Record};
use crate::report::{Ran, Report};
use crate::schedule::{Due, Schedule};

/// Time between two reports of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// Time that requests in flight get after a stop. What has no answer then is counted as stopped.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it does now.
    pub phase: Phase,
    /// Since the first request could be due.
    pub elapsed: Duration,
    /// Requests that were due so far.
    pub due: u64,
    /// Whole answers so far.
    pub answered: u64,
    /// Errors so far.
    pub errors: u64,
    /// Requests without an end.
    pub in_flight: u64,
}

/// What a run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Requests are being sent.
    Sending,
    /// The last requests are waited for.
    Draining,
}

/// Runs a load test to its end. `progress` is told once a second and when the last request is out; it must
/// not block. Dropping the future ends every request, connection and thread of the run.
pub async fn run(options: Options, progress: impl Fn(Progress) + Send) -> Result<Report, LoadError> {
    run_until(options, pending(), progress).await
}

/// As [`run`], and ends early when `stop` completes, with a report of what was done until then.
pub async fn run_until(
    options: Options,
    stop: impl Future<Output = ()> + Send,
    progress: impl Fn(Progress) + Send,
) -> Result<Report, LoadError> {
    let options = options.check()?;
    let mut stop = Box::pin(stop);
    // Whichever loses is dropped for good.
    let engine = tokio::select! {
        engine = Box::pin(Engine::open(&options)) => Arc::new(engine?),
        () = stop.as_mut() => return Err(LoadError::Stopped),
    };
    let mut run = Run::new(&options, Arc::clone(&engine));
    let stopped = run.send(stop.as_mut(), &progress).await?;
    let sending = if stopped { run.start.elapsed() } else { options.duration };
    let stopped = run.drain(stopped, stop.as_mut(), &progress).await;
    let (record, elapsed) = (run.record, run.start.elapsed());
    drop(run.flights);
    let ran = Ran { elapsed, sending, stopped, connections: engine.connections() };
    if let Some(engine) = Arc::into_inner(engine) {
        engine.close().await;
    }
    Ok(Report::new(&options, &record, ran))
}

/// The state of a run. Dropping it ends its requests.
struct Run<'options> {
    options: &'options Checked,
    engine: Arc<Engine>,
    start: Instant,
    flights: JoinSet<Outcome>,
    record: Record,
    ticks: Interval,
}

impl<'options> Run<'options> {
    fn new(options: &'options Checked, engine: Arc<Engine>) -> Run<'options> {
        let mut ticks = interval(PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Run { options, engine, start: Instant::now(), flights: JoinSet::new(), record: Record::new(options), ticks }
    }

    /// Sends until the schedule ends or `stop` completes, and says whether it was the latter.
    async fn send(
        &mut self,
        mut stop: impl Future<Output = ()> + Unpin,
        progress: &impl Fn(Progress),
    ) -> Result<bool, LoadError> {
        self.start = Instant::now();
        let mut pacer = Pacer::start(Schedule::new(self.options), self.start).map_err(LoadError::Thread)?;
        loop {
            // A branch that loses is only a wait: nothing is taken out of a queue before it wins.
            tokio::select! {
                due = pacer.next() => match due {
                    Some(due) => self.launch(due),
                    None => return Ok(false),
                },
                Some(ended) = self.flights.join_next() => self.land(ended),
                _ = self.ticks.tick() => progress(self.progress(Phase::Sending)),
                () = &mut stop => return Ok(true),
            }
        }
    }

    /// Waits for what is in flight: each request ends by its own timeout, and all end soon after a stop.
    async fn drain(
        &mut self,
        mut stopped: bool,
        mut stop: impl Future<Output = ()> + Unpin,
        progress: &impl Fn(Progress),
    ) -> bool {
        progress(self.progress(Phase::Draining));
        let mut grace = Box::pin(sleep(STOP_GRACE));
        loop {
            tokio::select! {
                ended = self.flights.join_next() => match ended {
                    Some(ended) => self.land(ended),
                    None => break,
                },
                _ = self.ticks.tick() => progress(self.progress(Phase::Draining)),
                () = &mut stop, if !stopped => {
                    stopped = true;
                    grace = Box::pin(sleep(STOP_GRACE));
                }
                () = &mut grace, if stopped => break,
            }
        }
        self.record.stopped();
        self.flights.shutdown().await;
        stopped
    }

    fn launch(&mut self, due: Due) {
        while let Some(ended) = self.flights.try_join_next() {
            self.land(ended);
        }
        self.record.due(due);
        if self.flights.len() >= self.options.in_flight_max {
            self.record.saturated(due);
        } else {
            self.flights.spawn(fly(Arc::clone(&self.engine), due, self.start, self.options.timeout));
        }
    }

    fn land(&mut self, ended: Result<Outcome, JoinError>) {
        match ended {
            Ok(outcome) => self.record.ended(&outcome),
            Err(error) => {
                // Only `shutdown` cancels a request, and what it cancels is not waited for here.
                if let Ok(panic) = error.try_into_panic() {
                    resume_unwind(panic);
                }
            }
        }
    }

    fn progress(&self, phase: Phase) -> Progress {
        let (due, answered, errors) = self.record.totals();
        Progress { phase, elapsed: self.start.elapsed(), due, answered, errors, in_flight: due - answered - errors }
    }
}

/// One request from being taken up to its end.
async fn fly(engine: Arc<Engine>, due: Due, start: Instant, timeout: Duration) -> Outcome {
    let due_at = start + due.at;
    let lag = due_at.elapsed();
    let end = timeout_at((due_at + timeout).into(), engine.send(due)).await.unwrap_or(Err(ErrorKind::Timeout));
    let service = end.map_or(Duration::ZERO, |answer| answer.sent.elapsed());
    Outcome { due, lag, latency: due_at.elapsed(), service, end }
}
