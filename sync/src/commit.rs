//! The committer: the one thread that owns the replica and writes to the engine.
//!
//! It takes what is waiting as one group, applies every commit of it, flushes once, and only then answers the
//! writers and sends to the peers. So many writers share one flush, and no peer learns of a write that a crash can
//! take back. A reader may see a write shortly before it is durable.

mod home;
mod session;

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use selvage_config::{NodeName, Region, StoreName};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::engine::{Engine, EngineError};
use crate::entry::{Dot, Key};
use crate::home::{Homes, Place};
use crate::planted::{self, Bug};
use crate::replica::{Action, Counts, Event, Health, Notice, Replica, Write, WriteError, Written};
use crate::session::Token;
use crate::store::KvError;
use crate::wire::{Message, Reach};

pub(crate) use self::home::HomeInput;

/// Inputs of one group, at most.
const GROUP_MAX: usize = 256;

/// Inputs that may wait. Their bytes are bounded by the permits they carry.
pub(crate) const INPUTS_MAX: usize = 1024;

/// What a writer waits for.
pub(crate) type Reply = oneshot::Sender<Result<Written, KvError>>;

/// What must stand at a key for a write to be made.
pub(crate) enum Seen {
    /// This value, or none.
    Value(Option<Bytes>),
    /// This as the newest write, or no value.
    Version(Option<Dot>),
}

/// What reaches the committer.
pub(crate) enum Input {
    /// Made only if what was `seen` stands there, if that is given.
    Write {
        key: Key,
        write: Write,
        seen: Option<Seen>,
        reply: Reply,
        _room: OwnedSemaphorePermit,
    },
    Connected {
        peer: NodeName,
        session: u64,
        frames: mpsc::Sender<Bytes>,
    },
    Disconnected {
        peer: NodeName,
        session: u64,
    },
    Received {
        peer: NodeName,
        session: u64,
        message: Message,
        _room: OwnedSemaphorePermit,
    },
    Sent {
        peer: NodeName,
        session: u64,
        frames: usize,
        bytes: usize,
    },
    Roster(BTreeMap<NodeName, Region>),
    Heal(Key),
    /// Answered once this node has what the session has seen.
    Await {
        token: Token,
        reply: oneshot::Sender<()>,
    },
    Home(HomeInput),
    Tick,
    Close,
}

/// The state of the replica as readers see it.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    pub(crate) peers: Vec<Health>,
    pub(crate) counts: Counts,
    pub(crate) reach: Reach,
    pub(crate) ahead_ms: i64,
    pub(crate) caught_up: bool,
    pub(crate) apart: BTreeMap<NodeName, u64>,
    pub(crate) homes: Arc<BTreeMap<StoreName, Place>>,
}

/// [`State`], renewed at every tick.
pub(crate) type SharedState = Arc<RwLock<State>>;

/// Applies what an event commits, and keeps the rest for after the flush.
pub(crate) fn apply(engine: &dyn Engine, actions: Vec<Action>, later: &mut Vec<Action>) -> Result<(), EngineError> {
    for action in actions {
        match action {
            Action::Commit(batch) if !planted::is(Bug::AckFirst) => engine.apply(batch)?,
            other => later.push(other),
        }
    }
    Ok(())
}

/// Makes durable what was committed, if anything that follows needs it: an answer to a writer, or a promise.
pub(crate) fn flush(engine: &dyn Engine, later: &[Action]) -> Result<(), EngineError> {
    let needed = later.iter().any(|action| matches!(action, Action::Done { result: Ok(_), .. } | Action::Flush));
    if needed && !planted::is(Bug::Flush) && !planted::is(Bug::AckFirst) { engine.flush() } else { Ok(()) }
}

struct Committer {
    replica: Replica,
    engine: Arc<dyn Engine>,
    links: HashMap<u64, mpsc::Sender<Bytes>>,
    writers: HashMap<u64, (Key, Reply)>,
    next_ticket: u64,
    /// Set for good when the engine failed: what it then holds is unknown, so nothing is written any more.
    failed: Option<EngineError>,
    /// Set while what was applied can't be flushed for want of room.
    full: Option<EngineError>,
    state: SharedState,
    waiting: Vec<(Token, oneshot::Sender<()>)>,
    homes: Homes,
    told: Vec<home::Told>,
    /// Where own writes are kept that were given up.
    discarded: PathBuf,
}

/// Runs until told to close or until nobody is left who could tell.
pub(crate) fn run(
    replica: Replica,
    engine: Arc<dyn Engine>,
    mut inputs: mpsc::Receiver<Input>,
    state: SharedState,
    discarded: PathBuf,
) {
    let (homes, unread) = match Homes::open(engine.as_ref(), replica.origin().node.clone()) {
        Ok(homes) => (homes, None),
        Err(error) => (Homes::none(replica.origin().node.clone()), Some(error)),
    };
    let mut committer = Committer {
        replica,
        engine,
        links: HashMap::new(),
        writers: HashMap::new(),
        next_ticket: 0,
        failed: None,
        full: None,
        state,
        waiting: Vec::new(),
        homes,
        told: Vec::new(),
        discarded,
    };
    if let Some(error) = unread {
        committer.fail(error);
    }
    committer.publish();
    let mut open = true;
    while open {
        let Some(first) = inputs.blocking_recv() else { break };
        let mut group = vec![first];
        while group.len() < GROUP_MAX {
            match inputs.try_recv() {
                Ok(input) => group.push(input),
                Err(_) => break,
            }
        }
        open = committer.group(group);
    }
    if let Err(error) = committer.engine.flush() {
        tracing::error!(error = %error, source = ?error, "last flush of the kv failed");
    }
}

impl Committer {
    /// Does one group. Says whether to go on.
    fn group(&mut self, inputs: Vec<Input>) -> bool {
        let mut open = true;
        let mut publish = false;
        let mut later = Vec::new();
        // Permits live until the group is done: what they bound is in memory as long.
        let mut rooms = Vec::new();
        for input in inputs {
            publish |= matches!(input, Input::Connected { .. } | Input::Disconnected { .. } | Input::Tick);
            let event = match input {
                Input::Close => {
                    open = false;
                    continue;
                }
                Input::Write { key, write, seen, reply, _room } => {
                    rooms.push(_room);
                    if let Err(error) = self.admits(&key, seen.as_ref()) {
                        let _gone = reply.send(Err(error));
                        continue;
                    }
                    self.next_ticket += 1;
                    self.writers.insert(self.next_ticket, (key.clone(), reply));
                    Event::Write { ticket: self.next_ticket, key, write }
                }
                Input::Connected { peer, session, frames } => {
                    self.links.insert(session, frames);
                    Event::Connected { peer, session }
                }
                Input::Disconnected { peer, session } => {
                    self.links.remove(&session);
                    Event::Disconnected { peer, session }
                }
                Input::Received { peer, session, message, _room } => {
                    rooms.push(_room);
                    Event::Received { peer, session, message }
                }
                Input::Sent { peer, session, frames, bytes } => Event::Sent { peer, session, frames, bytes },
                Input::Roster(members) => Event::Roster(members),
                Input::Heal(key) => Event::Heal(key),
                Input::Await { token, reply } => {
                    self.wait(token, reply);
                    continue;
                }
                Input::Home(input) => {
                    publish |= input.is_shown();
                    self.home(input, &mut later);
                    continue;
                }
                Input::Tick => Event::Tick,
            };
            self.event(event, &mut later);
        }
        let signed = self.replica.sign();
        if self.failed.is_none()
            && let Err(error) = apply(self.engine.as_ref(), signed, &mut later)
        {
            self.fail(error);
        }
        if self.failed.is_none()
            && let Err(error) = flush(self.engine.as_ref(), &later)
        {
            self.unflushed(error);
        }
        later.extend(self.replica.push());
        for action in later {
            self.carry_out(action);
        }
        self.tell_homes();
        self.tell_sessions();
        if publish {
            self.publish();
        }
        open
    }

    fn publish(&self) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = State {
            peers: self.replica.health(),
            counts: self.replica.counts(),
            reach: self.replica.reach(),
            ahead_ms: self.replica.ahead_ms(),
            caught_up: self.replica.is_caught_up(),
            apart: self.replica.apart(),
            homes: Arc::new(self.homes.places(self.replica.origin().incarnation)),
        };
    }

    /// Hands an event to the replica and applies what it commits. The rest is done after the flush.
    fn event(&mut self, event: Event, later: &mut Vec<Action>) {
        if let Some(error) = self.failed.clone() {
            if let Event::Write { ticket, .. } = event {
                self.answer(ticket, Err(refused(error)));
            }
            return;
        }
        if let Err(error) = self.ready_for(&event) {
            match event {
                Event::Write { ticket, .. } => self.answer(ticket, Err(KvError::Full(error))),
                // What it sent is not merged. On a new link it is asked for again.
                Event::Received { session, .. } | Event::Connected { session, .. } => {
                    self.links.remove(&session);
                }
                _ => {}
            }
            return;
        }
        let ticket = match &event {
            Event::Write { ticket, .. } => Some(*ticket),
            _ => None,
        };
        let session = match &event {
            Event::Received { session, .. } | Event::Sent { session, .. } => Some(*session),
            _ => None,
        };
        match self.replica.handle(now_ms(), event) {
            Ok(actions) => {
                if let Err(error) = apply(self.engine.as_ref(), actions, later) {
                    self.fail(error);
                }
            }
            Err(error) => {
                tracing::error!(error = %error, source = ?error, "the kv's engine can't be read");
                if let Some(ticket) = ticket {
                    self.answer(ticket, Err(KvError::Engine(error)));
                }
                // The peer would take what it sent for merged.
                if let Some(session) = session {
                    self.links.remove(&session);
                }
            }
        }
    }

    /// Whether the disk has room for an event. While something waits that found none, no link may begin: a catch-up
    /// would tell a peer of writes that a crash can still take back.
    fn ready_for(&mut self, event: &Event) -> Result<(), EngineError> {
        let grows = matches!(
            event,
            Event::Write { .. } | Event::Received { message: Message::Batch { .. } | Message::Snapshot { .. }, .. }
        );
        let begins = self.full.is_some() && matches!(event, Event::Connected { .. });
        if !grows && !begins {
            return Ok(());
        }
        self.engine.writable()?;
        if self.full.is_some() {
            self.engine.flush()?;
            self.full = None;
            tracing::info!("the kv takes writes again");
        }
        Ok(())
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Commit(_) | Action::Flush => {}
            Action::Done { ticket, result } => {
                let result = match (&self.failed, &self.full, result) {
                    (Some(error), _, _) => Err(refused(error.clone())),
                    (None, Some(error), Ok(_)) => Err(KvError::Full(error.clone())),
                    (None, None, Ok(value)) => Ok(value),
                    (None, _, Err(error)) => Err(self.refusal(ticket, &error)),
                };
                self.answer(ticket, result);
            }
            Action::Send { session, frame, .. } => {
                // The replica counts what is queued, so a full channel is a fault of ours; the link then starts anew.
                if self.links.get(&session).is_some_and(|frames| frames.try_send(frame).is_err()) {
                    self.links.remove(&session);
                }
            }
            Action::Close { peer, session, why } => {
                tracing::warn!(%peer, why, "link closed");
                self.links.remove(&session);
            }
            Action::Notify(notice) => self.tell(notice),
        }
    }

    fn tell(&self, notice: Notice) {
        match notice {
            Notice::Corrupt { key } => {
                tracing::error!(store = %key.store, key = key.name, "corrupt record replaced by newer or healed entries");
            }
            Notice::Future { peer, entries } => {
                tracing::warn!(%peer, entries, "entries from the future kept aside: compare the clocks");
            }
            Notice::Stale { peer, entries } => {
                tracing::warn!(%peer, entries, "entries refused: their sender has to take a snapshot first");
            }
            Notice::Rewound { peer, incarnation } => {
                tracing::error!(%peer, incarnation, "the kv's directory is an old copy: going on as a new incarnation");
            }
            Notice::Forged { peer, entries } => {
                tracing::error!(%peer, entries, "entries refused: nothing proves that their origins wrote them");
            }
            Notice::Apart { node, since_ms } => {
                tracing::warn!(%node, since_ms, "nothing is collected: for long this node has said other than this one, or nothing");
            }
            Notice::Bootstrapped { peer } => tracing::info!(%peer, "all of a peer's state was taken"),
            Notice::Diverged { peer, entries } => {
                tracing::error!(%peer, entries, "a proof found old differences and repairs them");
            }
            Notice::Discarded { entry } => {
                let Key { store, name } = &entry.key;
                tracing::error!(%store, key = name, file = %self.discarded.display(), "write given up: it reached nobody in time");
                let file = std::fs::OpenOptions::new().create(true).append(true).open(&self.discarded);
                if let Err(error) = file.and_then(|mut file| writeln!(file, "{entry:?}")) {
                    tracing::error!(%error, file = %self.discarded.display(), "keep a write that was given up");
                }
            }
        }
    }

    fn refusal(&self, ticket: u64, error: &WriteError) -> KvError {
        let key = self.writers.get(&ticket).map_or_else(String::new, |(key, _)| key.name.clone());
        match error {
            WriteError::NotCounter(_) => KvError::NotCounter { key },
            WriteError::Corrupt => KvError::Corrupt { key },
            WriteError::ClockUnsafe { ahead_ms } => KvError::ClockUnsafe { ahead_ms: *ahead_ms },
            WriteError::Crowded => KvError::Crowded { key },
        }
    }

    fn answer(&mut self, ticket: u64, result: Result<Written, KvError>) {
        if let Some((_, reply)) = self.writers.remove(&ticket) {
            // A writer that stopped waiting has its write made all the same.
            let _gone = reply.send(result);
        }
    }

    /// A flush failed. Where that is for want of room, what it was to write waits in memory: it may still be made, as
    /// may any write that was answered with an error.
    fn unflushed(&mut self, error: EngineError) {
        if !error.is_full() {
            return self.fail(error);
        }
        tracing::error!(error = %error, source = ?error, "the disk is full: the kv only reads until there is room");
        self.full = Some(error);
        self.links.clear();
    }

    fn fail(&mut self, error: EngineError) {
        tracing::error!(error = %error, source = ?error, "the kv's engine failed: no more writes until restart");
        self.failed = Some(error);
        // What was to be sent may not be durable.
        self.links.clear();
    }
}

fn refused(error: EngineError) -> KvError {
    if error.is_full() { KvError::Full(error) } else { KvError::Engine(error) }
}

/// Milliseconds since the Unix epoch by the wall clock.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    use super::*;
    use crate::engine::{Batch, Memory, Row};
    use crate::trust::{Keyring, Nobody};

    /// Counts flushes, and fails them when told to.
    #[derive(Default)]
    struct Counting {
        rows: Memory,
        flushes: AtomicUsize,
        broken: AtomicBool,
        full: AtomicBool,
    }

    impl Engine for Counting {
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
            self.rows.get(key)
        }

        fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
            self.rows.scan(prefix, from, limit)
        }

        fn apply(&self, batch: Batch) -> Result<(), EngineError> {
            self.rows.apply(batch)
        }

        fn flush(&self) -> Result<(), EngineError> {
            self.flushes.fetch_add(1, Ordering::Relaxed);
            if self.full.load(Ordering::Relaxed) {
                return Err(EngineError::full("flush", std::io::Error::other("no space")));
            }
            if self.broken.load(Ordering::Relaxed) {
                return Err(EngineError::new("flush", std::io::Error::other("torn")));
            }
            Ok(())
        }
    }

    fn write(number: usize) -> (Input, oneshot::Receiver<Result<Written, KvError>>) {
        let (reply, done) = oneshot::channel();
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let key = Key { store: "app/default".parse().unwrap(), name: format!("k{number}") };
        let write = Write::Set { value: Bytes::from_static(b"v"), expires_ms: None };
        (Input::Write { key, write, seen: None, reply, _room: room }, done)
    }

    fn replica(engine: &Arc<Counting>) -> Replica {
        let rows = Arc::clone(engine) as Arc<dyn Engine>;
        let keyring = Keyring { trust: Arc::new(Nobody), chance: [0; 32] };
        Replica::open(rows, "a".parse().unwrap(), b"here", 1_000, keyring).unwrap()
    }

    #[test]
    fn what_waits_together_shares_a_flush() {
        let engine: Arc<Counting> = Arc::default();
        let replica = replica(&engine);
        engine.flushes.store(0, Ordering::Relaxed);
        let (sender, inputs) = mpsc::channel(INPUTS_MAX);
        let mut waiting = Vec::new();
        for number in 0..2 * GROUP_MAX {
            let (input, done) = write(number);
            assert!(sender.try_send(input).is_ok());
            waiting.push(done);
        }
        drop(sender);
        run(replica, Arc::clone(&engine) as Arc<dyn Engine>, inputs, SharedState::default(), PathBuf::new());
        for mut done in waiting {
            assert!(matches!(done.try_recv(), Ok(Ok(_))));
        }
        // One for each group and one at the end.
        assert_eq!(engine.flushes.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_write_whose_flush_failed_is_an_error_is_told_to_nobody_and_ends_all_writing() {
        let engine: Arc<Counting> = Arc::default();
        let replica = replica(&engine);
        let (sender, inputs) = mpsc::channel(INPUTS_MAX);
        let (frames, mut link) = mpsc::channel(16);
        let peer: NodeName = "b".parse().unwrap();
        let hello = Message::Hello {
            versions: crate::wire::VERSIONS,
            node: peer.clone(),
            vector: crate::vector::VersionVector::default(),
            reach: Reach::default(),
        };
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        assert!(sender.try_send(Input::Connected { peer: peer.clone(), session: 1, frames }).is_ok());
        let received = Input::Received { peer, session: 1, message: hello, _room: room };
        assert!(sender.try_send(received).is_ok());
        let committer = std::thread::spawn({
            let engine = Arc::clone(&engine) as Arc<dyn Engine>;
            move || run(replica, engine, inputs, SharedState::default(), PathBuf::new())
        });
        // Our hello and the end of an empty catch-up.
        assert!(link.blocking_recv().is_some() && link.blocking_recv().is_some());
        engine.broken.store(true, Ordering::Relaxed);
        for number in 0..2 {
            let (input, done) = write(number);
            assert!(sender.blocking_send(input).is_ok());
            assert!(matches!(done.blocking_recv(), Ok(Err(KvError::Engine(_)))));
        }
        assert!(link.blocking_recv().is_none(), "the link ended and the write was not sent");
        drop(sender);
        committer.join().unwrap();
    }

    #[test]
    fn a_full_disk_refuses_writes_and_ends_links_until_there_is_room() {
        let engine: Arc<Counting> = Arc::default();
        let replica = replica(&engine);
        let (sender, inputs) = mpsc::channel(INPUTS_MAX);
        let committer = std::thread::spawn({
            let engine = Arc::clone(&engine) as Arc<dyn Engine>;
            move || run(replica, engine, inputs, SharedState::default(), PathBuf::new())
        });
        let made = |number| {
            let (input, done) = write(number);
            assert!(sender.blocking_send(input).is_ok());
            done.blocking_recv().unwrap()
        };
        assert!(made(0).is_ok());
        engine.full.store(true, Ordering::Relaxed);
        assert!(matches!(made(1), Err(KvError::Full(_))));
        assert!(matches!(made(2), Err(KvError::Full(_))));
        // While what waits is not durable, no peer may learn of it.
        let (frames, mut link) = mpsc::channel(16);
        assert!(sender.blocking_send(Input::Connected { peer: "b".parse().unwrap(), session: 1, frames }).is_ok());
        assert!(link.blocking_recv().is_none());
        engine.full.store(false, Ordering::Relaxed);
        assert!(made(3).is_ok());
        drop(sender);
        committer.join().unwrap();
    }
}
