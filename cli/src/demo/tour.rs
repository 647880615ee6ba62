//! The tour of `demo --check`: each stop shows one promise on the running fleet, over real sockets.

mod limits;
mod load;
mod releases;
mod replication;
mod serving;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use miette::Report;
use serde::Serialize;

use super::fleet::Fleet;
use super::visit::Visitor;
use crate::output::{Output, failed};

/// How long something eventual may take before a stop has failed.
const EVENTUALLY: Duration = Duration::from_secs(30);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// One stop, as it went.
#[derive(Debug, Serialize)]
struct Stop {
    name: &'static str,
    ok: bool,
    milliseconds: u128,
    told: String,
}

/// What every stop works with.
struct Tour<'a> {
    fleet: &'a mut Fleet,
    visitor: Visitor,
    output: Output,
    stops: Vec<Stop>,
}

/// Walks the whole tour, also past a stop that failed. The code says whether all went well.
pub(super) async fn walk(fleet: &mut Fleet, output: Output) -> ExitCode {
    let visitor = match Visitor::of(fleet) {
        Ok(visitor) => visitor,
        Err(error) => return output.failed(&error),
    };
    let mut tour = Tour { fleet, visitor, output: output.quiet(), stops: Vec::new() };
    macro_rules! stops {
        ($($name:literal => $stop:path),+ $(,)?) => {
            $(
                let began = Instant::now();
                let result = $stop(&mut tour).await;
                tour.note($name, began, result);
            )+
        };
    }
    stops! {
        "hello on every node over HTTP/1.1, HTTP/2 and HTTP/3" => serving::hello,
        "a valid token opens the gate, seven bad ones do not" => serving::tokens,
        "a write and a delete at fra are seen at sin" => replication::write,
        "a partition is survived and healed" => replication::partition,
        "an unsigned release is refused, the old one serves" => releases::unsigned,
        "a tampered release is refused, the old one serves" => releases::tampered,
        "a new release under load without a failed request" => releases::rollout,
        "a rollback" => releases::rollback,
        "nodes serve and restart without the control plane" => releases::alone,
        "a CPU burner is stopped, its neighbour answers" => limits::burn,
        "a memory hog is stopped, its neighbour answers" => limits::hog,
        "five seconds of load" => load::load,
    }
    let all = tour.stops.iter().all(|stop| stop.ok);
    let failures = tour.stops.iter().filter(|stop| !stop.ok).count();
    let summary = serde_json::json!({ "ok": all, "stops": tour.stops });
    output.answer(&summary, format_args!("{} stops passed, {failures} failed", tour.stops.len() - failures));
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Tour<'_> {
    fn note(&mut self, name: &'static str, began: Instant, result: Result<String, Report>) {
        let milliseconds = began.elapsed().as_millis();
        let (ok, told) = match result {
            Ok(told) => (true, told),
            Err(error) => (false, error.to_string()),
        };
        if !self.output.is_json() {
            let mark = if ok { "ok  " } else { "FAIL" };
            self.output.answer(&(), format_args!("{mark} {milliseconds:>7} ms  {name}: {told}"));
        }
        self.stops.push(Stop { name, ok, milliseconds, told });
    }
}

/// Whether `found` is what a stop needs; else it has failed.
fn expect(found: bool, told: impl FnOnce() -> String) -> Result<(), Report> {
    if found { Ok(()) } else { Err(failed(told(), None)) }
}

/// Waits until `look` finds what it looks for; returns how long that took.
async fn eventually(what: &str, mut look: impl AsyncFnMut() -> Result<bool, Report>) -> Result<Duration, Report> {
    let began = Instant::now();
    while !look().await? {
        expect(began.elapsed() < EVENTUALLY, || format!("{what}: not within {} s", EVENTUALLY.as_secs()))?;
        tokio::time::sleep(LOOK).await;
    }
    Ok(began.elapsed())
}
