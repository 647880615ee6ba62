//! Calls into an engine that may panic on damaged files: a panic is an error, and the engine is not called again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use super::EngineError;

/// An engine panicked. What its files hold can't be trusted.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the engine panicked: {0}")]
pub(super) struct Panicked(String);

/// Whether an engine is to be called any more.
#[derive(Debug, Default)]
pub(super) struct Guard {
    down: AtomicBool,
}

impl Guard {
    /// Runs `call`. After a panic its locks may be held for ever, so every later call fails at once.
    pub(super) fn run<T>(
        &self,
        doing: &'static str,
        call: impl FnOnce() -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        if self.is_down() {
            return Err(EngineError::corrupt(doing, Panicked("earlier".into())));
        }
        let ran = caught(doing, call);
        if ran.as_ref().is_err_and(EngineError::is_panic) {
            self.down.store(true, Ordering::Release);
        }
        ran
    }

    /// Whether it panicked.
    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }
}

/// Runs `call`; a panic is an error.
pub(super) fn caught<T>(doing: &'static str, call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(EngineError::panicked(doing, Panicked(text.to_owned())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_panicked_is_not_called_again() {
        let guard = Guard::default();
        assert_eq!(guard.run("get", || Ok(1)).unwrap(), 1);
        let error = guard.run("get", || -> Result<(), _> { panic!("torn page") }).unwrap_err();
        assert!(error.is_corrupt());
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("torn page"));
        let later = guard.run("get", || -> Result<(), _> { unreachable!("called again") });
        assert!(later.unwrap_err().is_corrupt());
    }
}
