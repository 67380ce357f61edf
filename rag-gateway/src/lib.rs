//! Finds the passages that matter: chunking, indexing and hybrid search over HTTP.
//!
//! [`Gateway::start`] is the way in: other services speak to it by the HTTP contract in
//! [`atlas_shared::gateway_api`]. [`source`] reads folders and repositories, for the gateway and for
//! the command line. Inside, from the outside in: [`http`] reads and answers, [`search`]
//! and [`indexing`] do the work, [`chunk`], [`embed`] and [`fusion`] are what they do it with, and
//! [`index`] is the port to the engine.
//!
//! Architecture invariants: this crate knows no worker, and nothing outside `index/` knows an engine.

mod cache;
mod chunk;
mod embed;
mod error;
mod fusion;
mod gateway;
mod http;
mod index;
mod indexing;
mod jobs;
mod metrics;
mod repository;
mod rerank;
mod search;
pub mod source;

pub use gateway::{Gateway, RunningGateway, StartError, documents_without_gateway};
