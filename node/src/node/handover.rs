//! A node hands its sockets to the process that comes after it, so that a new version of the program takes over without a
//! connection refused.
//!
//! The one that runs offers its sockets at a Unix socket in its state directory. The one that starts asks for them, lets the
//! kernel steer new connections to itself, and says so. From then on what is new waits in the sockets; the old process
//! lets its requests end, closes its KV, whose files only one process may have, and goes; the new one opens it and serves.

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
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::listen::dearth::Dearth;
use crate::listen::sockets::{Sockets, UdpGroup};
use crate::listen::steer::{Half, SHARDS_MAX};

/// The Unix socket in the state directory.
const FILE: &str = "handover.sock";
/// What both sides speak. A process of another version is refused.
const VERSION: u32 = 1;
/// Bytes of what one side tells the other.
const MESSAGE_BYTES_MAX: usize = 1_024;
/// Sockets at most: two of TCP, and both halves of QUIC's.
const SOCKETS_MAX: usize = 2 + 2 * SHARDS_MAX as usize;
/// How long the other side may take to answer.
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
    goes_within_ms: u64,
}

/// Sockets that a successor may have.
#[derive(Debug)]
pub(super) struct Offer {
    task: JoinHandle<()>,
    taken: CancellationToken,
    successor: Arc<Mutex<Option<UnixStream>>>,
}

impl Offer {
    /// Offers `sockets` from now on. `goes_within` is how long this process takes to go.
    pub(super) fn open(state_dir: &Path, sockets: Sockets, goes_within: Duration) -> Result<Self, HandoverError> {
        let path = state_dir.join(FILE);
        let failed = |source| HandoverError::Socket { action: "listen at", path: path.clone(), source };
        // Of the process before: whoever still ran would have the KV, and this one would not have come so far.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let (taken, successor) = (CancellationToken::new(), Arc::new(Mutex::new(None)));
        let (told, place) = (taken.clone(), Arc::clone(&successor));
        let task = tokio::spawn(async move {
            let stream = wait(&listener, Arc::new(sockets), goes_within).await;
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
    /// this process ends.
    pub(super) fn let_go(&self, free: bool) {
        let Some(mut stream) = self.successor.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        if free {
            // A successor that is gone needs to know nothing.
            let _ = stream.write_all(FREE);
        } else {
            // The end of the process closes it.
            std::mem::forget(stream);
        }
    }
}

/// Waits until somebody has taken the sockets.
async fn wait(listener: &UnixListener, sockets: Arc<Sockets>, goes_within: Duration) -> UnixStream {
    let mut dearth = Dearth::at("handover");
    loop {
        let accepted = match listener.accept().await {
            Ok((accepted, _)) => accepted,
            Err(error) => {
                dearth.pause(&error).await;
                continue;
            }
        };
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
                tokio::task::spawn_blocking(move || give(stream, &sockets, goes_within)).await
            }
            Err(error) => Ok(Err(error)),
        };
        match given {
            Ok(Ok(stream)) => return stream,
            Ok(Err(error)) => tracing::warn!(%error, "a successor did not take over"),
            Err(_) => {}
        }
    }
}

/// Gives the sockets, and waits until they have been taken.
fn give(mut stream: UnixStream, sockets: &Sockets, goes_within: Duration) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.set_write_timeout(Some(ANSWER_MAX))?;
    let quic = sockets.quic.as_ref().filter(|group| group.sockets().len() > 1);
    let told = Told {
        version: VERSION,
        https: sockets.https.is_some(),
        http: sockets.http.is_some(),
        quic: quic.map_or(0, |group| group.sockets().len()),
        second_half: quic.is_some_and(|group| group.active() == Half::Second),
        goes_within_ms: u64::try_from(goes_within.as_millis()).unwrap_or(u64::MAX),
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

/// Takes over from the node that runs with this state directory, and waits until it has gone. `None` if none runs. Blocks.
pub(super) fn take_over(state_dir: &Path) -> Result<Option<Sockets>, HandoverError> {
    let path = state_dir.join(FILE);
    let failed = |action| {
        let path = path.clone();
        move |source| HandoverError::Socket { action, path, source }
    };
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(failed("connect to")(error)),
    };
    stream.set_read_timeout(Some(ANSWER_MAX)).map_err(failed("set up"))?;
    let (told, descriptors) = receive(&stream).map_err(failed("receive sockets from"))?;
    let told = told.filter(|told| told.version == VERSION).ok_or(HandoverError::Version)?;
    let sockets = assemble(&told, descriptors).ok_or(HandoverError::Version)?;
    let steer = |is_handover| sockets.quic.as_ref().map_or(Ok(()), |group| group.steer(is_handover));
    steer(true).map_err(failed("steer packets taken from"))?;
    stream.write_all(TAKEN).map_err(failed("answer"))?;
    tracing::info!("new connections are ours; the node before lets its requests end");
    wait_for_end(&mut stream, Duration::from_millis(told.goes_within_ms).saturating_add(LATE_MAX))?;
    steer(false).map_err(failed("steer packets taken from"))?;
    Ok(Some(sockets))
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
fn wait_for_end(stream: &mut UnixStream, most: Duration) -> Result<(), HandoverError> {
    let begun = Instant::now();
    let left = || Some(most.saturating_sub(begun.elapsed())).filter(|left| !left.is_zero());
    let stays = || HandoverError::Stays { waited: most };
    // Whose end is awaited below: asked for while it is there, as its number may be another's later.
    let process = process_of(stream);
    let mut byte = [0; 1];
    let said = loop {
        // Fails only for no time at all.
        let _ = stream.set_read_timeout(Some(left().ok_or_else(stays)?));
        match stream.read(&mut byte) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(read) => break read > 0,
            Err(_) => break false,
        }
    };
    // A process that ends closes its files one by one, and this one may be among the first.
    while let Some(process) = process.as_ref().filter(|_| !said) {
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

    async fn take(dir: &Path) -> Result<Option<Sockets>, HandoverError> {
        let dir = dir.to_owned();
        tokio::task::spawn_blocking(move || take_over(&dir)).await.unwrap()
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
            let offer = Offer::open(dir.path(), own, Duration::from_secs(1)).unwrap();
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
        let offer = Offer::open(dir.path(), sockets(), Duration::from_secs(1)).unwrap();
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
            b"{\"version\":2,\"https\":false,\"http\":false,\"quic\":0,\"second_half\":false,\"goes_within_ms\":1}\n",
            b"{\"version\":1,\"https\":true,\"http\":false,\"quic\":0,\"second_half\":false,\"goes_within_ms\":1}\n",
            b"{\"version\":1,\"https\":false,\"http\":false,\"quic\":2,\"second_half\":false,\"goes_within_ms\":1}\n",
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
            matches!(wait_for_end(near, Duration::from_millis(20)), Err(HandoverError::Stays { .. }))
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
        wait_for_end(&mut near, Duration::from_secs(60)).unwrap();
    }
}
