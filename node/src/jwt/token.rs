//! One token: a compact JWS (RFC 7515 7.1) that carries claims (RFC 7519).
//!
//! [`Token::parse`] reads what it says; [`Token::verify`] believes it. Nothing in the header is followed: `jku`, `x5u`,
//! `x5c` and `jwk` say where a forger keeps his keys (RFC 8725 3.10).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use selvage_config::app::jwt::{Algorithm, Issuer};
use serde_json::{Map, Value};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::json;
use super::key::KeySet;
use crate::fault::Denial;

/// Largest token, bytes.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// The `typ` values of tokens that let someone in (RFC 7519 5.1, RFC 9068 2.1). One with another type, such as a logout
/// token, was made for something else (RFC 8725 3.11).
const TYPES: [&str; 2] = ["jwt", "at+jwt"];

/// Claims of a verified token. Only [`Token::verify`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    subject: Option<String>,
    issuer: String,
    payload: String,
}

impl Claims {
    /// `sub`, whom the token is about.
    pub fn subject(&self) -> Option<&str> {
        self.subject.as_deref()
    }

    /// `iss`, who said so.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// All claims: JSON in base64url, as in the token.
    pub fn payload(&self) -> &str {
        &self.payload
    }
}

/// A token of which nothing is believed yet.
#[derive(Debug)]
pub(super) struct Token<'t> {
    pub(super) algorithm: Algorithm,
    pub(super) kid: Option<String>,
    /// What is signed: header and payload as sent (RFC 7515 5.2).
    input: &'t str,
    payload: &'t str,
    claims: Map<String, Value>,
    signature: Vec<u8>,
}

impl<'t> Token<'t> {
    /// Reads a token whose algorithm is one of `allowed`.
    pub(super) fn parse(text: &'t str, allowed: &[Algorithm]) -> Result<Self, Denial> {
        if text.len() > TOKEN_BYTES_MAX {
            return Err(Denial::Malformed);
        }
        let (input, signature) = text.rsplit_once('.').ok_or(Denial::Malformed)?;
        let (header, payload) = input.split_once('.').ok_or(Denial::Malformed)?;
        // The engine refuses padding, foreign characters (so a further '.') and unused bits that are set.
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Denial::Malformed);
        let object = |part: &str| json::object(&decode(part)?).ok_or(Denial::Malformed);
        let header = object(header)?;
        let (algorithm, kid) = read_header(&header, allowed)?;
        Ok(Self { algorithm, kid, input, payload, claims: object(payload)?, signature: decode(signature)? })
    }

    /// Believes the token if a key of the issuer signed it and its claims hold at `now`.
    pub(super) fn verify(&self, keys: &KeySet, issuer: &Issuer, now: SystemTime) -> Result<Claims, Denial> {
        let key = keys.find(self.kid.as_deref(), self.algorithm).ok_or(Denial::UnknownKey)?;
        if !key.verify(self.input.as_bytes(), &self.signature) {
            return Err(Denial::Signature);
        }
        self.check(issuer, now)?;
        let subject = self.claims.get("sub").and_then(Value::as_str).map(str::to_owned);
        Ok(Claims { subject, issuer: issuer.issuer.clone(), payload: self.payload.to_owned() })
    }

    /// RFC 7519 4.1, each claim by its own rule.
    fn check(&self, issuer: &Issuer, now: SystemTime) -> Result<(), Denial> {
        let claim = |name: &str| self.claims.get(name);
        if claim("iss").and_then(Value::as_str) != Some(issuer.issuer.as_str()) {
            return Err(Denial::Issuer);
        }
        let ours = |audience: &Value| issuer.audiences.iter().any(|ours| audience == ours.as_str());
        let reaches_us = match claim("aud") {
            Some(Value::Array(audiences)) => audiences.iter().all(Value::is_string) && audiences.iter().any(ours),
            Some(audience) => ours(audience),
            None => false,
        };
        if !reaches_us {
            return Err(Denial::Audience);
        }
        if claim("sub").is_some_and(|sub| !sub.is_string()) {
            return Err(Denial::Malformed);
        }
        let leeway = Duration::from_secs(issuer.leeway_seconds);
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let ends = claim("exp").and_then(numeric_date).ok_or(Denial::Expired)?;
        if now >= ends.saturating_add(leeway) {
            return Err(Denial::Expired);
        }
        if let Some(begins) = claim("nbf") {
            let begins = numeric_date(begins).ok_or(Denial::NotYetValid)?;
            if now.saturating_add(leeway) < begins {
                return Err(Denial::NotYetValid);
            }
        }
        Ok(())
    }
}

fn read_header(header: &Map<String, Value>, allowed: &[Algorithm]) -> Result<(Algorithm, Option<String>), Denial> {
    let alg = header.get("alg").and_then(Value::as_str).ok_or(Denial::Malformed)?;
    // RFC 8725 3.1 and 3.2: the rule's list decides, and it can't hold `none` or an HMAC.
    let algorithm = allowed.iter().find(|a| a.as_str() == alg).copied().ok_or(Denial::Algorithm)?;
    // RFC 7515 4.1.11: we understand no extension. RFC 7797: `b64` changes what is signed.
    if header.contains_key("crit") || header.contains_key("b64") || header.contains_key("zip") {
        return Err(Denial::Malformed);
    }
    let kind = |value: &Value| {
        let text = value.as_str()?.to_ascii_lowercase();
        let short = text.strip_prefix("application/").unwrap_or(&text);
        TYPES.contains(&short).then_some(())
    };
    // A `cty` says that the payload is a token again (RFC 7519 5.2).
    if header.get("typ").is_some_and(|typ| kind(typ).is_none()) || header.contains_key("cty") {
        return Err(Denial::Malformed);
    }
    match header.get("kid") {
        None => Ok((algorithm, None)),
        Some(kid) => Ok((algorithm, Some(kid.as_str().ok_or(Denial::Malformed)?.to_owned()))),
    }
}

/// RFC 7519 2: seconds since 1970, which may have a fraction. `None` for what is no date or before 1970.
fn numeric_date(value: &Value) -> Option<Duration> {
    match value.as_u64() {
        Some(seconds) => Some(Duration::from_secs(seconds)),
        None => Duration::try_from_secs_f64(value.as_f64()?).ok(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::jwt::forge::{Forger, claims, issuer, today};

    fn verify(forger: &Forger, text: &str) -> Result<Claims, Denial> {
        let issuer = issuer(&forger.jwks());
        let token = Token::parse(text, &issuer.algorithms)?;
        token.verify(&KeySet::parse(forger.jwks().as_bytes()).unwrap(), &issuer, today())
    }

    fn changed(name: &str, value: Value) -> Value {
        let mut all = claims();
        all[name] = value;
        all
    }

    #[test]
    fn a_good_token_of_each_algorithm_is_believed() {
        for forger in Forger::all() {
            let believed = verify(&forger, &forger.sign(&claims())).unwrap();
            assert_eq!((believed.subject(), believed.issuer()), (Some("ada"), "https://issuer.example"));
            let payload = URL_SAFE_NO_PAD.decode(believed.payload()).unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&payload).unwrap(), claims());
        }
    }

    #[test]
    fn each_claim_is_held_to_its_rule() {
        let forger = Forger::ed25519("a");
        let now = today().duration_since(UNIX_EPOCH).unwrap().as_secs();
        for (name, value, denial) in [
            ("iss", json!("https://issuer.example/"), Denial::Issuer),
            ("iss", json!("HTTPS://issuer.example"), Denial::Issuer),
            ("iss", json!(["https://issuer.example"]), Denial::Issuer),
            ("iss", json!(null), Denial::Issuer),
            ("aud", json!("other"), Denial::Audience),
            ("aud", json!(["other"]), Denial::Audience),
            ("aud", json!([]), Denial::Audience),
            ("aud", json!(["api", 1]), Denial::Audience),
            ("aud", json!([["api"]]), Denial::Audience),
            ("aud", json!({"api": 1}), Denial::Audience),
            ("exp", json!(now - 60), Denial::Expired),
            ("exp", json!(now - 61), Denial::Expired),
            ("exp", json!(0), Denial::Expired),
            ("exp", json!(-1), Denial::Expired),
            ("exp", json!(-1.5), Denial::Expired),
            ("exp", json!(now.to_string()), Denial::Expired),
            ("exp", json!(null), Denial::Expired),
            ("exp", json!([now + 9]), Denial::Expired),
            ("nbf", json!(now + 61), Denial::NotYetValid),
            ("nbf", json!("0"), Denial::NotYetValid),
            ("nbf", json!(1e300), Denial::NotYetValid),
            ("sub", json!(7), Denial::Malformed),
        ] {
            let token = forger.sign(&changed(name, value.clone()));
            assert_eq!(verify(&forger, &token), Err(denial), "{name} {value}");
        }
        for (name, value) in [
            ("aud", json!(["other", "api"])),
            ("exp", json!(now - 59)),
            ("exp", json!(now as f64 + 0.5)),
            ("nbf", json!(now + 60)),
            ("nbf", json!(0)),
        ] {
            assert!(verify(&forger, &forger.sign(&changed(name, value.clone()))).is_ok(), "{name} {value}");
        }
        for missing in ["iss", "aud", "exp"] {
            let mut all = claims();
            all.as_object_mut().unwrap().remove(missing);
            assert!(verify(&forger, &forger.sign(&all)).is_err(), "{missing}");
        }
    }

    #[test]
    fn an_algorithm_outside_the_rule_is_refused() {
        let forger = Forger::rsa("a");
        let payload = URL_SAFE_NO_PAD.encode(claims().to_string());
        for alg in ["none", "None", "NONE", "nOnE", "", "HS256", "HS384", "HS512", "PS256", "RS512", "ES384", "rs256"] {
            let header = URL_SAFE_NO_PAD.encode(json!({ "alg": alg }).to_string());
            for signature in ["", "AA"] {
                let token = format!("{header}.{payload}.{signature}");
                assert_eq!(verify(&forger, &token), Err(Denial::Algorithm), "{alg}");
            }
        }
        // Signed by an allowed key type, but the rule takes only another.
        let token = forger.sign(&claims());
        assert_eq!(Token::parse(&token, &[Algorithm::ES256]).unwrap_err(), Denial::Algorithm);
    }

    #[test]
    fn a_public_key_is_no_shared_secret() {
        let forger = Forger::rsa("a");
        for secret in [forger.jwks().into_bytes(), forger.public()] {
            let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","kid":"a"}"#);
            let input = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims().to_string()));
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &secret);
            let tag = URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, input.as_bytes()));
            assert_eq!(verify(&forger, &format!("{input}.{tag}")), Err(Denial::Algorithm));
        }
    }

    #[test]
    fn a_signature_by_another_key_is_refused() {
        let (ours, theirs) = (Forger::p256("a"), Forger::p256("a"));
        assert_eq!(verify(&ours, &theirs.sign(&claims())), Err(Denial::Signature));
        assert_eq!(verify(&ours, &Forger::p256("b").sign(&claims())), Err(Denial::UnknownKey));
        assert_eq!(verify(&ours, &Forger::ed25519("a").sign(&claims())), Err(Denial::UnknownKey));
        let good = ours.sign(&claims());
        let (input, signature) = good.rsplit_once('.').unwrap();
        let forged = URL_SAFE_NO_PAD.encode(changed("sub", json!("root")).to_string());
        let header = input.split('.').next().unwrap();
        assert_eq!(verify(&ours, &format!("{header}.{forged}.{signature}")), Err(Denial::Signature));
        assert_eq!(verify(&ours, &format!("{input}.")), Err(Denial::Signature));
        let zeros = URL_SAFE_NO_PAD.encode([0; 64]);
        assert_eq!(verify(&ours, &format!("{input}.{zeros}")), Err(Denial::Signature));
    }

    #[test]
    fn a_header_that_asks_for_more_is_refused() {
        let forger = Forger::p256("a");
        for (name, value) in [
            ("crit", json!(["exp"])),
            ("crit", json!([])),
            ("b64", json!(false)),
            ("b64", json!(true)),
            ("zip", json!("DEF")),
            ("cty", json!("JWT")),
            ("typ", json!("logout+jwt")),
            ("typ", json!("dpop+jwt")),
            ("typ", json!(1)),
            ("kid", json!(1)),
            ("alg", json!(["ES256"])),
        ] {
            let token = forger.sign_with(&json!({ name: value.clone() }), &claims());
            assert_eq!(verify(&forger, &token), Err(Denial::Malformed), "{name} {value}");
        }
        for typ in ["JWT", "jwt", "at+jwt", "application/at+jwt"] {
            assert!(verify(&forger, &forger.sign_with(&json!({ "typ": typ }), &claims())).is_ok(), "{typ}");
        }
    }

    #[test]
    fn a_key_in_the_token_is_not_looked_at() {
        let (ours, theirs) = (Forger::p256("a"), Forger::p256("evil"));
        let jwk = serde_json::from_str::<Value>(&theirs.jwks()).unwrap()["keys"][0].clone();
        for extra in [
            json!({ "jwk": jwk }),
            json!({ "jku": "https://evil.example/keys", "kid": "evil" }),
            json!({ "x5u": "https://evil.example/cert", "x5c": ["MIIB"] }),
        ] {
            assert!(verify(&ours, &theirs.sign_with(&extra, &claims())).is_err(), "{extra}");
        }
        let mut own = theirs.sign_with(&json!({ "jwk": jwk, "kid": "a" }), &claims());
        assert_eq!(verify(&ours, &own), Err(Denial::Signature));
        own = ours.sign_with(&json!({ "jwk": jwk }), &claims());
        assert!(verify(&ours, &own).is_ok());
    }

    #[test]
    fn an_encoding_with_any_freedom_is_refused() {
        let forger = Forger::ed25519("a");
        let good = forger.sign(&claims());
        let [header, payload, signature] = good.split('.').collect::<Vec<_>>().try_into().unwrap();
        // 64 bytes leave four unused bits in the last character: any other value of them decodes the same.
        let last = signature.chars().next_back().unwrap();
        let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
        let loose = format!("{}{next}", &signature[..signature.len() - 1]);
        for bad in [
            format!("{header}.{payload}.{signature}=="),
            format!("{header}=.{payload}.{signature}"),
            format!("{header}.{payload}.{loose}"),
            format!("{header}.{payload}.{signature}\n"),
            format!(" {header}.{payload}.{signature}"),
            format!("{header}. {payload}.{signature}"),
            format!("{header}.{payload}.{signature}.{signature}"),
            format!("{header}..{payload}.{signature}"),
            format!("{header}.{payload}"),
            format!("{header}.{payload}.{}", signature.replacen(|c: char| c.is_ascii_alphanumeric(), "+", 1)),
            String::new(),
            ".".into(),
            "..".into(),
            "...".into(),
            format!("{header}.{}.{signature}", "A".repeat(TOKEN_BYTES_MAX)),
        ] {
            assert_eq!(verify(&forger, &bad), Err(Denial::Malformed), "{bad}");
        }
    }

    #[test]
    fn a_member_twice_is_refused_though_signed() {
        let forger = Forger::ed25519("a");
        let twice = claims().to_string().replacen('{', r#"{"aud":"other","#, 1);
        assert_eq!(verify(&forger, &forger.sign_text(r#"{"alg":"EdDSA","kid":"a"}"#, &twice)), Err(Denial::Malformed));
        let header = r#"{"alg":"none","alg":"EdDSA","kid":"a"}"#;
        let token = forger.sign_text(header, &claims().to_string());
        assert_eq!(verify(&forger, &token), Err(Denial::Malformed));
        let token = forger.sign_text(r#"{"alg":"EdDSA","kid":"a"}"#, "[]");
        assert_eq!(verify(&forger, &token), Err(Denial::Malformed));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = Token::parse(&text, &Algorithm::ALL);
        }

        #[test]
        fn no_parts_panic(header in ".*", payload in ".*", signature: Vec<u8>) {
            let [header, payload] = [header, payload].map(|part| URL_SAFE_NO_PAD.encode(part));
            let text = format!("{header}.{payload}.{}", URL_SAFE_NO_PAD.encode(signature));
            let _ = Token::parse(&text, &Algorithm::ALL);
        }
    }
}
