//! The work of one request, which goes on when it is its turn, and pays for each.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::full::is_full;
use super::{Class, Crowded, Line, Spent, Wait};

/// There was no turn for it in its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Late;

/// Work in turns. The first one is waited for until the deadline and no longer; later ones the work itself is told of when
/// it is past: it knows what to do then.
pub(crate) struct InTurns<F> {
    work: F,
    line: Line,
    spent: Arc<Spent>,
    deadline: Instant,
    wait: Option<Wait>,
    is_begun: bool,
}

impl<F: Future + Unpin> InTurns<F> {
    /// Work that waits to begin.
    ///
    /// # Errors
    /// Too much of its app waits.
    pub(crate) fn begin(line: &Line, spent: &Arc<Spent>, deadline: Instant, work: F) -> Result<Self, Crowded> {
        let wait = Some(line.enter(spent, Class::Begins, deadline)?);
        Ok(Self { work, line: line.clone(), spent: Arc::clone(spent), deadline, wait, is_begun: false })
    }

    /// Work that is going on, of which nothing has been paid yet.
    pub(crate) fn going_on(line: &Line, spent: &Arc<Spent>, deadline: Instant, work: F) -> Self {
        Self { work, line: line.clone(), spent: Arc::clone(spent), deadline, wait: None, is_begun: true }
    }
}

impl<F: Future + Unpin> Future for InTurns<F> {
    type Output = Result<F::Output, Late>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let me = &mut *self;
        let mut now = Instant::now();
        if me.wait.is_none() && me.deadline > now && me.line.is_on(&me.spent, now) {
            me.wait = me.line.enter(&me.spent, Class::GoesOn, me.deadline).ok();
        }
        let mut expected = 0;
        if let Some(wait) = &mut me.wait {
            let Poll::Ready(granted) = Pin::new(wait).poll(cx) else { return Poll::Pending };
            me.wait = None;
            if granted.is_none() && !me.is_begun {
                return Poll::Ready(Err(Late));
            }
            expected = granted.unwrap_or(0);
            now = Instant::now();
        }
        me.is_begun = true;
        let polled = Pin::new(&mut me.work).poll(cx);
        // On a core that has time left nobody keeps accounts.
        if expected > 0 || is_full(now) {
            me.spent.pay(now.elapsed(), expected);
        }
        polled.map(Ok)
    }
}
