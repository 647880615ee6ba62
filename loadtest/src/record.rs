//! Counts what became of the requests. One owner, no locks: memory does not grow with the length of a run.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::engine::Answer;
use crate::error::ErrorKind;
use crate::options::{Options, Protocol};
use crate::schedule::Due;
use crate::status::StatusSet;

/// Longest time that is told apart, in microseconds: an hour, above every timeout plus any lag. Longer ones count as it.
const LATENCY_MAX_US: u64 = 3_600_000_000;
/// Significant digits of a recorded time.
const DIGITS: u8 = 3;

/// How one request ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) due: Due,
    /// From due to the moment the generator took it up.
    pub(crate) lag: Duration,
    /// From due to the end.
    pub(crate) latency: Duration,
    /// From being given to a connection to the end.
    pub(crate) service: Duration,
    pub(crate) end: Result<Answer, ErrorKind>,
}

/// What is counted per protocol.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    pub(crate) requests: u64,
    pub(crate) answered: u64,
    pub(crate) unexpected: u64,
    pub(crate) bytes: u64,
    /// From due. Holds answers, and timeouts at the age they reached; other errors would only make it look better.
    pub(crate) latency: Histogram<u64>,
    /// From send, answers only.
    pub(crate) service: Histogram<u64>,
    pub(crate) statuses: BTreeMap<u16, u64>,
    pub(crate) errors: BTreeMap<ErrorKind, u64>,
}

/// What is counted per request class.
#[derive(Clone, Debug)]
pub(crate) struct ClassTally {
    pub(crate) name: String,
    pub(crate) expect: StatusSet,
    pub(crate) requests: u64,
    pub(crate) unexpected: u64,
    pub(crate) errors: u64,
    pub(crate) statuses: BTreeMap<u16, u64>,
}

/// Everything counted in a run.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) protocols: BTreeMap<Protocol, Tally>,
    pub(crate) classes: Vec<ClassTally>,
    pub(crate) lag: Histogram<u64>,
    /// When the last request was taken up, from the start of the run.
    pub(crate) last_start: Duration,
}

impl Tally {
    pub(crate) fn new() -> Tally {
        Tally {
            requests: 0,
            answered: 0,
            unexpected: 0,
            bytes: 0,
            latency: histogram(),
            service: histogram(),
            statuses: BTreeMap::new(),
            errors: BTreeMap::new(),
        }
    }

    pub(crate) fn errors(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Adds another tally. Histograms add up exactly.
    pub(crate) fn add(&mut self, other: &Tally) {
        self.requests += other.requests;
        self.answered += other.answered;
        self.unexpected += other.unexpected;
        self.bytes += other.bytes;
        // All histograms have the same bounds, so nothing falls outside.
        let _ = self.latency.add(&other.latency);
        let _ = self.service.add(&other.service);
        for (status, count) in &other.statuses {
            *self.statuses.entry(*status).or_default() += count;
        }
        for (kind, count) in &other.errors {
            *self.errors.entry(*kind).or_default() += count;
        }
    }
}

impl Record {
    pub(crate) fn new(options: &Options) -> Record {
        let class = |class: &crate::options::RequestClass| ClassTally {
            name: class.name.clone(),
            expect: class.expect.clone(),
            requests: 0,
            unexpected: 0,
            errors: 0,
            statuses: BTreeMap::new(),
        };
        Record {
            protocols: options.mix.protocols().map(|protocol| (protocol, Tally::new())).collect(),
            classes: options.requests.iter().map(class).collect(),
            lag: histogram(),
            last_start: Duration::ZERO,
        }
    }

    /// Counts a request that was taken up, or would have been if there had been room.
    pub(crate) fn due(&mut self, due: Due) {
        self.tally(due).requests += 1;
        self.classes[due.class].requests += 1;
    }

    /// Counts a request that was due while no more were allowed in flight.
    pub(crate) fn saturated(&mut self, due: Due) {
        self.error(due, ErrorKind::Saturated);
    }

    /// Counts the end of a request.
    pub(crate) fn ended(&mut self, outcome: &Outcome) {
        let due = outcome.due;
        self.lag.saturating_record(micros(outcome.lag));
        self.last_start = self.last_start.max(due.at + outcome.lag);
        let answer = match outcome.end {
            Ok(answer) => answer,
            Err(kind) => {
                if kind == ErrorKind::Timeout {
                    self.tally(due).latency.saturating_record(micros(outcome.latency));
                }
                return self.error(due, kind);
            }
        };
        let class = &mut self.classes[due.class];
        let unexpected = u64::from(!class.expect.contains(answer.status));
        class.unexpected += unexpected;
        *class.statuses.entry(answer.status).or_default() += 1;
        let tally = self.tally(due);
        tally.answered += 1;
        tally.unexpected += unexpected;
        tally.bytes += answer.bytes;
        tally.latency.saturating_record(micros(outcome.latency));
        tally.service.saturating_record(micros(outcome.service));
        *tally.statuses.entry(answer.status).or_default() += 1;
    }

    /// Counts what was in flight when the run was stopped: everything taken up that has no end yet.
    pub(crate) fn stopped(&mut self) {
        for tally in self.protocols.values_mut() {
            let open = tally.requests - tally.answered - tally.errors();
            if open > 0 {
                tally.errors.insert(ErrorKind::Stopped, open);
            }
        }
        for class in &mut self.classes {
            class.errors = class.requests - class.statuses.values().sum::<u64>();
        }
    }

    /// Requests that were due, that were answered and that failed.
    pub(crate) fn totals(&self) -> (u64, u64, u64) {
        let all = self.protocols.values();
        all.fold((0, 0, 0), |(due, answered, errors), tally| {
            (due + tally.requests, answered + tally.answered, errors + tally.errors())
        })
    }

    fn error(&mut self, due: Due, kind: ErrorKind) {
        self.classes[due.class].errors += 1;
        *self.tally(due).errors.entry(kind).or_default() += 1;
    }

    fn tally(&mut self, due: Due) -> &mut Tally {
        self.protocols.entry(due.protocol).or_insert_with(Tally::new)
    }
}

pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_US, DIGITS).expect("constant bounds that a histogram allows")
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::options::tests::sample;

    fn due(protocol: Protocol) -> Due {
        Due { at: Duration::from_millis(5), protocol, target: 0, class: 0 }
    }

    fn ended(record: &mut Record, protocol: Protocol, end: Result<u16, ErrorKind>, millis: u64) {
        let end = end.map(|status| Answer { status, bytes: 10, sent: Instant::now() });
        let latency = Duration::from_millis(millis);
        record.due(due(protocol));
        record.ended(&Outcome {
            due: due(protocol),
            lag: Duration::from_micros(50),
            latency,
            service: latency / 2,
            end,
        });
    }

    #[test]
    fn each_request_is_counted_once_and_under_its_protocol() {
        let mut record = Record::new(&sample());
        ended(&mut record, Protocol::H1, Ok(200), 4);
        ended(&mut record, Protocol::H1, Ok(503), 8);
        ended(&mut record, Protocol::H2, Err(ErrorKind::Closed), 1);
        record.due(due(Protocol::H2));
        record.saturated(due(Protocol::H2));
        assert_eq!(record.totals(), (4, 2, 2));
        let (h1, h2) = (&record.protocols[&Protocol::H1], &record.protocols[&Protocol::H2]);
        assert_eq!((h1.answered, h1.unexpected, h1.bytes, h1.latency.len(), h1.latency.max()), (2, 1, 20, 2, 8_003));
        assert_eq!(h1.statuses, BTreeMap::from([(200, 1), (503, 1)]));
        assert_eq!(h2.errors, BTreeMap::from([(ErrorKind::Closed, 1), (ErrorKind::Saturated, 1)]));
        assert_eq!(h2.latency.len(), 0);
        let class = &record.classes[0];
        assert_eq!((class.requests, class.unexpected, class.errors), (4, 1, 2));
        assert_eq!(record.last_start, Duration::from_micros(5_050));
    }

    #[test]
    fn a_timeout_is_an_error_and_counts_at_its_age() {
        let mut record = Record::new(&sample());
        ended(&mut record, Protocol::H1, Err(ErrorKind::Timeout), 1_000);
        let tally = &record.protocols[&Protocol::H1];
        assert_eq!((tally.answered, tally.latency.len(), tally.service.len()), (0, 1, 0));
        assert!(tally.latency.min() >= 999_000);
    }

    #[test]
    fn what_has_no_end_when_the_run_stops_is_an_error() {
        let mut record = Record::new(&sample());
        ended(&mut record, Protocol::H1, Ok(200), 1);
        record.due(due(Protocol::H1));
        record.stopped();
        assert_eq!(record.protocols[&Protocol::H1].errors, BTreeMap::from([(ErrorKind::Stopped, 1)]));
        assert_eq!((record.totals(), record.classes[0].errors), ((2, 1, 1), 1));
    }

    #[test]
    fn times_beyond_the_histogram_count_as_its_end() {
        let mut record = Record::new(&sample());
        ended(&mut record, Protocol::H1, Ok(200), 10_000_000);
        assert_eq!(record.protocols[&Protocol::H1].latency.len(), 1);
    }
}
