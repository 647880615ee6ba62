//! Sessions: what a client has seen, so that another node can wait until it has that too.
//!
//! A [`Token`] holds of every origin the newest write that the session made or read. A node that has all of it shows
//! the session its own writes and never something older than it saw (sync.md invariant K9).

use std::fmt;
use std::str::FromStr;

use crate::entry::Dot;
use crate::vector::VersionVector;

/// Origins in one token, at most: beyond, the oldest session must begin anew.
pub const TOKEN_ORIGINS_MAX: usize = 32;

/// Longest text of a token, bytes: of each origin its node's name, two numbers in base 16, two dots and a comma.
pub(crate) const TOKEN_BYTES_MAX: usize = TOKEN_ORIGINS_MAX * (selvage_config::id::NAME_BYTES_MAX + 2 * 16 + 3);

/// What a session has seen. As text it is `node.incarnation.seq`, numbers in base 16, with commas between.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Token(VersionVector);

/// Text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a session's token of at most {TOKEN_ORIGINS_MAX} parts node.incarnation.seq")]
pub struct TokenError;

impl Token {
    /// The session made or read this write.
    pub fn saw(&mut self, dot: &Dot) {
        self.0.lift(&dot.origin, dot.seq);
    }

    /// Of how many origins it names a write.
    pub(crate) fn origins(&self) -> usize {
        self.0.len()
    }

    /// Whether a node that has `vector` has all that the session saw.
    pub fn is_in(&self, vector: &VersionVector) -> bool {
        !vector.lacks(&self.0)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (origin, seq)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{}", Dot { origin: origin.clone(), seq })?;
        }
        Ok(())
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let mut token = Self::default();
        for (at, part) in text.split(',').filter(|part| !part.is_empty()).enumerate() {
            if at == TOKEN_ORIGINS_MAX {
                return Err(TokenError);
            }
            token.saw(&part.parse().map_err(|_| TokenError)?);
        }
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Origin;

    fn dot(node: &str, seq: u64) -> Dot {
        Dot { origin: Origin { node: node.parse().unwrap(), incarnation: 0xab }, seq }
    }

    #[test]
    fn a_token_is_text_and_back_and_is_had_by_who_has_all_of_it() {
        let mut token = Token::default();
        token.saw(&dot("fra-1", 17));
        token.saw(&dot("iad-1", 2));
        token.saw(&dot("fra-1", 3));
        assert_eq!(token.to_string(), "fra-1.ab.11,iad-1.ab.2");
        assert_eq!(token.to_string().parse(), Ok(token.clone()));
        let mut vector = VersionVector::default();
        vector.lift(&dot("fra-1", 1).origin, 17);
        assert!(!token.is_in(&vector));
        vector.lift(&dot("iad-1", 1).origin, 2);
        assert!(token.is_in(&vector));
    }

    #[test]
    fn other_text_is_refused() {
        let many = vec!["a.1.1"; TOKEN_ORIGINS_MAX + 1].join(",");
        for text in ["x", "a.1", "a.1.1.1", "A.1.1", "a.g.1", "a..1", &many] {
            assert_eq!(text.parse::<Token>(), Err(TokenError), "{text}");
        }
        assert_eq!("".parse(), Ok(Token::default()));
    }
}
