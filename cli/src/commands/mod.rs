//! The commands: one file each, a struct that is its arguments and its help, one `run`.

pub(crate) mod ask;
pub(crate) mod budget;
pub(crate) mod collections;
pub(crate) mod config;
pub(crate) mod demo;
pub(crate) mod dev;
pub(crate) mod dlq;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod index;
pub(crate) mod judge;
pub(crate) mod key;
pub(crate) mod migrate;
pub(crate) mod publish;
pub(crate) mod runs;
pub(crate) mod search;
