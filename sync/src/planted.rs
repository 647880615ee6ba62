//! Planted bugs: each breaks one rule on purpose, and the simulator must notice.
//!
//! They exist in test builds only: [`is`] is a constant elsewhere, so no release can have one.

/// A rule that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Bug {
    /// Writes of the same stamp are not told apart.
    TieBreak,
    /// The frontier is taken over the nodes that are connected, not over the roster.
    FrontierOfAlive,
    /// The vector advances over gaps.
    VectorGap,
    /// A copied or old directory goes on as the incarnation that it was.
    Incarnation,
    /// Writes are stamped by the wall clock alone.
    WallClock,
    /// A flush does nothing.
    Flush,
    /// Entries of any origin are taken from anybody.
    Forgery,
    /// Entries that others wrote are taken without a proof of it.
    Unsigned,
    /// A relay passes writes on without what proves them.
    RelayUnproved,
    /// What was passed on is passed on again.
    RelayLoop,
    /// An entry's life begins when it arrives.
    LifeFromArrival,
    /// A session's token is not waited for.
    Token,
    /// Counter parts are added up when merged.
    CounterAdd,
    /// The sketch keeps what was superseded.
    Sketch,
    /// A write is answered and sent before it is committed.
    AckFirst,
    /// A home goes on when there is a newer one.
    HomeFence,
    /// A new home does not wait for what the one before had.
    HomeEager,
    /// A home that lost its disk is taken for the one that had it.
    HomeTaken,
    /// A home answers a read with what a crash can still take back.
    HomeDirty,
    /// A read is answered by the node that is asked, which is not the home.
    HomeStale,
}

#[cfg(test)]
pub(crate) use switch::{is, plant};

/// Whether this bug is planted: never outside tests.
#[cfg(not(test))]
pub(crate) const fn is(_bug: Bug) -> bool {
    false
}

#[cfg(test)]
mod switch {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug in what this thread runs, or none.
    pub(crate) fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    /// Whether this bug is planted.
    pub(crate) fn is(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}
