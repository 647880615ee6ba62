//! What happens to fleets of processes. Time decides nothing: each step waits until what it wants has come true, and at the
//! end of each all nodes have the same rows, byte for byte, and every write that was acknowledged.

use std::process::Command;
use std::time::{Duration, Instant};

use rand::Rng;

use super::disk::{copy_below, files_below};
use super::fleet::{Fleet, Process, until};

/// Bytes that may wait for one peer: the queue, a window of a catch-up, and the frame that passes it.
const QUEUED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The most memory that a node may take in any of this, KiB.
const MEMORY_KIB_MAX: u64 = 512 * 1024;

type Scene = (&'static str, fn(&str));

const SCENES: [Scene; 6] = [
    ("partitions", partitions),
    ("slow", slow),
    ("copies", copies),
    ("clock", clock),
    ("full", full),
    ("revoked", revoked),
];

/// Plays one scene, or all at once: they mostly wait.
pub(super) fn play(name: &str) {
    let wanted: Vec<Scene> = SCENES.into_iter().filter(|(scene, _)| name.is_empty() || *scene == name).collect();
    assert!(!wanted.is_empty(), "no scene is called {name}");
    std::thread::scope(|scope| {
        for (scene, play) in wanted {
            scope.spawn(move || play(scene));
        }
    });
}

/// Ten times, one node after another is cut off, for moments and for longer than a link lives, and one is killed meanwhile.
fn partitions(what: &str) {
    let start = Instant::now();
    let mut fleet = Fleet::meshed();
    (0..3).for_each(|of| fleet.node(of).tell(&format!("load {of} 100")));
    for round in 0..10 {
        let of = round % 3;
        fleet.paths_of(of).for_each(|path| path.cut(true));
        fleet.progress(20);
        if round == 4 {
            until("the links are found dead", || fleet.node(of).state().links == 0);
        }
        if round == 7 {
            let other = (of + 1) % 3;
            fleet.nodes[other].take().expect("it runs").kill();
            let command = fleet.command(other);
            fleet.run(other, command);
            fleet.node(other).tell(&format!("load again-{other} 100"));
        }
        let for_ms = rand::rng().random_range(50..400);
        std::thread::sleep(Duration::from_millis(for_ms));
        fleet.paths_of(of).for_each(|path| path.cut(false));
        assert!((0..3).all(|of| fleet.node(of).state().queued <= QUEUED_BYTES_MAX));
    }
    (0..3).for_each(|of| fleet.node(of).tell("stop"));
    assert!((0..3).all(|of| fleet.node(of).memory_kib_max() < MEMORY_KIB_MAX));
    fleet.end(what, start);
}

/// One peer has a line of 1 KB/s while the others write much more than that.
fn slow(what: &str) {
    let start = Instant::now();
    let mut fleet = Fleet::meshed();
    fleet.paths_of(2).for_each(|path| path.slow(1_000));
    let mut most = 0;
    for of in [0, 1] {
        fleet.node(of).tell(&format!("load {of} 20000"));
    }
    // 40 MB that the slow one lacks: five times what may wait for it.
    let before = fleet.kept();
    until("much was written", || {
        most = most.max(fleet.node(0).state().queued).max(fleet.node(1).state().queued);
        fleet.kept() >= before + 2_000
    });
    for of in [0, 1] {
        fleet.node(of).tell("stop");
    }
    until("the fast ones have each other's writes", || {
        let (a, b) = (fleet.node(0).state(), fleet.node(1).state());
        a.digest == b.digest
    });
    assert!(most <= QUEUED_BYTES_MAX, "{most} bytes waited");
    assert!((0..2).all(|of| fleet.node(of).memory_kib_max() < MEMORY_KIB_MAX));
    fleet.paths_of(2).for_each(|path| path.slow(0));
    assert!(fleet.paths_of(2).all(|path| path.passed() > 0));
    fleet.end(what, start);
}

/// A directory is copied and started beside the original; later an older copy is put back in its place.
fn copies(what: &str) {
    let start = Instant::now();
    let mut fleet = Fleet::meshed();
    fleet.node(1).tell("load first 100");
    fleet.progress(50);
    fleet.node(1).tell("stop");
    fleet.nodes[1].take().expect("it runs").kill();
    let (own, copy) = (fleet.directory(1), fleet.directory(1).with_extension("copy"));
    copy_below(&own, &copy);
    let command = fleet.command(1);
    fleet.run(1, command);

    // Both are b now: the original has links to both others in turn with the copy.
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(fleet.arguments(1, &copy, 0));
    let mut twin = Process::start(command, &fleet.said);
    let c = fleet.node(2).port;
    twin.tell(&format!("peers a@fra=127.0.0.1:9 c@sin=127.0.0.1:{c}"));
    fleet.node(1).tell("load original 100");
    twin.tell("load copy 100");
    fleet.progress(100);
    fleet.node(1).tell("stop");
    twin.tell("stop");
    let last = |fleet: &Fleet, prefix: &str| {
        let said = fleet.said.lock().unwrap();
        said.kept.iter().filter(|key| key.starts_with(prefix)).cloned().collect::<Vec<_>>()
    };
    for key in last(&fleet, "copy") {
        until("c has what the copy wrote", || fleet.node(2).ask(&format!("has {key}")) == "yes");
    }
    twin.close();
    fleet.linked();
    fleet.converged();

    // The copy is older than the original by now.
    fleet.nodes[1].take().expect("it runs").kill();
    std::fs::remove_dir_all(own.join("kv")).unwrap();
    copy_below(&copy.join("kv"), &own.join("kv"));
    assert!(!files_below(&own.join("kv")).is_empty());
    let command = fleet.command(1);
    fleet.run(1, command);
    fleet.node(1).tell("load restored 100");
    fleet.progress(50);
    fleet.node(1).tell("stop");
    fleet.linked();
    fleet.end(what, start);
}

/// A node's clock jumps an hour ahead and minutes back while it runs: it takes no writes until it is right again.
fn clock(what: &str) {
    let Some(library) = faketime() else {
        assert!(std::env::var_os("CI").is_none(), "CI needs libfaketime: see .ci/tools");
        return eprintln!("\n!!! SKIPPED: libfaketime is not installed; .ci/tools DIR installs it !!!\n");
    };
    let start = Instant::now();
    let mut fleet = Fleet::start();
    let offset = fleet.directory(2).join("offset");
    let set = |text: &str| {
        // Replaced as a whole: the process reads it at any time.
        std::fs::write(offset.with_extension("new"), text).unwrap();
        std::fs::rename(offset.with_extension("new"), &offset).unwrap();
    };
    set("+0");
    let mut command = fleet.command(2);
    let facts = [("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", &offset).envs(facts);
    for of in 0..2 {
        let command = fleet.command(of);
        fleet.run(of, command);
    }
    fleet.run(2, command);
    fleet.linked();
    until("its clock is compared", || fleet.node(2).ask("set before").starts_with("acked"));
    for (jump, name) in [("+3600", "hour"), ("-240", "minutes")] {
        fleet.node(0).tell(&format!("load {name} 100"));
        set(jump);
        until("a wrong clock is noticed", || fleet.node(2).state().ahead_ms.abs() > 500);
        let refused = fleet.node(2).ask(&format!("set {name}"));
        assert!(refused.contains("clock is unsafe"), "{refused}");
        assert!(!fleet.node(2).state().ready);
        fleet.progress(20);
        fleet.node(0).tell("stop");
        assert!((0..2).all(|of| fleet.node(of).state().ahead_ms.abs() < 500), "the others' time stays as it is");
        set("+0");
        until("it takes writes again", || fleet.node(2).ask(&format!("set {name}")).starts_with("acked"));
    }
    assert_eq!(fleet.said.lock().unwrap().refused, Vec::<String>::new(), "nobody else was disturbed");
    fleet.end(what, start);
}

fn faketime() -> Option<std::path::PathBuf> {
    let told = std::env::var_os("SELVAGE_TEST_FAKETIME").map(std::path::PathBuf::from);
    let installed = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|folder| folder.path());
    told.into_iter()
        .chain(installed.map(|folder| folder.join("faketime/libfaketime.so.1")))
        .find(|library| library.exists())
}

/// A node's disk is full: it refuses writes, serves what it has, and when there is room again gets what it missed.
fn full(what: &str) {
    let start = Instant::now();
    let mut fleet = Fleet::start();
    // A file system of its own, where any user may make one.
    let script = "mount -t tmpfs -o size=40m tmpfs \"$1/kv\" && head -c 12M /dev/zero > \"$1/kv/ballast\" && shift && exec \"$@\"";
    let own = fleet.directory(2);
    std::fs::create_dir(own.join("kv")).unwrap();
    let unshare = ["--user", "--map-root-user", "--mount"];
    let allowed = Command::new("unshare").args(unshare).arg("true").status();
    if !allowed.is_ok_and(|status| status.success()) {
        return eprintln!("\n!!! SKIPPED: this user may not make a small file system (user namespaces) !!!\n");
    }
    let mut command = Command::new("unshare");
    command.args(unshare).args(["sh", "-c", script, "sh"]).arg(&own).arg(std::env::current_exe().unwrap());
    command.args(fleet.arguments(2, &own, 8));
    for of in 0..2 {
        let command = fleet.command(of);
        fleet.run(of, command);
    }
    fleet.run(2, command);
    fleet.linked();
    fleet.node(2).tell("load own 20000");
    until("the disk is full", || fleet.said.lock().unwrap().refused.iter().any(|why| why.contains("nearly full")));
    fleet.node(2).tell("stop");
    fleet.node(0).tell("load others 100");
    fleet.progress(50);
    fleet.node(0).tell("stop");
    assert_eq!(fleet.node(2).ask("has own-0-0"), "yes", "it serves what it has");
    assert!(fleet.node(2).ask("set more").contains("nearly full"));
    fleet.node(2).tell(&format!("unlink {}/kv/ballast", own.display()));
    until("it takes writes again", || fleet.node(2).ask("set more").starts_with("acked"));
    fleet.converged();
    // Its file system ends with it. What it alone had acknowledged before is with the others by now.
    fleet.nodes[2].take().expect("it runs").close();
    std::fs::remove_dir_all(own.join("kv")).unwrap();
    let command = fleet.command(2);
    fleet.run(2, command);
    fleet.linked();
    fleet.end(what, start);
}

/// A node is taken out of the roster while it writes: what it then says reaches nobody, until it is let in again.
fn revoked(what: &str) {
    let start = Instant::now();
    let mut fleet = Fleet::meshed();
    fleet.node(1).tell("load b 100");
    fleet.progress(20);
    for of in [0, 2] {
        let roster = fleet.roster(of, |other| other != 1);
        fleet.node(of).tell(&roster);
    }
    until("it has no links", || fleet.node(1).state().links == 0);
    fleet.progress(20);
    fleet.node(1).tell("stop");
    assert!(fleet.node(1).ask("set late").starts_with("acked"));
    fleet.node(0).tell("load a 100");
    fleet.progress(20);
    fleet.node(0).tell("stop");
    until("the others go on", || fleet.node(0).state().digest == fleet.node(2).state().digest);
    for of in [0, 2] {
        assert_eq!(fleet.node(of).ask("has late"), "no");
    }
    for of in [0, 2] {
        let roster = fleet.roster(of, |_| true);
        fleet.node(of).tell(&roster);
    }
    fleet.linked();
    fleet.end(what, start);
}
