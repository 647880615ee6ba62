//! Instances that answer more than one request: what stays, what does not, and what ends them.
//!
//! `counter.wat` answers with how many requests its instance has had: "1" is an instance that nobody used before.

use futures_util::StreamExt;
use selvage_config::app::isolation::Reuse;
use selvage_node::fault::GuestFault;
use selvage_node::request::BodyError;

use super::*;

/// Longer than any test: no instance here ends by itself.
const NEVER_MS: u64 = 60_000;
/// More requests than instances are ever made ahead.
const ANSWERS_MAX: usize = 100;

async fn reused(name: &str, change: impl FnOnce(&mut Reuse)) -> Guest {
    let mut reuse = Reuse { idle_ms: NEVER_MS, ..Reuse::default() };
    change(&mut reuse);
    // One at a time: the next request waits until the guest of the last one is done, however late that is after its
    // answer's end.
    let guest = Guest::new(name).await.limits(|limits| limits.concurrent_requests = 1);
    guest.with(|grants| grants.isolation = Isolation::Reuse(reuse))
}

async fn counter() -> Active {
    reused("counter.wat", |_| {}).await.activate().unwrap()
}

/// A counter for as many requests at once.
async fn counters(concurrent_requests: u32) -> Active {
    let guest = reused("counter.wat", |_| {}).await;
    guest.limits(|limits| limits.concurrent_requests = concurrent_requests).activate().unwrap()
}

impl Active {
    async fn count(&self, path: &str) -> String {
        told(self.get(path).await.unwrap()).await.1
    }
}

#[tokio::test]
async fn a_fresh_instance_knows_nothing_of_other_requests() {
    let guest = Guest::new("counter.wat").await.activate().unwrap();
    for _ in 0..3 {
        assert_eq!(guest.count("/").await, "1");
    }
}

#[tokio::test]
async fn fresh_instances_are_made_ahead_and_each_answers_one_request() {
    let guest = Guest::new("counter.wat").await.activate().unwrap();
    assert_eq!((guest.pool.idle(), guest.count("/").await), (0, "1".into()));
    for _ in 0..3 {
        made_ahead(&guest, 1).await;
        assert_eq!(guest.count("/").await, "1");
    }
    made_ahead(&guest, 1).await;
    assert!(!guest.pool.expire(Instant::now() + Duration::from_hours(1)), "nobody needs it");
    assert_eq!((guest.pool.idle(), guest.count("/").await), (0, "1".into()));
}

#[tokio::test]
async fn what_takes_anothers_place_is_as_warm_and_knows_none_of_its_requests() {
    for reuse in [false, true] {
        let guests = async || match reuse {
            false => Guest::new("counter.wat").await,
            true => reused("counter.wat", |_| {}).await,
        };
        let (old, new) = (guests().await.activate().unwrap(), guests().await.activate().unwrap());
        new.pool.warm_like(&old.pool).await;
        assert_eq!(new.pool.idle(), 0, "nobody needs any");
        old.count("/").await;
        made_ahead(&old, 1).await;
        new.pool.warm_like(&old.pool).await;
        assert_eq!((new.pool.idle(), new.count("/").await), (1, "1".into()));
    }
}

#[tokio::test]
async fn code_that_nobody_asks_for_goes_and_comes_back() {
    for name in ["counter.wat", "gate"] {
        let guest = Guest::new(name).await.activate().unwrap();
        assert!(guest.pool.is_loaded());
        for _ in 0..2 {
            assert!(!guest.pool.expire(Instant::now() + Duration::from_hours(1)));
            assert!(!guest.pool.is_loaded());
            // Many at once load it once.
            let asked = futures_util::future::join_all((0..4).map(|_| guest.get("/public/x"))).await;
            assert!(asked.into_iter().all(|answer| answer.unwrap().status() == 200));
            // Unless they had instances that somebody was still making ahead meanwhile.
            for _ in 0..ANSWERS_MAX {
                if guest.pool.is_loaded() {
                    break;
                }
                guest.get("/public/x").await.unwrap();
            }
            assert!(guest.pool.is_loaded());
        }
    }
}

#[tokio::test]
async fn an_instance_answers_one_request_after_another() {
    let guest = counter().await;
    for count in ["1", "2", "3"] {
        assert_eq!(guest.count("/").await, count);
        settled(&guest, 1).await;
    }
}

#[tokio::test]
async fn a_real_guest_of_each_generation_is_used_again() {
    for name in ["hello", "hello-p3"] {
        let guest = reused(name, |_| {}).await.activate().unwrap();
        for _ in 0..3 {
            assert_eq!(guest.ask("GET", "/", "").await, (200, "Hello from Selvage\n".into()), "{name}");
            settled(&guest, 1).await;
            assert_eq!(guest.ask("POST", "/echo", "come back").await, (200, "come back".into()), "{name}");
        }
    }
}

#[tokio::test]
async fn two_requests_at_a_time_have_two_instances() {
    let guest = counters(2).await;
    let busy = guest.get("/s").await.unwrap();
    assert_eq!(guest.count("/").await, "1");
    assert_eq!(guest.count("/").await, "2");
    settled(&guest, 1).await;
    drop(busy);
    assert_eq!(guest.count("/").await, "3");
}

#[tokio::test]
async fn instances_of_a_crowd_are_never_shared() {
    let guest = counters(4).await;
    for round in ["1", "2"] {
        // All are held at once before any is read, so none can be given back in between.
        let held = futures_util::future::join_all((0..4).map(|_| guest.get("/l"))).await;
        let mut ends = Vec::new();
        for response in held {
            ends.push(told(response.unwrap()).await.1.trim_start_matches('\0').to_owned());
        }
        assert_eq!(ends, [round; 4]);
        settled(&guest, 4).await;
    }
}

/// Waits until so many instances were made ahead: threads do so that have only what others leave them.
async fn made_ahead(guest: &Active, idle: usize) {
    let made = async {
        while guest.pool.idle() < idle {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, made).await.expect("nobody makes instances ahead");
}

/// Lets the guests come to their ends until so many instances wait.
async fn settled(guest: &Active, idle: usize) {
    for _ in 0..1_000 {
        if guest.pool.idle() == idle {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("{} instances wait, not {idle}", guest.pool.idle());
}

#[tokio::test]
async fn after_a_fault_the_next_request_has_a_new_instance() {
    let limits = |limits: &mut Limits| {
        limits.cpu_ms = 200;
        limits.memory_bytes = 8 << 20;
    };
    for (path, fault) in [("/t", GuestFault::Trap), ("/b", GuestFault::ExceededCpu)] {
        let guest = reused("counter.wat", |_| {}).await.limits(limits).activate().unwrap();
        assert_eq!(guest.count("/").await, "1");
        assert_eq!(guest.get(path).await.unwrap_err(), Fault::Guest(fault), "{path}");
        assert_eq!(guest.pool.idle(), 0, "{path}");
        assert_eq!(guest.count("/").await, "1", "{path}");
    }
}

#[tokio::test]
async fn an_answer_that_was_not_finished_ends_the_instance() {
    let guest = counter().await;
    assert_eq!(guest.count("/").await, "1");
    // A fault, or if the guest was interrupted after its head, a body that breaks off.
    match guest.get("/u").await {
        Err(fault) => assert_eq!(fault, Fault::Guest(GuestFault::BadResponse)),
        Ok(response) => assert!(response.into_body().collect().await.is_err()),
    }
    assert_eq!(guest.count("/").await, "1");
}

#[tokio::test]
async fn a_wall_timeout_ends_the_instance() {
    let guest = reused("counter.wat", |_| {}).await.limits(|limits| limits.wall_ms = 300).activate().unwrap();
    assert_eq!(guest.count("/").await, "1");
    let unread = guest.get("/s").await.unwrap();
    // Nobody reads; the only lease is free again as soon as the guest is stopped.
    let next = guest.pool.lease(Instant::now() + PATIENCE).await.unwrap();
    let mut chunks = unread.into_body().into_data_stream();
    let end = loop {
        match chunks.next().await.expect("an endless body does not end") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(end, BodyError::Guest { outcome: "exceeded-wall" }), "{end:?}");
    drop(next);
    assert_eq!(guest.count("/").await, "1");
}

#[tokio::test]
async fn who_was_refused_memory_answers_no_other_request() {
    let limits = |limits: &mut Limits| limits.memory_bytes = 8 << 20;
    let guest = reused("counter.wat", |_| {}).await.limits(limits).activate().unwrap();
    assert_eq!(guest.count("/").await, "1");
    assert_eq!(guest.count("/h").await, "2", "the guest got over the refusal");
    assert_eq!(guest.count("/").await, "1");
}

#[tokio::test]
async fn a_fault_harms_no_request_beside_it() {
    let guest = counters(2).await;
    let beside = guest.get("/l").await.unwrap();
    assert_eq!(guest.get("/t").await.unwrap_err(), Fault::Guest(GuestFault::Trap));
    let (status, text) = told(beside).await;
    assert_eq!((status, text.trim_start_matches('\0')), (200, "1"));
    settled(&guest, 1).await;
    assert_eq!(guest.count("/").await, "2");
}

#[tokio::test]
async fn an_instance_ends_after_its_last_request() {
    let guest = reused("counter.wat", |reuse| reuse.requests_max = 2).await.activate().unwrap();
    for count in ["1", "2", "1", "2", "1"] {
        assert_eq!(guest.count("/").await, count);
    }
}

#[tokio::test]
async fn an_instance_with_too_much_memory_ends() {
    let guest = reused("counter.wat", |reuse| reuse.memory_bytes_max = 3 << 20).await.activate().unwrap();
    // 2 MiB more than it began with is below the mark, 4 MiB is not.
    for (path, count) in [("/g", "1"), ("/", "2"), ("/g", "3"), ("/", "1")] {
        assert_eq!(guest.count(path).await, count, "{path}");
    }
}

#[tokio::test]
async fn an_instance_that_forgets_to_let_go_of_requests_is_used_again_up_to_a_bound() {
    let guest = counter().await;
    assert_eq!(guest.count("/k").await, "1");
    assert_eq!(guest.count("/").await, "2", "as one with a garbage collector would");
    let mut lived = 2;
    while guest.count("/k").await != "1" {
        lived += 1;
        assert!(lived < 100, "it holds as many as it has answered");
    }
}

#[tokio::test]
async fn an_instance_that_holds_on_to_a_body_ends() {
    let guest = counter().await;
    assert_eq!(guest.count("/").await, "1");
    assert_eq!(guest.ask("POST", "/k", "unread").await, (200, "2".into()));
    assert_eq!(guest.count("/").await, "1");
}

#[tokio::test]
async fn a_client_that_leaves_in_the_body_ends_the_instance() {
    let guest = counter().await;
    assert_eq!(guest.count("/").await, "1");
    let mut frames = guest.get("/s").await.unwrap().into_body().into_data_stream();
    assert!(frames.next().await.unwrap().is_ok());
    drop(frames);
    assert_eq!(guest.count("/").await, "1");
}

#[tokio::test]
async fn a_body_that_is_read_to_its_end_gives_the_instance_back() {
    let guest = counter().await;
    for count in ["1", "2", "3"] {
        let (_, text) = told(guest.get("/l").await.unwrap()).await;
        assert_eq!((text.len(), text.trim_start_matches('\0')), (64 * 4096 + 1, count));
    }
}

#[tokio::test]
async fn each_request_has_its_own_outbound_budget() {
    let origin = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = origin.local_addr().unwrap();
    // Nobody answers there: refused connections (906) count all the same.
    drop(origin);
    let guest = reused("outbound.wat", |_| {}).await.limits(|limits| limits.outbound_requests = 1);
    let guest = guest.with(|grants| {
        grants.outbound = vec![format!("http://{address}").parse().unwrap()];
        let options = EgressOptions { private_networks: true, roots: Vec::new() };
        grants.egress = Arc::new(Egress::new(&options).unwrap());
    });
    let guest = guest.activate().unwrap();
    for _ in 0..3 {
        assert_eq!(guest.get(&format!("/{address}")).await.unwrap().status(), 906);
        // It is the same instance each time.
        settled(&guest, 1).await;
    }
}

#[tokio::test]
async fn an_instance_that_nobody_needs_ends() {
    let guest = counter().await;
    assert_eq!(guest.count("/").await, "1");
    settled(&guest, 1).await;
    let now = Instant::now();
    assert!(guest.pool.expire(now), "it has not waited long");
    assert_eq!(guest.count("/").await, "2");
    settled(&guest, 1).await;
    assert!(!guest.pool.expire(now + Duration::from_millis(2 * NEVER_MS)));
    assert_eq!(guest.pool.idle(), 0);
    assert_eq!(guest.count("/").await, "1");
}

#[tokio::test]
async fn the_pool_itself_ends_instances_that_nobody_needs() {
    let guest = reused("counter.wat", |reuse| reuse.idle_ms = 200).await.activate().unwrap();
    guest.count("/").await;
    // Not `settled`: on a busy machine it may be gone before anybody looks.
    for _ in 0..1_000 {
        if guest.pool.idle() > 0 {
            break;
        }
        tokio::task::yield_now().await;
    }
    let gone = async {
        while guest.pool.idle() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
}
