//! Hands each request out at the moment it is due, from a thread of its own.
//!
//! The timers of the async runtime are a millisecond wide, which is more than a fast answer takes. A thread
//! that sleeps on the kernel's own clock, with the slack of its timers at the smallest, wakes within tens of
//! microseconds.

use std::fs;
use std::io;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tokio::sync::mpsc;

use crate::schedule::{Due, Schedule};

/// Requests handed out but not yet taken. When full the thread waits and nothing is dropped: the wait is part
/// of the requests' latency, and of the generator's lag.
const HANDOFF_MAX: usize = 1024;

/// A schedule that is being handed out. Dropping it ends its thread.
#[derive(Debug)]
pub(crate) struct Pacer {
    due: mpsc::Receiver<Due>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Starts to hand out `schedule`, whose time 0 is `start`.
    pub(crate) fn start(schedule: Schedule, start: Instant) -> io::Result<Pacer> {
        let (sender, due) = mpsc::channel(HANDOFF_MAX);
        let thread =
            thread::Builder::new().name("loadtest-pacer".to_owned()).spawn(move || pace(schedule, start, &sender))?;
        Ok(Pacer { due, thread: Some(thread) })
    }

    /// The next request, at the moment it is due; `None` after the last. Safe to drop and call again.
    pub(crate) async fn next(&mut self) -> Option<Due> {
        self.due.recv().await
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        // Closing first: it fails a send that waits for room, so that the join below is short.
        self.due.close();
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn pace(schedule: Schedule, start: Instant, sender: &mpsc::Sender<Due>) {
    narrow_timer_slack();
    for due in schedule {
        let at = start + due.at;
        loop {
            if sender.is_closed() {
                return;
            }
            let now = Instant::now();
            if now >= at {
                break;
            }
            thread::park_timeout(at - now);
        }
        if sender.blocking_send(due).is_err() {
            return;
        }
    }
}

/// Asks the kernel to wake this thread on time rather than together with others. Where that cannot be asked
/// (not Linux, no procfs) sleeps are some 50 us less exact; the lag that results is measured and reported.
fn narrow_timer_slack() {
    if let Ok(link) = fs::read_link("/proc/thread-self")
        && let Some(id) = link.file_name()
    {
        let _ = fs::write(Path::new("/proc").join(id).join("timerslack_ns"), "1");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::options::tests::sample;

    #[tokio::test]
    async fn no_request_is_handed_out_early_and_none_is_lost() {
        let mut options = sample();
        (options.rate, options.duration) = (2_000, Duration::from_millis(200));
        let expected: Vec<_> = Schedule::new(&options).collect();
        let start = Instant::now();
        let mut pacer = Pacer::start(Schedule::new(&options), start).unwrap();
        let mut seen = Vec::new();
        while let Some(due) = pacer.next().await {
            assert!(start.elapsed() >= due.at);
            seen.push(due);
        }
        assert_eq!(seen, expected);
    }

    #[tokio::test]
    async fn a_late_taker_gets_every_request() {
        let mut options = sample();
        (options.rate, options.duration) = (100_000, Duration::from_millis(100));
        let long_ago = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        let mut pacer = Pacer::start(Schedule::new(&options), long_ago).unwrap();
        let mut count = 0;
        while pacer.next().await.is_some() {
            count += 1;
        }
        assert_eq!(count, 10_000);
    }

    #[test]
    fn dropping_ends_a_thread_that_sleeps_and_one_that_waits_for_room() {
        let mut options = sample();
        (options.rate, options.duration) = (1, Duration::from_secs(3_600));
        drop(Pacer::start(Schedule::new(&options), Instant::now() + Duration::from_secs(3_600)).unwrap());
        options.rate = 1_000_000;
        drop(Pacer::start(Schedule::new(&options), Instant::now()).unwrap());
    }
}
