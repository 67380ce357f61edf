//! Why a run must stop before its end.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Who says stop. The first one to say so wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// The lease is another worker's: write nothing.
    Fenced,
    /// A `cancel` command: finish as failed, code `cancelled`.
    Cancelled,
    /// `RUN_TIMEOUT_SECONDS`: give back, or fail when attempts are used up.
    TimedOut,
    /// `metadata.deadline` has passed: finish as failed, code `deadline_exceeded`.
    Deadline,
    /// The worker shuts down and `DRAIN_TIMEOUT_SECONDS` is over: give the run back at once.
    Drained,
}

/// A signal that one run listens to, between and during its calls. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    token: CancellationToken,
    reason: Arc<OnceLock<StopReason>>,
}

impl Stop {
    /// Says stop.
    pub(crate) fn stop(&self, reason: StopReason) {
        // A second reason changes nothing: the run is stopping already.
        let _ = self.reason.set(reason);
        self.token.cancel();
    }

    /// Waits until somebody says stop. Safe to cancel.
    pub(crate) async fn stopped(&self) -> StopReason {
        self.token.cancelled().await;
        self.reason()
    }

    /// The reason, if somebody said stop.
    pub(crate) fn check(&self) -> Result<(), StopReason> {
        if self.token.is_cancelled() { Err(self.reason()) } else { Ok(()) }
    }

    fn reason(&self) -> StopReason {
        // Set before the token is cancelled, always.
        self.reason.get().copied().unwrap_or(StopReason::Drained)
    }
}
