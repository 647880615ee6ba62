//! Trust: what makes the nodes of a fleet believe that a key is an origin's.
//!
//! An origin signs its writes with a key of its own ([`Signer`]), made with its incarnation and kept beside its rows. That
//! the key is this origin's says a [`Voucher`], which the node proves by its identity in the fleet ([`Trust`]). It is
//! passed on with the writes, and believed if that identity was good when it was made: writes outlive certificates.

use std::fmt;
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use ring::digest::{Context, SHA256};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use selvage_config::NodeName;

use crate::entry::{EntryError, Fields, Origin, put_origin};

/// Longest proof of a voucher, bytes: a signature and a chain of certificates.
pub const VOUCHER_PROOF_BYTES_MAX: usize = 8 * 1024;

/// Bytes of a signature.
pub(crate) const SIGNATURE_BYTES: usize = 64;

const KEY_BYTES: usize = 32;

/// Who this node is to its fleet, and what it believes of others.
pub trait Trust: Send + Sync + 'static {
    /// What proves to others that this node says this; none if it has no identity.
    fn prove(&self, statement: &[u8]) -> Option<Vec<u8>>;

    /// Another number when the identity is another one: what was said as the last one is then said again.
    fn mark(&self) -> u64;

    /// Whether this proves that `node` said it then.
    fn is_proved(&self, node: &NodeName, statement: &[u8], at_ms: u64, proof: &[u8]) -> bool;
}

/// A node that has no identity: it proves nothing and believes nobody.
pub struct Nobody;

impl Trust for Nobody {
    fn prove(&self, _statement: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn mark(&self) -> u64 {
        0
    }

    fn is_proved(&self, _node: &NodeName, _statement: &[u8], _at_ms: u64, _proof: &[u8]) -> bool {
        false
    }
}

/// What a node signs with, and whom it trusts; `chance` makes the keys of incarnations that begin in this run.
pub struct Keyring {
    /// Who this node is, and what it believes.
    pub trust: Arc<dyn Trust>,
    /// What no other run has.
    pub chance: [u8; 32],
}

impl Keyring {
    /// Secret bytes of an origin's key that no other run of any node makes.
    pub(crate) fn seed(&self, origin: &Origin) -> [u8; KEY_BYTES] {
        let mut named = Vec::new();
        put_origin(&mut named, origin);
        let mut context = Context::new(&SHA256);
        context.update(b"selvage-kv key 1\0");
        context.update(&self.chance);
        context.update(&named);
        let mut seed = [0; KEY_BYTES];
        seed.copy_from_slice(context.finish().as_ref());
        seed
    }
}

/// An origin's public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub(crate) [u8; KEY_BYTES]);

impl PublicKey {
    pub(crate) fn has_signed(self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

/// An origin's key.
pub(crate) struct Signer(Ed25519KeyPair);

impl Signer {
    /// None if these are not the bytes of a seed.
    pub(crate) fn of(seed: &[u8]) -> Option<Self> {
        Ed25519KeyPair::from_seed_unchecked(seed).ok().map(Self)
    }

    pub(crate) fn public(&self) -> PublicKey {
        let mut key = [0; KEY_BYTES];
        key.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(key)
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(self.0.sign(message).as_ref());
        signature
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Signer").field(&self.public()).finish()
    }
}

/// A node's word that a key is that of an origin of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Voucher {
    /// The origin.
    pub origin: Origin,
    /// Its key.
    pub key: PublicKey,
    /// When it was given, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What proves it.
    pub proof: Bytes,
}

impl Voucher {
    /// The voucher of this node for an origin of it; none if it has no identity.
    pub(crate) fn give(trust: &dyn Trust, origin: &Origin, key: PublicKey, at_ms: u64) -> Option<Self> {
        let proof =
            trust.prove(&statement(origin, key, at_ms)).filter(|proof| proof.len() <= VOUCHER_PROOF_BYTES_MAX)?;
        Some(Self { origin: origin.clone(), key, at_ms, proof: proof.into() })
    }

    /// A key that nobody vouches for.
    pub(crate) fn bare(origin: &Origin, key: PublicKey) -> Self {
        Self { origin: origin.clone(), key, at_ms: 0, proof: Bytes::new() }
    }

    /// Whether its origin's node gave it.
    pub(crate) fn is_good(&self, trust: &dyn Trust) -> bool {
        let statement = statement(&self.origin, self.key, self.at_ms);
        trust.is_proved(&self.origin.node, &statement, self.at_ms, &self.proof)
    }

    /// Its bytes but for the origin.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.put_slice(&self.key.0);
        out.put_u64(self.at_ms);
        out.put_u16(u16::try_from(self.proof.len()).unwrap_or(u16::MAX));
        out.put_slice(&self.proof);
    }

    pub(crate) fn decode(origin: Origin, fields: &mut Fields) -> Result<Self, EntryError> {
        let mut key = [0; KEY_BYTES];
        key.copy_from_slice(&fields.take(KEY_BYTES)?);
        let at_ms = fields.u64()?;
        let length = usize::from(fields.u16()?);
        if length > VOUCHER_PROOF_BYTES_MAX {
            return Err(EntryError::Field("voucher"));
        }
        Ok(Self { origin, key: PublicKey(key), at_ms, proof: fields.take(length)? })
    }
}

fn statement(origin: &Origin, key: PublicKey, at_ms: u64) -> Vec<u8> {
    let mut out = b"selvage-kv voucher 1\0".to_vec();
    put_origin(&mut out, origin);
    out.put_slice(&key.0);
    out.put_u64(at_ms);
    out
}

/// A node of a fleet without an authority: it says who it is by a hash that only the honest do not make for others.
#[cfg(test)]
pub(crate) struct Named(pub(crate) NodeName);

#[cfg(test)]
impl Trust for Named {
    fn prove(&self, statement: &[u8]) -> Option<Vec<u8>> {
        let named = [self.0.as_str().as_bytes(), statement].concat();
        Some(ring::digest::digest(&SHA256, &named).as_ref().to_vec())
    }

    fn mark(&self) -> u64 {
        0
    }

    fn is_proved(&self, node: &NodeName, statement: &[u8], _at_ms: u64, proof: &[u8]) -> bool {
        Self(node.clone()).prove(statement).as_deref() == Some(proof)
    }
}
