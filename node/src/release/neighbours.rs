//! The node's neighbours: peers of its region, from whose disks a release is had when the control plane is far or gone.
//!
//! They are asked first, over the same mTLS identity as all of the fleet, and believed in nothing: what comes is verified
//! as if a stranger had sent it. One that lies, stalls or sends too much costs a bounded time, once in a while; then the
//! next source is asked.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustls::ClientConfig;
use selvage_certs::Role;
use selvage_config::oci::Descriptor;
use selvage_config::plan::{Peer, Plan};
use selvage_config::signature::SIGNATURES_MAX;
use selvage_config::{Digest, NodeName, Region};
use tokio::sync::watch;

use super::origin::{Origin, OriginError, chain};

/// A node's path of the blobs on its disk, for its peers: `GET {BLOBS_PATH}{digest}`, with `range: bytes=N-` from there on.
pub const BLOBS_PATH: &str = "/blobs/";
/// A node's path of what may be signatures of a manifest, for its peers: `GET {SIGNATURES_PATH}{digest}`, a list of
/// descriptors of blobs.
pub const SIGNATURES_PATH: &str = "/signatures/";
/// Neighbours that are asked for one thing.
const ASKED_MAX: usize = 2;
/// Time for an answer without its bytes.
const PATIENCE: Duration = Duration::from_secs(3);
/// Who sends slower than this is no near source, bytes a second.
const RATE_MIN: u64 = 1024 * 1024;
/// How long a neighbour is left alone that was slow, gone or told lies.
const LEFT_ALONE: Duration = Duration::from_secs(60);
/// Clients that are kept: one for each neighbour that was asked.
const CLIENTS_MAX: usize = 64;
/// Bytes of a list of signatures.
const LIST_BYTES_MAX: u64 = 256 * 1024;

/// The peers of the node's region, as the newest plan names them. Clones share what is known of them.
#[derive(Clone)]
pub struct Neighbours {
    tls: Arc<ClientConfig>,
    region: Region,
    plans: watch::Receiver<Option<Arc<Plan>>>,
    known: Arc<Mutex<BTreeMap<NodeName, Known>>>,
}

/// What is known of a neighbour.
#[derive(Debug)]
struct Known {
    peer: Peer,
    origin: Origin,
    left_alone_until: Option<Instant>,
}

impl Neighbours {
    /// The peers in `region` of the plans that come. `tls` shows who the node is and trusts the fleet's authorities.
    pub fn new(tls: Arc<ClientConfig>, region: Region, plans: watch::Receiver<Option<Arc<Plan>>>) -> Self {
        Self { tls, region, plans, known: Arc::default() }
    }

    /// The bytes with a digest, if a neighbour has them, of which not more than `size` are read.
    pub(crate) async fn blob(&self, digest: Digest, size: u64) -> Option<Bytes> {
        let longest = PATIENCE + Duration::from_secs(size / RATE_MIN);
        for (peer, origin) in self.near() {
            let path = format!("{BLOBS_PATH}{digest}");
            let asked = tokio::time::timeout(longest, origin.get_blob(&path, size)).await;
            match asked {
                Ok(Ok(Some(bytes))) if Digest::of(&bytes) == digest => return Some(bytes),
                Ok(Ok(Some(bytes))) => {
                    self.leave_alone(&peer, &format!("it sent {} bytes of {}", bytes.len(), Digest::of(&bytes)))
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => self.leave_alone(&peer, &chain(&error)),
                Err(_) => self.leave_alone(&peer, "it is too slow"),
            }
        }
        None
    }

    /// What may be signatures of a manifest, as far as neighbours know any. Nothing of it is believed, and one that names
    /// others keeps nobody from being asked.
    pub(crate) async fn signatures(&self, manifest: Digest) -> Vec<Descriptor> {
        let mut found: Vec<Descriptor> = Vec::new();
        for (peer, origin) in self.near() {
            let path = format!("{SIGNATURES_PATH}{manifest}");
            let asked = origin.get_once(&path, "application/json", LIST_BYTES_MAX, Duration::ZERO);
            let list = match tokio::time::timeout(PATIENCE, asked).await {
                Ok(Ok(None)) => continue,
                Ok(Ok(Some(bytes))) => serde_json::from_slice::<Vec<Descriptor>>(&bytes).map_err(|error| chain(&error)),
                Ok(Err(error)) => Err(chain(&error)),
                Err(_) => Err("it is too slow".to_owned()),
            };
            match list {
                Ok(list) => {
                    for layer in list.into_iter().take(SIGNATURES_MAX) {
                        if !found.contains(&layer) {
                            found.push(layer);
                        }
                    }
                }
                Err(error) => self.leave_alone(&peer, &error),
            }
        }
        found
    }

    /// Neighbours to ask, in this node's own order, without those that are left alone.
    fn near(&self) -> Vec<(NodeName, Origin)> {
        let Some(plan) = self.plans.borrow().clone() else { return Vec::new() };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_planned =
            |node: &NodeName, known: &Known| plan.peers.iter().any(|peer| peer.node == *node && *peer == known.peer);
        known.retain(|node, known| is_planned(node, known));
        let mut near = Vec::new();
        for peer in in_order(&plan, &self.region) {
            if near.len() == ASKED_MAX {
                break;
            }
            if !known.contains_key(&peer.node) {
                if known.len() >= CLIENTS_MAX {
                    continue;
                }
                match self.origin(peer) {
                    Ok(origin) => {
                        let peer = peer.clone();
                        known.insert(peer.node.clone(), Known { peer, origin, left_alone_until: None });
                    }
                    Err(error) => {
                        tracing::warn!(neighbour = %peer.node, error = chain(&error), "no client for a neighbour");
                        continue;
                    }
                }
            }
            let neighbour = &known[&peer.node];
            if neighbour.left_alone_until.is_none_or(|until| until <= Instant::now()) {
                near.push((peer.node.clone(), neighbour.origin.clone()));
            }
        }
        near
    }

    fn origin(&self, peer: &Peer) -> Result<Origin, OriginError> {
        let role = Role::Node { region: peer.region.clone(), node: peer.node.clone() };
        let address = peer.admin.map(|address| address.to_string()).unwrap_or_default();
        Origin::of(&role, &[address], &self.tls)
    }

    fn leave_alone(&self, node: &NodeName, why: &str) {
        tracing::warn!(neighbour = %node, why, "a neighbour is of no help, left alone for a while");
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get_mut(node) {
            known.left_alone_until = Some(Instant::now() + LEFT_ALONE);
        }
    }
}

/// The peers of a region that may have releases, in an order that is the asking node's own (rendezvous hashing): each of a
/// region's nodes is asked by about as many others as any, and one that goes changes the order of no others.
fn in_order<'p>(plan: &'p Plan, region: &Region) -> Vec<&'p Peer> {
    let weight = |peer: &&Peer| {
        let mut hasher = DefaultHasher::new();
        (plan.node.as_str(), peer.node.as_str()).hash(&mut hasher);
        hasher.finish()
    };
    let mut peers: Vec<&Peer> =
        plan.peers.iter().filter(|peer| peer.region == *region && peer.admin.is_some()).collect();
    peers.sort_by_cached_key(weight);
    peers
}

/// Where a release's bytes come from besides this disk. Neighbours are asked first: they are near, and a whole region that
/// takes a release crosses the way to the control plane once for each blob and not once for each node.
#[derive(Clone, Default)]
pub struct Sources {
    /// The control plane.
    pub origin: Option<Origin>,
    /// Peers of the region.
    pub neighbours: Option<Neighbours>,
}

impl Sources {
    /// Whether there is nobody to ask.
    pub fn is_none(&self) -> bool {
        self.origin.is_none() && self.neighbours.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: usize, region: &str, has_admin: bool) -> Peer {
        let address = ([192, 0, 2, 1], 7_400).into();
        let node = format!("{region}-{number}").parse().unwrap();
        Peer { node, region: region.parse().unwrap(), address, admin: has_admin.then_some(address) }
    }

    /// Whom the node with this number asks, of a region of `nodes`.
    fn asked(number: usize, peers: &[Peer]) -> Vec<String> {
        let node: NodeName = format!("fra-{number}").parse().unwrap();
        let others = peers.iter().filter(|peer| peer.node != node).cloned().collect();
        let plan = Plan::new(node, 1, Vec::new(), others);
        in_order(&plan, &"fra".parse().unwrap()).iter().take(ASKED_MAX).map(|peer| peer.node.to_string()).collect()
    }

    #[test]
    fn each_node_of_a_region_is_asked_by_about_as_many_others() {
        const NODES: usize = 200;
        let mut peers: Vec<Peer> = (0..NODES).map(|number| peer(number, "fra", true)).collect();
        peers.extend((0..NODES).map(|number| peer(number, "iad", true)));
        peers.push(peer(NODES, "fra", false));
        let mut askers: BTreeMap<String, usize> = BTreeMap::new();
        for number in 0..NODES {
            let asked = asked(number, &peers);
            assert_eq!(asked.len(), ASKED_MAX);
            assert!(asked.iter().all(|name| name.starts_with("fra-") && *name != format!("fra-{NODES}")), "{asked:?}");
            asked.into_iter().for_each(|name| *askers.entry(name).or_default() += 1);
        }
        // Two each on average. By chance alone one in a thousand is asked by more than eight.
        let (most, idle) = (askers.values().max().copied().unwrap(), NODES - askers.len());
        assert!(most <= 10 && idle < NODES / 4, "the most: {most}, nobody asks {idle}");
    }

    #[test]
    fn a_node_that_goes_is_replaced_for_those_that_asked_it_and_for_nobody_else() {
        const NODES: usize = 50;
        let peers: Vec<Peer> = (0..NODES).map(|number| peer(number, "fra", true)).collect();
        let left: Vec<Peer> = peers.iter().filter(|peer| peer.node.as_str() != "fra-7").cloned().collect();
        for number in (0..NODES).filter(|number| *number != 7) {
            let (before, after) = (asked(number, &peers), asked(number, &left));
            let is_hit = before.iter().any(|name| name == "fra-7");
            assert_eq!(before == after, !is_hit, "{number}: {before:?} {after:?}");
            assert!(before.iter().all(|name| name == "fra-7" || after.contains(name)), "{before:?} {after:?}");
        }
    }
}
