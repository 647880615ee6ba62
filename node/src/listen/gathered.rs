//! Small writes of HTTP/2, gathered into one.
//!
//! `h2` writes each frame of data by itself, and a system call takes as long as a whole small answer. What it writes while
//! it has more to say is kept here, as much as one record of TLS holds; it says that by flushing in between, right after a
//! write of a frame's head and payload together, and it flushes once more when it has said all.

use std::io::IoSlice;

/// Most bytes of one record (RFC 8446 5.1).
const BYTES_MAX: usize = 16 * 1024;

/// What is to be written together. It has memory only while there is something.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    bytes: Vec<u8>,
    /// How much of it the system has.
    written: usize,
    /// Whether more is about to come.
    has_more: bool,
}

impl Gathered {
    /// Takes all of it, if there is room.
    pub(super) fn take(&mut self, slices: &[IoSlice<'_>]) -> Option<usize> {
        let length = slices.iter().map(|slice| slice.len()).sum::<usize>();
        self.has_more = false;
        if self.bytes.len() + length > BYTES_MAX {
            return None;
        }
        self.has_more = slices.iter().filter(|slice| !slice.is_empty()).count() > 1;
        slices.iter().for_each(|slice| self.bytes.extend_from_slice(slice));
        Some(length)
    }

    /// Whether a flush is one in between, which may wait. The next one is not, unless more came.
    pub(super) fn may_wait(&mut self) -> bool {
        std::mem::take(&mut self.has_more)
    }

    /// What the system has not got.
    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    /// The system has so much more.
    pub(super) fn advance(&mut self, count: usize) {
        self.written += count;
        if self.written >= self.bytes.len() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(gathered: &mut Gathered, slices: &[&[u8]]) -> Option<usize> {
        let slices: Vec<IoSlice<'_>> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
        gathered.take(&slices)
    }

    #[test]
    fn frames_are_kept_until_there_is_no_more() {
        let mut gathered = Gathered::default();
        assert_eq!(take(&mut gathered, &[b"head", b"payload"]), Some(11));
        assert!(gathered.may_wait());
        assert_eq!(take(&mut gathered, &[b"head", b"more"]), Some(8));
        assert!(gathered.may_wait() && !gathered.may_wait(), "a second flush is the last");
        assert_eq!(take(&mut gathered, &[b"ping", b""]), Some(4));
        assert!(!gathered.may_wait(), "a frame without a payload of its own comes last");
        gathered.advance(4);
        assert_eq!(gathered.rest(), b"payloadheadmoreping");
        gathered.advance(19);
        assert!(gathered.rest().is_empty() && gathered.bytes.capacity() == 0);
    }

    #[test]
    fn there_is_room_for_one_record() {
        let mut gathered = Gathered::default();
        assert_eq!(take(&mut gathered, &[&[0; 9], &[0; BYTES_MAX]]), None);
        assert!(!gathered.may_wait() && gathered.rest().is_empty());
        assert_eq!(take(&mut gathered, &[&[0; 9], &[0; BYTES_MAX - 9]]), Some(BYTES_MAX));
        assert_eq!(take(&mut gathered, &[b"x"]), None);
        assert_eq!(gathered.rest().len(), BYTES_MAX);
    }
}
