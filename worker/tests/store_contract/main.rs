//! The contract of the store port: what every adapter promises, run against both.
//!
//! `embedded::…` runs on a SQLite file, `supabase::…` on a real Postgres with the real migrations behind a
//! PostgREST-compatible server. The clock is moved, never waited for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod harness;

mod budget;
mod deferred;
mod fleet;
mod lifecycle;
mod operators;
mod random;
mod supabase_only;
mod upgrade;

/// Runs every named test on both adapters.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(crate::harness::Harness::embedded().await).await;
                }
            )*
        }
        mod supabase {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let Some(harness) = crate::harness::Harness::supabase(stringify!($name)).await else {
                        return;
                    };
                    super::$name(harness).await;
                }
            )*
        }
    };
}

pub(crate) use contract;
