//! Guests that hoard what is not their memory: fields, descriptors, places in the pool, and a task's budget.

use super::*;

/// Set in the process of its own.
const ALONE: &str = "SELVAGE_TEST_ALONE";

/// Runs `work` in a process of its own, whose memory and descriptors are nobody else's.
fn alone(name: &str, work: impl Future<Output = ()>) {
    if std::env::var_os(ALONE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(work);
    }
    LazyLock::force(&CACHE);
    let name = format!("{}::{name}", module_path!().split_once("::").unwrap().1);
    let mut own = std::process::Command::new(std::env::current_exe().unwrap());
    let output = own.args(["--exact", &name, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}

fn kibibytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    value.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Fields count towards nobody's memory limit: 10,000 handles of 128 KiB each are 1.2 GiB of the node's own.
#[test]
fn fields_that_a_guest_hoards_are_bounded_like_its_memory() {
    alone("fields_that_a_guest_hoards_are_bounded_like_its_memory", async {
        let guest = Guest::new("fields_hog.wat").await.limits(|limits| limits.cpu_ms = 10_000).activate().unwrap();
        let before = kibibytes("VmHWM:");
        let end = end(&guest, request("GET", "/", empty())).await;
        let grown = (kibibytes("VmHWM:") - before) / 1024;
        // The default for a component's memory; what it holds through handles should be of that order at most.
        assert!(grown <= 256, "{grown} MiB, {end}");
    });
}

/// Handles of files are descriptors of the process: 10,000 for each request, of a number that everybody shares.
#[test]
fn a_guest_that_hoards_files_takes_a_bounded_number_of_descriptors() {
    alone("a_guest_that_hoards_files_takes_a_bounded_number_of_descriptors", async {
        let files = tempfile::tempdir().unwrap();
        std::fs::write(files.path().join("page.html"), "text").unwrap();
        let guest = Guest::new("file_hog.wat").await.with(|grants| {
            grants.files = Some(files.path().to_owned());
            grants.limits.cpu_ms = 10_000;
        });
        let guest = guest.activate().unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").map_or(usize::MAX, Iterator::count);
        let before = open();
        let call = tokio::spawn(async move { end(&guest, request("GET", "/", empty())).await });
        let mut most = 0;
        while !call.is_finished() {
            most = most.max(open());
            tokio::task::yield_now().await;
        }
        let end = call.await.unwrap();
        assert!(most <= before + 256, "{most} descriptors, {end}");
    });
}

/// A component may have more than one memory in each of its instances.
#[tokio::test]
async fn guests_of_many_memories_leave_places_for_others() {
    let engines = Engines::new(&EngineOptions::of_instances(16)).unwrap();
    let activate = async |text: &str, concurrent: u32| {
        let mut guest = Guest::new("hello.wat").await.limits(|limits| limits.concurrent_requests = concurrent);
        guest.code = wat::parse_str(text).unwrap().into();
        let digest = Digest::of(&guest.code);
        let app = App::of_component("test".parse().unwrap(), "guest".parse().unwrap(), digest);
        let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, guest.code)]));
        let verified = verify(fetched, &Policy::LocalFiles.into()).unwrap();
        let cache = CompileCache::open(&guest._state.path().join("cache")).unwrap();
        let compiled = compile(&engines, &cache, &verified.component(&"guest".parse().unwrap()).unwrap()).unwrap();
        Active { pool: Pool::new(&engines, &compiled, guest.grants).unwrap(), _state: guest._state }
    };
    let text = |name: &str| {
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests").join(name)).unwrap()
    };
    let many = "  (core module $page (memory 1))\n".to_owned() + "  (core instance (instantiate $page))\n";
    let slow = text("slow.wat").replace("  (core module $main-module", &format!("{many}  (core module $main-module"));
    let (slow, hello) = (activate(&slow, 12).await, activate(&text("hello.wat"), 1).await);
    let mut calls: Vec<_> = (0..12).map(|_| Box::pin(slow.get("/"))).collect();
    for call in &mut calls {
        assert!(futures_util::poll!(call).is_pending());
    }
    // Twelve requests under way of one component with two memories, of 16 instances that the engine has room for.
    assert_eq!(told(hello.get("/").await.unwrap()).await, (200, "hello".into()));
}

/// tokio's channels say "not yet" when a task has used up its budget, even if what is asked for is there.
#[tokio::test]
async fn an_answer_is_not_lost_when_the_task_has_used_up_its_budget() {
    let guest = Arc::new(Guest::new("hello.wat").await.activate().unwrap());
    for used in 0..=128 {
        let guest = Arc::clone(&guest);
        // A task begins with its whole budget.
        let asked = tokio::spawn(async move {
            for _ in 0..used {
                let _ = futures_util::poll!(std::pin::pin!(tokio::task::consume_budget()));
            }
            end(&guest, request("GET", "/", empty())).await
        });
        assert_eq!(asked.await.unwrap(), "200", "after {used} steps");
    }
}
