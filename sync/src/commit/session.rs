//! Sessions within the committer: they wait until this node has what they have seen.

use tokio::sync::oneshot;

use super::Committer;
use crate::session::Token;

/// Sessions that may wait for this node to catch up with them.
const WAITING_MAX: usize = 4096;

impl Committer {
    pub(super) fn wait(&mut self, token: Token, reply: oneshot::Sender<()>) {
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push((token, reply));
        }
    }

    /// Tells those whose wait is over.
    pub(super) fn tell_sessions(&mut self) {
        let replica = &self.replica;
        for (_, reply) in self.waiting.extract_if(.., |(token, reply)| reply.is_closed() || replica.has(token)) {
            let _gone = reply.send(());
        }
    }
}
