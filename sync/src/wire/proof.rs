//! Digests and cells on the wire. Counts follow as differences from what chance makes likely, so most take a byte; of
//! the items only those bytes that any of them uses.

use std::collections::BTreeMap;

use bytes::BufMut;

use super::entries::{length, number, put_number, put_signed, signed};
use crate::entry::{EntryError, Fields};
use crate::sketch::{CELLS, Cell, Digest, Item, PROBES, SHARDS, Span};

/// Spans in one frame, at most.
pub(super) const SPANS_MAX: usize = 4096;

/// Items in one frame, at most.
pub(super) const ITEMS_MAX: usize = 1 << 16;

/// How many items a cell likely has, of `count` in the first.
fn likely(count: i32, at: usize) -> i32 {
    let at = i64::try_from(at).unwrap_or(i64::MAX - 2);
    i32::try_from(i64::from(count) * 2 / (at + 2)).unwrap_or(0)
}

pub(super) fn put_digests(out: &mut Vec<u8>, digests: &[Digest]) {
    for digest in digests {
        out.put_u64(digest.sum);
        put_signed(out, digest.count.into());
        for (at, probe) in (1..).zip(&digest.probes) {
            put_signed(out, probe.wrapping_sub(likely(digest.count, at)).into());
        }
    }
}

pub(super) fn digests(fields: &mut Fields) -> Result<Vec<Digest>, EntryError> {
    let mut digests = Vec::with_capacity(SHARDS);
    for _ in 0..SHARDS {
        let sum = fields.u64()?;
        let count = small(fields)?;
        let mut probes = [0; PROBES];
        for (at, probe) in (1..).zip(&mut probes) {
            *probe = small(fields)?.wrapping_add(likely(count, at));
        }
        digests.push(Digest { sum, count, probes });
    }
    Ok(digests)
}

fn small(fields: &mut Fields) -> Result<i32, EntryError> {
    i32::try_from(signed(fields)?).map_err(|_| EntryError::Field("count"))
}

pub(super) fn put_spans(out: &mut Vec<u8>, spans: &BTreeMap<Span, u64>) {
    let count = spans.len().min(SPANS_MAX);
    put_number(out, count as u64);
    for (span, digest) in spans.iter().take(count) {
        put_number(out, span.number());
        out.put_u64(*digest);
    }
}

pub(super) fn spans(fields: &mut Fields) -> Result<BTreeMap<Span, u64>, EntryError> {
    let mut spans = BTreeMap::new();
    for _ in 0..length(fields, SPANS_MAX, "spans")? {
        spans.insert(Span::from_number(number(fields)?), fields.u64()?);
    }
    Ok(spans)
}

pub(super) fn put_cells(out: &mut Vec<u8>, cells: &[Cell]) {
    put_number(out, cells.len() as u64);
    let used = cells.iter().fold(0, |used, cell| used | cell.items);
    let columns: Vec<usize> = (0..8).filter(|at| used.to_be_bytes()[*at] != 0).collect();
    out.put_u8(columns.iter().fold(0, |mask, at| mask | (1 << at)));
    let first = cells.first().map_or(0, |cell| cell.count);
    for (at, cell) in cells.iter().enumerate() {
        columns.iter().for_each(|column| out.put_u8(cell.items.to_be_bytes()[*column]));
        out.put_u32(cell.checks);
        let likely = if at == 0 { 0 } else { likely(first, at) };
        put_signed(out, cell.count.wrapping_sub(likely).into());
    }
}

pub(super) fn cells(fields: &mut Fields) -> Result<Vec<Cell>, EntryError> {
    let count = length(fields, CELLS, "cells")?;
    let mask = fields.u8()?;
    let mut cells: Vec<Cell> = Vec::new();
    for at in 0..count {
        let mut items = [0; 8];
        for (column, byte) in items.iter_mut().enumerate() {
            if mask & (1 << column) != 0 {
                *byte = fields.u8()?;
            }
        }
        let checks = fields.u32()?;
        let likely = cells.first().map_or(0, |first| likely(first.count, at));
        let count = small(fields)?.wrapping_add(likely);
        cells.push(Cell { items: Item::from_be_bytes(items), checks, count });
    }
    Ok(cells)
}

/// Items in order, each as the difference from the one before.
pub(super) fn put_items(out: &mut Vec<u8>, items: &[Item]) {
    let mut sorted: Vec<Item> = items.iter().copied().take(ITEMS_MAX).map(turned).collect();
    sorted.sort_unstable();
    put_number(out, sorted.len() as u64);
    let mut last = 0;
    for item in sorted {
        put_number(out, item.wrapping_sub(last));
        last = item;
    }
}

pub(super) fn items(fields: &mut Fields) -> Result<Vec<Item>, EntryError> {
    let mut items = Vec::new();
    let mut last: u64 = 0;
    for _ in 0..length(fields, ITEMS_MAX, "items")? {
        last = last.wrapping_add(number(fields)?);
        items.push(turned_back(last));
    }
    Ok(items)
}

/// The sequence number before the content's bits, so that neighbours of one origin are near each other.
fn turned(item: Item) -> u64 {
    (item & 0xffff << 48) | (item & 0xff_ffff_ffff) << 8 | (item >> 40 & 0xff)
}

fn turned_back(turned: u64) -> Item {
    (turned & 0xffff << 48) | (turned & 0xff) << 40 | (turned >> 8 & 0xff_ffff_ffff)
}
