//! All hostile guests at once, in a process of their own: memory and descriptors can only be counted for a process.

use std::sync::atomic::AtomicBool;

use futures_util::StreamExt;

use super::*;

/// Set in the process of its own.
const ALONE: &str = "SELVAGE_TEST_ALONE";
/// Hostile guests at once.
const AT_ONCE: usize = 8;
/// How often each runs.
const ROUNDS: usize = 3;
/// Calls of the neighbour meanwhile, at least.
const HEALTHY: usize = 200;
/// Resident memory that may be left over: the allocator and the pools keep some of what they had.
const GROWTH_BYTES_MAX: u64 = 64 << 20;
/// Descriptors that may be left over: the runtime opens some of its own at their first use.
const DESCRIPTORS_MAX: usize = 8;

/// Resident bytes and open descriptors of this process.
fn held() -> (u64, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kibibytes: u64 = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    (kibibytes * 1024, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

/// Every hostile guest once, each in a task of its own as for a connection of its own.
async fn round(crowd: &[(&'static str, Arc<Active>)]) {
    let calls = crowd.iter().map(async |(name, guest)| {
        let guest = Arc::clone(guest);
        let call = tokio::spawn(async move { end(&guest, request("GET", "/", empty())).await });
        (*name, call.await.unwrap())
    });
    let ends: Vec<_> = futures_util::stream::iter(calls).buffer_unordered(AT_ONCE).collect().await;
    for (name, end) in ends {
        // Beside so many others each may meet another of its limits first. None gets an answer out, none is the node's.
        let expected = ["exceeded-cpu", "exceeded-wall", "exceeded-memory", "trap", "no-response", "bad-response"];
        // A tick between its two answers lets the first one out, whole.
        let is_between = *name == *"twice.wat" && end == "201";
        assert!(is_between || expected.contains(&end.as_str()), "{name}: {end}");
    }
}

/// Calls a guest that means no harm until it was called often enough and `over` says so; how often that was.
async fn neighbour(hello: Active, over: Arc<AtomicBool>) -> usize {
    let mut pace = tokio::time::interval(Duration::from_millis(2));
    let mut calls = 0;
    while calls < HEALTHY || !over.load(Ordering::SeqCst) {
        pace.tick().await;
        unharmed(&hello, &format!("call {calls}")).await;
        calls += 1;
    }
    calls
}

async fn crowd() {
    let hello = Guest::new("hello.wat").await.limits(|limits| limits.concurrent_requests = 1);
    let kv = hello.grants.kv.clone();
    let hello = hello.activate().unwrap();
    let mut crowd = Vec::new();
    for name in ENDS.map(|(name, _)| name).into_iter().chain(["endless_body.wat", "huge_headers.wat"]) {
        let guest = hostile(name).await.with(|grants| {
            grants.kv = kv.clone();
            grants.limits.cpu_ms = 50;
            grants.limits.wall_ms = 1_000;
        });
        crowd.push((name, Arc::new(guest.activate().unwrap())));
    }
    // What is warm only after a first use is not counted.
    round(&crowd).await;
    let (memory, descriptors) = held();

    let over = Arc::new(AtomicBool::new(false));
    let neighbour = tokio::spawn(neighbour(hello, Arc::clone(&over)));
    for _ in 0..ROUNDS {
        round(&crowd).await;
    }
    over.store(true, Ordering::SeqCst);
    assert!(neighbour.await.unwrap() >= HEALTHY);

    let (memory_now, descriptors_now) = held();
    let grown = memory_now.saturating_sub(memory);
    assert!(grown <= GROWTH_BYTES_MAX, "{grown} bytes more than before");
    assert!(descriptors_now <= descriptors + DESCRIPTORS_MAX, "{descriptors_now} descriptors, {descriptors} before");
}

#[test]
fn a_crowd_of_hostile_guests_harms_nobody_and_leaves_nothing_behind() {
    if std::env::var_os(ALONE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(crowd());
    }
    // Two processes must not both create the key of the cache.
    LazyLock::force(&CACHE);
    let module = module_path!().split_once("::").unwrap().1;
    let name = format!("{module}::a_crowd_of_hostile_guests_harms_nobody_and_leaves_nothing_behind");
    let mut own = std::process::Command::new(std::env::current_exe().unwrap());
    let output = own.args(["--exact", &name, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}
