//! What a node keeps on disk of one store's home.

use bytes::{BufMut as _, Bytes};
use selvage_config::NodeName;
use selvage_config::plan::Home;

use crate::entry::{EntryError, Fields};
use crate::wire::entries::{length, put_number};

/// The form of these rows.
const FORM: u8 = 1;

/// Claims of its own that a node remembers; the oldest goes, and then counts as forgotten.
pub(super) const CLAIMS_MAX: usize = 16;

/// Homes that a node made way for and that may never have decided, at most; it makes way for no more.
pub(super) const GRANTS_MAX: usize = 64;

/// A term, and the life of the node that had it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) term: u64,
    pub(crate) incarnation: u64,
}

/// Whom a node made way for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) node: NodeName,
    pub(crate) held: Held,
}

/// One store's home.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Row {
    /// The newest home that the plan named.
    pub(super) term: u64,
    /// Which node it is; none if that can't be read any more.
    pub(super) home: Option<NodeName>,
    /// The one before, as far as this node was told.
    pub(super) before: Option<(u64, NodeName)>,
    /// As which home this node decided last.
    pub(super) held: Option<Held>,
    /// As which homes it asked others to make way, the newest last: one that it does not remember it may have been.
    pub(super) claims: Vec<Held>,
    /// Whom it has made way for itself.
    pub(super) grants: Vec<Grant>,
}

impl Row {
    /// What is known once a newer home was named.
    pub(super) fn follow(self, home: &Home) -> Self {
        let before = self.home.map(|node| (self.term, node)).or(self.before);
        let mut grants = self.grants;
        grants.retain(|grant| grant.held.term > home.lost);
        Self { term: home.term, home: Some(home.node.clone()), before, held: self.held, claims: self.claims, grants }
    }

    /// Whether this is the home that a plan names.
    pub(super) fn is_of(&self, home: &Home) -> bool {
        (self.term, self.home.as_ref()) == (home.term, Some(&home.node))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORM];
        out.put_u64(self.term);
        put_node(&mut out, self.home.as_ref());
        out.put_u64(self.before.as_ref().map_or(0, |(term, _)| *term));
        put_node(&mut out, self.before.as_ref().map(|(_, node)| node));
        put_claims(&mut out, self.held.as_slice());
        put_claims(&mut out, &self.claims);
        put_grants(&mut out, &self.grants);
        out
    }

    pub(super) fn decode(bytes: Bytes) -> Result<Self, EntryError> {
        let mut fields = Fields::of(bytes);
        if fields.u8()? != FORM {
            return Err(EntryError::Field("form"));
        }
        let (term, home) = (fields.u64()?, node(&mut fields)?);
        let (since, before) = (fields.u64()?, node(&mut fields)?);
        let held = claims(&mut fields)?.pop();
        let (claims, grants) = (claims(&mut fields)?, grants(&mut fields)?);
        fields.end()?;
        Ok(Self { term, home, before: before.map(|node| (since, node)), held, claims, grants })
    }
}

fn put_held(out: &mut Vec<u8>, held: Held) {
    out.put_u64(held.term);
    out.put_u64(held.incarnation);
}

fn held(fields: &mut Fields) -> Result<Held, EntryError> {
    Ok(Held { term: fields.u64()?, incarnation: fields.u64()? })
}

pub(super) fn put_claims(out: &mut Vec<u8>, claims: &[Held]) {
    put_number(out, claims.len() as u64);
    claims.iter().for_each(|claim| put_held(out, *claim));
}

pub(super) fn claims(fields: &mut Fields) -> Result<Vec<Held>, EntryError> {
    (0..length(fields, CLAIMS_MAX, "claims")?).map(|_| held(fields)).collect()
}

pub(super) fn put_grants(out: &mut Vec<u8>, grants: &[Grant]) {
    put_number(out, grants.len() as u64);
    for grant in grants {
        put_node(out, Some(&grant.node));
        put_held(out, grant.held);
    }
}

pub(super) fn grants(fields: &mut Fields) -> Result<Vec<Grant>, EntryError> {
    let grant = |fields: &mut Fields| {
        let node = node(fields)?.ok_or(EntryError::Field("node"))?;
        Ok(Grant { node, held: held(fields)? })
    };
    (0..length(fields, GRANTS_MAX, "grants")?).map(|_| grant(fields)).collect()
}

fn put_node(out: &mut Vec<u8>, node: Option<&NodeName>) {
    let name = node.map_or("", NodeName::as_str);
    out.put_u8(u8::try_from(name.len()).expect("a name is 63 bytes at most"));
    out.put_slice(name.as_bytes());
}

fn node(fields: &mut Fields) -> Result<Option<NodeName>, EntryError> {
    let length = usize::from(fields.u8()?);
    if length == 0 {
        return Ok(None);
    }
    let bytes = fields.take(length)?;
    let name = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
    name.map(Some).ok_or(EntryError::Field("node"))
}
