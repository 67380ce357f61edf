//! Searching over HTTP: what happens between finding and answering, and who may find what.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod page;
mod pipeline;
#[path = "../support/mod.rs"]
mod support;
mod tenants;
