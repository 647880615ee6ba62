//! The result of a run: numbers for programs (serde) and a table for people (`Display`).

mod table;

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;
use crate::options::{Options, Protocol};
use crate::record::{ClassTally, Record, Tally};

/// The share of the due requests that must have been sent, in time, for a run to be valid.
const REACHED_MIN: f64 = 0.99;

/// What a run measured. Times are in microseconds and count from the moment a request was due.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whether the generator did what was asked of it. Else the numbers say more about it than about the target.
    pub valid: bool,
    /// Why not, if not.
    pub reason: Option<String>,
    /// The run was stopped before its time.
    pub stopped: bool,
    /// The seed of the schedule.
    pub seed: u64,
    /// From the first request that could be due to the last answer.
    pub elapsed_ms: u64,
    /// Requests per second that were asked for.
    pub rate_asked: f64,
    /// Requests per second that were sent while requests were due.
    pub rate_sent: f64,
    /// Whole answers per second, over the whole run.
    pub rate_answered: f64,
    /// All protocols together.
    pub total: Line,
    /// Each protocol of the mix.
    pub protocols: BTreeMap<Protocol, Line>,
    /// Each request class, in the order given.
    pub classes: Vec<ClassLine>,
    /// How late the generator itself took up requests.
    pub lag: Percentiles,
    /// Connections over the whole run.
    pub connections: Connections,
}

/// Counts and times of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Requests that were due.
    pub requests: u64,
    /// Requests with a whole answer.
    pub answered: u64,
    /// Answers with a status that their class does not expect.
    pub unexpected_status: u64,
    /// Bytes of answered bodies.
    pub body_bytes: u64,
    /// From due to the last byte of the answer. Includes timeouts, at the age they reached.
    pub latency: Percentiles,
    /// From send to the last byte of the answer: what a closed-loop tool would have shown.
    pub service: Percentiles,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Requests without a whole answer, by reason.
    pub errors: BTreeMap<ErrorKind, u64>,
}

/// Counts of one request class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassLine {
    /// Its name.
    pub name: String,
    /// The statuses it expects.
    pub expect: String,
    /// Requests that were due.
    pub requests: u64,
    /// Answers with another status.
    pub unexpected_status: u64,
    /// Requests without a whole answer.
    pub errors: u64,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
}

/// A distribution of times in microseconds, exact to three digits; all 0 if it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    /// How many times were recorded.
    pub count: u64,
    /// The shortest.
    pub min_us: u64,
    /// Half are at most this.
    pub p50_us: u64,
    /// 90 % are at most this.
    pub p90_us: u64,
    /// 99 % are at most this.
    pub p99_us: u64,
    /// 99.9 % are at most this.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Connections of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Opened, before the run and during it.
    pub opened: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Requests that a connection gave back because it was closing, and that went to another one.
    pub resent: u64,
}

/// What a report needs beside the record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ran {
    /// From the start to the last answer.
    pub(crate) elapsed: Duration,
    /// From the start to the last moment a request could be due.
    pub(crate) sending: Duration,
    pub(crate) stopped: bool,
    pub(crate) connections: Connections,
}

impl Report {
    pub(crate) fn new(options: &Options, record: &Record, ran: Ran) -> Report {
        let mut all = Tally::new();
        record.protocols.values().for_each(|tally| all.add(tally));
        let sent = all.requests - all.errors.get(&ErrorKind::Saturated).copied().unwrap_or(0);
        let lag = Percentiles::of(&record.lag);
        let reason = reason(options, all.requests, sent, ran.sending, record.last_start, lag);
        Report {
            valid: reason.is_none(),
            reason,
            stopped: ran.stopped,
            seed: options.seed,
            elapsed_ms: u64::try_from(ran.elapsed.as_millis()).unwrap_or(u64::MAX),
            rate_asked: f64::from(options.rate),
            rate_sent: per_second(sent, ran.sending.max(record.last_start)),
            rate_answered: per_second(all.answered, ran.elapsed),
            total: Line::of(&all),
            protocols: record.protocols.iter().map(|(protocol, tally)| (*protocol, Line::of(tally))).collect(),
            classes: record.classes.iter().map(ClassLine::of).collect(),
            lag,
            connections: ran.connections,
        }
    }

    /// Whether the run is valid and each request was answered with a status it expects.
    pub fn clean(&self) -> bool {
        self.valid && self.answered()
    }

    /// Whether each request was answered with a status it expects, however late.
    pub fn answered(&self) -> bool {
        self.total.requests > 0 && self.total.unexpected_status == 0 && self.total.errors.is_empty()
    }
}

/// Why a run is not valid.
fn reason(
    options: &Options,
    due: u64,
    sent: u64,
    sending: Duration,
    last_start: Duration,
    lag: Percentiles,
) -> Option<String> {
    let mut reasons = Vec::new();
    if due == 0 {
        reasons.push("no request was due: the run is too short for its rate".to_owned());
    }
    let limit = options.lag_p99_max;
    if u128::from(lag.p99_us) > limit.as_micros() {
        reasons.push(format!("the generator was late: p99 {} us, allowed {} us", lag.p99_us, limit.as_micros()));
    }
    let (planned, reached) = (per_second(due, sending), per_second(sent, sending.max(last_start)));
    if reached < planned * REACHED_MIN {
        reasons.push(format!("the generator sent {reached} requests/s, due were {planned}"));
    }
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// A rate with one decimal.
#[allow(clippy::cast_precision_loss)]
fn per_second(count: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { (count as f64 / seconds * 10.0).round() / 10.0 } else { 0.0 }
}

impl Line {
    fn of(tally: &Tally) -> Line {
        Line {
            requests: tally.requests,
            answered: tally.answered,
            unexpected_status: tally.unexpected,
            body_bytes: tally.bytes,
            latency: Percentiles::of(&tally.latency),
            service: Percentiles::of(&tally.service),
            statuses: tally.statuses.clone(),
            errors: tally.errors.clone(),
        }
    }
}

impl ClassLine {
    fn of(tally: &ClassTally) -> ClassLine {
        ClassLine {
            name: tally.name.clone(),
            expect: tally.expect.to_string(),
            requests: tally.requests,
            unexpected_status: tally.unexpected,
            errors: tally.errors,
            statuses: tally.statuses.clone(),
        }
    }
}

impl Percentiles {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Percentiles {
        if histogram.is_empty() {
            return Percentiles::default();
        }
        Percentiles {
            count: histogram.len(),
            min_us: histogram.min(),
            p50_us: histogram.value_at_quantile(0.5),
            p90_us: histogram.value_at_quantile(0.9),
            p99_us: histogram.value_at_quantile(0.99),
            p999_us: histogram.value_at_quantile(0.999),
            max_us: histogram.max(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Instant;

    use super::*;
    use crate::engine::Answer;
    use crate::options::tests::sample;
    use crate::record::{Outcome, histogram};
    use crate::schedule::Due;

    /// A run of 100 requests a second for one second, with this lag and these requests never sent.
    pub(crate) fn report(lag_us: u64, saturated: u64) -> Report {
        let options = sample();
        let mut record = Record::new(&options);
        for index in 0..100 {
            let protocol = if index % 4 == 0 { Protocol::H2 } else { Protocol::H1 };
            let due = Due { at: Duration::from_millis(index * 10), protocol, target: 0, class: 0 };
            record.due(due);
            if index < saturated {
                record.saturated(due);
                continue;
            }
            let latency = Duration::from_micros(100 * (index + 1));
            let status = if index == 99 { 503 } else { 200 };
            let end = Ok(Answer { status, bytes: 7, sent: Instant::now() });
            record.ended(&Outcome { due, lag: Duration::from_micros(lag_us), latency, service: latency / 2, end });
        }
        let connections = Connections { opened: 2, failed: 0, resent: 0 };
        let (elapsed, sending) = (Duration::from_secs(2), Duration::from_secs(1));
        Report::new(&options, &record, Ran { elapsed, sending, stopped: false, connections })
    }

    #[test]
    fn percentiles_are_those_of_the_recorded_times() {
        let mut times = histogram();
        (1..=1_000_u64).for_each(|micros| times.record(micros).unwrap());
        let percentiles = Percentiles::of(&times);
        let expected =
            Percentiles { count: 1_000, min_us: 1, p50_us: 500, p90_us: 900, p99_us: 990, p999_us: 999, max_us: 1_000 };
        assert_eq!(percentiles, expected);
        assert_eq!(Percentiles::of(&histogram()), Percentiles::default());
    }

    #[test]
    fn a_report_comes_back_from_json_as_it_was() {
        let report = report(40, 3);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["protocols"]["h1"]["statuses"]["503"], 1);
        assert_eq!(value["total"]["errors"]["saturated"], 3);
    }

    #[test]
    fn the_total_is_the_sum_of_the_protocols() {
        let report = report(40, 0);
        let (h1, h2) = (&report.protocols[&Protocol::H1], &report.protocols[&Protocol::H2]);
        assert_eq!((h1.requests, h2.requests, report.total.requests), (75, 25, 100));
        assert_eq!(report.total.body_bytes, 700);
        assert_eq!((report.total.latency.count, report.total.latency.p50_us), (100, 5_003));
        assert_eq!((report.total.unexpected_status, report.classes[0].unexpected_status), (1, 1));
        assert_eq!((report.rate_sent, report.rate_answered), (100.0, 50.0));
    }

    #[test]
    fn a_generator_that_was_late_makes_the_run_invalid() {
        assert_eq!((report(900, 0).valid, report(900, 0).reason), (true, None));
        let late = report(1_500, 0);
        assert!(!late.valid && !late.clean());
        assert_eq!(late.reason.unwrap(), "the generator was late: p99 1500 us, allowed 1000 us");
    }

    #[test]
    fn a_generator_that_could_not_send_enough_makes_the_run_invalid() {
        assert!(report(40, 1).valid);
        assert_eq!(report(40, 2).reason.unwrap(), "the generator sent 98 requests/s, due were 100");
    }

    #[test]
    fn a_run_without_requests_is_not_valid() {
        let options = sample();
        let connections = Connections { opened: 0, failed: 0, resent: 0 };
        let ran = Ran { elapsed: Duration::ZERO, sending: Duration::ZERO, stopped: true, connections };
        let report = Report::new(&options, &Record::new(&options), ran);
        assert_eq!(report.reason.unwrap(), "no request was due: the run is too short for its rate");
    }

    #[test]
    fn only_a_run_without_surprises_is_clean() {
        let mut report = report(40, 0);
        assert!(!report.clean());
        report.total.unexpected_status = 0;
        assert!(report.clean());
        report.valid = false;
        assert!(!report.clean() && report.answered(), "late, and all there");
        report.total.errors.insert(ErrorKind::Timeout, 1);
        assert!(!report.answered());
    }
}
