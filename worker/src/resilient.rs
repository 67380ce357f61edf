//! Store calls, tried again while it can help.

use std::future::Future;

use atlas_shared::{ledger::LedgerError, resilience::RetryPolicy};

/// Runs a store call; tries again after transient failures, by the policy. Every store call is
/// idempotent, so a call that was carried out but not answered may be repeated.
pub(crate) async fn store<T, F, Fut>(policy: &RetryPolicy, mut call: F) -> Result<T, LedgerError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, LedgerError>>,
{
    let mut attempt = 0;
    loop {
        attempt += 1;
        let error = match call().await {
            Err(LedgerError::Upstream(error)) => error,
            result => return result,
        };
        let Some(delay) = policy.next_delay(attempt, &error) else { return Err(error.into()) };
        tracing::info!(attempt, error = %error, "store call failed, trying again");
        tokio::time::sleep(delay).await;
    }
}
