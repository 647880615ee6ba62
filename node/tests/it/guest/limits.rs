//! What a guest may use, and what it is called when it wants more.

use selvage_node::fault::GuestFault;

use super::*;

async fn fault(guest: Guest) -> Fault {
    guest.get("/").await.unwrap_err()
}

#[tokio::test]
async fn a_guest_that_burns_cpu_is_stopped() {
    for name in ["burn.wat", "burn_start.wat"] {
        let guest = Guest::new(name).await.limits(|limits| limits.cpu_ms = 100);
        assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededCpu), "{name}");
    }
}

#[tokio::test]
async fn others_run_while_a_guest_burns() {
    // One thread: whoever does not yield stops everyone.
    let guest = Guest::new("burn.wat").await.limits(|limits| limits.cpu_ms = 300).activate().unwrap();
    let other = tokio::spawn(async {
        let mut steps = 0_u32;
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            steps += 1;
            if steps == 10 {
                return steps;
            }
        }
    });
    let burning = async { guest.get("/").await.unwrap_err() };
    let first = tokio::select! {
        fault = burning => panic!("the guest was the only one to run: {fault:?}"),
        steps = other => steps.unwrap(),
    };
    assert_eq!(first, 10);
}

#[tokio::test]
async fn a_guest_that_hoards_memory_is_stopped() {
    let guest = Guest::new("hog.wat").await.limits(|limits| limits.memory_bytes = 8 << 20);
    assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededMemory));
}

#[tokio::test]
async fn a_guest_that_is_too_large_from_the_start_is_named_so() {
    let guest = Guest::new("hello.wat").await.limits(|limits| limits.memory_bytes = 1024);
    assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededMemory));
}

#[tokio::test]
async fn a_silent_guest_is_a_fault() {
    assert_eq!(fault(Guest::new("silent.wat").await).await, Fault::Guest(GuestFault::NoResponse));
}

#[tokio::test]
async fn a_guest_that_waits_too_long_is_stopped() {
    let guest = Guest::new("slow.wat").await.limits(|limits| limits.wall_ms = 100);
    assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededWall));
}

#[tokio::test]
async fn time_in_the_queue_counts_as_wall_time() {
    let guest = Guest::new("hello.wat").await.limits(|limits| limits.wall_ms = 1_000).activate().unwrap();
    let mut late = request("GET", "/", empty());
    late.arrived = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
    assert_eq!(guest.call(late).await.unwrap_err(), Fault::Guest(GuestFault::ExceededWall));
}

#[tokio::test]
async fn a_guest_that_floods_its_log_still_answers() {
    let metrics = Metrics::new();
    let guest = Guest::new("log_flood.wat").await.limits(|limits| limits.log_bytes = 4096);
    let guest = guest.with(|grants| grants.log_dropped = metrics.log_dropped("test"));
    assert_eq!(told(guest.get("/").await.unwrap()).await, (200, "flooded".into()));
    // It is told when the instance is gone, which may be after the answer.
    let counted = async {
        let lost = || {
            let text = metrics.text();
            let line = text.lines().find(|line| line.starts_with("selvage_guest_log_dropped_bytes_total{"))?;
            line.rsplit_once(' ')?.1.parse::<u64>().ok().filter(|bytes| *bytes > 0)
        };
        while lost().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("nobody counts what was dropped");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_a_fault() {
    let fault = fault(Guest::new("huge_headers.wat").await).await;
    // The host refuses the field, and this guest traps on that.
    assert!(matches!(fault, Fault::Guest(GuestFault::Trap | GuestFault::BadResponse)), "{fault:?}");
}

#[tokio::test]
async fn requests_beyond_the_queue_are_shed_at_once() {
    let guest = Guest::new("slow.wat").await.limits(|limits| {
        limits.wall_ms = 30_000;
        limits.concurrent_requests = 1;
    });
    let guest = guest.activate().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let held = guest.pool.lease(deadline).await.unwrap();
    let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(guest.pool.lease(deadline))).collect();
    for lease in &mut waiting {
        assert!(futures_util::poll!(lease).is_pending());
    }
    assert_eq!(guest.pool.lease(deadline).await.err(), Some(Fault::Overload("queue")));
    drop(held);
    assert!(waiting.remove(0).await.is_ok());
}

#[tokio::test]
async fn a_request_waits_for_a_lease_until_its_deadline_only() {
    let guest = Guest::new("slow.wat").await.limits(|limits| limits.concurrent_requests = 1).activate().unwrap();
    let _held = guest.pool.lease(Instant::now() + PATIENCE).await.unwrap();
    let refused = guest.pool.lease(Instant::now() + Duration::from_millis(20)).await;
    assert_eq!(refused.err(), Some(Fault::Overload("queue-deadline")));
}

/// `/proc/self/task/*` of the threads for guests that compute: what `sched` says of their policy.
#[cfg(target_os = "linux")]
fn heavy_threads() -> Vec<bool> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
    let named = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "selvage-heavy")
    };
    // proc_pid_stat(5): field 41 is the policy, and 5 is SCHED_IDLE. The name before it may hold spaces.
    let is_idle = |path: std::path::PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(41 - 3) == Some("5")
    };
    tasks.filter(named).map(is_idle).collect()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn guests_that_compute_go_on_behind_everything_else() {
    let burner = Guest::new("burn.wat").await.limits(|limits| limits.cpu_ms = 100).activate().unwrap();
    assert_eq!(burner.get("/").await.unwrap_err().outcome(), "exceeded-cpu");
    let threads = heavy_threads();
    assert!(!threads.is_empty() && threads.iter().all(|is_idle| *is_idle), "{threads:?}");
}
