//! Requests in front of the handshake's end (0-RTT), seen through a relay that can hold the client back.

use std::sync::Mutex;

use quinn::{ClientConfig as QuicClient, Connecting};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::bodies::deploy;
use super::raw::{DATA, GOOD, Outcome, Raw, frame, get, head};
use super::*;

/// Bytes of a datagram that are passed on.
const DATAGRAM_BYTES_MAX: usize = 2 * 1024;

/// Stands between a connection's client and the node. While it holds, what the client sends after it has heard of the node
/// waits.
struct Relay {
    address: SocketAddr,
    holds: watch::Sender<bool>,
    /// What the client said in its first breath.
    first: Arc<Mutex<Vec<Vec<u8>>>>,
    task: JoinHandle<()>,
}

impl Relay {
    async fn to(node: SocketAddr) -> Self {
        let (near, far) =
            (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
        far.connect(node).await.unwrap();
        let (holds, mut held) = watch::channel(true);
        let first = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let (address, heard) = (near.local_addr().unwrap(), Arc::clone(&first));
        let task = tokio::spawn(async move {
            let (mut there, mut back) = (vec![0; DATAGRAM_BYTES_MAX], vec![0; DATAGRAM_BYTES_MAX]);
            let (mut client, mut waiting, mut has_answered) = (None, Vec::new(), false);
            loop {
                // A datagram is received whole or stays in its socket.
                tokio::select! {
                    Ok((length, from)) = near.recv_from(&mut there) => {
                        client = Some(from);
                        let datagram = there[..length].to_vec();
                        if !has_answered {
                            heard.lock().unwrap().push(datagram.clone());
                        }
                        if has_answered && *held.borrow() {
                            waiting.push(datagram);
                        } else {
                            far.send(&datagram).await.unwrap();
                        }
                    }
                    Ok(length) = far.recv(&mut back) => {
                        has_answered = true;
                        near.send_to(&back[..length], client.unwrap()).await.unwrap();
                    }
                    Ok(()) = held.changed() => {
                        for datagram in waiting.drain(..) {
                            far.send(&datagram).await.unwrap();
                        }
                    }
                }
            }
        });
        Self { address, holds, first, task }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A front with early data and a guest, and a client.
struct Scene {
    front: Front,
    client: QuicClient,
    _guest: crate::guest::Active,
}

impl Scene {
    async fn new(has_early_data: bool) -> Self {
        let front = Front::open(Bounds::default(), &["hello"], Arc::default(), has_early_data).await;
        let guest = deploy(&front, "early.wat").await;
        let mut crypto = front.client(b"h3");
        crypto.enable_early_data = true;
        let client = QuicClient::new(Arc::new(QuicClientConfig::try_from(crypto).unwrap()));
        Self { front, client, _guest: guest }
    }

    fn begin(&self, at: SocketAddr) -> (Endpoint, Connecting) {
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connecting = endpoint.connect_with(self.client.clone(), at, HOST).unwrap();
        (endpoint, connecting)
    }

    /// Comes once, and goes with tickets and tokens.
    async fn come_first(&self) {
        let (endpoint, connecting) = self.begin(self.front.https());
        let raw = Raw::over(endpoint, connecting.await.unwrap());
        // What the node says of itself comes in front of the answer.
        assert_eq!(raw.ask(&get("/status")).await, Outcome::Status(200));
        raw.quic.close(VarInt::from_u32(0x100), b"");
    }

    /// Comes again, and speaks before the node has answered. What it says later is held back.
    async fn come_again(&self) -> (Raw, quinn::ZeroRttAccepted, Relay) {
        let relay = Relay::to(self.front.https()).await;
        let (endpoint, connecting) = self.begin(relay.address);
        let (quic, accepted) = connecting.into_0rtt().unwrap_or_else(|_| panic!("it has no ticket"));
        (Raw::over(endpoint, quic), accepted, relay)
    }

    fn early(&self, answered: &str) -> String {
        format!(r#"selvage_early_requests_total{{answered="{answered}"}} 1"#)
    }
}

#[tokio::test]
async fn what_does_no_harm_is_answered_before_the_handshake_ends_and_the_app_is_told() {
    let scene = Scene::new(true).await;
    scene.come_first().await;
    let (raw, accepted, relay) = scene.come_again().await;
    assert_eq!(raw.ask(&get("/status")).await, Outcome::Status(425));
    scene.front.counted(&scene.early("at-once")).await;
    relay.holds.send_replace(false);
    assert!(timeout(PATIENCE, accepted).await.unwrap());
    assert_eq!(raw.ask(&get("/status")).await, Outcome::Status(200), "after the handshake it is not early");
}

#[tokio::test]
async fn what_may_do_harm_waits_for_the_handshakes_end() {
    let scene = Scene::new(true).await;
    for (count, fields, body) in [
        (1, [(":method", "POST"), GOOD[1], GOOD[2], (":path", "/status")], vec![]),
        (2, [(":method", "GET"), GOOD[1], GOOD[2], (":path", "/status")], frame(DATA, b"body")),
    ] {
        scene.come_first().await;
        let (raw, accepted, relay) = scene.come_again().await;
        let asked = [head(&fields), body].concat();
        let (mut send, receive) = raw.quic.open_bi().await.unwrap();
        send.write_all(&asked).await.unwrap();
        send.finish().unwrap();
        scene.front.counted(&format!(r#"selvage_early_requests_total{{answered="after-handshake"}} {count}"#)).await;
        relay.holds.send_replace(false);
        assert!(timeout(PATIENCE, accepted).await.unwrap());
        assert_eq!(raw.outcome(receive).await, Outcome::Status(200), "{fields:?}");
    }
}

#[tokio::test]
async fn what_is_sent_again_by_another_is_not_answered() {
    let scene = Scene::new(true).await;
    scene.come_first().await;
    let (raw, accepted, relay) = scene.come_again().await;
    assert_eq!(raw.ask(&get("/status")).await, Outcome::Status(425));
    relay.holds.send_replace(false);
    assert!(timeout(PATIENCE, accepted).await.unwrap());
    raw.quic.close(VarInt::from_u32(0x100), b"");
    let first = relay.first.lock().unwrap().clone();
    let thief = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut answer = vec![0; DATAGRAM_BYTES_MAX];
    // As long as the node remembers the connection it says nothing to it; then it takes it for one who comes new.
    let sent_again = async {
        loop {
            for datagram in &first {
                thief.send_to(datagram, scene.front.https()).await.unwrap();
            }
            if timeout(Duration::from_millis(100), thief.recv(&mut answer)).await.is_ok() {
                return;
            }
        }
    };
    timeout(PATIENCE, sent_again).await.unwrap();
    scene.come_first().await;
    scene.front.counted(&scene.early("at-once")).await;
    assert!(!scene.front.parts.metrics.text().contains("after-handshake"));
}

#[tokio::test]
async fn of_an_address_that_is_not_proven_nothing_is_taken_early() {
    let scene = Scene::new(true).await;
    scene.come_first().await;
    // It has a ticket, and no token.
    let mut stranger = scene.client.clone();
    stranger.token_store(Arc::new(quinn::NoneTokenStore));
    let scene = Scene { client: stranger, ..scene };
    let (raw, accepted, relay) = scene.come_again().await;
    let (mut send, receive) = raw.quic.open_bi().await.unwrap();
    send.write_all(&get("/status")).await.unwrap();
    send.finish().unwrap();
    relay.holds.send_replace(false);
    assert!(timeout(PATIENCE, accepted).await.unwrap());
    assert_eq!(raw.outcome(receive).await, Outcome::Status(200), "an address that is not proven has no early data");
}

#[tokio::test]
async fn unless_the_node_says_so_there_is_no_early_data() {
    let scene = Scene::new(false).await;
    scene.come_first().await;
    let (_endpoint, connecting) = scene.begin(scene.front.https());
    assert!(connecting.into_0rtt().is_err(), "its tickets don't allow it");
}
