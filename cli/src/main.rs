//! Placeholder.
#[allow(dead_code, reason = "the command comes with the CLI")]
mod migrations;

fn main() {}
