//! The name that a certificate is for.

use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;

use crate::app::is_host;

/// What a wildcard begins with.
const WILDCARD: &str = "*.";

/// A host name in lower case, or `*.` and one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct CertificateName(String);

impl CertificateName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it stands for any one label before the rest.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with(WILDCARD)
    }

    /// The name without the `*.`.
    pub fn host(&self) -> &str {
        self.0.strip_prefix(WILDCARD).unwrap_or(&self.0)
    }
}

impl fmt::Display for CertificateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that no certificate is for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no lower-case host name, nor `*.` and one")]
pub struct NotAName(String);

impl TryFrom<String> for CertificateName {
    type Error = NotAName;
    fn try_from(text: String) -> Result<Self, NotAName> {
        let host = text.strip_prefix(WILDCARD).unwrap_or(&text);
        if is_host(host) && host.parse::<IpAddr>().is_err() { Ok(Self(text)) } else { Err(NotAName(text)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_certificate_is_for_is_no_name() {
        for bad in
            ["A.test", "", "*", "*.*.test", "a..test", "a.*", "10.0.0.1", "*.10.0.0.1", "a.test.", "a_b.test", "a/b"]
        {
            assert!(CertificateName::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        let name = CertificateName::try_from("*.a.test".to_owned()).unwrap();
        assert_eq!((name.host(), name.is_wildcard()), ("a.test", true));
    }
}
