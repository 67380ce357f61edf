//! How many runs are doing work of their own: all that neither wait for the gateway nor for a model.
//!
//! A thousand runs that wait for a model cost next to nothing, but a thousand that are started, or answered, at
//! the same moment wait for each other. So new ones are started one after another, and answers go before them:
//! a request that is not started waits in the queue, where any worker can take it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

/// Runs at work for each core. More would wait for each other; fewer would not share transactions.
const FOR_EACH_CORE: usize = 4;
/// The longest that a start is put off. Runs may be held up by something else than work (a rate limit, an open
/// circuit), and must not hold up the others for long.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Counts the runs at work. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Busy(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    at_work: AtomicUsize,
    enough: usize,
    /// Woken when a run stops working, for now or for good.
    eased: Notify,
}

/// A run at work, until dropped.
#[derive(Debug)]
pub(crate) struct AtWork(Arc<Shared>);

/// A run that waits for an upstream, until dropped.
#[derive(Debug)]
pub(crate) struct Away<'a>(&'a Shared);

impl Busy {
    /// For a worker on this machine.
    pub(crate) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::up_to(cores * FOR_EACH_CORE)
    }

    fn up_to(enough: usize) -> Self {
        Self(Arc::new(Shared { at_work: AtomicUsize::new(0), enough, eased: Notify::new() }))
    }

    /// A run begins to work.
    pub(crate) fn begin(&self) -> AtWork {
        self.0.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(Arc::clone(&self.0))
    }

    /// A run at work begins to wait.
    pub(crate) fn away(&self) -> Away<'_> {
        self.0.ease();
        Away(&self.0)
    }

    /// Waits until there is room for another run at work, but not for long.
    pub(crate) async fn room(&self) {
        let eased = async {
            loop {
                // Listen before looking, so that nothing is missed in between.
                let eased = self.0.eased.notified();
                if self.0.at_work.load(Ordering::Relaxed) < self.0.enough {
                    return;
                }
                eased.await;
            }
        };
        let _ = tokio::time::timeout(LONGEST_WAIT, eased).await;
    }
}

impl Shared {
    fn ease(&self) {
        self.at_work.fetch_sub(1, Ordering::Relaxed);
        // Only the intake waits.
        self.eased.notify_one();
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.ease();
    }
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        self.0.at_work.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_waits_while_enough_runs_are_at_work() {
        let busy = Busy::up_to(2);
        let first = busy.begin();
        assert_eq!(busy.room().now_or_never(), Some(()));
        let second = busy.begin();
        assert_eq!(busy.room().now_or_never(), None);

        // One that waits for a model makes room, until it is answered.
        let away = busy.away();
        assert_eq!(busy.room().now_or_never(), Some(()));
        drop(away);
        assert_eq!(busy.room().now_or_never(), None);

        // One that ends wakes who waits.
        let waiting = tokio::spawn({
            let busy = busy.clone();
            async move { busy.room().await }
        });
        tokio::task::yield_now().await;
        drop(first);
        let asked = tokio::time::Instant::now();
        assert!(waiting.await.is_ok());
        assert_eq!(asked.elapsed(), Duration::ZERO);
        drop(second);
        assert_eq!(busy.0.at_work.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn runs_that_are_held_up_do_not_stop_the_intake() {
        let busy = Busy::up_to(1);
        let _held_up = busy.begin();
        let asked = tokio::time::Instant::now();
        busy.room().await;
        assert_eq!(asked.elapsed(), LONGEST_WAIT);
    }
}
