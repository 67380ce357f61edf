//! What the worker and the gateway must agree on.
//!
//! Contracts first: the message contract ([`message`]), the gateway's HTTP API
//! ([`gateway_api`]), the token ledger port ([`ledger`]) and the model ports ([`model`]).
//! Then what every process needs: configuration ([`config`]), secrets, telemetry,
//! metrics and probes, and one layer of retries and circuit breakers ([`resilience`]).
//!
//! Architecture invariant: this crate knows neither the worker nor the gateway.

pub mod config;
pub mod error;
pub mod gateway_api;
pub mod gateway_client;
mod http_client;
pub mod ids;
pub mod ledger;
pub mod message;
pub mod metrics;
pub mod model;
pub mod openai;
pub mod ops;
pub mod postgrest;
pub mod process;
pub mod rerank;
pub mod resilience;
pub mod secret;
pub mod secrets;
pub mod serve;
pub mod sqlite;
pub mod telemetry;
pub mod tokenizer;
pub mod trace_context;

pub use config::{Config, ConfigErrors, Env};
pub use error::{Dependency, UNSTORABLE, UpstreamError};
pub use ids::{TaskId, WorkerId};
pub use ledger::{Ledger, Tokens};
pub use secret::Secret;
