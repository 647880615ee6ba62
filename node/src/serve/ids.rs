//! Names of requests, as answers and logs have them.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use http::HeaderValue;

/// Bytes that all names begin with: a number of the process in hexadecimal digits, and a `-`.
const ID_START_BYTES: usize = 17;

/// Names requests: unique on this node, and not twice after a restart.
#[derive(Debug)]
pub(super) struct Ids {
    /// What all begin with.
    start: [u8; ID_START_BYTES],
    next: AtomicU64,
}

impl Ids {
    pub(super) fn new() -> Self {
        // The standard library's hash keys are the one source of randomness that can't fail.
        let mut start = [b'-'; ID_START_BYTES];
        let (digits, _) = start.split_at_mut(ID_START_BYTES - 1);
        write_hex(RandomState::new().hash_one(0), digits);
        Self { start, next: AtomicU64::new(0) }
    }

    pub(super) fn next(&self) -> HeaderValue {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut text = [0; 2 * ID_START_BYTES];
        let digits = (count.max(1).ilog2() / 4 + 1) as usize;
        let length = ID_START_BYTES + digits;
        text[..ID_START_BYTES].copy_from_slice(&self.start);
        write_hex(count, &mut text[ID_START_BYTES..length]);
        let mut value = HeaderValue::from_bytes(&text[..length]).expect("hexadecimal digits and '-'");
        // It never comes again: to HPACK this says that its table shall not keep it (RFC 7541 6.2.3).
        value.set_sensitive(true);
        value
    }
}

/// As many of the last hexadecimal digits as there is room for. `format!` takes ten times as long, for each request.
fn write_hex(mut number: u64, digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number % 16) as usize];
        number /= 16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_names_of_their_own() {
        let (one, other) = (Ids::new(), Ids::new());
        let text = |value: HeaderValue| value.to_str().unwrap().to_owned();
        let mut names: Vec<String> = (0..300).map(|_| text(one.next())).collect();
        let start = std::str::from_utf8(&one.start).unwrap();
        assert_eq!(
            (&names[0], &names[15], &names[16]),
            (&format!("{start}0"), &format!("{start}f"), &format!("{start}10"))
        );
        one.next.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(text(one.next()), format!("{start}{:x}", u64::MAX));
        assert!(other.start != one.start && one.next().is_sensitive());
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 300);
    }
}
