//! Keys as NATS can have them: letters, digits, `-`, `_` and `/` stand for themselves, any other byte is `=` and two
//! digits, and the empty key is `=`. So every key is one token of a subject, and people can read most.

use selvage_config::StoreName;

/// The empty key.
const EMPTY: &str = "=";

/// The subjects of one store.
pub(super) struct Subjects {
    /// With the dot behind it.
    base: String,
}

impl Subjects {
    pub(super) fn of(bucket: &str, store: &StoreName) -> Self {
        Self { base: format!("$KV.{bucket}.{}.", store.as_str().replace('/', ".")) }
    }

    pub(super) fn of_key(&self, key: &str) -> String {
        let mut subject = self.base.clone();
        if key.is_empty() {
            return subject + EMPTY;
        }
        for byte in key.bytes() {
            if is_plain(byte) {
                subject.push(char::from(byte));
            } else {
                subject += &format!("={byte:02X}");
            }
        }
        subject
    }

    pub(super) fn of_all(&self) -> String {
        format!("{}*", self.base)
    }

    /// The key of a subject; none if we would not have written it so.
    pub(super) fn key(&self, subject: &str) -> Option<String> {
        let encoded = subject.strip_prefix(&self.base)?;
        if encoded == EMPTY {
            return Some(String::new());
        }
        let mut bytes = Vec::with_capacity(encoded.len());
        let mut rest = encoded.as_bytes();
        while let Some((&first, tail)) = rest.split_first() {
            rest = tail;
            bytes.push(match first {
                b'=' => {
                    let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
                    rest = &tail[2..];
                    u8::from_str_radix(digits, 16).ok()?
                }
                plain => plain,
            });
        }
        let key = String::from_utf8(bytes).ok()?;
        (self.of_key(&key) == subject).then_some(key)
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_one_token_and_comes_back() {
        let subjects = Subjects::of("selvage", &"shop/my_label".parse().unwrap());
        assert_eq!(subjects.of_key("a/b-c_9"), "$KV.selvage.shop.my_label.a/b-c_9");
        assert_eq!(subjects.of_key(""), "$KV.selvage.shop.my_label.=");
        assert_eq!(subjects.of_key("a.b*> =\0é"), "$KV.selvage.shop.my_label.a=2Eb=2A=3E=20=3D=00=C3=A9");
        for key in ["", "=", "a.b", "*", ">", " ", "\r\n", "é\u{10FFFE}", "%2E", &"\u{7f}".repeat(1_024)] {
            let subject = subjects.of_key(key);
            assert_eq!(subject.matches('.').count(), 4, "{subject}");
            assert_eq!(subjects.key(&subject).as_deref(), Some(key));
        }
    }

    #[test]
    fn what_we_would_not_have_written_is_no_key() {
        let subjects = Subjects::of("selvage", &"shop/default".parse().unwrap());
        for bad in ["", "a", "=2", "=2e", "=41", "=FF", "=+1", "a=", "a.b", "=="] {
            let subject = format!("$KV.selvage.shop.default.{bad}");
            let is_key = bad == "a";
            assert_eq!(subjects.key(&subject).is_some(), is_key, "{bad}");
        }
        assert_eq!(subjects.key("$KV.selvage.shop.other.a"), None);
    }
}
