//! HTTP/2 as bytes: the frames that a client sends without need (RFC 9113 10.5).
//!
//! The parser behind keeps to the protocol and to its own bounds; what it answers at little cost (pings, settings,
//! priorities, windows, frames it does not know) it takes without end. Here these are counted. Only the nine bytes of each
//! frame's head are looked at.

/// Bytes of a frame's head (RFC 9113 4.1).
const HEAD_BYTES: usize = 9;
/// Window updates that one frame of ours may bring about: for its stream and for the connection, and twice that, since
/// clients may tell in smaller steps.
const UPDATES_OF_DATA: u32 = 4;
/// Window updates that a client may have in store. It may open its windows before it asks for anything.
const UPDATES_MAX: u32 = 1_000;
/// Acknowledgements that we may wait for.
const ACKS_MAX: u32 = 1_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// END_STREAM of DATA, ACK of SETTINGS and PING.
const FLAG_1: u8 = 1;

/// Where in one direction's frames.
#[derive(Debug, Default)]
struct Frames {
    head: [u8; HEAD_BYTES],
    have: usize,
    /// Bytes that are not looked at: a frame's payload, or the preface.
    skip: usize,
}

/// The head of a frame.
#[derive(Debug, Clone, Copy)]
struct Frame {
    length: usize,
    kind: u8,
    flag_1: bool,
}

impl Frames {
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        *bytes = &bytes[skipped..];
        let taken = (HEAD_BYTES - self.have).min(bytes.len());
        self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
        self.have += taken;
        *bytes = &bytes[taken..];
        if self.have < HEAD_BYTES {
            return None;
        }
        let [a, b, c, kind, flags, ..] = self.head;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        (self.have, self.skip) = (0, length);
        Some(Frame { length, kind, flag_1: flags & FLAG_1 != 0 })
    }
}

/// Counts what a client does that serves nothing.
#[derive(Debug)]
pub(super) struct Glitches {
    received: Frames,
    sent: Frames,
    /// Window updates that the client may send.
    updates: u32,
    /// Acknowledgements that the client owes.
    acks: u32,
}

impl Glitches {
    /// A connection whose client has yet to send a preface of so many bytes.
    pub(super) fn new(preface_bytes: usize) -> Self {
        let received = Frames { skip: preface_bytes, ..Frames::default() };
        Self { received, sent: Frames::default(), updates: UPDATES_MAX, acks: 0 }
    }

    /// How much of what the client sent serves nothing.
    pub(super) fn received(&mut self, mut bytes: &[u8]) -> u32 {
        let mut count = 0;
        while let Some(frame) = self.received.next(&mut bytes) {
            let served = match (frame.kind, frame.flag_1) {
                (DATA, is_last) => is_last || frame.length > 0,
                (HEADERS, _) => true,
                // RFC 9113 6.10: heads in pieces are allowed, pieces of nothing serve nothing.
                (CONTINUATION, _) => frame.length > 0,
                (SETTINGS | PING, true) => take(&mut self.acks),
                (WINDOW_UPDATE, _) => take(&mut self.updates),
                _ => false,
            };
            count += u32::from(!served);
        }
        count
    }

    /// How many streams we gave up: what we reset the client brought about.
    pub(super) fn sent(&mut self, mut bytes: &[u8]) -> u32 {
        let mut count = 0;
        while let Some(frame) = self.sent.next(&mut bytes) {
            match (frame.kind, frame.flag_1) {
                (DATA, _) => self.updates = self.updates.saturating_add(UPDATES_OF_DATA).min(UPDATES_MAX),
                (SETTINGS | PING, false) => self.acks = self.acks.saturating_add(1).min(ACKS_MAX),
                (RST_STREAM, _) => count += 1,
                _ => {}
            }
        }
        count
    }
}

/// Takes one, if there is one.
fn take(store: &mut u32) -> bool {
    let had = *store > 0;
    *store = store.saturating_sub(1);
    had
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        bytes.resize(bytes.len() + payload, 6);
        bytes
    }

    #[test]
    fn what_serves_nothing_is_counted_and_requests_are_not() {
        for (kind, flags, payload, want) in [
            (HEADERS, 4, 20, 0),
            (DATA, 0, 20, 0),
            (DATA, 1, 0, 0),
            (DATA, 0, 0, 1),
            (CONTINUATION, 4, 20, 0),
            (CONTINUATION, 0, 0, 1),
            (RST_STREAM, 0, 4, 1),
            (2, 0, 5, 1),
            (SETTINGS, 0, 6, 1),
            (SETTINGS, 1, 0, 1),
            (PING, 0, 8, 1),
            (PING, 1, 8, 1),
            (7, 0, 8, 1),
            (0x77, 0, 100, 1),
        ] {
            assert_eq!(Glitches::new(0).received(&frame(kind, flags, payload)), want, "type {kind}, flags {flags}");
        }
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        for _ in 0..3 {
            bytes.extend(frame(HEADERS, 5, 30));
            bytes.extend(frame(PING, 0, 8));
            bytes.extend(frame(DATA, 0, 0));
        }
        for size in 1..bytes.len() {
            let mut glitches = Glitches::new(24);
            let count: u32 = bytes.chunks(size).map(|piece| glitches.received(piece)).sum();
            assert_eq!(count, 6, "{size}");
        }
    }

    #[test]
    fn a_client_may_tell_of_what_it_took_and_answer_what_we_asked() {
        let mut glitches = Glitches::new(0);
        let update = frame(WINDOW_UPDATE, 0, 4);
        let updates = |glitches: &mut Glitches, count: u32| (0..count).map(|_| glitches.received(&update)).sum::<u32>();
        assert_eq!(updates(&mut glitches, UPDATES_MAX + 5), 5);
        assert_eq!(glitches.sent(&frame(DATA, 0, 16_384)), 0);
        assert_eq!(updates(&mut glitches, UPDATES_OF_DATA + 1), 1);
        assert_eq!(glitches.sent(&frame(PING, 0, 8)), 0);
        assert_eq!(glitches.received(&frame(PING, 1, 8)), 0);
        assert_eq!(glitches.received(&frame(PING, 1, 8)), 1);
        assert_eq!(glitches.sent(&frame(RST_STREAM, 0, 4)), 1);
    }
}
