//! Roles: who a certificate of the fleet stands for.
//!
//! The role is the certificate's one URI name, in the form of a SPIFFE ID. The same certificate carries a fixed
//! DNS name made from the role, so that a client may connect by address and still verify whom it reached.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use selvage_config::id::NAME_BYTES_MAX;
use selvage_config::{NodeName, Region};
use x509_parser::extensions::GeneralName;

use crate::IdentityError;
use crate::identity::{alternative_names, parse};

/// The domain of the names that stand for roles. `internal` is reserved for private use, so no public authority
/// certifies them, and [`crate::Authority`] gives each to its role alone.
pub const INTERNAL_DOMAIN: &str = "selvage.internal";

/// What every role's URI begins with: scheme and trust domain.
const URI_PREFIX: &str = "spiffe://selvage/";
/// Characters of a foreign URI that an error repeats.
const URI_SHOWN_MAX: usize = 128;

/// An operator: a person or program that gives the control plane orders.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperatorName(String);

/// A text that can't name an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "operator name {text:?} must be 1 to {NAME_BYTES_MAX} characters of a-z, 0-9 and inner '-', starting with a letter or digit"
)]
pub struct OperatorNameError {
    text: String,
}

impl OperatorName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for OperatorName {
    type Err = OperatorNameError;

    /// The rule is that of a node's name: it stands as a label in a DNS name too.
    fn from_str(text: &str) -> Result<Self, OperatorNameError> {
        match text.parse::<NodeName>() {
            Ok(name) => Ok(Self(name.into())),
            Err(_) => Err(OperatorNameError { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for OperatorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who a certificate of the fleet stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A node, in its region.
    Node {
        /// Where it stands.
        region: Region,
        /// Which it is.
        node: NodeName,
    },
    /// The control plane.
    ControlPlane,
    /// An operator.
    Operator {
        /// Which.
        name: OperatorName,
    },
}

impl Role {
    /// The role as the URI name of a certificate.
    pub fn uri(&self) -> String {
        match self {
            Self::Node { region, node } => format!("{URI_PREFIX}node/{region}/{node}"),
            Self::ControlPlane => format!("{URI_PREFIX}control-plane"),
            Self::Operator { name } => format!("{URI_PREFIX}operator/{name}"),
        }
    }

    /// The DNS name to verify when connecting to this role, whatever the address.
    pub fn tls_name(&self) -> String {
        match self {
            Self::Node { node, .. } => format!("{node}.node.{INTERNAL_DOMAIN}"),
            Self::ControlPlane => format!("control-plane.{INTERNAL_DOMAIN}"),
            Self::Operator { name } => format!("{name}.operator.{INTERNAL_DOMAIN}"),
        }
    }

    fn parse(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix(URI_PREFIX)?.split('/');
        let role = match (parts.next()?, parts.next(), parts.next()) {
            ("node", Some(region), Some(node)) => Self::Node { region: region.parse().ok()?, node: node.parse().ok()? },
            ("control-plane", None, None) => Self::ControlPlane,
            ("operator", Some(name), None) => Self::Operator { name: name.parse().ok()? },
            _ => return None,
        };
        parts.next().is_none().then_some(role)
    }
}

/// Shown as its URI: the form of logs and of the audit log.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        Self::parse(uri).ok_or_else(|| IdentityError::Role { uri: uri.chars().take(URI_SHOWN_MAX).collect() })
    }
}

/// Tells whom a verified certificate stands for. This reads the name only: that the certificate is genuine was
/// the handshake's matter.
pub fn peer_role(certificate: &CertificateDer<'_>) -> Result<Role, IdentityError> {
    let certificate = parse(certificate)?;
    // X.509-SVID 3: a certificate that may sign others is nobody's identity.
    if certificate.basic_constraints().map_err(|_| IdentityError::Malformed)?.is_some_and(|basic| basic.value.ca) {
        return Err(IdentityError::Authority);
    }
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    let uris: Vec<String> = alternative_names(&certificate)?.iter().filter_map(uri).collect();
    match uris.as_slice() {
        // X.509-SVID 2: with two URI names it is undecided who this is, even if one is not ours.
        [uri] => uri.parse(),
        several => Err(IdentityError::UriNames { found: several.len() }),
    }
}

/// Tells who is at the other end, from what a rustls connection calls its peer's certificates. `None` is a peer
/// that showed none, which only a listener with [`crate::ClientAuth::Optional`] lets in.
pub fn peer_of(certificates: Option<&[CertificateDer<'_>]>) -> Result<Option<Role>, IdentityError> {
    match certificates {
        None | Some([]) => Ok(None),
        Some([leaf, ..]) => peer_role(leaf).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair, SanType};

    use super::*;

    fn roles() -> [Role; 3] {
        [
            Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() },
            Role::ControlPlane,
            Role::Operator { name: "ada".parse().unwrap() },
        ]
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    #[test]
    fn a_role_reads_back_from_its_uri() {
        let uris = roles().map(|role| role.uri());
        assert_eq!(
            uris,
            ["spiffe://selvage/node/fra/fra-1", "spiffe://selvage/control-plane", "spiffe://selvage/operator/ada"]
        );
        assert_eq!(uris.map(|uri| uri.parse::<Role>().unwrap()), roles());
    }

    #[test]
    fn every_role_has_its_own_tls_name() {
        assert_eq!(
            roles().map(|role| role.tls_name()),
            ["fra-1.node.selvage.internal", "control-plane.selvage.internal", "ada.operator.selvage.internal"]
        );
    }

    #[test]
    fn an_almost_right_uri_names_nobody() {
        for text in [
            "",
            "spiffe://selvage",
            "spiffe://selvage/",
            "spiffe://selvage/node",
            "spiffe://selvage/node/fra",
            "spiffe://selvage/node//fra-1",
            "spiffe://selvage/node/fra/",
            "spiffe://selvage/node/fra/fra-1/",
            "spiffe://selvage/node/fra/fra-1/x",
            "spiffe://selvage/node/fra/fra_1",
            "spiffe://selvage/node/fra/Fra-1",
            "spiffe://selvage/node/fra/fra-1?x",
            "spiffe://selvage/node/fra/fra-1#x",
            "spiffe://selvage/node/fra/fra%2d1",
            "spiffe://selvage/node/fra/../x",
            "spiffe://selvage/control-plane/",
            "spiffe://selvage/control-plane/x",
            "spiffe://selvage//control-plane",
            "spiffe://selvage/Control-Plane",
            "SPIFFE://selvage/control-plane",
            "spiffe://selvage:443/control-plane",
            "spiffe://selvage.example/control-plane",
            "spiffe://x@selvage/control-plane",
            "https://selvage/control-plane",
            " spiffe://selvage/control-plane",
            "spiffe://selvage/control-plane ",
            "spiffe://selvage/control-plane\0",
            "spiffe://selvage/operator",
            "spiffe://selvage/operator/",
            "spiffe://selvage/operator/ada/x",
            "spiffe://selvage/operator/ada lovelace",
        ] {
            assert!(matches!(text.parse::<Role>(), Err(IdentityError::Role { .. })), "{text:?}");
        }
    }

    #[test]
    fn a_certificate_tells_its_role() {
        for role in roles() {
            let der = certificate(|params| params.subject_alt_names = vec![uri(&role.uri())]);
            assert_eq!(peer_role(&der).unwrap(), role);
            assert_eq!(peer_of(Some(&[der])).unwrap(), Some(role));
        }
        assert_eq!(peer_of(None).unwrap(), None);
    }

    #[test]
    fn a_certificate_with_no_or_two_uri_names_is_refused() {
        let ours = "spiffe://selvage/control-plane";
        let dns = SanType::DnsName("control-plane.selvage.internal".try_into().unwrap());
        for (names, expected) in [
            (vec![], 0),
            (vec![dns], 0),
            (vec![uri(ours), uri(ours)], 2),
            (vec![uri(ours), uri("https://example.com")], 2),
            (vec![uri("https://example.com"), uri(ours)], 2),
        ] {
            let der = certificate(|params| params.subject_alt_names = names);
            let error = peer_role(&der).unwrap_err();
            assert!(matches!(error, IdentityError::UriNames { found } if found == expected), "{error:?}");
        }
    }

    #[test]
    fn the_common_name_is_nobodys_role() {
        let der = certificate(|params| {
            params.distinguished_name.push(rcgen::DnType::CommonName, "spiffe://selvage/control-plane");
        });
        assert!(matches!(peer_role(&der), Err(IdentityError::UriNames { found: 0 })));
    }

    #[test]
    fn a_second_alternative_name_extension_is_refused() {
        // SEQUENCE { [6] "spiffe://selvage/control-plane" }
        let text = b"spiffe://selvage/control-plane";
        let length = u8::try_from(text.len()).unwrap();
        let mut content = vec![0x30, length + 2, 0x86, length];
        content.extend_from_slice(text);
        let extension = || CustomExtension::from_oid_content(&[2, 5, 29, 17], content.clone());
        let one = certificate(|params| params.custom_extensions = vec![extension()]);
        assert_eq!(peer_role(&one).unwrap(), Role::ControlPlane);
        let two = certificate(|params| params.custom_extensions = vec![extension(), extension()]);
        assert!(matches!(peer_role(&two), Err(IdentityError::Malformed)));
    }

    #[test]
    fn an_alternative_name_that_is_no_text_is_refused() {
        let content = vec![0x30, 0x04, 0x86, 0x02, 0xff, 0xfe];
        let extension = CustomExtension::from_oid_content(&[2, 5, 29, 17], content);
        let der = certificate(|params| params.custom_extensions = vec![extension]);
        assert!(matches!(peer_role(&der), Err(IdentityError::Malformed)));
    }

    #[test]
    fn an_authority_is_nobody() {
        let der = certificate(|params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.subject_alt_names = vec![uri("spiffe://selvage/control-plane")];
        });
        assert!(matches!(peer_role(&der), Err(IdentityError::Authority)));
    }

    #[test]
    fn bytes_that_are_no_certificate_are_refused() {
        let good = certificate(|params| params.subject_alt_names = vec![uri("spiffe://selvage/control-plane")]);
        assert!(matches!(peer_role(&CertificateDer::from(Vec::new())), Err(IdentityError::Malformed)));
        for length in 0..good.len() {
            assert!(peer_role(&CertificateDer::from(&good[..length])).is_err(), "{length}");
        }
    }

    #[test]
    fn an_operator_name_is_a_dns_label() {
        assert_eq!("ada".parse::<OperatorName>().unwrap().as_str(), "ada");
        for bad in ["", "Ada", "a.b", "-a", "a b"] {
            assert!(bad.parse::<OperatorName>().is_err(), "{bad}");
        }
    }
}
