//! The roster: which nodes this one talks to.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use selvage_config::{NodeName, Region};

/// Peers of one node, at most. What is beyond, in the order of names, is left out and logged.
pub(crate) const PEERS_MAX: usize = 1024;

/// A peer and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddr {
    /// Its name, which its certificate must bear.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// The address of its link.
    pub addr: SocketAddr,
}

/// What the links shall be like now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Roster {
    pub(crate) peers: BTreeMap<NodeName, PeerAddr>,
    /// Whether it was ever told.
    pub(crate) known: bool,
    pub(crate) isolated: bool,
    pub(crate) closing: bool,
}

impl Roster {
    /// Replaces the peers. A node is not its own peer.
    pub(crate) fn set(&mut self, own: &NodeName, peers: Vec<PeerAddr>) {
        let mut peers: BTreeMap<_, _> =
            peers.into_iter().filter(|peer| peer.node != *own).map(|peer| (peer.node.clone(), peer)).collect();
        while peers.len() > PEERS_MAX {
            if let Some((node, _)) = peers.pop_last() {
                tracing::error!(%node, limit = PEERS_MAX, "peer left out: the roster is too long");
            }
        }
        self.peers = peers;
        self.known = true;
    }

    /// Whether there may be a link to `node`.
    pub(crate) fn admits(&self, node: &NodeName) -> bool {
        !self.isolated && !self.closing && self.peers.contains_key(node)
    }

    /// Whether `peer` is in it as it was, wherever links may be at the moment.
    pub(crate) fn lists(&self, peer: &PeerAddr) -> bool {
        !self.closing && self.peers.get(&peer.node) == Some(peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str) -> PeerAddr {
        PeerAddr { node: name.parse().unwrap(), region: "fra".parse().unwrap(), addr: "127.0.0.1:1".parse().unwrap() }
    }

    #[test]
    fn only_listed_nodes_are_admitted_and_none_when_isolated() {
        let own = "a".parse().unwrap();
        let mut roster = Roster::default();
        roster.set(&own, vec![peer("a"), peer("b")]);
        assert!(roster.admits(&"b".parse().unwrap()));
        assert!(!roster.admits(&"c".parse().unwrap()));
        assert!(!roster.admits(&own));
        roster.isolated = true;
        assert!(!roster.admits(&"b".parse().unwrap()));
        assert!(roster.lists(&peer("b")));
    }

    #[test]
    fn a_roster_that_is_too_long_is_cut() {
        let mut roster = Roster::default();
        let peers = (0..=PEERS_MAX).map(|number| peer(&format!("n{number}"))).collect();
        roster.set(&"a".parse().unwrap(), peers);
        assert_eq!(roster.peers.len(), PEERS_MAX);
    }
}
