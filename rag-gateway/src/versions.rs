//! How often each collection changed in this process: part of every cache key, so that an answer from
//! before a change is never served after it.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Change counters by collection.
#[derive(Debug, Default)]
pub(crate) struct Versions(Mutex<HashMap<String, u64>>);

impl Versions {
    pub(crate) fn of(&self, collection: &str) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(collection).copied().unwrap_or_default()
    }

    pub(crate) fn changed(&self, collection: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(collection.to_owned()).or_default() += 1;
    }
}
