//! Who may talk to a NATS server: TLS, and users by key, by credentials of an operator, by token.
//!
//! Keys and tokens are as nats-io/nkeys and nats-io/jwt (version 2) have them: a key is base32 of a prefix, 32 bytes and a
//! checksum; a JWT is signed by Ed25519 of such a key.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use selvage_certs::Authority;
use serde_json::{Value, json};

/// What a key is of, by the prefix that makes its first letter.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Operator = 14 << 3,
    Account = 0,
    User = 20 << 3,
}

/// The prefix of a seed.
const SEED: u8 = 18 << 3;

/// A key of somebody.
pub(super) struct Nkey {
    kind: Kind,
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

impl Nkey {
    pub(super) fn new(kind: Kind) -> Self {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).unwrap();
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
        Self { kind, seed, pair }
    }

    pub(super) fn public(&self) -> String {
        written(&[&[self.kind as u8], self.pair.public_key().as_ref()].concat())
    }

    pub(super) fn seed(&self) -> String {
        let kind = self.kind as u8;
        written(&[&[SEED | (kind >> 5), (kind & 31) << 3], &self.seed[..]].concat())
    }

    /// Says something of another key, or of itself.
    fn vouches(&self, of: &Self, name: &str, says: &Value) -> String {
        let claims = json!({
            "jti": name, "iat": 1_700_000_000, "iss": self.public(), "sub": of.public(), "name": name, "nats": says,
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "typ": "JWT", "alg": "ed25519-nkey" })), part(&claims));
        let signature = URL_SAFE_NO_PAD.encode(self.pair.sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }
}

/// Base32 (RFC 4648 6, without padding) of the bytes and their CRC-16 (XMODEM), lower byte first.
fn written(bytes: &[u8]) -> String {
    let crc = bytes.iter().fold(0_u16, |crc, byte| {
        (0..8).fold(
            crc ^ (u16::from(*byte) << 8),
            |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 },
        )
    });
    let all = [bytes, &crc.to_le_bytes()].concat();
    let mut text = String::new();
    let (mut held, mut bits) = (0_u32, 0);
    for byte in all {
        (held, bits) = ((held << 8) | u32::from(byte), bits + 8);
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(held >> bits) as usize & 31]));
        }
        held &= (1 << bits) - 1;
    }
    if bits > 0 {
        text.push(char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(held << (5 - bits)) as usize & 31]));
    }
    text
}

/// A server's certificate by an authority of its own: what its file says of it, and what a control plane's file says.
pub(super) fn tls(dir: &Path) -> (String, String) {
    let authority = Authority::create("nats").unwrap();
    let certificate = authority.issue_server(&["localhost".into()], &[IpAddr::V4(Ipv4Addr::LOCALHOST)]).unwrap();
    let path = |name: &str| dir.join(name);
    certificate.save(path("server.pem"), path("server.key")).unwrap();
    std::fs::write(path("nats-ca.pem"), authority.certificate_pem()).unwrap();
    let settings =
        format!("tls {{ cert_file: {:?}, key_file: {:?}, timeout: 10 }}\n", path("server.pem"), path("server.key"));
    (settings, format!("roots = {:?}\n", path("nats-ca.pem")))
}

/// A server of an operator: its settings, and the credentials of a user of its account.
pub(super) fn operator() -> (String, String) {
    let (operator, system, account, user) =
        (Nkey::new(Kind::Operator), Nkey::new(Kind::Account), Nkey::new(Kind::Account), Nkey::new(Kind::User));
    let rights = json!({ "pub": {}, "sub": {} });
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let no_streams = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    });
    let of_account =
        |limits: &Value| json!({ "limits": limits, "default_permissions": rights, "type": "account", "version": 2 });
    let own = operator.vouches(
        &operator,
        "operator",
        &json!({ "system_account": system.public(), "type": "operator", "version": 2 }),
    );
    let settings = format!(
        "server_name: one\noperator: {own}\nsystem_account: {system_key}\nresolver: MEMORY\n\
         resolver_preload: {{ {system_key}: {system_word}, {account_key}: {account_word} }}\n",
        system_key = system.public(),
        system_word = operator.vouches(&system, "SYS", &of_account(&no_streams)),
        account_key = account.public(),
        account_word = operator.vouches(&account, "fleet", &of_account(&limits)),
    );
    let word = account.vouches(
        &user,
        "control-planes",
        &json!({ "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2 }),
    );
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{word}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed()
    );
    (settings, credentials)
}
