//! Records that hold secrets, sealed: what lies on the disk can't be read, or changed, without a key that lies apart.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_config::Digest;

/// Bytes of the key.
const KEY_BYTES: usize = 32;
/// Characters of a key's id.
const ID_CHARS: usize = 16;
/// How a sealed record begins; one that is not sealed begins with `{`.
const SEALED: u8 = 1;

/// Seals records and opens them.
pub struct Seal {
    key: LessSafeKey,
    id: String,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    /// Reads the key, or makes one where there is none.
    ///
    /// # Errors
    /// The disk's, or a file that is no key.
    pub fn open(path: &Path) -> io::Result<Self> {
        let key = match fs::read_to_string(path) {
            Ok(text) => decode(text.trim())
                .ok_or_else(|| io::Error::other("not 64 hexadecimal digits (openssl rand -hex 32 makes a key)"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
            Err(error) => return Err(error),
        };
        Ok(Self::of(&key))
    }

    /// Seals with a key that comes from elsewhere.
    pub(crate) fn of(key: &[u8; KEY_BYTES]) -> Self {
        let id = id_of(key);
        let key = UnboundKey::new(&AES_256_GCM, key).expect("the key is as long as the algorithm's");
        Self { key: LessSafeKey::new(key), id }
    }

    /// Which key it is, for people who have several.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Seals a record for its place: it can't be put into another's. The nonce is random, which is safe for four thousand
    /// million records of one key (NIST SP 800-38D 8.3).
    ///
    /// # Errors
    /// The system gave no random bytes.
    pub fn seal(&self, place: &[u8], record: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| io::Error::other("no random bytes"))?;
        let mut sealed = record;
        let unique = Nonce::assume_unique_for_key(nonce);
        let done = self.key.seal_in_place_append_tag(unique, Aad::from(place), &mut sealed);
        done.map_err(|_| io::Error::other("the record is too large to be sealed"))?;
        Ok([&[SEALED], nonce.as_slice(), &sealed].concat())
    }

    /// Opens a record. Those of before there was a seal are taken as they are. None if it was not sealed here.
    pub fn open_record(&self, place: &[u8], bytes: &[u8]) -> Option<Vec<u8>> {
        if bytes.first() == Some(&SEALED) { self.open_sealed(place, bytes) } else { Some(bytes.to_vec()) }
    }

    /// Opens a record, if it was sealed with this key, for this place.
    pub(crate) fn open_sealed(&self, place: &[u8], bytes: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = bytes.strip_prefix(&[SEALED])?.split_at_checked(NONCE_LEN)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let record = self.key.open_in_place(nonce, Aad::from(place), &mut sealed).ok()?;
        Some(record.to_vec())
    }
}

/// The beginning of a hash: it tells keys apart, and nothing of them, for they are random.
fn id_of(key: &[u8; KEY_BYTES]) -> String {
    let hash = Digest::of(&[b"selvage sealing key ".as_slice(), key].concat());
    hash.hex().chars().take(ID_CHARS).collect()
}

fn make(path: &Path) -> io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut key).map_err(|_| io::Error::other("no random bytes"))?;
    let text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    // A key that is half on the disk would be found there and never open anything.
    let aside = path.with_extension("partial");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::File::open(directory)?.sync_all()?;
    }
    Ok(key)
}

fn decode(text: &str) -> Option<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    if text.len() != 2 * KEY_BYTES || !text.is_ascii() {
        return None;
    }
    for (index, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_sealed_record_is_opened_in_its_place_and_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sealing.key");
        let seal = Seal::open(&path).unwrap();
        let sealed = seal.seal(b"app/hello", b"{\"secret\":\"s3cret\"}".to_vec()).unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"s3cret"));
        let again = Seal::open(&path).unwrap();
        assert_eq!(again.open_record(b"app/hello", &sealed).unwrap(), b"{\"secret\":\"s3cret\"}");
        assert_eq!(again.open_record(b"app/other", &sealed), None);
        let mut changed = sealed.clone();
        *changed.last_mut().unwrap() ^= 1;
        assert_eq!(again.open_record(b"app/hello", &changed), None);
        assert_eq!(again.open_record(b"app/hello", &[SEALED, 2]), None);
        assert_eq!(again.open_record(b"app/hello", b"{}").unwrap(), b"{}");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let other = Seal::open(&directory.path().join("other.key")).unwrap();
        assert_eq!(other.open_record(b"app/hello", &sealed), None);
    }

    #[test]
    fn a_file_that_is_no_key_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sealing.key");
        fs::write(&path, "short").unwrap();
        assert!(Seal::open(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "short");
    }
}
