//! Issuers for tests: keys of each kind, and tokens signed with them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::rsa::{KeyPair as RsaKeyPair, KeyPairComponents, PublicKeyComponents};
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256};
use selvage_config::app::jwt::{Algorithm, Issuer, KeySource};
use serde_json::{Value, json};

/// When tests happen: 2023-11-14.
pub(crate) fn today() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

/// The examples of the standards, with their private keys where a test needs one.
pub(crate) fn vectors() -> Vec<Value> {
    serde_json::from_str(include_str!("vectors.json")).unwrap()
}

/// Claims that every rule of [`issuer`] holds for.
pub(crate) fn claims() -> Value {
    let now = today().duration_since(UNIX_EPOCH).unwrap().as_secs();
    json!({"iss": "https://issuer.example", "aud": "api", "sub": "ada", "exp": now + 300, "iat": now, "nbf": now})
}

/// An issuer whose keys are given in its document.
pub(crate) fn issuer(jwks: &str) -> Issuer {
    Issuer {
        issuer: "https://issuer.example".into(),
        audiences: vec!["api".into()],
        keys: KeySource::Inline(jwks.into()),
        algorithms: Algorithm::ALL.to_vec(),
        leeway_seconds: 60,
    }
}

enum Private {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// Somebody with a private key.
pub(crate) struct Forger {
    kid: &'static str,
    jwk: Value,
    private: Private,
}

impl Forger {
    pub(crate) fn all() -> [Self; 3] {
        [Self::rsa("a"), Self::p256("a"), Self::ed25519("a")]
    }

    pub(crate) fn rsa(kid: &'static str) -> Self {
        let vector = vectors().swap_remove(0);
        let part = |group: &str, name: &str| URL_SAFE_NO_PAD.decode(vector[group][name].as_str().unwrap()).unwrap();
        let private = |name| part("private", name);
        let key = RsaKeyPair::from_components(&KeyPairComponents {
            public_key: PublicKeyComponents { n: part("jwk", "n"), e: part("jwk", "e") },
            d: private("d"),
            p: private("p"),
            q: private("q"),
            dP: private("dp"),
            dQ: private("dq"),
            qInv: private("qi"),
        });
        Self { kid, jwk: vector["jwk"].clone(), private: Private::Rsa(key.unwrap()) }
    }

    pub(crate) fn p256(kid: &'static str) -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        let [x, y] = [1..33, 33..65].map(|part| URL_SAFE_NO_PAD.encode(&key.public_key().as_ref()[part]));
        Self { kid, jwk: json!({"kty": "EC", "crv": "P-256", "x": x, "y": y}), private: Private::P256(key) }
    }

    pub(crate) fn ed25519(kid: &'static str) -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
        let x = URL_SAFE_NO_PAD.encode(key.public_key().as_ref());
        Self { kid, jwk: json!({"kty": "OKP", "crv": "Ed25519", "x": x}), private: Private::Ed25519(key) }
    }

    fn algorithm(&self) -> Algorithm {
        match &self.private {
            Private::Rsa(_) => Algorithm::RS256,
            Private::P256(_) => Algorithm::ES256,
            Private::Ed25519(_) => Algorithm::EdDSA,
        }
    }

    /// The public half as a JWK set.
    pub(crate) fn jwks(&self) -> String {
        let mut jwk = self.jwk.clone();
        jwk["kid"] = json!(self.kid);
        jwk["alg"] = json!(self.algorithm().as_str());
        json!({ "keys": [jwk] }).to_string()
    }

    /// The public half as bytes that others might take for a secret.
    pub(crate) fn public(&self) -> Vec<u8> {
        match &self.private {
            Private::Rsa(key) => key.public().as_ref().to_vec(),
            Private::P256(key) => key.public_key().as_ref().to_vec(),
            Private::Ed25519(key) => key.public_key().as_ref().to_vec(),
        }
    }

    /// A token with these claims.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        self.sign_with(&json!({}), claims)
    }

    /// A token whose header has `extra` members, which replace the usual ones.
    pub(crate) fn sign_with(&self, extra: &Value, claims: &Value) -> String {
        let mut header = json!({"alg": self.algorithm().as_str(), "kid": self.kid});
        for (name, value) in extra.as_object().unwrap() {
            header[name] = value.clone();
        }
        self.sign_text(&header.to_string(), &claims.to_string())
    }

    /// A token of this header and payload, whatever they are.
    pub(crate) fn sign_text(&self, header: &str, payload: &str) -> String {
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        let signature = match &self.private {
            Private::Rsa(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), input.as_bytes(), &mut signature).unwrap();
                signature
            }
            Private::P256(key) => key.sign(&SystemRandom::new(), input.as_bytes()).unwrap().as_ref().to_vec(),
            Private::Ed25519(key) => key.sign(input.as_bytes()).as_ref().to_vec(),
        };
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}
