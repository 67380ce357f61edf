//! Measuring retrieval on a test collection: pure functions on plain data. The command that talks to a
//! gateway is [`crate::commands::eval`].

pub(crate) mod dataset;
pub(crate) mod measure;
pub(crate) mod report;
pub(crate) mod significance;
