//! How urgent an answer is (RFC 9218).

use http::HeaderValue;

/// Bytes of a priority that are read. What the standard defines is a tenth of it.
const BYTES_MAX: usize = 128;
/// The least urgent (RFC 9218 4.1).
const URGENCY_MAX: u8 = 7;

/// A client's wish. A lower urgency goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Priority {
    /// 0 to 7.
    pub(super) urgency: u8,
    /// Whether a part of the answer is of use.
    pub(super) incremental: bool,
}

impl Default for Priority {
    /// RFC 9218 4.
    fn default() -> Self {
        Self { urgency: 3, incremental: false }
    }
}

impl Priority {
    /// Reads a field, or the payload of a PRIORITY_UPDATE frame. What can't be read is as if it was not there (RFC 9218 4).
    pub(super) fn read(value: &(impl AsRef<[u8]> + ?Sized)) -> Self {
        let mut priority = Self::default();
        priority.adopt(value.as_ref());
        priority
    }

    /// Takes over what `value` says, and leaves the rest (RFC 9218 8).
    pub(super) fn merged(mut self, value: &HeaderValue) -> Self {
        self.adopt(value.as_bytes());
        self
    }

    /// A dictionary of RFC 8941 3.2, as far as `u` and `i` go. The last member of a name counts.
    fn adopt(&mut self, value: &[u8]) {
        let Some(text) = value.get(..value.len().min(BYTES_MAX)).and_then(|value| std::str::from_utf8(value).ok())
        else {
            return;
        };
        for member in text.split(',') {
            // Without its parameters.
            let member = member.split(';').next().unwrap_or_default().trim_matches([' ', '\t']);
            match member.split_once('=').unwrap_or((member, "?1")) {
                ("u", digit) => {
                    if let Some(urgency) = digit.parse().ok().filter(|urgency| *urgency <= URGENCY_MAX) {
                        self.urgency = urgency;
                    }
                }
                ("i", "?1") => self.incremental = true,
                ("i", "?0") => self.incremental = false,
                _ => {}
            }
        }
    }

    /// As quinn orders streams: higher goes first, and equal ones take turns. Of two that are as urgent, the one that is of
    /// use only when it is whole goes first. The default is 0, as quinn's.
    pub(super) fn order(self) -> i32 {
        2 * (3 - i32::from(self.urgency)) - i32::from(self.incremental)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_is_read_as_far_as_it_can_be() {
        for (text, urgency, incremental) in [
            ("", 3, false),
            ("u=0", 0, false),
            ("i", 3, true),
            ("u=5, i", 5, true),
            ("u=5,i=?0", 5, false),
            ("i=?1;x=1, u=2;y", 2, true),
            ("u=8", 3, false),
            ("u=-1", 3, false),
            ("u=a, i=1", 3, false),
            ("u=1, u=6", 6, false),
            ("x=\"u=1\"", 3, false),
        ] {
            assert_eq!(Priority::read(text), Priority { urgency, incremental }, "{text}");
        }
    }

    #[test]
    fn what_is_urgent_goes_first() {
        let order = |text: &str| Priority::read(text).order();
        assert!(order("u=0, i") > order("u=1"));
        assert!(order("u=1") > order("u=1, i"));
        assert_eq!(order(""), 0);
        let server = HeaderValue::from_static("u=1");
        assert_eq!(Priority::read("u=5, i").merged(&server), Priority { urgency: 1, incremental: true });
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            proptest::prop_assert!((-9..=6).contains(&Priority::read(&bytes).order()));
        }
    }
}
