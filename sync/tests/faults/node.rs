//! One node of a fleet, as a process that does what it is told line by line.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ring::digest::{Context, SHA256};
use rustls::pki_types::CertificateDer;
use selvage_certs::{Anchors, ClientAuth, Identity, Role, mutual_client, mutual_server, peer_role, roots_from_pem};
use selvage_config::NodeName;
use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_sync::{Kv, Options, PeerAddr, Tls, Trust};

use super::disk;

/// Tasks that write at once, and how long each waits after a write and after a refusal.
const WRITERS: usize = 2;
const PAUSE: Duration = Duration::from_millis(2);
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// What a node says, and what it believes.
struct Word {
    identity: Identity,
    anchors: Anchors,
}

impl Trust for Word {
    fn prove(&self, statement: &[u8]) -> Option<Vec<u8>> {
        self.identity.state(statement)
    }

    fn mark(&self) -> u64 {
        0
    }

    fn is_proved(&self, node: &NodeName, statement: &[u8], at_ms: u64, proof: &[u8]) -> bool {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(at_ms);
        let said = self.anchors.stated_by(statement, proof, at);
        said.is_some_and(|role| matches!(role, Role::Node { node: said, .. } if said == *node))
    }
}

fn tls(directory: &Path) -> Tls {
    let identity = Identity::load(directory.join("certificate.pem"), directory.join("key.pem")).unwrap();
    let roots = roots_from_pem(directory.join("roots.pem")).unwrap();
    Tls {
        trust: Arc::new(Word { identity: identity.clone(), anchors: Anchors::new(roots.clone()).unwrap() }),
        server: mutual_server(&identity, &roots, ClientAuth::Required).unwrap(),
        client: mutual_client(&identity, &roots).unwrap(),
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The parent has failed if nobody listens any more.
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// What is written at a key.
pub(super) fn value(key: &str, bytes: usize) -> Bytes {
    let mut value = key.as_bytes().to_vec();
    value.resize(bytes.max(key.len()), b'.');
    value.into()
}

pub(super) fn run(directory: &Path, name: &str, region: &str, free_mib: &str) {
    let runtime = disk::runtime();
    let options = Options {
        node: name.parse().unwrap(),
        region: region.parse().unwrap(),
        directory: directory.join("kv"),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        tls: Some(tls(directory)),
        kept: Kept { disk_free_mib_min: free_mib.parse().unwrap(), ..disk::kept(KvEngine::Sled) },
    };
    let identify = Arc::new(|certificate: &CertificateDer<'_>| match peer_role(certificate) {
        Ok(Role::Node { node, .. }) => Some(node),
        _ => None,
    });
    let kv = runtime.block_on(Kv::open(options, identify)).unwrap();
    say(&format!("listens {}", kv.local_addr().unwrap().port()));
    let loading = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["peers", ..] => {
                kv.set_peers(words[1..].iter().map(|word| peer(word)).collect());
                say("ok");
            }
            ["load", prefix, bytes] => {
                loading.store(true, Ordering::Relaxed);
                for writer in 0..WRITERS {
                    let (kv, loading, prefix) = (kv.clone(), Arc::clone(&loading), format!("{prefix}-{writer}"));
                    let bytes: usize = bytes.parse().unwrap();
                    writers.push(runtime.spawn(async move { load(&kv, &prefix, bytes, &loading).await }));
                }
                say("ok");
            }
            ["stop"] => {
                loading.store(false, Ordering::Relaxed);
                runtime.block_on(async {
                    for writer in writers.drain(..) {
                        writer.await.unwrap();
                    }
                });
                say("ok");
            }
            ["set", key] => match runtime.block_on(kv.set(&disk::store(), key, value(key, 0))) {
                Ok(()) => say(&format!("acked {key}")),
                Err(error) => say(&format!("no {error}")),
            },
            ["has", key] => say(if kv.exists(&disk::store(), key).unwrap() { "yes" } else { "no" }),
            ["state"] => say(&state(&kv)),
            ["unlink", path] => {
                std::fs::remove_file(path).unwrap();
                say("ok");
            }
            ["close"] => break,
            _ => panic!("{line}"),
        }
    }
    runtime.block_on(kv.close());
}

/// Writes until told to stop: new keys, one key that everybody writes, and deletions. It says every key whose write was
/// acknowledged, and before each deletion that it may happen.
async fn load(kv: &Kv, prefix: &str, bytes: usize, loading: &AtomicBool) {
    let store = disk::store();
    let mut number = 0_u64;
    while loading.load(Ordering::Relaxed) {
        let key = format!("{prefix}-{number}");
        match kv.set(&store, &key, value(&key, bytes)).await {
            Ok(()) => say(&format!("kept {key}")),
            Err(error) => {
                say(&format!("refused {error}"));
                tokio::time::sleep(REFUSED_PAUSE).await;
                continue;
            }
        }
        // A refusal of these two shows nothing that the one above does not.
        let _shared = kv.set(&store, "shared", value(&key, 0)).await;
        if number % 8 == 7 {
            let key = format!("{prefix}-{}", number - 3);
            say(&format!("deletes {key}"));
            if kv.delete(&store, &key).await.is_ok() {
                say(&format!("deleted {key}"));
            }
        }
        number += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// `name@region=address`
fn peer(word: &str) -> PeerAddr {
    let (name, rest) = word.split_once('@').unwrap();
    let (region, addr) = rest.split_once('=').unwrap();
    let addr: SocketAddr = addr.parse().unwrap();
    PeerAddr { node: name.parse().unwrap(), region: region.parse().unwrap(), addr }
}

fn state(kv: &Kv) -> String {
    let (mut context, mut rows, mut after) = (Context::new(&SHA256), 0, None::<String>);
    loop {
        let listed = kv.list_entries(&disk::store(), "", after.as_deref(), 1000).unwrap();
        let Some(last) = listed.last() else { break };
        after = Some(last.name.clone());
        rows += listed.len();
        listed.iter().for_each(|entry| context.update(format!("{entry:?}").as_bytes()));
    }
    let digest: String = context.finish().as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let (status, progress) = (kv.status(), kv.progress());
    let links = status.iter().filter(|peer| peer.connected).count();
    let queued = status.iter().map(|peer| peer.queued_bytes).max().unwrap_or(0);
    format!("state {digest} {rows} {links} {queued} {} {}", progress.ahead_ms, progress.is_ready())
}
