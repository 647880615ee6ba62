//! An issuer's public keys, read from a JWK set (RFC 7517).
//!
//! One key has one algorithm (RFC 8725 3.1): its type decides, and an `alg` member that says otherwise makes it
//! unusable. Keys that can't be used are skipped, as RFC 7517 5 asks; a set without any usable one is refused.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey as Agreement, agree_ephemeral};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use selvage_config::app::jwt::Algorithm;
use serde_json::{Map, Value};

use super::json;

/// Most keys of a set.
const KEYS_MAX: usize = 64;
/// Largest JWK set, bytes.
pub(super) const SET_BYTES_MAX: usize = 64 * 1024;
/// Bits of an RSA modulus (RFC 7518 3.3 and what ring verifies).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2_048..=8_192;
/// Bytes of an RSA exponent: ring takes up to 33 bits, nobody uses more than 17.
const RSA_EXPONENT_BYTES_MAX: usize = 4;
/// Bytes of one coordinate of P-256 and of an Ed25519 key.
const COORDINATE_BYTES: usize = 32;
/// First byte of an uncompressed point (SEC 1 2.3.3).
const UNCOMPRESSED: u8 = 4;

/// Why a JWK set can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Too large.
    #[error("JWK set is larger than {SET_BYTES_MAX} bytes")]
    Large,
    /// Not JSON, or with duplicate members, or without an array `keys` of objects.
    #[error("not a JWK set")]
    Malformed,
    /// Too many keys.
    #[error("JWK set has more than {KEYS_MAX} keys")]
    Many,
    /// Two keys of one algorithm and one `kid`: a token could mean either.
    #[error("JWK set has two keys of one kind with the same kid")]
    Twice,
    /// Nothing that a signature could be verified with.
    #[error("JWK set has no RSA (2048 bits or more), P-256 or Ed25519 key for signatures")]
    Unusable,
}

/// A public key and the one algorithm that it verifies.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) kid: Option<String>,
    pub(super) algorithm: Algorithm,
    /// RSA: modulus. P-256: uncompressed point. Ed25519: the key.
    public: Vec<u8>,
    /// RSA only.
    exponent: Vec<u8>,
}

/// The keys of an issuer at one time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct KeySet {
    keys: Vec<Key>,
}

impl Key {
    /// Whether `signature` is this key's over `message`.
    pub(super) fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        let verified = match self.algorithm {
            Algorithm::RS256 => RsaPublicKeyComponents { n: &self.public, e: &self.exponent }.verify(
                &RSA_PKCS1_2048_8192_SHA256,
                message,
                signature,
            ),
            // RFC 7518 3.4: R and S side by side, not DER.
            Algorithm::ES256 => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.public).verify(message, signature)
            }
            Algorithm::EdDSA => UnparsedPublicKey::new(&ED25519, &self.public).verify(message, signature),
        };
        verified.is_ok()
    }

    /// A key that can be used, or `None`.
    fn parse(jwk: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        let (algorithm, public, exponent) = match (text("kty")?, text("crv")) {
            ("RSA", None) => (Algorithm::RS256, bytes("n").filter(|n| is_modulus(n))?, bytes("e")?),
            ("EC", Some("P-256")) => (Algorithm::ES256, point(&bytes("x")?, &bytes("y")?)?, Vec::new()),
            ("OKP", Some("Ed25519")) => {
                (Algorithm::EdDSA, bytes("x").filter(|x| x.len() == COORDINATE_BYTES)?, Vec::new())
            }
            _ => return None,
        };
        if algorithm == Algorithm::RS256 && !is_exponent(&exponent) {
            return None;
        }
        let says = |name: &str, want: &str| jwk.get(name).is_none_or(|value| value.as_str() == Some(want));
        let verifies = |ops: &Value| ops.as_array().is_some_and(|ops| ops.iter().any(|op| op == "verify"));
        let kid = match jwk.get("kid") {
            None => None,
            Some(kid) => Some(kid.as_str()?.to_owned()),
        };
        // RFC 7517 4.2 to 4.4. A private member means that the issuer has leaked the key: whoever reads the set can sign.
        let usable = says("alg", algorithm.as_str())
            && says("use", "sig")
            && jwk.get("key_ops").is_none_or(verifies)
            && !jwk.contains_key("d");
        usable.then_some(Self { kid, algorithm, public, exponent })
    }
}

impl KeySet {
    /// Reads a JWK set.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, KeySetError> {
        if bytes.len() > SET_BYTES_MAX {
            return Err(KeySetError::Large);
        }
        let set = json::object(bytes).ok_or(KeySetError::Malformed)?;
        let jwks = set.get("keys").and_then(Value::as_array).ok_or(KeySetError::Malformed)?;
        if jwks.len() > KEYS_MAX {
            return Err(KeySetError::Many);
        }
        let mut keys: Vec<Key> = Vec::new();
        for jwk in jwks {
            let Some(key) = Key::parse(jwk.as_object().ok_or(KeySetError::Malformed)?) else { continue };
            let same = |other: &Key| other.kid.is_some() && other.kid == key.kid && other.algorithm == key.algorithm;
            if keys.iter().any(same) {
                return Err(KeySetError::Twice);
            }
            keys.push(key);
        }
        if keys.is_empty() { Err(KeySetError::Unusable) } else { Ok(Self { keys }) }
    }

    /// The key that a token means. Without a `kid` there must be exactly one that fits.
    pub(super) fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<&Key> {
        let mut fitting = self.keys.iter().filter(|key| key.algorithm == algorithm);
        match kid {
            Some(kid) => fitting.find(|key| key.kid.as_deref() == Some(kid)),
            None => fitting.next().filter(|_| fitting.next().is_none()),
        }
    }
}

/// RFC 7518 6.3.1.1: big-endian, as short as can be. A modulus of two odd primes is odd.
fn is_modulus(n: &[u8]) -> bool {
    let Some(first) = n.first().filter(|first| **first != 0) else { return false };
    let unused = usize::try_from(first.leading_zeros()).unwrap_or(0);
    RSA_BITS.contains(&(n.len() * 8 - unused)) && n.last().is_some_and(|last| last & 1 == 1)
}

/// Odd and more than 1: with 1 every message is its own signature.
fn is_exponent(e: &[u8]) -> bool {
    let fits = e.first().is_some_and(|first| *first != 0) && e.len() <= RSA_EXPONENT_BYTES_MAX;
    fits && e != [1] && e.last().is_some_and(|last| last & 1 == 1)
}

/// An uncompressed point, if it lies on P-256 (RFC 8725 3.4).
fn point(x: &[u8], y: &[u8]) -> Option<Vec<u8>> {
    if x.len() != COORDINATE_BYTES || y.len() != COORDINATE_BYTES {
        return None;
    }
    let point = [&[UNCOMPRESSED], x, y].concat();
    // ring checks a point only when it is used. A key agreement is the use that needs no signature.
    let mine = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).ok()?;
    agree_ephemeral(mine, &Agreement::new(&ECDH_P256, &point), |_| ()).ok()?;
    Some(point)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::jwt::forge::vectors;

    fn parse(keys: &[Value]) -> Result<KeySet, KeySetError> {
        KeySet::parse(json!({ "keys": keys }).to_string().as_bytes())
    }

    fn with(base: &Value, name: &str, value: Value) -> Value {
        let mut jwk = base.clone();
        jwk[name] = value;
        jwk
    }

    #[test]
    fn the_signatures_of_the_standards_verify_and_no_other_does() {
        for vector in vectors() {
            let set = parse(&[vector["jwk"].clone()]).unwrap();
            let key = &set.keys[0];
            let input = vector["input"].as_str().unwrap().as_bytes();
            let signature = URL_SAFE_NO_PAD.decode(vector["signature"].as_str().unwrap()).unwrap();
            assert!(key.verify(input, &signature), "{}", vector["source"]);
            for at in 0..signature.len() {
                let mut forged = signature.clone();
                forged[at] ^= 1;
                assert!(!key.verify(input, &forged), "{} {at}", vector["source"]);
            }
            assert!(!key.verify(&input[1..], &signature));
            assert!(!key.verify(input, &signature[1..]));
            assert!(!key.verify(input, b""));
            assert!(!key.verify(input, &vec![0; signature.len()]), "psychic signature");
        }
    }

    #[test]
    fn a_key_is_used_only_for_what_it_says() {
        for vector in vectors() {
            let jwk = &vector["jwk"];
            for (name, value) in [
                ("alg", json!("HS256")),
                ("alg", json!("PS256")),
                ("alg", json!(1)),
                ("use", json!("enc")),
                ("use", json!(null)),
                ("key_ops", json!(["sign"])),
                ("key_ops", json!("verify")),
                ("d", json!("AA")),
                ("kid", json!(7)),
            ] {
                assert_eq!(parse(&[with(jwk, name, value.clone())]), Err(KeySetError::Unusable), "{name} {value}");
            }
            assert!(parse(&[with(jwk, "use", json!("sig"))]).is_ok());
            assert!(parse(&[with(jwk, "key_ops", json!(["verify"]))]).is_ok());
        }
    }

    #[test]
    fn a_weak_or_broken_key_is_refused() {
        let [rsa, ec, okp] = [0, 1, 2].map(|i| vectors()[i]["jwk"].clone());
        let encode = |bytes: &[u8]| json!(URL_SAFE_NO_PAD.encode(bytes));
        let n = URL_SAFE_NO_PAD.decode(rsa["n"].as_str().unwrap()).unwrap();
        let x = URL_SAFE_NO_PAD.decode(ec["x"].as_str().unwrap()).unwrap();
        let mut off_curve = x.clone();
        off_curve[0] ^= 1;
        let mut even = n.clone();
        *even.last_mut().unwrap() &= 0xfe;
        for bad in [
            with(&rsa, "n", encode(&n[..128])),
            with(&rsa, "n", encode(&[&[0], n.as_slice()].concat())),
            with(&rsa, "n", encode(&vec![0xff; 1_025])),
            with(&rsa, "n", encode(&even)),
            with(&rsa, "n", json!(format!("{}==", rsa["n"].as_str().unwrap()))),
            with(&rsa, "e", encode(&[1])),
            with(&rsa, "e", encode(&[0])),
            with(&rsa, "e", encode(&[])),
            with(&rsa, "e", encode(&[0, 1, 0, 1])),
            with(&rsa, "e", encode(&[2])),
            with(&rsa, "e", encode(&[1; 5])),
            with(&rsa, "kty", json!("EC")),
            with(&rsa, "crv", json!("P-256")),
            with(&ec, "x", encode(&off_curve)),
            with(&ec, "x", encode(&x[1..])),
            with(&ec, "y", encode(&[0; 32])),
            with(&ec, "crv", json!("P-384")),
            with(&ec, "crv", json!("secp256k1")),
            with(&okp, "x", encode(&[9; 31])),
            with(&okp, "x", encode(&[9; 33])),
            with(&okp, "crv", json!("Ed448")),
            with(&okp, "crv", json!("X25519")),
            json!({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}),
            json!({}),
        ] {
            assert_eq!(parse(std::slice::from_ref(&bad)), Err(KeySetError::Unusable), "{bad}");
        }
    }

    #[test]
    fn an_unusable_key_hides_no_usable_one() {
        let set = parse(&[json!({"kty": "oct", "k": "AA"}), with(&vectors()[1]["jwk"], "kid", json!("a"))]).unwrap();
        assert!(set.find(Some("a"), Algorithm::ES256).is_some());
    }

    #[test]
    fn a_token_means_exactly_one_key() {
        let [rsa, ec, okp] = [0, 1, 2].map(|i| vectors()[i]["jwk"].clone());
        let set = parse(&[with(&rsa, "kid", json!("a")), with(&ec, "kid", json!("a")), okp]).unwrap();
        assert_eq!(set.find(Some("a"), Algorithm::RS256).unwrap().algorithm, Algorithm::RS256);
        assert_eq!(set.find(Some("a"), Algorithm::ES256).unwrap().algorithm, Algorithm::ES256);
        assert_eq!(set.find(Some("a"), Algorithm::EdDSA), None, "a key without kid is not the one that kid names");
        assert_eq!(set.find(Some("b"), Algorithm::RS256), None);
        assert!(set.find(None, Algorithm::EdDSA).is_some());
        let two = parse(&[with(&ec, "kid", json!("a")), with(&ec, "kid", json!("b"))]).unwrap();
        assert_eq!(two.find(None, Algorithm::ES256), None);
        let twice = parse(&[with(&ec, "kid", json!("a")), with(&ec, "kid", json!("a"))]);
        assert_eq!(twice, Err(KeySetError::Twice));
    }

    #[test]
    fn a_document_that_is_no_set_is_refused() {
        for bad in ["", "[]", "{}", r#"{"keys":{}}"#, r#"{"keys":["a"]}"#, r#"{"keys":[],"keys":[]}"#] {
            assert_eq!(KeySet::parse(bad.as_bytes()), Err(KeySetError::Malformed), "{bad}");
        }
        assert_eq!(parse(&[]), Err(KeySetError::Unusable));
        assert_eq!(parse(&vec![vectors()[2]["jwk"].clone(); KEYS_MAX + 1]), Err(KeySetError::Many));
        assert_eq!(KeySet::parse(&vec![b' '; SET_BYTES_MAX + 1]), Err(KeySetError::Large));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = KeySet::parse(&bytes);
        }

        #[test]
        fn no_members_panic(n in "[A-Za-z0-9_-]{0,90}", e in "[A-Za-z0-9_-]{0,8}") {
            let _ = parse(&[json!({"kty": "RSA", "n": n, "e": e}), json!({"kty": "EC", "crv": "P-256", "x": n, "y": e})]);
        }
    }
}
