//! Session tickets that every node of a point of presence can open (RFC 8446 4.6.1, RFC 5077).
//!
//! Time is cut into epochs, each with a key of its own that comes of the shared secret, so nodes need not talk to change
//! keys. A ticket is sealed with the key of its epoch and opened for two epochs more; the epoch to come is taken too,
//! because another node's clock may be ahead. A ticket names its key by sixteen bytes that tell nothing of time or key.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::server::ProducesTickets;

use crate::secret::FrontSecret;

/// How long tickets are sealed with one key, seconds. The nonce is random: 2³² tickets in this time, a hundred thousand a
/// second, are the most for which NIST SP 800-38D 8.3 calls that safe.
const EPOCH_SECONDS: u64 = 12 * 3_600;
/// Epochs before the present one whose tickets are opened.
const EPOCHS_PAST: u64 = 2;
/// How long a client may keep a ticket, seconds: what is opened at least.
const LIFETIME_SECONDS: u32 = 24 * 3_600;
/// Bytes of a key's name.
const NAME_BYTES: usize = 16;
/// Bytes of a ticket that is looked at. With a client's certificates they may be larger, but those get none.
const TICKET_BYTES_MAX: usize = 16 * 1024;

/// Seals and opens tickets.
pub(crate) struct Tickets {
    secret: FrontSecret,
    keys: ArcSwap<Keys>,
    random: SystemRandom,
}

/// The keys of a time.
struct Keys {
    epoch: u64,
    /// The present one first, then the one to come, then those that were.
    known: Vec<Key>,
}

struct Key {
    name: [u8; NAME_BYTES],
    key: LessSafeKey,
}

impl Key {
    fn new(secret: &FrontSecret, epoch: u64) -> Self {
        let epoch = epoch.to_be_bytes();
        let key: [u8; 32] = secret.key(&[b"ticket key", &epoch]);
        let key = UnboundKey::new(&AES_256_GCM, &key).expect("a key of the algorithm's length");
        Self { name: secret.key(&[b"ticket name", &epoch]), key: LessSafeKey::new(key) }
    }
}

impl Keys {
    fn new(secret: &FrontSecret, epoch: u64) -> Self {
        let next = epoch.saturating_add(1);
        let past = (1..=EPOCHS_PAST).filter_map(|ago| epoch.checked_sub(ago));
        let epochs = [epoch, next].into_iter().chain(past);
        Self { epoch, known: epochs.map(|epoch| Key::new(secret, epoch)).collect() }
    }
}

/// The epoch of a time. A clock before 1970 is in the first one.
fn epoch(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()) / EPOCH_SECONDS
}

impl Tickets {
    pub(crate) fn new(secret: FrontSecret) -> Self {
        let keys = ArcSwap::from_pointee(Keys::new(&secret, epoch(SystemTime::now())));
        Self { secret, keys, random: SystemRandom::new() }
    }

    /// The keys of this time. They are made anew by whoever comes first in it, or by two at once: they are the same.
    fn keys(&self, now: SystemTime) -> Arc<Keys> {
        let (keys, epoch) = (self.keys.load_full(), epoch(now));
        if keys.epoch == epoch {
            return keys;
        }
        let keys = Arc::new(Keys::new(&self.secret, epoch));
        self.keys.store(Arc::clone(&keys));
        keys
    }

    fn seal(&self, now: SystemTime, plain: &[u8]) -> Option<Vec<u8>> {
        let keys = self.keys(now);
        let Key { name, key } = keys.known.first()?;
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut ticket = Vec::with_capacity(NAME_BYTES + NONCE_LEN + plain.len() + AES_256_GCM.tag_len());
        ticket.extend_from_slice(name);
        ticket.extend_from_slice(&nonce);
        ticket.extend_from_slice(plain);
        let body = &mut ticket[NAME_BYTES + NONCE_LEN..];
        let tag = key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(name), body).ok()?;
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn open(&self, now: SystemTime, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (name, rest) = ticket.split_first_chunk::<NAME_BYTES>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let keys = self.keys(now);
        let Key { key, .. } = keys.known.iter().find(|key| key.name == *name)?;
        let mut sealed = sealed.to_vec();
        let length = key.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(name), &mut sealed).ok()?.len();
        sealed.truncate(length);
        Some(sealed)
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME_SECONDS
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(SystemTime::now(), plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.open(SystemTime::now(), cipher)
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").field("epoch", &self.keys.load().epoch).finish_non_exhaustive()
    }
}

/// Gives and takes no ticket: the listener asks for certificates, and a resumed session would not show one.
#[derive(Debug)]
pub(crate) struct NoTickets;

impl ProducesTickets for NoTickets {
    fn enabled(&self) -> bool {
        false
    }

    fn lifetime(&self) -> u32 {
        0
    }

    fn encrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn decrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use rustls::client::Resumption;
    use rustls::{ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection};
    use selvage_config::node::TlsProvider;

    use super::*;
    use crate::{Authority, Certificates, FrontTls, Resolver, TlsVersions, front_server, roots_of};

    const PLAIN: &[u8] = b"a session";

    /// Two nodes of one place.
    fn nodes() -> (Tickets, Tickets) {
        let secret = FrontSecret::random().unwrap();
        (Tickets::new(secret.clone()), Tickets::new(secret))
    }

    fn at(epochs: u64, seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs((40_000 + epochs) * EPOCH_SECONDS + seconds)
    }

    #[test]
    fn every_node_opens_what_another_one_sealed() {
        let (one, other) = nodes();
        let ticket = one.seal(at(0, 7), PLAIN).unwrap();
        assert_eq!(other.open(at(0, 9), &ticket).unwrap(), PLAIN);
        assert_ne!(one.seal(at(0, 7), PLAIN).unwrap(), ticket, "the nonce is another one");
        assert!(nodes().0.open(at(0, 9), &ticket).is_none(), "another secret");
        assert_eq!(one.decrypt(&other.encrypt(PLAIN).unwrap()).unwrap(), PLAIN);
    }

    #[test]
    fn a_ticket_is_opened_for_two_epochs_more_and_a_clock_may_be_ahead() {
        let (one, other) = nodes();
        let ticket = one.seal(at(10, 0), PLAIN).unwrap();
        for (epoch, opened) in [(8, false), (9, true), (10, true), (11, true), (12, true), (13, false)] {
            assert_eq!(other.open(at(epoch, 0), &ticket).is_some(), opened, "{epoch}");
        }
        assert!(u64::from(LIFETIME_SECONDS) <= EPOCHS_PAST * EPOCH_SECONDS);
        // Back again: keys do not only go forward.
        assert!(other.open(at(10, 0), &ticket).is_some());
    }

    #[test]
    fn a_ticket_that_was_touched_is_not_opened() {
        let (one, _) = nodes();
        let ticket = one.seal(at(0, 0), PLAIN).unwrap();
        for index in 0..ticket.len() {
            let mut touched = ticket.clone();
            touched[index] ^= 1;
            assert!(one.open(at(0, 0), &touched).is_none(), "{index}");
            assert!(one.open(at(0, 0), &ticket[..index]).is_none(), "{index}");
        }
        assert!(one.open(at(0, 0), &[ticket.as_slice(), &[0]].concat()).is_none());
        assert!(one.open(at(0, 0), &vec![0; 1 << 20]).is_none());
    }

    #[test]
    fn a_clock_at_its_beginning_breaks_nothing() {
        let (one, _) = nodes();
        let ticket = one.seal(UNIX_EPOCH - Duration::from_secs(1), PLAIN).unwrap();
        assert_eq!(one.open(UNIX_EPOCH, &ticket).unwrap(), PLAIN);
    }

    /// Tickets whose clock a test sets.
    #[derive(Debug)]
    struct Clocked {
        tickets: Tickets,
        epochs: AtomicU64,
    }

    impl Clocked {
        fn now(&self) -> SystemTime {
            at(self.epochs.load(Ordering::SeqCst), 0)
        }
    }

    impl ProducesTickets for Clocked {
        fn enabled(&self) -> bool {
            true
        }

        fn lifetime(&self) -> u32 {
            LIFETIME_SECONDS
        }

        fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
            self.tickets.seal(self.now(), plain)
        }

        fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
            self.tickets.open(self.now(), cipher)
        }
    }

    /// One handshake, with all that the server says after it.
    fn shake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> HandshakeKind {
        let mut client = ClientConnection::new(Arc::clone(client), "shop.test".try_into().unwrap()).unwrap();
        let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
        while client.wants_write() || server.wants_write() {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).unwrap();
            }
            server.read_tls(&mut bytes.as_slice()).unwrap();
            server.process_new_packets().unwrap();
            bytes.clear();
            while server.wants_write() {
                server.write_tls(&mut bytes).unwrap();
            }
            if !bytes.is_empty() {
                client.read_tls(&mut bytes.as_slice()).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        client.handshake_kind().unwrap()
    }

    #[test]
    fn sessions_are_resumed_while_keys_change_under_load() {
        const CLIENTS: usize = 4;
        const ROUNDS: u64 = 12;
        let authority = Authority::create("public").unwrap();
        let table = Certificates::of([&authority.issue_server(&["shop.test".into()], &[]).unwrap()]).unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        let tls = FrontTls {
            resolver: Arc::new(Resolver::new(table)),
            provider: TlsProvider::default(),
            secret: FrontSecret::random().unwrap(),
            versions: TlsVersions::Only13,
            has_challenges: false,
            has_early_data: false,
            rules: Arc::default(),
        };
        let clocked = Arc::new(Clocked { tickets: Tickets::new(tls.secret.clone()), epochs: AtomicU64::new(0) });
        let mut server = ServerConfig::clone(&front_server(&tls, &[], tls.versions).unwrap());
        server.ticketer = Arc::<Clocked>::clone(&clocked);
        let (server, round) = (Arc::new(server), Barrier::new(CLIENTS + 1));
        std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let mut client = crate::client(&roots);
                    client.resumption = Resumption::in_memory_sessions(8);
                    let client = Arc::new(client);
                    assert_eq!(shake(&client, &server), HandshakeKind::Full);
                    for number in 0..ROUNDS {
                        round.wait();
                        // The key changes somewhere between these.
                        for _ in 0..5 {
                            assert_eq!(shake(&client, &server), HandshakeKind::Resumed, "round {number}");
                        }
                    }
                });
            }
            for _ in 0..ROUNDS {
                round.wait();
                clocked.epochs.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
}
