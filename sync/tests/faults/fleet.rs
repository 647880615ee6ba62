//! A fleet of processes: each has its own directory, certificate and socket, and every link goes through a path of the test.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path as FilePath, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use selvage_certs::{Authority, Role};
use selvage_config::node::KvEngine;
use selvage_sync::engine::{Engine, Settings, Vault};
use tempfile::TempDir;

use super::proxy::Path;
use super::{disk, node};

/// How long anything may take that shall happen.
const PATIENCE: Duration = Duration::from_secs(120);

/// Rows read at once.
const ROWS: usize = 1 << 20;

/// Names and regions of the nodes, in the order in which they dial: each the ones after it.
pub(super) const NODES: [(&str, &str); 3] = [("a", "fra"), ("b", "iad"), ("c", "sin")];

/// Waits until `holds`, which must come true.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the processes said of their writes.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Acknowledged and not deleted by anybody.
    pub(super) kept: BTreeSet<String>,
    /// Of which an acknowledged deletion says that it is gone.
    deleted: BTreeSet<String>,
    pub(super) refused: Vec<String>,
}

/// How a node stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    pub(super) digest: String,
    pub(super) rows: usize,
    pub(super) links: usize,
    pub(super) queued: usize,
    pub(super) ahead_ms: i64,
    pub(super) ready: bool,
}

/// One running process. Dropping it kills it.
pub(super) struct Process {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    pub(super) port: u16,
}

impl Process {
    pub(super) fn start(mut command: Command, said: &Arc<Mutex<Said>>) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (answer, answers) = channel();
        let said = Arc::clone(said);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let mut said = said.lock().unwrap();
                match line.split_once(' ') {
                    Some(("kept", key)) => _ = said.kept.insert(key.to_owned()),
                    // Whether that will have happened nobody knows who does not hear so.
                    Some(("deletes", key)) => _ = said.kept.remove(key),
                    Some(("deleted", key)) => _ = said.deleted.insert(key.to_owned()),
                    Some(("refused", why)) => said.refused.push(why.to_owned()),
                    _ => {
                        drop(said);
                        if answer.send(line).is_err() {
                            return;
                        }
                    }
                }
            }
        });
        let mut process = Self { child, input, answers, port: 0 };
        let listens = process.answer("start");
        process.port = listens.strip_prefix("listens ").expect(&listens).parse().unwrap();
        process
    }

    fn answer(&mut self, what: &str) -> String {
        self.answers.recv_timeout(PATIENCE).unwrap_or_else(|why| panic!("no answer to {what}: {why}"))
    }

    pub(super) fn ask(&mut self, what: &str) -> String {
        writeln!(self.input, "{what}").and_then(|()| self.input.flush()).unwrap();
        self.answer(what)
    }

    pub(super) fn tell(&mut self, what: &str) {
        assert_eq!(self.ask(what), "ok", "{what}");
    }

    pub(super) fn state(&mut self) -> State {
        let answer = self.ask("state");
        let words: Vec<&str> = answer.split(' ').collect();
        let ["state", digest, rows, links, queued, ahead_ms, ready] = words[..] else { panic!("{answer}") };
        State {
            digest: digest.to_owned(),
            rows: rows.parse().unwrap(),
            links: links.parse().unwrap(),
            queued: queued.parse().unwrap(),
            ahead_ms: ahead_ms.parse().unwrap(),
            ready: ready == "true",
        }
    }

    /// The most memory that it ever had, KiB.
    pub(super) fn memory_kib_max(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux says so");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub(super) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(super) fn close(mut self) {
        writeln!(self.input, "close").and_then(|()| self.input.flush()).unwrap();
        until("the process ends", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}

pub(super) struct Fleet {
    root: TempDir,
    pub(super) said: Arc<Mutex<Said>>,
    pub(super) nodes: Vec<Option<Process>>,
    paths: BTreeMap<(usize, usize), Path>,
}

impl Fleet {
    /// Three nodes that all have links to each other.
    pub(super) fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let authority = Authority::create("faults").unwrap();
        for (name, region) in NODES {
            let directory = root.path().join(name);
            std::fs::create_dir(&directory).unwrap();
            let role = Role::Node { region: region.parse().unwrap(), node: name.parse().unwrap() };
            let identity = authority.issue_identity(&role, &[], &[]).unwrap();
            identity.save(directory.join("certificate.pem"), directory.join("key.pem")).unwrap();
            std::fs::write(directory.join("roots.pem"), authority.certificate_pem()).unwrap();
        }
        let pairs = (0..NODES.len()).flat_map(|a| (a + 1..NODES.len()).map(move |b| (a, b)));
        let paths = pairs.map(|pair| (pair, Path::new())).collect();
        Self { root, said: Arc::default(), nodes: (0..NODES.len()).map(|_| None).collect(), paths }
    }

    pub(super) fn meshed() -> Self {
        let mut fleet = Self::start();
        for of in 0..NODES.len() {
            fleet.run(of, fleet.command(of));
        }
        fleet.linked();
        fleet
    }

    pub(super) fn directory(&self, of: usize) -> PathBuf {
        self.root.path().join(NODES[of].0)
    }

    /// What starts a node in its directory.
    pub(super) fn command(&self, of: usize) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(self.arguments(of, &self.directory(of), 0));
        command
    }

    pub(super) fn arguments(&self, of: usize, directory: &FilePath, free_mib: u32) -> Vec<String> {
        let (name, region) = NODES[of];
        let directory = directory.to_str().unwrap().to_owned();
        vec!["node".into(), directory, name.into(), region.into(), free_mib.to_string()]
    }

    /// Starts a node, and leads the others' paths to it.
    pub(super) fn run(&mut self, of: usize, command: Command) {
        let process = Process::start(command, &self.said);
        for ((_, to), path) in &self.paths {
            if *to == of {
                path.lead_to(process.port);
            }
        }
        self.nodes[of] = Some(process);
        let roster = self.roster(of, |_| true);
        self.node(of).tell(&roster);
    }

    /// What tells a node the roster of all that `lists` says.
    pub(super) fn roster(&self, of: usize, lists: impl Fn(usize) -> bool) -> String {
        let peer = |other: usize| {
            let (name, region) = NODES[other];
            // The second of a pair is dialed, and dials nobody.
            let address = self.paths.get(&(of, other)).map_or("127.0.0.1:9".into(), |path| path.address().to_string());
            format!(" {name}@{region}={address}")
        };
        let peers: String = (0..NODES.len()).filter(|other| *other != of && lists(*other)).map(peer).collect();
        format!("peers{peers}")
    }

    pub(super) fn node(&mut self, of: usize) -> &mut Process {
        self.nodes[of].as_mut().expect("it runs")
    }

    /// The paths between a node and all others.
    pub(super) fn paths_of(&self, of: usize) -> impl Iterator<Item = &Path> {
        self.paths.iter().filter(move |((a, b), _)| *a == of || *b == of).map(|(_, path)| path)
    }

    pub(super) fn linked(&mut self) {
        for of in 0..NODES.len() {
            until("all links stand", || self.node(of).state().links == NODES.len() - 1);
        }
    }

    pub(super) fn kept(&self) -> usize {
        self.said.lock().unwrap().kept.len()
    }

    /// Waits until some more writes were acknowledged.
    pub(super) fn progress(&self, writes: usize) {
        let before = self.kept();
        until("writes are acknowledged", || self.kept() >= before + writes);
    }

    /// Waits until all nodes show the same.
    pub(super) fn converged(&mut self) {
        let mut shown = String::new();
        let start = Instant::now();
        loop {
            let states: Vec<State> = (0..NODES.len()).map(|of| self.node(of).state()).collect();
            let same = states.iter().all(|state| state.digest == states[0].digest && state.ready);
            if same && states.iter().all(|state| state.queued == 0 && state.links == NODES.len() - 1) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: all show the same: {shown}");
            shown = format!("{states:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends all nodes when they have converged, and demands of their rows that they are the same, byte for byte, and that
    /// nothing is missing that was acknowledged.
    pub(super) fn end(mut self, what: &str, start: Instant) {
        self.converged();
        self.nodes.iter_mut().for_each(|process| process.take().expect("it runs").close());
        let rows: Vec<BTreeMap<_, _>> = (0..NODES.len())
            .map(|of| {
                let kept = disk::kept(KvEngine::Sled);
                let vault = Vault::open(&self.directory(of).join("kv"), Settings::from(&kept)).unwrap();
                let rows = vault.scan(b"d", b"d", ROWS).unwrap();
                rows.into_iter().map(|row| (row.key, row.value.unwrap())).collect()
            })
            .collect();
        for (of, others) in rows.iter().enumerate().skip(1) {
            assert!(*others == rows[0], "{what}: {} has other bytes than {}", NODES[of].0, NODES[0].0);
        }
        let said = self.said.lock().unwrap();
        let row = |key: &str| rows[0].get(format!("d{}\0{key}", disk::store()).as_bytes());
        for key in &said.kept {
            let found = row(key).unwrap_or_else(|| panic!("{what}: {key} was acknowledged and is lost"));
            let value = node::value(key, 0);
            assert!(found.windows(value.len()).any(|part| part == value), "{what}: {key} has another value");
        }
        println!(
            "{what}: {} acknowledged writes kept, {} deletions, {} refusals, {} rows the same byte for byte, {:.1} s",
            said.kept.len(),
            said.deleted.len(),
            said.refused.len(),
            rows[0].len(),
            start.elapsed().as_secs_f64()
        );
    }
}
