//! Instances of WASI 0.3 that answer several requests at once.
//!
//! The example `crowd` answers with how many requests its instance has had, and how many at once at most.

use futures_util::future::{join, join_all};
use selvage_config::app::isolation::Reuse;
use selvage_node::fault::GuestFault;
use selvage_node::request::BodyError;

use super::*;

/// Longer than any test: no instance here ends by itself.
const NEVER_MS: u64 = 60_000;

async fn crowd(reuse: impl FnOnce(&mut Reuse), limits: impl FnOnce(&mut Limits)) -> Active {
    let mut bounds = Reuse { idle_ms: NEVER_MS, ..Reuse::default() };
    reuse(&mut bounds);
    let guest = Guest::new("crowd").await.with(|grants| grants.isolation = Isolation::Reuse(bounds));
    guest.limits(limits).activate().unwrap()
}

impl Active {
    /// How many requests the instance has had, and how many at once at most.
    async fn here(&self, path: &str) -> (u32, u32) {
        numbers(&told(self.get(path).await.unwrap()).await.1)
    }

    async fn fault(&self, path: &str) -> GuestFault {
        match self.get(path).await {
            Err(Fault::Guest(fault)) => fault,
            other => panic!("{path}: {:?}", other.map(|response| response.status())),
        }
    }
}

fn numbers(text: &str) -> (u32, u32) {
    let (count, most) = text.trim().trim_start_matches('.').split_once(' ').expect("two numbers");
    (count.parse().unwrap(), most.parse().unwrap())
}

/// Instances that are begun with before requests share one.
fn cores() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

/// Waits until so many instances have nothing to do.
async fn resting(guest: &Active, idle: usize) {
    let settled = async {
        while guest.pool.idle() != idle {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, settled).await;
    in_time.unwrap_or_else(|_| panic!("{} instances wait, not {idle}", guest.pool.idle()));
}

/// Until an instance has begun with what it was asked.
async fn begun() {
    tokio::time::sleep(Duration::from_millis(300)).await;
}

#[tokio::test]
async fn one_after_another_they_have_one_instance() {
    let guest = crowd(|_| {}, |_| {}).await;
    for count in 1..=5 {
        assert_eq!(guest.here("/").await, (count, 1));
        resting(&guest, 1).await;
    }
}

#[tokio::test]
async fn requests_that_wait_share_an_instance() {
    let guest = crowd(|_| {}, |_| {}).await;
    let answers = join_all((0..8 * cores()).map(|_| guest.here("/wait/300"))).await;
    let most = answers.iter().map(|(_, most)| *most).max().unwrap();
    assert!(most >= 8, "{answers:?}");
    // As many instances as can compute at once, and no more.
    resting(&guest, cores()).await;
}

#[tokio::test]
async fn beyond_its_concurrency_the_next_has_another_instance() {
    let guest = crowd(|reuse| reuse.concurrency = 2, |_| {}).await;
    let answers = join_all((0..16).map(|_| guest.here("/wait/300"))).await;
    assert!(answers.iter().all(|(_, most)| *most <= 2), "{answers:?}");
    resting(&guest, 8).await;
}

#[tokio::test]
async fn a_trap_ends_those_beside_it_and_nobody_else() {
    let guest = crowd(|_| {}, |_| {}).await;
    // One in each instance that there will be.
    let beside = join_all((0..cores()).map(|_| guest.get("/wait/2000")));
    let trap = async {
        begun().await;
        guest.fault("/trap").await
    };
    let (mut beside, trap) = join(beside, trap).await;
    assert_eq!(trap, GuestFault::Trap);
    beside.retain(Result::is_err);
    let faults: Vec<_> = beside.into_iter().map(Result::unwrap_err).collect();
    assert_eq!(faults, [Fault::Guest(GuestFault::Trap)]);
}

#[tokio::test]
async fn a_trap_breaks_off_the_bodies_beside_it() {
    let guest = crowd(|_| {}, |_| {}).await;
    let bodies = join_all((0..cores()).map(async |_| guest.get("/stream/20").await.unwrap().into_body())).await;
    assert_eq!(guest.fault("/trap").await, GuestFault::Trap);
    let mut broken = 0;
    for body in bodies {
        if let Err(end) = body.collect().await {
            assert!(matches!(end, BodyError::Guest { outcome: "trap" }), "{end:?}");
            broken += 1;
        }
    }
    assert_eq!(broken, 1);
}

#[tokio::test]
async fn who_never_answers_runs_out_of_time_and_the_others_end_well() {
    let guest = crowd(|_| {}, |limits| limits.wall_ms = 2_000).await;
    assert_eq!(guest.here("/").await, (1, 1));
    let (never, beside) = join(guest.fault("/never"), guest.here("/wait/700")).await;
    assert_eq!(never, GuestFault::ExceededWall);
    assert!(beside.0 <= 2, "{beside:?}");
    // The instance with the one that never ends has gone; that of the other is there, unless they shared it.
    assert!(guest.pool.idle() <= 1);
    assert_eq!(guest.here("/").await.1, 1, "nobody else is in its instance");
}

#[tokio::test]
async fn who_computes_for_ever_ends_and_holds_up_nobody_else() {
    let guest = crowd(|_| {}, |limits| limits.cpu_ms = 200).await;
    assert_eq!(guest.here("/").await, (1, 1));
    let after = async {
        begun().await;
        // The one that computes has its instance for itself from now on.
        join_all((0..4).map(|_| guest.here("/wait/1"))).await
    };
    let (burn, after) = join(guest.fault("/burn"), after).await;
    assert_eq!(burn, GuestFault::ExceededCpu);
    assert_eq!(after.len(), 4);
    assert!(guest.here("/").await.0 >= 1);
}

#[tokio::test]
async fn what_goes_on_after_the_answer_is_bounded_too() {
    let guest = crowd(|_| {}, |limits| (limits.wall_ms, limits.concurrent_requests) = (1_000, 1)).await;
    assert_eq!(guest.here("/late/60000").await, (1, 1));
    assert_eq!(guest.pool.idle(), 0, "it works on");
    // It holds the only place until its time is over, and is not used again.
    let next = guest.pool.lease(Instant::now() + PATIENCE).await.unwrap();
    assert_eq!(told(next.call(request("GET", "/", empty())).await.unwrap()).await.1, "1 1\n");
}

#[tokio::test]
async fn an_instance_ends_after_its_last_request_and_above_its_memory() {
    let guest = crowd(|reuse| reuse.requests_max = 2, |_| {}).await;
    for count in [1, 2, 1, 2, 1] {
        assert_eq!(guest.here("/").await.0, count);
        resting(&guest, usize::from(count == 1)).await;
    }
    let guest = crowd(|reuse| reuse.memory_bytes_max = 8 << 20, |_| {}).await;
    for (path, count) in [("/grow/1", 1), ("/", 2), ("/grow/16", 3), ("/", 1)] {
        assert_eq!(guest.here(path).await.0, count, "{path}");
        resting(&guest, usize::from(path != "/grow/16")).await;
    }
}

#[tokio::test]
async fn bodies_stream_beside_each_other() {
    let guest = crowd(|_| {}, |_| {}).await;
    let bodies = join_all((0..6).map(async |_| told(guest.get("/stream/5").await.unwrap()).await.1)).await;
    for body in bodies {
        assert_eq!(body.chars().filter(|c| *c == '.').count(), 5 * 1024);
        assert!(numbers(&body).0 <= 6, "{body}");
    }
}

#[tokio::test]
async fn who_leaves_harms_nobody() {
    let guest = crowd(|_| {}, |_| {}).await;
    let beside = guest.here("/wait/1000");
    let leaves = async {
        drop(guest.get("/stream/1000").await.unwrap());
        for _ in 0..4 {
            let asked = guest.get("/wait/60000");
            assert!(tokio::time::timeout(Duration::from_millis(50), asked).await.is_err());
        }
    };
    let (beside, ()) = join(beside, leaves).await;
    assert!(beside.0 >= 1);
    assert_eq!(told(guest.get("/").await.unwrap()).await.0, 200);
}

#[tokio::test]
async fn a_client_that_sends_too_much_is_refused_alone() {
    let guest = crowd(|_| {}, |limits| limits.request_body_bytes = 10).await;
    let guest = &guest;
    let large = guest.call(request("POST", "/wait/10", full("more than ten bytes")));
    let (large, beside) = join(large, guest.here("/wait/100")).await;
    // The guest does not read it, or it is refused: never another's trouble.
    assert!(large.is_ok() || large.is_err_and(|fault| fault.status() == 413));
    assert!(beside.0 <= 2);
}

#[tokio::test]
async fn instances_that_nobody_needs_end() {
    let guest = crowd(|_| {}, |_| {}).await;
    guest.here("/").await;
    resting(&guest, 1).await;
    assert!(guest.pool.expire(Instant::now()), "it has not waited long");
    assert!(!guest.pool.expire(Instant::now() + Duration::from_millis(2 * NEVER_MS)));
    resting(&guest, 0).await;
    assert_eq!(guest.here("/").await, (1, 1));
    // And with the pool everything.
    let pool = Arc::downgrade(&guest.pool);
    drop(guest);
    assert!(pool.upgrade().is_none());
}

#[tokio::test]
async fn without_reuse_nobody_shares_anything() {
    let guest = Guest::new("crowd").await.activate().unwrap();
    assert_eq!(join_all((0..4).map(|_| guest.here("/wait/100"))).await, [(1, 1); 4]);
}
