//! What each piece of a request costs, in instructions: no clock, so a regression shows on any machine.
//!
//! This test starts its own program again under callgrind (Debian: `valgrind`), which makes so many calls of a piece and
//! then more of them; the difference, divided, is one call. What is counted is the debug build, so the figures are for
//! comparison with themselves.

use std::path::PathBuf;
use std::process::Command;

use selvage_config::ComponentName;
use selvage_node::route::{ActiveApp, Table};
use selvage_node::serve::{Parts, serve};

use super::*;

/// A piece of the request path, the calls of it that are counted, and the instructions that one may take: a fifth more
/// than it took when this was written. Who makes a piece cheaper lowers its bound.
const PIECES: [(&str, u64, u64); 4] = [
    // A static answer through every step: head, route, admission, answer, counting.
    ("route", 300, 36_000),
    ("lease", 3_000, 920),
    // A fresh instance, its call, and the answer's body.
    ("call", 300, 232_000),
    ("serve", 300, 305_000),
];
/// Instances that fit beside callgrind.
const INSTANCES: u32 = 2;
/// Between two questions to a guest that has no instance.
const BETWEEN: Duration = Duration::from_millis(20);
/// How the piece and the number of calls reach the program under callgrind.
const PIECE: &str = "SELVAGE_TEST_PIECE";
/// The thread in which a test program runs its only test, by callgrind's count: the first one that it starts.
const TEST_THREAD: &str = "02";
/// The name of the test that it runs there.
const RUN: &str = "guest::instructions::runs_a_piece_under_callgrind";

#[test]
fn a_request_takes_no_more_instructions_than_it_did() {
    let Some(valgrind) = on_path("valgrind") else {
        assert!(std::env::var_os("CI").is_none(), "no valgrind in CI: apt-get install valgrind");
        return eprintln!("SKIPPED: no valgrind, so instructions are not counted: apt-get install valgrind");
    };
    // The first run may have to compile the guest.
    counted(&valgrind, "call", 1);
    for (piece, calls, most) in PIECES {
        let (few, many) = (counted(&valgrind, piece, calls / 10), counted(&valgrind, piece, calls / 10 + calls));
        let each = many.saturating_sub(few) / calls;
        println!("{piece}: {each} instructions, {most} at most");
        assert!(each <= most, "{piece} takes {each} instructions, more than {most}");
        assert!(each >= most / 4, "{piece} takes {each} instructions: lower its bound of {most}");
    }
}

/// Instructions of the thread that makes so many calls. What others do depends on the time it takes.
fn counted(valgrind: &Path, piece: &str, calls: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(valgrind);
    // In turn: instances are made and dropped by other threads, which would wait for this one without end.
    command.args(["--tool=callgrind", "--separate-threads=yes", "--fair-sched=yes"]);
    command.arg(format!("--callgrind-out-file={}", dir.path().join("out").display()));
    command.arg(std::env::current_exe().unwrap()).args(["--exact", RUN, "--ignored", "--test-threads=1"]);
    let output = command.env(PIECE, format!("{piece} {calls}")).env_remove("RUST_BACKTRACE").output().unwrap();
    let (told, printed) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{told}\n{printed}");
    let counts = std::fs::read_to_string(dir.path().join(format!("out-{TEST_THREAD}"))).unwrap();
    let total = counts.lines().find_map(|line| line.strip_prefix("totals: "));
    total.unwrap_or_else(|| panic!("callgrind counted nothing: {counts}")).trim().parse().unwrap()
}

#[test]
#[ignore = "runs under callgrind, where the test above starts it"]
fn runs_a_piece_under_callgrind() {
    let asked = std::env::var(PIECE).expect("started by the test above");
    let (piece, calls) = asked.split_once(' ').unwrap();
    // One thread, so that what is counted is the same each time.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(tokio::task::unconstrained(run(piece, calls.parse().unwrap())));
}

async fn run(piece: &str, calls: u64) {
    // callgrind has address space for a few only. Without memory for those that wait, none is made ahead, and every call
    // makes its own.
    let options = EngineOptions { memory_bytes: 0, ..EngineOptions::of_instances(INSTANCES) };
    let engines = Engines::new(&options).unwrap();
    let guest = Guest::new("hello.wat").await.limits(|limits| limits.wall_ms = 600_000);
    let guest = guest.activate_on(&engines).unwrap();
    let parts = Arc::new(Parts::new("node".parse().unwrap(), "here".parse().unwrap(), 64, Metrics::new()));
    let name: ComponentName = "guest".parse().unwrap();
    let app = App::of_component("test".parse().unwrap(), name.clone(), Digest::of(b"guest"));
    let pools = BTreeMap::from([(name, Arc::clone(&guest.pool))]);
    let active = ActiveApp::new(app, None, Digest::of(b"manifest"), &pools, &BTreeMap::new()).unwrap();
    parts.table.store(Arc::new(Table::alone(Arc::new(active))));
    for _ in 0..calls {
        match piece {
            "route" => {
                let response = serve(&parts, request("GET", "/.well-known/spin/health", empty())).await;
                assert_eq!(told(response).await, (200, "OK".into()));
            }
            "lease" => drop(guest.pool.lease(Instant::now() + PATIENCE).await.unwrap()),
            "call" => hello(async || guest.ask("GET", "/", "").await).await,
            "serve" => hello(async || told(serve(&parts, request("GET", "/", empty())).await).await).await,
            other => panic!("no piece {other}"),
        }
    }
}

/// Asks until it is answered. On a machine that is full of other work the instances of the calls before may still be
/// waiting for the threads that end them.
async fn hello(ask: impl AsyncFn() -> (u16, String)) {
    let begun = Instant::now();
    loop {
        match ask().await {
            (503, _) if begun.elapsed() < PATIENCE => tokio::time::sleep(BETWEEN).await,
            answer => return assert_eq!(answer, (200, "hello".into())),
        }
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}
