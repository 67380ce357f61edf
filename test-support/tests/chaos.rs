//! The short form of `make chaos`. The long one is the same with more of everything.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use atlas_test_support::{
    chaos::{self, ChaosOptions, FleetError},
    skip,
};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_paid_twice_or_over_budget_whatever_breaks() {
    let folder = tempfile::tempdir().unwrap();
    let options = ChaosOptions { seed: 7, requests: 150, folder: folder.path().to_owned() };
    match chaos::run(options).await {
        Ok(outcome) => {
            println!("{}", outcome.report);
            assert!(outcome.differences.is_empty(), "{}", outcome.report);
        }
        Err(FleetError::Missing { service, reason }) => {
            skip("nothing_is_lost_paid_twice_or_over_budget_whatever_breaks", service, &reason);
        }
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    }
}
