//! TLS identities of Selvage: who a peer is, where its key lies, and what a listener shows to whom.
//!
//! Three users. A node's public listener shows certificates by name ([`Resolver`]): those of files, kept fresh by
//! [`Reload`], and those that it got by ACME ([`IssuedFiles`], [`Challenges`], [`Window`]).
//! Nodes and the control plane know each other by a certificate of the fleet's own [`Authority`], whose URI name
//! is a [`Role`]. Operators reach the control plane with such a certificate or with a token.
//!
//! Nothing here opens a socket, starts a task or owns a timer.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod provider;

mod files;

mod identity;
mod role;

mod authority;
mod enrolment;
mod late;

mod challenge;
mod issued;
mod place;
mod renewal;

mod reload;
mod resolver;

mod seal;
mod secret;
mod tickets;

mod names;

mod anchors;
mod front;
mod mutual;
mod statement;

pub use anchors::{Anchors, was_vouched_for};
pub use authority::{Authority, AuthorityError, Rotation, RotationError};
pub use challenge::{ACME_ALPN, Answering, ChallengeError, Challenges, DIGEST_BYTES};
pub use enrolment::Enrolment;
pub use files::{FileError, PemFiles, chain_pem, roots_from_pem};
pub use front::{FrontServers, FrontTls, TlsVersions, front_server, quic_server};
pub use identity::{Identity, IdentityError};
pub use issued::IssuedFiles;
pub use late::{LateError, late_role};
pub use mutual::{ClientAuth, TlsError, client, mutual_client, mutual_server, roots_of};
pub use names::{NameRule, NameRules};
pub use place::PlaceSeal;
pub use provider::{provider, provider_of};
pub use reload::{Reload, ReloadError, Reloaded};
pub use renewal::{Backoff, Window};
pub use resolver::{Certificates, Resolver, ResolverError};
pub use role::{INTERNAL_DOMAIN, OperatorName, OperatorNameError, Role, peer_of, peer_role};
pub use seal::Seal;
pub use secret::{FrontSecret, RandomError};
