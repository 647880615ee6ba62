//! Registry tokens: what a client gets for its name and password, good for some repositories and some minutes
//! (the distribution project's token specification, "Docker Registry v2 authentication via central service").
//!
//! A token is its claims and a MAC over them, so nothing need be remembered but one key. Who it stands for is looked
//! up again at every use: an operator who was removed has no use of one.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use selvage_config::oci::Repository;
use serde::{Deserialize, Serialize};

use super::rights::{Action, Scope};

/// How long a token is good for, seconds. Clients ask for another when it is over.
pub(crate) const TOKEN_SECONDS: u64 = 300;
/// Scopes in one token.
const SCOPES_MAX: usize = 16;
/// Bytes of the key.
pub(crate) const KEY_BYTES: usize = 32;
/// Distinguishes a token of this kind from an operator's own.
const PREFIX: &str = "sr1.";

/// Makes registry tokens and reads them.
#[derive(Debug)]
pub(crate) struct Tokens(hmac::Key);

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// The operator's name.
    pub(crate) name: String,
    /// Whether a certificate proved it.
    pub(crate) by_certificate: bool,
    /// When it ends, milliseconds since 1970.
    pub(crate) ends_ms: u64,
    pub(crate) scopes: Vec<Scope>,
}

impl Tokens {
    pub(crate) fn new(key: &[u8; KEY_BYTES]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    pub(crate) fn write(&self, claims: &Claims) -> String {
        let body = serde_json::to_vec(claims).expect("claims have only strings and numbers");
        let mac = hmac::sign(&self.0, &body);
        format!("{PREFIX}{}.{}", URL_SAFE_NO_PAD.encode(&body), URL_SAFE_NO_PAD.encode(mac.as_ref()))
    }

    /// The claims of a token that is ours and has not ended.
    pub(crate) fn read(&self, text: &str, now_ms: u64) -> Option<Claims> {
        let (body, mac) = text.strip_prefix(PREFIX)?.split_once('.')?;
        let (body, mac) = (URL_SAFE_NO_PAD.decode(body).ok()?, URL_SAFE_NO_PAD.decode(mac).ok()?);
        hmac::verify(&self.0, &body, &mac).ok()?;
        let claims: Claims = serde_json::from_slice(&body).ok()?;
        (claims.ends_ms > now_ms).then_some(claims)
    }
}

/// Reads `repository:<name>:<actions>`, several separated by spaces. What is asked for besides repositories is left
/// out, as are actions that nobody knows.
pub(crate) fn scopes<'q>(values: impl Iterator<Item = &'q str>) -> Vec<Scope> {
    let read = |text: &str| {
        let (name, actions) = text.strip_prefix("repository:")?.rsplit_once(':')?;
        let repository: Repository = name.parse().ok()?;
        let all = [Action::Pull, Action::Push, Action::Delete];
        let wanted = |action: &Action| actions.split(',').any(|word| word == action.as_str() || word == "*");
        Some(Scope { repository, actions: all.into_iter().filter(wanted).collect() })
    };
    values.flat_map(str::split_whitespace).filter_map(read).take(SCOPES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        let scopes = scopes(["repository:apps/hello:pull,push"].into_iter());
        Claims { name: "ops".into(), by_certificate: false, ends_ms: 100, scopes }
    }

    #[test]
    fn a_token_says_what_was_written_until_it_ends() {
        let tokens = Tokens::new(&[7; KEY_BYTES]);
        let token = tokens.write(&claims());
        assert_eq!(tokens.read(&token, 99), Some(claims()));
        assert_eq!(tokens.read(&token, 100), None);
        assert_eq!(Tokens::new(&[8; KEY_BYTES]).read(&token, 0), None);
    }

    #[test]
    fn a_token_that_was_changed_says_nothing() {
        let tokens = Tokens::new(&[7; KEY_BYTES]);
        let token = tokens.write(&claims());
        for place in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[place] = if changed[place] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            // The last digit of base64 has bits that mean nothing, and those are refused too.
            assert_eq!(tokens.read(&changed, 0), None, "{place}");
        }
        for bad in ["", "sr1.", "sr1..", "sr1.a.b", &token[4..]] {
            assert_eq!(tokens.read(bad, 0), None, "{bad}");
        }
    }

    #[test]
    fn scopes_are_read_as_registries_write_them() {
        let read =
            scopes(["repository:a/b:pull repository:c:*", "registry:catalog:*", "x", "repository:A:pull"].into_iter());
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].repository.as_str(), read[0].actions.len()), ("a/b", 1));
        assert_eq!((read[1].repository.as_str(), read[1].actions.len()), ("c", 3));
    }
}
