//! Finds the passages that matter.

mod chunk;
mod index;
