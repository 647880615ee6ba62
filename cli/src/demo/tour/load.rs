//! Load over every version at every node.

use std::time::Duration;

use bytes::Bytes;
use miette::Report;
use reqwest::Method;
use reqwest::header::HeaderMap;
use selvage_loadtest::{Arrivals, Mix, Options, RequestClass, Scheme, StatusSet, Target};

use super::{Tour, expect};
use crate::loadtest::{load_failure, roots};

/// How late the generator may be: it shares two cores with the whole fleet.
const LAG: Duration = Duration::from_millis(250);

/// Open-loop load on `hello` at every node.
pub(super) fn options(tour: &Tour<'_>, path: &str, rate: u32, duration: Duration) -> Result<Options, Report> {
    let targets = tour.fleet.nodes().map(|node| {
        let addr = node.front();
        Target { scheme: Scheme::Https, host: "hello.localhost".into(), port: addr.port(), addr }
    });
    let class = RequestClass {
        name: "hello".into(),
        weight: 1,
        method: Method::GET,
        path: path.into(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        expect: StatusSet::success(),
        host: None,
    };
    Ok(Options {
        targets: targets.collect(),
        rate,
        duration,
        seed: 1,
        mix: Mix { h1: 28, h2: 51, h3: 21 },
        connections: 2,
        arrivals: Arrivals::Poisson,
        requests: vec![class],
        roots: roots(&tour.fleet.certs().join("ca.pem"))?,
        in_flight_max: 10_000,
        timeout: Duration::from_secs(10),
        lag_p99_max: LAG,
    })
}

/// Five seconds of it, with percentiles for each version. A machine that is too busy to judge its latency says so there.
pub(super) async fn load(tour: &mut Tour<'_>) -> Result<String, Report> {
    let report = selvage_loadtest::run(options(tour, "/", 300, Duration::from_secs(5))?, |_| {}).await;
    let report = report.map_err(|error| load_failure(&error))?;
    expect(report.answered(), || format!("requests failed:\n{report}"))?;
    Ok(format!("{} requests, 0 failed\n{report}", report.total.requests))
}
