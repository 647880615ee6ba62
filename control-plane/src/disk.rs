//! Work that waits on the disk, off the threads that serve requests.

use std::panic::resume_unwind;

/// Runs `work` where waiting holds up nothing else. It ends even if the caller is dropped, so a change that began
/// is either made or not.
pub(crate) async fn wait<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime is ending, and drops this future with everything else.
            Err(_) => std::future::pending().await,
        },
    }
}
