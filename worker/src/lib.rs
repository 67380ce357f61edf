//! Pulls architecture requests, asks the gateway for passages, has a model write a grounded spec
//! within budget, stores it and publishes it.
//!
//! The life cycle of a run reads top to bottom in `run.rs`. [`queue`] and [`store`] are the ports to
//! the outside with their adapters; [`agent`] turns passages into a spec without touching either;
//! `call.rs` is the only place that spends tokens.
//!
//! Architecture invariant: this crate never depends on the gateway's crate; they meet at
//! `atlas_shared::gateway_api`.

pub mod agent;
pub mod queue;
pub mod store;

mod busy;
mod call;
mod cancels;
mod context;
mod control;
mod crash;
mod documents;
mod gate;
mod intake;
mod limiter;
mod live;
mod metrics;
mod outbox;
mod resilient;
mod run;
mod service;
mod stop;
mod sweep;

pub use service::{RunningWorker, StartError, Worker};
