//! Key pairs as cosign keeps them: `cosign.key` (encrypted PKCS #8) and `cosign.pub` (SubjectPublicKeyInfo).
//!
//! The private key's PEM holds JSON: scrypt stretches the password, NaCl's secretbox (XSalsa20-Poly1305) seals the key
//! (go-securesystemslib `encrypted`, which cosign uses).

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crypto_secretbox::aead::{Aead, KeyInit};
use crypto_secretbox::{Nonce, XSalsa20Poly1305};
use miette::Report;
use ring::rand::{SecureRandom, SystemRandom};
use selvage_config::key::pem;
use selvage_config::{PrivateKey, PublicKey};
use serde::{Deserialize, Serialize};

use crate::output::{Output, failed, failure, wrong};

/// The label that cosign writes since 2.0.
const LABEL: &str = "ENCRYPTED SIGSTORE PRIVATE KEY";
/// The label that it wrote before.
const LABEL_OLD: &str = "ENCRYPTED COSIGN PRIVATE KEY";
/// scrypt's cost as cosign chooses it: log2 N, r, p.
const SCRYPT: (u8, u32, u32) = (15, 8, 1);
/// The most that a key file may ask of scrypt, log2 N: 128 MiB with r = 8.
const SCRYPT_LOG_N_MAX: u8 = 17;
/// Largest key file, bytes.
const KEY_BYTES_MAX: usize = 64 * 1024;
/// `selvage key`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  COSIGN_PASSWORD=… selvage key --prefix release      writes release.key and release.pub\n  selvage key --prefix plan --plain                  the control plane's, which signs plans by itself"
)]
pub(crate) struct Arguments {
    /// The files are PREFIX.key and PREFIX.pub.
    #[arg(long, default_value = "cosign")]
    prefix: PathBuf,

    /// Write the private key as PKCS #8 without a password: for a program that signs by itself.
    #[arg(long)]
    plain: bool,

    #[command(flatten)]
    password: PasswordArguments,
}

/// Where a key's password comes from.
#[derive(Clone, clap::Args)]
pub(crate) struct PasswordArguments {
    /// The private key's password. An empty one is allowed, as in cosign.
    #[arg(
        long = "key-password",
        env = "COSIGN_PASSWORD",
        hide_env_values = true,
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) password: String,
}

impl std::fmt::Debug for PasswordArguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PasswordArguments(…)")
    }
}

/// A private key to sign with.
pub(crate) struct SigningKey(PrivateKey);

#[derive(Serialize, Deserialize)]
struct Sealed {
    kdf: Kdf,
    cipher: Cipher,
    ciphertext: String,
}

#[derive(Serialize, Deserialize)]
struct Kdf {
    name: String,
    params: KdfParams,
    salt: String,
}

#[derive(Serialize, Deserialize)]
struct KdfParams {
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
}

#[derive(Serialize, Deserialize)]
struct Cipher {
    name: String,
    nonce: String,
}

/// Makes a key pair in two files. Nothing is overwritten.
pub(crate) fn run(arguments: &Arguments, output: Output) -> Result<ExitCode, Report> {
    let (private, public) = (with_suffix(&arguments.prefix, "key"), with_suffix(&arguments.prefix, "pub"));
    if public.exists() {
        return Err(wrong(format!("{} exists", public.display()), Some("choose another --prefix")));
    }
    let key = SigningKey::generate()?;
    let sealed = if arguments.plain { key.0.to_pem() } else { key.to_pem(&arguments.password.password)? };
    write_new(&private, sealed.as_bytes(), 0o600)?;
    write_new(&public, key.public_pem().as_bytes(), 0o644)?;
    let text = format!("private key  {}\npublic key   {}", private.display(), public.display());
    output.answer(&serde_json::json!({ "private": private, "public": public }), text);
    Ok(ExitCode::SUCCESS)
}

fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// Writes a file that is not there yet.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Report> {
    let hint = "choose another place, or remove the file";
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(bytes))
        .map_err(|error| failure(&format!("write {}", path.display()), &error, Some(hint)))
}

impl SigningKey {
    /// A fresh ECDSA P-256 key.
    pub(crate) fn generate() -> Result<Self, Report> {
        PrivateKey::generate().map(Self).map_err(|error| failure("make a key", &error, None))
    }

    /// Opens a key file: cosign's, or PKCS #8 without a password.
    pub(crate) fn load(path: &Path, password: &str) -> Result<Self, Report> {
        let name = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| failure(&format!("read {name}"), &error, None))?;
        if let Ok(key) = PrivateKey::from_pem(text.as_bytes()) {
            return Ok(Self(key));
        }
        let sealed = unarmor(&text).ok_or_else(|| {
            let hint = "expected a cosign private key: make one with `selvage key` or `cosign generate-key-pair`";
            wrong(format!("{name} is no key file"), Some(hint))
        })?;
        let pkcs8 = open(&sealed, password)
            .map_err(|reason| wrong(format!("open {name}: {reason}"), Some("give the password in COSIGN_PASSWORD")))?;
        PrivateKey::from_pkcs8(&pkcs8).map(Self).map_err(|error| failure(&format!("use {name}"), &error, None))
    }

    /// The key itself.
    pub(crate) fn private(&self) -> &PrivateKey {
        &self.0
    }

    /// Signs with SHA-256; the signature is in DER.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Report> {
        self.0.sign(message).map_err(|error| failure("sign", &error, None))
    }

    /// The public key's SubjectPublicKeyInfo, DER.
    pub(crate) fn spki(&self) -> Vec<u8> {
        self.0.public().spki().to_vec()
    }

    /// The public key, PEM.
    pub(crate) fn public_pem(&self) -> String {
        self.0.public().to_pem()
    }

    /// The private key as a cosign key file.
    pub(crate) fn to_pem(&self, password: &str) -> Result<String, Report> {
        let no_random = |_| failed("the system has no random numbers", None);
        let (mut salt, mut nonce) = ([0; 32], [0; 24]);
        SystemRandom::new().fill(&mut salt).map_err(no_random)?;
        SystemRandom::new().fill(&mut nonce).map_err(no_random)?;
        let (log_n, r, p) = SCRYPT;
        let cipher = stretched(password, &salt, log_n, r, p).map_err(|reason| failed(reason, None))?;
        let sealed = cipher.encrypt(Nonce::from_slice(&nonce), self.0.pkcs8());
        let sealed = sealed.map_err(|_| failed("seal the key", None))?;
        let document = Sealed {
            kdf: Kdf { name: "scrypt".into(), params: KdfParams { n: 1 << log_n, r, p }, salt: STANDARD.encode(salt) },
            cipher: Cipher { name: "nacl/secretbox".into(), nonce: STANDARD.encode(nonce) },
            ciphertext: STANDARD.encode(sealed),
        };
        let json = serde_json::to_vec(&document).map_err(|error| failure("write the key", &error, None))?;
        Ok(pem(LABEL, &json))
    }
}

fn stretched(password: &str, salt: &[u8], log_n: u8, r: u32, p: u32) -> Result<XSalsa20Poly1305, &'static str> {
    let params = scrypt::Params::new(log_n, r, p, 32).map_err(|_| "its scrypt parameters can't be used")?;
    let mut key = [0; 32];
    scrypt::scrypt(password.as_bytes(), salt, &params, &mut key).map_err(|_| "its scrypt parameters can't be used")?;
    Ok(XSalsa20Poly1305::new(&key.into()))
}

fn open(sealed: &[u8], password: &str) -> Result<Vec<u8>, &'static str> {
    const MALFORMED: &str = "it is malformed";
    let sealed: Sealed = serde_json::from_slice(sealed).map_err(|_| MALFORMED)?;
    let bytes = |text: &str| STANDARD.decode(text).map_err(|_| MALFORMED);
    if sealed.kdf.name != "scrypt" || sealed.cipher.name != "nacl/secretbox" {
        return Err("only scrypt with nacl/secretbox is understood");
    }
    let KdfParams { n, r, p } = sealed.kdf.params;
    let log_n = u8::try_from(n.trailing_zeros()).unwrap_or(u8::MAX);
    if !n.is_power_of_two() || log_n > SCRYPT_LOG_N_MAX || r > 16 || p > 16 {
        return Err("its scrypt parameters are beyond reason");
    }
    let nonce = bytes(&sealed.cipher.nonce)?;
    if nonce.len() != 24 {
        return Err(MALFORMED);
    }
    let cipher = stretched(password, &bytes(&sealed.kdf.salt)?, log_n, r, p)?;
    let opened = cipher.decrypt(Nonce::from_slice(&nonce), bytes(&sealed.ciphertext)?.as_slice());
    opened.map_err(|_| "the password is wrong")
}

/// Reads a public key, PEM.
pub(crate) fn public_key(path: &Path) -> Result<PublicKey, Report> {
    let name = path.display();
    let text = std::fs::read(path).map_err(|error| failure(&format!("read {name}"), &error, None))?;
    PublicKey::from_pem(&text).map_err(|error| failure(&format!("use {name}"), &error, None))
}

fn unarmor(text: &str) -> Option<Vec<u8>> {
    if text.len() > KEY_BYTES_MAX {
        return None;
    }
    let body = |label: &str| {
        let (_, after) = text.split_once(&format!("-----BEGIN {label}-----"))?;
        Some(after.split_once(&format!("-----END {label}-----"))?.0)
    };
    let body: String = body(LABEL).or_else(|| body(LABEL_OLD))?.split_whitespace().collect();
    STANDARD.decode(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_opens_with_its_password_only() {
        let key = SigningKey::generate().unwrap();
        let sealed = unarmor(&key.to_pem("right").unwrap()).unwrap();
        assert_eq!(open(&sealed, "right").unwrap(), key.0.pkcs8());
        assert_eq!(open(&sealed, "wrong"), Err("the password is wrong"));
        assert!(open(b"{}", "right").is_err());
    }

    #[test]
    fn a_key_file_may_not_ask_for_gigabytes() {
        let key = SigningKey::generate().unwrap();
        let sealed = unarmor(&key.to_pem("").unwrap()).unwrap();
        let mut document: serde_json::Value = serde_json::from_slice(&sealed).unwrap();
        document["kdf"]["params"]["N"] = (1_u64 << 40).into();
        let asked = open(&serde_json::to_vec(&document).unwrap(), "");
        assert_eq!(asked, Err("its scrypt parameters are beyond reason"));
    }

    #[test]
    fn a_key_without_a_password_is_read_too() {
        let directory = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        let path = directory.path().join("plan.key");
        std::fs::write(&path, key.0.to_pem()).unwrap();
        assert_eq!(SigningKey::load(&path, "").unwrap().spki(), key.spki());
    }
}
