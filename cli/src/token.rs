//! `selvage token`: JSON Web Tokens to test with (RFC 7519), and the public keys that verify them (RFC 7517).

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use miette::Report;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};
use selvage_config::Digest;
use serde_json::{Map, Value, json};

use crate::output::{Output, failed, failure, wrong};

/// `selvage token`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage token --key examples/gate/test-keys/es256.pem --kid es256 \\\n    --issuer https://issuer.example --audience gate --subject alice\n  selvage token --key es256.pem --jwks > jwks.json"
)]
pub(crate) struct Arguments {
    /// A private key, PKCS #8 PEM: RSA (RS256), P-256 (ES256) or Ed25519 (EdDSA).
    #[arg(long)]
    key: PathBuf,

    /// Print the public key as a JWK set instead of a token.
    #[arg(long)]
    jwks: bool,

    /// The key's name in the token's header. Default: its thumbprint (RFC 7638).
    #[arg(long)]
    kid: Option<String>,

    /// `iss`.
    #[arg(long)]
    issuer: Option<String>,

    /// `aud`. May be repeated.
    #[arg(long)]
    audience: Vec<String>,

    /// `sub`.
    #[arg(long)]
    subject: Option<String>,

    /// Seconds until `exp`; negative for a token that has expired.
    #[arg(long, default_value_t = 3_600, allow_negative_numbers = true)]
    expires_in: i64,

    /// Seconds until `nbf`. Without it the token has none.
    #[arg(long, allow_negative_numbers = true)]
    not_before_in: Option<i64>,

    /// A further claim, as NAME=VALUE; VALUE may be JSON. May be repeated.
    #[arg(long = "claim", value_parser = crate::deploy::pair, value_name = "NAME=VALUE")]
    claims: Vec<(String, String)>,
}

/// A private key that signs tokens.
pub(crate) enum TokenKey {
    /// RS256.
    Rsa(RsaKeyPair),
    /// ES256.
    P256(EcdsaKeyPair),
    /// EdDSA.
    Ed25519(Ed25519KeyPair),
}

/// Prints a token, or the key's public half.
pub(crate) fn run(arguments: &Arguments, output: Output) -> Result<ExitCode, Report> {
    let name = arguments.key.display();
    let text = std::fs::read_to_string(&arguments.key)
        .map_err(|error| wrong(format!("read {name}: {error}"), Some("give a PKCS #8 PEM file with --key")))?;
    let key = TokenKey::of_pem(&text).ok_or_else(|| {
        let hint = "make one with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem";
        wrong(format!("{name} is no PKCS #8 private key of RSA, P-256 or Ed25519"), Some(hint))
    })?;
    let kid = arguments.kid.clone().unwrap_or_else(|| key.thumbprint());
    if arguments.jwks {
        let set = json!({ "keys": [key.jwk(&kid)] });
        output.answer(&set, serde_json::to_string_pretty(&set).unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    let token = key.token(&kid, &claims(arguments)?)?;
    output.answer(&json!({ "token": token }), &token);
    Ok(ExitCode::SUCCESS)
}

fn claims(arguments: &Arguments) -> Result<Map<String, Value>, Report> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|e| failure("read the clock", &e, None))?.as_secs();
    let at = |offset: i64| json!(i64::try_from(now).unwrap_or(i64::MAX).saturating_add(offset));
    let mut claims = Map::new();
    let text = |value: &Option<String>| value.clone().map(Value::String);
    for (name, value) in [("iss", text(&arguments.issuer)), ("sub", text(&arguments.subject))] {
        claims.extend(value.map(|value| (name.to_owned(), value)));
    }
    match arguments.audience.as_slice() {
        [] => {}
        [one] => drop(claims.insert("aud".into(), json!(one))),
        many => drop(claims.insert("aud".into(), json!(many))),
    }
    claims.insert("iat".into(), at(0));
    claims.insert("exp".into(), at(arguments.expires_in));
    claims.extend(arguments.not_before_in.map(|offset| ("nbf".to_owned(), at(offset))));
    for (name, value) in &arguments.claims {
        claims.insert(name.clone(), serde_json::from_str(value).unwrap_or_else(|_| json!(value)));
    }
    Ok(claims)
}

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl TokenKey {
    /// The one private key of a PEM text.
    pub(crate) fn of_pem(text: &str) -> Option<Self> {
        let (_, after) = text.split_once("-----BEGIN PRIVATE KEY-----")?;
        let body: String = after.split_once("-----END PRIVATE KEY-----")?.0.split_whitespace().collect();
        Self::of_pkcs8(&STANDARD.decode(body).ok()?)
    }

    /// A key in PKCS #8 DER.
    pub(crate) fn of_pkcs8(der: &[u8]) -> Option<Self> {
        let p256 = || EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &SystemRandom::new()).ok();
        let ed25519 = || Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok();
        let rsa = || RsaKeyPair::from_pkcs8(der).ok();
        p256().map(Self::P256).or_else(|| ed25519().map(Self::Ed25519)).or_else(|| rsa().map(Self::Rsa))
    }

    /// The `alg` of its tokens.
    pub(crate) fn algorithm(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::P256(_) => "ES256",
            Self::Ed25519(_) => "EdDSA",
        }
    }

    /// Signs in the form that JWS wants (RFC 7518 3.3, 3.4; RFC 8037 3.1).
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Report> {
        let no_random = |_| failed("the system has no random numbers", None);
        Ok(match self {
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature).map_err(no_random)?;
                signature
            }
            Self::P256(key) => key.sign(&SystemRandom::new(), message).map_err(no_random)?.as_ref().to_owned(),
            Self::Ed25519(key) => key.sign(message).as_ref().to_owned(),
        })
    }

    /// The public key's members, without `kid` and `alg`.
    fn public(&self) -> Map<String, Value> {
        let members = match self {
            Self::Rsa(key) => {
                let parts = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(key.public());
                json!({ "e": encoded(parts.e), "kty": "RSA", "n": encoded(parts.n) })
            }
            Self::P256(key) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(32);
                json!({ "crv": "P-256", "kty": "EC", "x": encoded(x), "y": encoded(y) })
            }
            Self::Ed25519(key) => json!({ "crv": "Ed25519", "kty": "OKP", "x": encoded(key.public_key()) }),
        };
        members.as_object().cloned().unwrap_or_default()
    }

    /// RFC 7638: the hash of the required members in the order of their names, without white space.
    pub(crate) fn thumbprint(&self) -> String {
        let members = Value::Object(self.public()).to_string();
        encoded(Digest::of(members.as_bytes()).as_bytes())
    }

    /// The public key as a JWK.
    pub(crate) fn jwk(&self, kid: &str) -> Value {
        let mut members = self.public();
        members.insert("kid".into(), json!(kid));
        members.insert("alg".into(), json!(self.algorithm()));
        members.insert("use".into(), json!("sig"));
        Value::Object(members)
    }

    /// A token with these claims.
    pub(crate) fn token(&self, kid: &str, claims: &Map<String, Value>) -> Result<String, Report> {
        let header = json!({ "alg": self.algorithm(), "kid": kid, "typ": "JWT" });
        let signed = format!("{}.{}", encoded(header.to_string()), encoded(Value::Object(claims.clone()).to_string()));
        Ok(format!("{signed}.{}", encoded(self.sign(signed.as_bytes())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_verifies_with_its_jwk() {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
        let key = TokenKey::of_pkcs8(pkcs8.as_ref()).unwrap();
        assert_eq!(key.algorithm(), "ES256");
        let token = key.token("k", &Map::new()).unwrap();
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let jwk = key.jwk("k");
        let part = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
        let point = [&[4], part("x").as_slice(), part("y").as_slice()].concat();
        let public = ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, point);
        assert!(public.verify(signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).unwrap()).is_ok());
    }

    #[test]
    fn the_thumbprint_is_that_of_the_specification() {
        // RFC 8037 A.3: Ed25519.
        let jwk = r#"{"crv":"Ed25519","kty":"OKP","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
        let hash = encoded(Digest::of(jwk.as_bytes()).as_bytes());
        assert_eq!(hash, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = TokenKey::of_pkcs8(pkcs8.as_ref()).unwrap();
        let members: Vec<String> = key.public().keys().cloned().collect();
        assert_eq!(members, ["crv", "kty", "x"], "members must stand in the order of their names");
    }
}
