//! The agent (DESIGN section 8): turns a request and numbered passages into a spec.
//!
//! Plain functions on plain data: no network, no store, no clock. [`Draft`] is a state machine that
//! says what it needs [`next`](Draft::next); the run's life cycle does it and feeds the outcome back:
//!
//! ```text
//! let mut draft = match checkpoint { Some(output) => Draft::restore(output)?, None => Draft::new(input) };
//! loop {
//!     match draft.next() {
//!         Next::Call(call) => {
//!             // Fit it into what may still be spent; `model` and `request_id` are the caller's.
//!             match draft.squeeze(available, |request| chat.prompt_tokens_upper_bound(model, request)) {
//!                 Ok(fitted) => { /* the request as it fits: reserve prompt + cap, send */
//!                     // A refusal is for the next model of the chain, as long as there is one.
//!                     if !(another_is_left && draft.refused(model, &answer)) { draft.answered(&answer); }
//!                     /* settle_step with Checkpoint { step: call.step, output: draft.checkpoint() } */ }
//!                 Err(_) => draft.cannot_call("run_budget", why), // best honest result, or Failed
//!             }
//!         }
//!         Next::Search(search) => match gateway.query_chat(search.query) {
//!             Ok(passages) => draft.found(passages),
//!             Err(error) => draft.search_failed(&error),
//!         },
//!         Next::Finished(finished) => break, // content, spec, metadata
//!         Next::Failed(failure) => break,    // error_code, error_message
//!     }
//! }
//! ```
//!
//! Promises: `next` is pure and cheap enough to call again; every state survives
//! `restore(checkpoint())`, given passages and their numbers included, so a finished call is never
//! made twice; the number of calls is bounded by 2 + the searches allowed, and one more for each model
//! that refuses. Steps are named `draft.0`, `draft.1`, … (one more after each round of searches),
//! `search.1`, … and `repair.0`; after a refusal `draft.0.other.1`, ….
//!
//! Without a model, [`offline::draft`] assembles the same document from passages.
//!
//! What is read here was written by others: requests, parents, passages and answers are data. They
//! are cleaned and stripped of secrets where they come in ([`clean`]), fenced in the prompt, and
//! sanitised where they go out ([`render`]).

mod admit;
mod clean;
mod compare;
mod draft;
mod finish;
mod guess;
#[cfg(test)]
mod hostile;
pub mod judge;
pub mod lookup;
mod mermaid;
pub mod offline;
mod passages;
mod prompt;
mod provenance;
mod read;
mod render;
pub mod rubric;
mod schema;
mod sketch;
mod spec;
#[cfg(test)]
mod testing;
mod words;

pub use admit::{Admitted, admit};
pub use draft::{
    AgentOptions, Call, DoesNotFit, Draft, DraftInput, Failure, Fitted, Next, PromptParts, Search,
};
pub use finish::{Citation, CitationFault, Finished};
pub use lookup::Lookup;
pub use mermaid::check as check_mermaid;
pub use prompt::version as prompt_version;
pub use schema::of_kind as schema_of;
pub use sketch::Sketch;
pub use spec::{
    Alternative, Change, Choice, Claim, Component, Consequences, Decision, Diagram, Field, Finding, Kind,
    KindFrom, Outcome, Requirements, Risk, Severity, Spec,
};
