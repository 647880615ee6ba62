//! Sketches: a small summary of all entries that tells two nodes how they differ, without reading a row.
//!
//! A rateless invertible Bloom lookup table (Yang et al., SIGCOMM 2024): a sequence of cells, and every item is in the
//! first cell and in ever sparser ones after it. The difference of two sketches is the sketch of the difference, and
//! decodes once it has about 1.4 cells for each item. Sketches are kept by shard; those of several shards added up are
//! the sketch of their union, so few differences need few cells.
//!
//! An item names an entry by the number of its dot ([`item`]), so whoever decodes one can ask for it and whoever is
//! asked finds it in the index. Nothing in an item can be chosen by who writes keys, so the hash needs no secret.

use std::collections::{BTreeMap, VecDeque};

use crate::entry::{Dot, Entry, fold, mix, put_origin};

/// Shards. Each has a digest of its own.
pub const SHARDS: usize = 64;

/// Cells of a shard: with all shards about 45,000 items, a replaced value counting twice.
pub const CELLS: usize = 1024;

/// Cells of the sketch of what ends in one span of time.
pub const SPAN_CELLS: usize = 64;

/// Bits of an item that hold the sequence number.
const SEQ_BITS: u32 = 40;

/// Cells after the first by which the number of differences is estimated.
pub(crate) const PROBES: usize = 3;

/// One entry as a number: 16 bits of its origin's hash, 8 of its content's, 40 of its sequence number.
pub type Item = u64;

/// The item of an entry.
pub fn item(entry: &Entry) -> Item {
    item_of(&entry.version.dot, entry.taste())
}

/// The item of a dot and the [`Entry::taste`] of what it wrote.
pub fn item_of(dot: &Dot, taste: u8) -> Item {
    let mut origin = Vec::with_capacity(80);
    put_origin(&mut origin, &dot.origin);
    let origin = fold(&origin) >> 48;
    (origin << 48) | (u64::from(taste) << SEQ_BITS) | (dot.seq & ((1 << SEQ_BITS) - 1))
}

/// The parts of an item: the origin's hash and the sequence number.
pub fn parts(item: Item) -> (u16, u64) {
    (u16::try_from(item >> 48).unwrap_or(0), item & ((1 << SEQ_BITS) - 1))
}

/// Which shard an item is in.
pub fn shard(item: Item) -> usize {
    usize::try_from(mix(item ^ 0x5eed) >> 58).unwrap_or(0)
}

/// What is added up in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cell {
    /// All items, by exclusive or.
    pub items: Item,
    /// All their checks, by exclusive or.
    pub checks: u32,
    /// How many.
    pub count: i32,
}

impl Cell {
    fn add(&mut self, item: Item, check: u32, by: i32) {
        self.items ^= item;
        self.checks ^= check;
        self.count = self.count.wrapping_add(by);
    }

    fn minus(self, other: Self) -> Self {
        Self {
            items: self.items ^ other.items,
            checks: self.checks ^ other.checks,
            count: self.count.wrapping_sub(other.count),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self { count: self.count.wrapping_add(other.count), ..self.minus(other) }
    }

    fn is_pure(self) -> bool {
        self.count.unsigned_abs() == 1 && self.checks == check(self.items)
    }
}

fn check(item: Item) -> u32 {
    u32::try_from(mix(item ^ 0xc4ec) >> 32).unwrap_or(0)
}

/// The cells that an item is in: always the first, then with gaps that grow with the distance.
struct Places {
    state: u64,
    next: u64,
}

impl Places {
    fn of(item: Item) -> Self {
        Self { state: mix(item), next: 0 }
    }
}

impl Iterator for Places {
    type Item = usize;

    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn next(&mut self) -> Option<usize> {
        let place = usize::try_from(self.next).ok()?;
        self.state = self.state.wrapping_mul(0xda94_2042_e4dd_58b5);
        // Of the i-th cell the next is at i + ceil((i + 1.5) (2^32 / sqrt(r + 1) - 1)): cell i holds an item with
        // probability 1 / (1 + i / 2). Square roots are exact by IEEE 754, so all nodes compute the same.
        let reach = 4_294_967_296.0 / (self.state as f64 + 1.0).sqrt() - 1.0;
        self.next = self.next.saturating_add(((self.next as f64 + 1.5) * reach).ceil() as u64);
        Some(place)
    }
}

/// The cells of a set of items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sketch {
    cells: Vec<Cell>,
    digest: u64,
}

impl Sketch {
    /// The sketch of no items.
    pub fn new(cells: usize) -> Self {
        Self { cells: vec![Cell::default(); cells], digest: 0 }
    }

    /// Takes an item in, or out again.
    pub fn toggle(&mut self, item: Item, by: i32) {
        let check = check(item);
        self.digest ^= mix(item ^ 0xd16e);
        let length = self.cells.len();
        for place in Places::of(item).take_while(|place| *place < length) {
            self.cells[place].add(item, check, by);
        }
    }

    /// A number that differs if the items do.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The first `count` cells.
    pub fn cells(&self, count: usize) -> &[Cell] {
        &self.cells[..count.min(self.cells.len())]
    }
}

/// The sketches of all that does not end, by shard.
#[derive(Debug, Clone)]
pub struct Shards(Vec<Sketch>);

impl Default for Shards {
    fn default() -> Self {
        Self(vec![Sketch::new(CELLS); SHARDS])
    }
}

impl Shards {
    /// Takes an item in, or out again.
    pub fn toggle(&mut self, item: Item, by: i32) {
        self.0[shard(item)].toggle(item, by);
    }

    /// What a peer is told to compare.
    pub fn digests(&self) -> Vec<Digest> {
        let probe = |sketch: &Sketch| {
            let count = |at: usize| sketch.cells[at].count;
            Digest { sum: sketch.digest, count: count(0), probes: [count(1), count(2), count(3)] }
        };
        self.0.iter().map(probe).collect()
    }

    /// The first `count` cells of the union of a group: of the `of` groups that the shards are cut into.
    pub fn group(&self, group: usize, of: usize, count: usize) -> Vec<Cell> {
        let width = SHARDS / of;
        let mut sum = vec![Cell::default(); count.min(CELLS)];
        for sketch in &self.0[group * width..(group + 1) * width] {
            sum.iter_mut().zip(&sketch.cells).for_each(|(sum, cell)| *sum = sum.plus(*cell));
        }
        sum
    }
}

/// One shard in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    /// A number that differs if the items do.
    pub sum: u64,
    /// How many items.
    pub count: i32,
    /// How many in each of the next cells.
    pub probes: [i32; PROBES],
}

/// About how many items differ. Of `d` that differ by chance, a cell that holds an item with probability p differs in
/// its count by p times the difference in size, and a deviation of d p (1 - p).
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub fn estimate(ours: &[Digest], theirs: &[Digest]) -> usize {
    let mut sum = 0.0;
    for (ours, theirs) in ours.iter().zip(theirs).filter(|(ours, theirs)| ours.sum != theirs.sum) {
        let apart = f64::from(ours.count.wrapping_sub(theirs.count));
        let mut spread = 0.0;
        for (at, (one, other)) in (1_u32..).zip(ours.probes.iter().zip(&theirs.probes)) {
            let p = 1.0 / (1.0 + f64::from(at) / 2.0);
            let off = f64::from(one.wrapping_sub(*other)) - p * apart;
            spread += off * off / (p * (1.0 - p));
        }
        sum += (spread / PROBES as f64).max(apart.abs()).max(1.0);
    }
    sum.ceil() as usize
}

/// Items that only one of two sides has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    /// Those that we have.
    pub ours: Vec<Item>,
    /// Those that they have.
    pub theirs: Vec<Item>,
}

/// The difference of two sets by the first cells of their sketches; none if these were too few.
pub fn decode(ours: &[Cell], theirs: &[Cell]) -> Option<Difference> {
    let mut cells: Vec<Cell> = ours.iter().zip(theirs).map(|(ours, theirs)| ours.minus(*theirs)).collect();
    let mut pure: VecDeque<usize> = (0..cells.len()).filter(|at| cells[*at].is_pure()).collect();
    let mut found = Difference::default();
    // Each found item empties at least one cell for good, unless the cells are not what they say.
    let mut left = cells.len();
    while let Some(at) = pure.pop_front() {
        let cell = cells[at];
        if !cell.is_pure() {
            continue;
        }
        left = left.checked_sub(1)?;
        if cell.count > 0 { &mut found.ours } else { &mut found.theirs }.push(cell.items);
        let check = check(cell.items);
        let length = cells.len();
        for place in Places::of(cell.items).take_while(|place| *place < length) {
            cells[place].add(cell.items, check, -cell.count);
            if cells[place].is_pure() {
                pure.push_back(place);
            }
        }
    }
    cells.iter().all(|cell| *cell == Cell::default()).then_some(found)
}

/// When mortal entries end, in spans whose width grows with how long they were to live: an entry's span depends on
/// nothing but the entry, and a node has some hundreds of them at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    width: u8,
    number: u64,
}

/// Widths of spans, milliseconds, and up to which life they are used.
const SPANS: [(u64, u64); 3] = [(600_000, 7_200_000), (14_400_000, 172_800_000), (345_600_000, u64::MAX)];

impl Span {
    /// When this entry ends; none if it does not.
    pub fn of(entry: &Entry) -> Option<Self> {
        let mortal_ms = entry.mortal_ms()?;
        Some(Self::at(mortal_ms, mortal_ms - entry.version.stamp.ms().min(mortal_ms)))
    }

    pub(crate) fn at(mortal_ms: u64, life_ms: u64) -> Self {
        let width = SPANS.iter().position(|(_, life)| life_ms < *life).unwrap_or(SPANS.len() - 1);
        Self { width: u8::try_from(width).unwrap_or(0), number: mortal_ms / SPANS[width].0 }
    }

    /// Whether all of it is after a floor.
    pub fn is_after(self, floor_ms: u64) -> bool {
        let width = SPANS.get(usize::from(self.width)).map_or(u64::MAX, |(width, _)| *width);
        self.number.saturating_mul(width) >= floor_ms
    }

    /// As one number, for the wire.
    pub fn number(self) -> u64 {
        (self.number << 2) | u64::from(self.width)
    }

    /// The span that [`Span::number`] was made of.
    pub fn from_number(number: u64) -> Self {
        Self { width: number.to_le_bytes()[0] & 3, number: number >> 2 }
    }
}

/// All sketches of a node.
#[derive(Debug, Clone, Default)]
pub struct Sketches {
    /// Of what does not end.
    pub shards: Shards,
    /// Of what does, by when.
    pub spans: BTreeMap<Span, (Sketch, usize)>,
}

impl Sketches {
    /// Takes an item in, or out again.
    pub fn toggle(&mut self, item: Item, span: Option<Span>, by: i32) {
        let Some(span) = span else { return self.shards.toggle(item, by) };
        let (sketch, count) = self.spans.entry(span).or_insert_with(|| (Sketch::new(SPAN_CELLS), 0));
        sketch.toggle(item, by);
        *count = count.saturating_add_signed(if by > 0 { 1 } else { -1 });
        if *count == 0 {
            self.spans.remove(&span);
        }
    }

    /// The digests of all spans after a floor.
    pub fn span_digests(&self, floor_ms: u64) -> BTreeMap<Span, u64> {
        let after = self.spans.iter().filter(|(span, _)| span.is_after(floor_ms));
        after.map(|(span, (sketch, _))| (*span, sketch.digest())).filter(|(_, digest)| *digest != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Origin;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn some_item(rng: &mut StdRng, seq_max: u64) -> Item {
        let node = ["fra-1", "iad-1", "sin-1", "gru-1"][rng.random_range(0..4)];
        let origin = Origin { node: node.parse().unwrap(), incarnation: 7 };
        item_of(&Dot { origin, seq: rng.random_range(1..seq_max) }, rng.random())
    }

    #[test]
    fn the_difference_of_two_sets_is_decoded_from_the_cells_of_a_group() {
        let mut rng = StdRng::seed_from_u64(1);
        let (mut one, mut other) = (Shards::default(), Shards::default());
        for _ in 0..20_000 {
            let both = some_item(&mut rng, 1 << 30);
            one.toggle(both, 1);
            other.toggle(both, 1);
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..100 {
            ours.push(some_item(&mut rng, 1 << 30));
            theirs.push(some_item(&mut rng, 1 << 30));
            one.toggle(*ours.last().unwrap(), 1);
            other.toggle(*theirs.last().unwrap(), 1);
        }
        let about = estimate(&one.digests(), &other.digests());
        assert!((120..320).contains(&about), "{about}");
        assert_eq!(decode(&one.group(0, 1, 150), &other.group(0, 1, 150)), None);
        let mut found = decode(&one.group(0, 1, 400), &other.group(0, 1, 400)).unwrap();
        for list in [&mut found.ours, &mut found.theirs, &mut ours, &mut theirs] {
            list.sort_unstable();
        }
        assert_eq!(found, Difference { ours, theirs });
    }

    #[test]
    fn what_was_taken_out_again_leaves_nothing() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut sketch = Sketch::new(CELLS);
        let items: Vec<Item> = (0..1_000).map(|_| some_item(&mut rng, 1 << 20)).collect();
        items.iter().for_each(|item| sketch.toggle(*item, 1));
        items.iter().for_each(|item| sketch.toggle(*item, -1));
        assert_eq!(sketch, Sketch::new(CELLS));
    }

    #[test]
    fn cells_that_are_not_what_they_say_are_refused_and_end() {
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..200 {
            let cell = |rng: &mut StdRng| {
                let items = rng.random();
                Cell { items, checks: check(items), count: rng.random_range(-1..=1) }
            };
            let cells: Vec<Cell> = (0..50).map(|_| cell(&mut rng)).collect();
            let _either = decode(&cells, &vec![Cell::default(); 50]);
        }
    }

    #[test]
    fn the_estimate_is_near_the_truth_also_when_all_are_on_one_side() {
        let mut rng = StdRng::seed_from_u64(4);
        for (ours, theirs) in [(1, 0), (30, 30), (2_000, 0), (10_000, 10_000)] {
            let (mut one, mut other) = (Shards::default(), Shards::default());
            (0..ours).for_each(|_| one.toggle(some_item(&mut rng, 1 << 39), 1));
            (0..theirs).for_each(|_| other.toggle(some_item(&mut rng, 1 << 39), 1));
            let about = estimate(&one.digests(), &other.digests());
            let truth = ours + theirs;
            assert!(about * 3 >= truth * 2 && about <= truth * 3 / 2 + 8, "{about} of {truth}");
        }
    }

    #[test]
    fn spans_are_after_a_floor_as_a_whole_or_not() {
        let span = Span::at(1_250_000, 0);
        assert!(span.is_after(1_200_000) && !span.is_after(1_200_001));
        assert_eq!(Span::from_number(span.number()), span);
        assert_ne!(Span::at(1_250_000, 10_000_000), span);
    }
}
