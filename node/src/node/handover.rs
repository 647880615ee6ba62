//! A node hands its sockets to the process that comes after it, so that a new version of the program takes over without a
//! connection refused.
//!
//! The one that runs offers its sockets at a Unix socket in its state directory. The one that starts has all ready but the
//! KV, whose files only one process may have; then it asks for the sockets, accepts at once what comes, lets the kernel
//! steer QUIC's new connections to itself, and says so. The old process takes nothing new, closes its KV as soon as the
//! calls of it that have begun are done, and says that it is free: the new one opens it. What the old one still answers
//! may go on to the end of its drain; calls of the KV go over this same socket until then.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::process::{PidfdFlags, geteuid, pidfd_open};
use selvage_backend::{Mesh, serve_carried};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::listen::dearth::Dearth;
use crate::listen::sockets::{Sockets, UdpGroup};
use crate::listen::steer::{Half, SHARDS_MAX};

/// The Unix socket in the state directory.
const FILE: &str = "handover.sock";
/// What both sides speak. A process of another version is refused.
const VERSION: u32 = 2;
/// Bytes of what one side tells the other.
const MESSAGE_BYTES_MAX: usize = 1_024;
/// Sockets at most: two of TCP, and both halves of QUIC's.
const SOCKETS_MAX: usize = 2 + 2 * SHARDS_MAX as usize;
/// How long the other side may take to answer; besides what the one before it has left to do.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How much later than it said the old process may go.
const LATE_MAX: Duration = Duration::from_secs(15);
/// What the successor says when new connections are its own.
const TAKEN: &[u8] = b"taken\n";
/// What the process before says when what only one process may have is free, though it runs on.
const FREE: &[u8] = b"free\n";

/// Why a node could not take over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The Unix socket failed.
    #[error("{action} {}", path.display())]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The node that runs says what this one does not understand.
    #[error("the node that runs can't hand over to this version")]
    Version,
    /// The node that runs does not go.
    #[error("the node that runs has not gone after {waited:?}")]
    Stays {
        /// How long that was.
        waited: Duration,
    },
}

/// What the sockets are that come with it, in this order.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    version: u32,
    https: bool,
    http: bool,
    quic: usize,
    second_half: bool,
    free_within_ms: u64,
}

/// Sockets that a successor may have.
#[derive(Debug)]
pub(super) struct Offer {
    task: JoinHandle<()>,
    taken: CancellationToken,
    successor: Arc<Mutex<Option<UnixStream>>>,
}

impl Offer {
    /// Offers `sockets` as soon as this process is `alone` with them. `free_within` is how long it takes to let go of what
    /// only one process may have.
    pub(super) fn open(
        state_dir: &Path,
        sockets: Sockets,
        free_within: Duration,
        alone: CancellationToken,
    ) -> Result<Self, HandoverError> {
        let path = state_dir.join(FILE);
        let failed = |source| HandoverError::Socket { action: "listen at", path: path.clone(), source };
        // Of the process before: it has handed over, or is gone.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let (taken, successor) = (CancellationToken::new(), Arc::new(Mutex::new(None)));
        let (told, place) = (taken.clone(), Arc::clone(&successor));
        let task = tokio::spawn(async move {
            let stream = wait(&listener, Arc::new(sockets), free_within, alone).await;
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
            told.cancel();
        });
        Ok(Self { task, taken, successor })
    }

    /// Whether somebody took over, as soon as it is so.
    pub(super) fn taken(&self) -> &CancellationToken {
        &self.taken
    }

    /// Lets go of the sockets.
    pub(super) async fn withdraw(&mut self) {
        self.task.abort();
        // An aborted task is gone when it has been awaited, and its sockets with it.
        let _ = (&mut self.task).await;
    }

    /// Tells the successor, if there is one, that what only one process may have is free: when `free`, now, and else when
    /// this process ends. Where it is told now, this is the stream to it.
    pub(super) fn let_go(&self, free: bool) -> Option<UnixStream> {
        let mut stream = self.successor.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        if !free {
            // The end of the process closes it.
            std::mem::forget(stream);
            return None;
        }
        // A successor that is gone needs to know nothing.
        stream.write_all(FREE).ok()?;
        Some(stream)
    }
}

/// Waits until somebody has taken the sockets.
async fn wait(
    listener: &UnixListener,
    sockets: Arc<Sockets>,
    free_within: Duration,
    alone: CancellationToken,
) -> UnixStream {
    let mut dearth = Dearth::at("handover");
    loop {
        let accepted = match listener.accept().await {
            Ok((accepted, _)) => accepted,
            Err(error) => {
                dearth.pause(&error).await;
                continue;
            }
        };
        // Half of QUIC's sockets are still those of the process before.
        alone.cancelled().await;
        let own = || {
            let stream = accepted;
            let own = stream.peer_cred()?.uid() == geteuid().as_raw();
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            if own { Ok(stream) } else { Err(io::ErrorKind::PermissionDenied.into()) }
        };
        let given = match own() {
            Ok(stream) => {
                let sockets = Arc::clone(&sockets);
                tokio::task::spawn_blocking(move || give(stream, &sockets, free_within)).await
            }
            Err(error) => Ok(Err(error)),
        };
        match given {
            Ok(Ok(stream)) => return stream,
            Ok(Err(error)) if is_nobody(&error) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a successor did not take over"),
            Err(_) => {}
        }
    }
}

/// Whether it was one who only looked whether a node runs, or went while it waited.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Gives the sockets, and waits until they have been taken.
fn give(mut stream: UnixStream, sockets: &Sockets, free_within: Duration) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.set_write_timeout(Some(ANSWER_MAX))?;
    let quic = sockets.quic.as_ref().filter(|group| group.sockets().len() > 1);
    let told = Told {
        version: VERSION,
        https: sockets.https.is_some(),
        http: sockets.http.is_some(),
        quic: quic.map_or(0, |group| group.sockets().len()),
        second_half: quic.is_some_and(|group| group.active() == Half::Second),
        free_within_ms: u64::try_from(free_within.as_millis()).unwrap_or(u64::MAX),
    };
    let mut message = serde_json::to_vec(&told)?;
    message.push(b'\n');
    let tcp = [&sockets.https, &sockets.http].into_iter().flatten().map(|socket| socket.as_fd());
    let udp = quic.into_iter().flat_map(UdpGroup::sockets).map(|socket| socket.as_fd());
    let all: Vec<BorrowedFd<'_>> = tcp.chain(udp).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !all.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&all)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(&stream, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
    let mut answer = [0; TAKEN.len()];
    stream.read_exact(&mut answer)?;
    if answer == TAKEN { Ok(stream) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Connects to the node that runs with this state directory. `None` if none runs.
fn connect(state_dir: &Path) -> Result<Option<UnixStream>, HandoverError> {
    let path = state_dir.join(FILE);
    match UnixStream::connect(&path) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(source) => Err(HandoverError::Socket { action: "connect to", path, source }),
    }
}

/// Whether a node runs with this state directory that would hand over.
pub(super) fn runs(state_dir: &Path) -> Result<bool, HandoverError> {
    Ok(connect(state_dir)?.is_some())
}

/// The node that runs, as the one sees it that comes after it.
#[derive(Debug)]
pub(super) struct Predecessor {
    stream: UnixStream,
    path: PathBuf,
    free_within: Duration,
    /// None where the system can't say.
    process: Option<OwnedFd>,
}

/// Asks the node that runs with this state directory for its sockets, and waits for as long as `patience` if it has not
/// done with the one before it. `None` if none runs. It goes on until [`Predecessor::succeed`]. Blocks.
pub(super) fn meet(state_dir: &Path, patience: Duration) -> Result<Option<(Predecessor, Sockets)>, HandoverError> {
    let path = state_dir.join(FILE);
    let Some(stream) = connect(state_dir)? else { return Ok(None) };
    let failed = |action| {
        let path = path.clone();
        move |source| HandoverError::Socket { action, path, source }
    };
    stream.set_read_timeout(Some(ANSWER_MAX.saturating_add(patience))).map_err(failed("set up"))?;
    let (told, descriptors) = receive(&stream).map_err(failed("receive sockets from"))?;
    let told = told.filter(|told| told.version == VERSION).ok_or(HandoverError::Version)?;
    let sockets = assemble(&told, descriptors).ok_or(HandoverError::Version)?;
    let free_within = Duration::from_millis(told.free_within_ms);
    // Asked for while it is there, as its number may be another's later.
    let process = process_of(&stream);
    Ok(Some((Predecessor { stream, path, free_within, process }, sockets)))
}

impl Predecessor {
    /// Takes over: new connections of QUIC come to `quic`, and the other one takes nothing new from now on.
    pub(super) fn succeed(&mut self, quic: Option<&UdpGroup>) -> Result<(), HandoverError> {
        let failed = |action| {
            let path = self.path.clone();
            move |source| HandoverError::Socket { action, path, source }
        };
        quic.map_or(Ok(()), |group| group.steer(true)).map_err(failed("steer packets taken from"))?;
        self.stream.write_all(TAKEN).map_err(failed("answer"))?;
        tracing::info!("new connections are ours; the node before lets its requests end");
        Ok(())
    }

    /// Waits until it says that what only one process may have is free, or is gone. Blocks.
    pub(super) fn wait_until_free(&mut self) -> Result<(), HandoverError> {
        let most = self.free_within.saturating_add(LATE_MAX);
        wait_for_end(&mut self.stream, self.process.as_ref(), most)
    }

    /// Answers its calls of the KV until it has ended. `on_call` hears of each.
    pub(super) async fn serve(self, mesh: Mesh, on_call: impl Fn()) {
        let nonblocking = self.stream.set_nonblocking(true);
        match nonblocking.and_then(|()| tokio::net::UnixStream::from_std(self.stream)) {
            Ok(stream) => match serve_carried(stream, mesh, on_call).await {
                Ok(()) => {}
                Err(error) => tracing::warn!(%error, "calls of the node before are carried no more"),
            },
            Err(error) => tracing::warn!(%error, "calls of the node before can't be carried"),
        }
        let Some(process) = self.process else { return };
        #[expect(unsafe_code, reason = "tokio can't know what a descriptor is")]
        // SAFETY: an `OwnedFd` is open, and is the same one until `AsyncFd`, which owns it, is dropped.
        let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
        // A pidfd is readable once its process has ended (pidfd_open(2)).
        match process {
            Ok(process) => drop(process.readable().await),
            Err(error) => tracing::warn!(%error, "the end of the node before can't be awaited"),
        }
    }
}

fn receive(stream: &UnixStream) -> io::Result<(Option<Told>, Vec<OwnedFd>)> {
    let mut message = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = part {
            descriptors.extend(more);
        }
    }
    // One short message, with all descriptors: it comes whole or is not one of ours.
    let whole = !got.flags.contains(ReturnFlags::CTRUNC) && message[..got.bytes].ends_with(b"\n");
    let told = serde_json::from_slice(&message[..got.bytes]).ok().filter(|_| whole);
    Ok((told, descriptors))
}

fn assemble(told: &Told, descriptors: Vec<OwnedFd>) -> Option<Sockets> {
    let mut next = descriptors.into_iter();
    let mut tcp = |there: bool| if there { next.next().map(|fd| Some(TcpListener::from(fd))) } else { Some(None) };
    let (https, http) = (tcp(told.https)?, tcp(told.http)?);
    let udp: Vec<UdpSocket> = next.map(UdpSocket::from).collect();
    if udp.len() != told.quic {
        return None;
    }
    let quic = match udp.len() {
        0 => None,
        _ => Some(UdpGroup::inherit(udp, if told.second_half { Half::Second } else { Half::First })?),
    };
    Some(Sockets { https, http, quic })
}

/// Waits until the other side says that all is free, or is gone.
fn wait_for_end(stream: &mut UnixStream, process: Option<&OwnedFd>, most: Duration) -> Result<(), HandoverError> {
    let begun = Instant::now();
    let left = || Some(most.saturating_sub(begun.elapsed())).filter(|left| !left.is_zero());
    let stays = || HandoverError::Stays { waited: most };
    let (mut said, mut read) = ([0; FREE.len()], 0);
    while read < said.len() {
        // Fails only for no time at all.
        let _ = stream.set_read_timeout(Some(left().ok_or_else(stays)?));
        match stream.read(&mut said[read..]) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(0) | Err(_) => break,
            Ok(more) => read += more,
        }
    }
    let is_free = read == said.len();
    // A process that ends closes its files one by one, and this one may be among the first.
    while let Some(process) = process.filter(|_| !is_free) {
        let left = left().ok_or_else(stays)?;
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) | Err(_) => break,
        }
    }
    Ok(())
}

/// The process at the other side of a socket. None where the system can't say.
fn process_of(stream: &UnixStream) -> Option<OwnedFd> {
    let other = socket_peercred(stream).ok()?.pid;
    pidfd_open(other, PidfdFlags::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::ListenOptions;

    fn sockets() -> Sockets {
        let any = Some("127.0.0.1:0".parse().unwrap());
        Sockets::default().bind(&ListenOptions { https: any, http: any, tls: None }).unwrap()
    }

    /// Takes over, and waits until all is free.
    async fn take(dir: &Path) -> Result<Option<Sockets>, HandoverError> {
        let dir = dir.to_owned();
        let take = move || {
            let Some((mut before, sockets)) = meet(&dir, Duration::ZERO)? else { return Ok(None) };
            before.succeed(sockets.quic.as_ref())?;
            before.wait_until_free()?;
            Ok(Some(sockets))
        };
        tokio::task::spawn_blocking(take).await.unwrap()
    }

    fn alone() -> CancellationToken {
        let alone = CancellationToken::new();
        alone.cancel();
        alone
    }

    #[tokio::test]
    async fn sockets_go_from_one_to_the_next_and_on() {
        let dir = tempfile::tempdir().unwrap();
        assert!(take(dir.path()).await.unwrap().is_none(), "nobody runs");
        let mut own = sockets();
        let addresses = |sockets: &Sockets| {
            let tcp = |socket: &Option<TcpListener>| socket.as_ref().unwrap().local_addr().unwrap();
            let udp = sockets.quic.as_ref().unwrap().sockets()[0].local_addr().unwrap();
            (tcp(&sockets.https), tcp(&sockets.http), udp)
        };
        let wanted = addresses(&own);
        for half in [Half::Second, Half::First, Half::Second] {
            let offer = Offer::open(dir.path(), own, Duration::from_secs(1), alone()).unwrap();
            let taking = tokio::spawn({
                let dir = dir.path().to_owned();
                async move { take(&dir).await }
            });
            offer.taken().cancelled().await;
            assert!(!taking.is_finished(), "the one before has not gone");
            offer.let_go(true);
            own = taking.await.unwrap().unwrap().unwrap();
            assert_eq!((addresses(&own), own.quic.as_ref().unwrap().active()), (wanted, half));
        }
    }

    #[tokio::test]
    async fn who_does_not_take_loses_nothing_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let offer = Offer::open(dir.path(), sockets(), Duration::from_secs(1), alone()).unwrap();
        let path = dir.path().join(FILE);
        drop(UnixStream::connect(&path).unwrap());
        let mut rude = UnixStream::connect(&path).unwrap();
        rude.write_all(b"no way").unwrap();
        let taking = tokio::spawn({
            let dir = dir.path().to_owned();
            async move { take(&dir).await }
        });
        offer.taken().cancelled().await;
        offer.let_go(true);
        assert!(taking.await.unwrap().unwrap().is_some());
    }

    #[tokio::test]
    async fn what_is_no_offer_is_refused() {
        for message in [
            &b"{}\n"[..],
            b"nothing",
            b"{\"version\":1,\"https\":false,\"http\":false,\"quic\":0,\"second_half\":false,\"free_within_ms\":1}\n",
            b"{\"version\":2,\"https\":true,\"http\":false,\"quic\":0,\"second_half\":false,\"free_within_ms\":1}\n",
            b"{\"version\":2,\"https\":false,\"http\":false,\"quic\":2,\"second_half\":false,\"free_within_ms\":1}\n",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let listener = std::os::unix::net::UnixListener::bind(dir.path().join(FILE)).unwrap();
            let told = message.to_vec();
            let other = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(&told).unwrap();
                stream
            });
            assert!(
                matches!(take(dir.path()).await, Err(HandoverError::Version)),
                "{}",
                String::from_utf8_lossy(message)
            );
            drop(other.join().unwrap());
        }
    }

    #[test]
    fn who_does_not_go_is_told() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let stays = |near: &mut UnixStream| {
            let own = process_of(near).unwrap();
            matches!(wait_for_end(near, Some(&own), Duration::from_millis(20)), Err(HandoverError::Stays { .. }))
        };
        assert!(stays(&mut near));
        // The socket has ended, and its process, which is this one, has not.
        drop(far);
        assert!(stays(&mut near));
    }

    #[test]
    fn who_says_that_all_is_free_is_waited_for_no_longer() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        far.write_all(FREE).unwrap();
        wait_for_end(&mut near, None, Duration::from_secs(60)).unwrap();
        // What comes after it is for others.
        far.write_all(b"!").unwrap();
        let mut byte = [0];
        near.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
    }

    #[tokio::test]
    async fn who_still_has_one_before_it_hands_over_when_that_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let before = CancellationToken::new();
        let offer = Offer::open(dir.path(), sockets(), Duration::from_secs(1), before.clone()).unwrap();
        assert!(runs(dir.path()).unwrap(), "whoever looks is told so");
        let path = dir.path().to_owned();
        let impatient = tokio::task::spawn_blocking(move || {
            let stream = connect(&path).unwrap().unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            receive(&stream).is_err()
        });
        assert!(impatient.await.unwrap(), "it gives nothing yet");
        before.cancel();
        let taking = tokio::spawn({
            let dir = dir.path().to_owned();
            async move { take(&dir).await }
        });
        offer.taken().cancelled().await;
        assert!(offer.let_go(true).is_some());
        assert!(taking.await.unwrap().unwrap().is_some());
        assert!(offer.let_go(true).is_none(), "there is one successor");
    }
}
