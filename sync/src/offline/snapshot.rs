//! A snapshot: all rows in order, in blocks with checksums, in a form that no engine has a part in.
//!
//! ```text
//! "selvage-kv 1\n"
//! blocks:  length u32, rows (key length u32, value length u32, key, value), SHA-256 of number u64 and rows
//! end:     length 0, rows u64, SHA-256 of number u64 and rows
//! ```
//!
//! A block's number is in its sum, so none can be left out, and one without an end is cut short.

use std::io::{self, Read, Write};

use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN};

const MAGIC: &[u8] = b"selvage-kv 1\n";

/// Bytes of rows after which a block is closed.
const BLOCK_BYTES: usize = 1024 * 1024;

/// Longest block that is read, bytes: one row of any size may follow the last that fits.
const BLOCK_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A snapshot that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It begins otherwise.
    #[error("this is no snapshot of a selvage kv, or one of another version")]
    Foreign,
    /// It ends before its end.
    #[error("the snapshot is cut short after {0} rows")]
    Short(u64),
    /// Its bytes are not those that were written.
    #[error("block {0} of the snapshot is damaged")]
    Damaged(u64),
    /// Reading or writing failed.
    #[error("the snapshot's file")]
    Io(#[source] io::Error),
}

fn sum(number: u64, bytes: &[u8]) -> [u8; SHA256_OUTPUT_LEN] {
    let mut context = Context::new(&SHA256);
    context.update(&number.to_be_bytes());
    context.update(bytes);
    let mut sum = [0; SHA256_OUTPUT_LEN];
    sum.copy_from_slice(context.finish().as_ref());
    sum
}

fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Rows of a block: key and value.
pub(super) type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// Writes a snapshot.
pub(super) struct Writer<W> {
    out: W,
    block: Vec<u8>,
    number: u64,
    rows: u64,
}

impl<W: Write> Writer<W> {
    pub(super) fn begin(mut out: W) -> Result<Self, SnapshotError> {
        out.write_all(MAGIC).map_err(SnapshotError::Io)?;
        Ok(Self { out, block: Vec::new(), number: 0, rows: 0 })
    }

    pub(super) fn row(&mut self, key: &[u8], value: &[u8]) -> Result<(), SnapshotError> {
        for part in [&length(key)[..], &length(value), key, value] {
            self.block.extend_from_slice(part);
        }
        self.rows += 1;
        if self.block.len() >= BLOCK_BYTES { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), SnapshotError> {
        let parts = [&length(&self.block)[..], &self.block, &sum(self.number, &self.block)];
        parts.into_iter().try_for_each(|part| self.out.write_all(part)).map_err(SnapshotError::Io)?;
        self.number += 1;
        self.block.clear();
        Ok(())
    }

    pub(super) fn end(mut self) -> Result<(), SnapshotError> {
        if !self.block.is_empty() {
            self.close()?;
        }
        let rows = self.rows.to_be_bytes();
        let parts = [&[0; 4][..], &rows, &sum(self.number, &rows)];
        parts.into_iter().try_for_each(|part| self.out.write_all(part)).map_err(SnapshotError::Io)?;
        self.out.flush().map_err(SnapshotError::Io)
    }
}

/// Reads a snapshot. Nothing of a block is given before all of it was verified.
pub(super) struct Reader<R> {
    input: R,
    number: u64,
    rows: u64,
}

impl<R: Read> Reader<R> {
    pub(super) fn begin(mut input: R) -> Result<Self, SnapshotError> {
        let mut magic = [0; MAGIC.len()];
        match input.read_exact(&mut magic) {
            Ok(()) if magic == MAGIC => Ok(Self { input, number: 0, rows: 0 }),
            Ok(()) => Err(SnapshotError::Foreign),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(SnapshotError::Foreign),
            Err(error) => Err(SnapshotError::Io(error)),
        }
    }

    /// The rows of the next block; none at the end.
    pub(super) fn block(&mut self) -> Result<Option<Rows>, SnapshotError> {
        let mut field = [0; 4];
        self.fill(&mut field)?;
        let length = u32::from_be_bytes(field) as usize;
        if length > BLOCK_BYTES_MAX {
            return Err(SnapshotError::Damaged(self.number));
        }
        let is_end = length == 0;
        let mut block = vec![0; if is_end { 8 } else { length }];
        self.fill(&mut block)?;
        let mut found = [0; SHA256_OUTPUT_LEN];
        self.fill(&mut found)?;
        if found != sum(self.number, &block) {
            return Err(SnapshotError::Damaged(self.number));
        }
        if is_end {
            let whole = block == self.rows.to_be_bytes();
            return if whole { Ok(None) } else { Err(SnapshotError::Damaged(self.number)) };
        }
        let rows = rows(&block).ok_or(SnapshotError::Damaged(self.number))?;
        self.number += 1;
        self.rows += rows.len() as u64;
        Ok(Some(rows))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => SnapshotError::Short(self.rows),
            _ => SnapshotError::Io(error),
        })
    }
}

fn rows(mut block: &[u8]) -> Option<Rows> {
    let mut rows = Vec::new();
    while !block.is_empty() {
        let (key, rest) = block.split_first_chunk()?;
        let (value, rest) = rest.split_first_chunk()?;
        let (key, rest) = rest.split_at_checked(u32::from_be_bytes(*key) as usize)?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*value) as usize)?;
        rows.push((key.to_vec(), value.to_vec()));
        block = rest;
    }
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(rows: &[(&[u8], &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut writer = Writer::begin(&mut out).unwrap();
        for (key, value) in rows {
            writer.row(key, value).unwrap();
        }
        writer.end().unwrap();
        out
    }

    fn read(bytes: &[u8]) -> Result<Rows, SnapshotError> {
        let mut reader = Reader::begin(bytes)?;
        let mut all = Vec::new();
        while let Some(rows) = reader.block()? {
            all.extend(rows);
        }
        Ok(all)
    }

    #[test]
    fn what_was_written_is_read() {
        let large = vec![7; BLOCK_BYTES];
        let rows: [(&[u8], &[u8]); 4] = [(b"a", b"1"), (b"b", b""), (b"c", &large), (b"d", b"2")];
        let all = read(&written(&rows)).unwrap();
        assert_eq!(all.len(), 4);
        assert!(all.iter().zip(rows).all(|((key, value), row)| (key.as_slice(), value.as_slice()) == row));
        assert_eq!(read(&written(&[])).unwrap(), []);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_an_error() {
        let whole = written(&[(b"key", b"value"), (b"other", b"")]);
        for bit in 0..8 * whole.len() {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_err(), "cut to {length}");
        }
    }
}
