use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use selvage_config::Digest;
use selvage_config::app::App;

use super::full::Filled;
use super::*;
use crate::engine::{EngineOptions, Engines};
use crate::host::tests::grants;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::release::compile::{CompileCache, compile};
use crate::release::fetch::Fetched;
use crate::release::verify::{Policy, verify};
use crate::request::{Protocol, Request, empty};
use crate::route::{ActiveApp, Table};
use crate::serve::{Parts, serve};

const PATIENCE: Duration = Duration::from_secs(60);
/// Of turns that are known to cost nothing yet, as many as the longest round has: what each costs besides is 10 µs.
const AT_ONCE: usize = 100;

/// Two apps that both asked for a full core.
fn apps(line: &Line) -> [Arc<Spent>; 2] {
    let apps = [Arc::default(), Arc::default()];
    for app in &apps {
        line.is_on(app, Instant::now());
    }
    apps
}

/// Work that says its name when it begins, and is done after so many turns.
async fn work(name: &'static str, turns: usize, said: Arc<Mutex<Vec<&'static str>>>) {
    for turn in 0..turns {
        if turn > 0 {
            tokio::task::yield_now().await;
        }
        said.lock().unwrap().push(name);
    }
}

#[test]
fn nobody_waits_on_a_core_that_has_time_left() {
    let (line, app) = (Line::default(), Arc::default());
    assert!(!line.is_on(&app, Instant::now()));
    assert!(!line.is_on(&Arc::default(), Instant::now()));
}

#[test]
fn on_a_full_core_an_app_waits_from_when_another_one_comes() {
    let (line, now, _full) = (Line::default(), Instant::now(), Filled::new());
    let (one, other) = (Spent::default(), Spent::default());
    assert!((0..100).all(|_| !line.is_on(&one, now)), "it is alone");
    assert!(line.is_on(&other, now) && line.is_on(&one, now));
    assert!(line.is_on(&one, now + COMPANY / 2));
    assert!(!line.is_on(&one, now + COMPANY * 2), "the other one has not come again");
    assert!(line.is_on(&other, now + COMPANY * 2));
}

#[tokio::test]
async fn a_neighbour_begins_before_a_flood_that_was_there_first() {
    let (line, _full) = (Line::default(), Filled::new());
    let [flood, neighbour] = apps(&line);
    let said = Arc::new(Mutex::new(Vec::new()));
    let deadline = Instant::now() + PATIENCE;
    let begin = |spent, name| {
        let work = Box::pin(work(name, 1, Arc::clone(&said)));
        tokio::spawn(InTurns::begin(&line, spent, deadline, work).unwrap())
    };
    let mut all: Vec<_> = (0..500).map(|_| begin(&flood, "flood")).collect();
    all.push(begin(&neighbour, "neighbour"));
    for one in all {
        one.await.unwrap().unwrap();
    }
    let said = said.lock().unwrap();
    let before = said.iter().position(|name| *name == "neighbour").unwrap();
    assert!(said.len() == 501 && before <= AT_ONCE, "{before}");
}

#[tokio::test]
async fn what_goes_on_waits_for_its_turn_again() {
    let (line, _full) = (Line::default(), Filled::new());
    let [one, other] = apps(&line);
    let said = Arc::new(Mutex::new(Vec::new()));
    let deadline = Instant::now() + PATIENCE;
    let long = InTurns::begin(&line, &one, deadline, Box::pin(work("long", 100, Arc::clone(&said)))).unwrap();
    let long = tokio::spawn(long);
    let mut short = Vec::new();
    for _ in 0..50 {
        let work = Box::pin(work("short", 1, Arc::clone(&said)));
        short.push(tokio::spawn(InTurns::begin(&line, &other, deadline, work).unwrap()));
    }
    for one in short {
        one.await.unwrap().unwrap();
    }
    long.await.unwrap().unwrap();
    assert_eq!(said.lock().unwrap().len(), 150);
    let state = line.desk.lock();
    assert_eq!((state.order.len(), state.order.tickets()), (0, 150), "each turn was waited for");
}

#[tokio::test]
async fn nobody_waits_longer_than_it_has_time() {
    let (line, _full) = (Line::default(), Filled::new());
    let [one, _] = apps(&line);
    // No usher comes: as if the thread never got to it.
    line.desk.lock().ushers = usize::MAX;
    let work = Box::pin(std::future::ready(()));
    let turns = InTurns::begin(&line, &one, Instant::now() + Duration::from_millis(10), work).unwrap();
    assert_eq!(turns.await, Err(Late));
    assert_eq!(line.desk.lock().order.len(), 0);
}

#[tokio::test]
async fn whoever_leaves_frees_its_place_and_owes_nothing() {
    let (line, _full) = (Line::default(), Filled::new());
    let [one, _] = apps(&line);
    let deadline = Instant::now() + PATIENCE;
    let waits: Vec<_> = (0..3).map(|_| line.enter(&one, Class::Begins, deadline).unwrap()).collect();
    assert_eq!(line.desk.lock().order.len(), 3);
    drop(waits);
    assert_eq!(line.desk.lock().order.len(), 0);
    let granted = line.enter(&one, Class::Begins, deadline).unwrap();
    assert!(line.desk.round(ROUND).is_some());
    drop(granted);
    assert_eq!(line.desk.lock().order.len(), 0);
    let after = line.enter(&one, Class::Begins, deadline).unwrap();
    assert!(line.desk.lock().order.clock_of(&one).is_some_and(|clock| clock == 0));
    drop(after);
}

#[tokio::test]
async fn a_flood_waits_up_to_a_bound_and_others_find_room() {
    let (line, _full) = (Line::default(), Filled::new());
    let [flood, other] = apps(&line);
    let deadline = Instant::now() + PATIENCE;
    let mut waits = Vec::new();
    while let Ok(wait) = line.enter(&flood, Class::Begins, deadline) {
        waits.push(wait);
    }
    assert!((1_000..100_000).contains(&waits.len()), "{}", waits.len());
    assert!(line.enter(&other, Class::Begins, deadline).is_ok());
}

#[tokio::test]
async fn ushers_end_when_nobody_waits_and_come_again() {
    let (line, _full) = (Line::default(), Filled::new());
    let [one, _] = apps(&line);
    for _ in 0..3 {
        let wait = line.enter(&one, Class::Begins, Instant::now() + PATIENCE).unwrap();
        assert!(wait.await.is_some());
        while line.desk.lock().ushers > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn on_several_threads_everybody_has_a_turn() {
    let line = Line::default();
    let apps: Vec<Arc<Spent>> = (0..7).map(|_| Arc::default()).collect();
    let said = Arc::new(Mutex::new(Vec::new()));
    let mut all = JoinSet::new();
    // So few of each app that no bound is met, however long the machine makes a turn.
    for number in 0..1_000 {
        let work = Box::pin(work("turn", 1 + number % 3, Arc::clone(&said)));
        let (line, spent) = (line.clone(), Arc::clone(&apps[number % apps.len()]));
        all.spawn(async move {
            let turns = InTurns::begin(&line, &spent, Instant::now() + PATIENCE, work).unwrap();
            // One in ten leaves before its turn, or in the middle of it.
            if number % 10 == 0 {
                let _ = tokio::time::timeout(Duration::ZERO, turns).await;
            } else {
                turns.await.unwrap();
            }
        });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
    assert!(said.lock().unwrap().len() >= 900 * 2 - 100);
    while line.desk.lock().ushers > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(line.desk.lock().order.len(), 0);
}

#[test]
fn an_usher_that_ends_with_its_runtime_is_followed_by_another() {
    let line = Line::default();
    let [one, _] = apps(&line);
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let first = runtime();
    let left = {
        let _in = first.enter();
        line.enter(&one, Class::Begins, deadline).unwrap()
    };
    assert_eq!(line.desk.lock().ushers, 1);
    drop(first);
    assert_eq!(line.desk.lock().ushers, 0);
    assert!(runtime().block_on(async { line.enter(&one, Class::Begins, deadline).unwrap().await.is_some() }));
    drop(left);
}

/// An app whose one guest answers `hello`.
async fn hello(engines: &Engines, name: &str) -> (Arc<ActiveApp>, tempfile::TempDir) {
    let (grants, dir) = grants(&[]).await;
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guests/hello.wat")).unwrap();
    let bytes = Bytes::from(wat::parse_bytes(&text).unwrap().into_owned());
    let (digest, guest) = (Digest::of(&bytes), "guest".parse().unwrap());
    let app = App::of_component(name.parse().unwrap(), "guest".parse().unwrap(), digest);
    let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, bytes)]));
    let verified = verify(fetched, &Policy::LocalFiles.into()).unwrap();
    let cache = CompileCache::open(&dir.path().join("compiled")).unwrap();
    let compiled = compile(engines, &cache, &verified.component(&guest).unwrap()).unwrap();
    let pools = BTreeMap::from([(guest, Pool::new(engines, &compiled, grants).unwrap())]);
    (Arc::new(ActiveApp::new(app, None, digest, &pools, &BTreeMap::new()).unwrap()), dir)
}

fn request(app: &str) -> Request {
    let http = http::Request::builder().uri("/").header("host", format!("{app}.edge.example"));
    Request {
        http: http.body(empty()).unwrap(),
        client: ([192, 0, 2, 1], 4711).into(),
        protocol: Protocol::H1,
        secure: false,
        arrived: Instant::now(),
    }
}

#[tokio::test]
async fn a_neighbours_request_is_answered_before_a_flood_of_requests_that_came_first() {
    let engines = Engines::new(&EngineOptions::of_instances(8)).unwrap();
    let apps = [hello(&engines, "flood").await, hello(&engines, "neighbour").await];
    let parts = Parts::new("node".parse().unwrap(), "here".parse().unwrap(), 1_000, Metrics::new());
    let active = apps.iter().map(|(app, _)| Arc::clone(app)).collect();
    parts.table.store(Arc::new(Table::new(active, "edge.example").unwrap()));
    let parts = Arc::new(parts);
    let answered = Arc::new(Mutex::new(Vec::new()));
    let ask = |app: &'static str| {
        let (parts, answered) = (Arc::clone(&parts), Arc::clone(&answered));
        tokio::spawn(async move {
            let response = serve(&parts, request(app)).await;
            assert_eq!(response.status(), 200);
            answered.lock().unwrap().push(app);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
        })
    };
    let _full = Filled::new();
    for app in ["flood", "neighbour"] {
        ask(app).await.unwrap();
    }
    answered.lock().unwrap().clear();
    let mut all: Vec<_> = (0..300).map(|_| ask("flood")).collect();
    all.push(ask("neighbour"));
    for one in all {
        one.await.unwrap();
    }
    let answered = answered.lock().unwrap();
    let before = answered.iter().position(|app| *app == "neighbour").unwrap();
    assert!(answered.len() == 301 && before <= AT_ONCE, "{before}");
    let text = parts.metrics.text();
    let in_line = |app: &str| {
        let line =
            text.lines().find(|line| line.starts_with(&format!("selvage_requests_in_line_total{{app=\"{app}\"}}")));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u32>().ok())
    };
    assert!(in_line("flood") >= Some(1) && in_line("neighbour") >= Some(1), "{text}");
}
