//! What cached answers are kept under, so that none outlives a change of the index.
//!
//! Every announced change gives its collection a new random number, kept where the chunks are. An
//! answer is stored with the numbers that were read *before* it was searched for, and served only
//! while they are the current ones. A writer announces before its call returns, so from then on no
//! replica serves an answer from before. The epoch is one more number, over all collections: a new
//! one empties every cache.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use uuid::Uuid;

use super::names;

/// What an answer is kept under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// Changes when all caches are emptied; differs between indexes.
    pub(crate) epoch: Uuid,
    /// The numbers of the collections that were asked about, in their order; nil: never changed.
    pub(crate) numbers: Vec<Uuid>,
    /// A change of one of them has begun and not ended.
    pub(crate) unfinished: bool,
}

/// A change that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChangeId(pub(crate) Uuid);

/// The numbers of an index that only this process has open.
#[derive(Debug)]
pub(crate) struct LocalVersions(Mutex<State>);

#[derive(Debug)]
struct State {
    epoch: Uuid,
    numbers: HashMap<String, Uuid>,
}

impl LocalVersions {
    /// Numbers that no other process ever had: what a shared cache still holds is void.
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State { epoch: Uuid::new_v4(), numbers: HashMap::new() }))
    }

    pub(crate) fn of(&self, collections: &[String]) -> Version {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |name: &String| state.numbers.get(names::plain(name)).copied().unwrap_or_default();
        // A change that was cut short ended with its process.
        Version { epoch: state.epoch, numbers: collections.iter().map(number).collect(), unfinished: false }
    }

    pub(crate) fn changed(&self, collection: &str) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.numbers.insert(names::plain(collection).to_owned(), Uuid::new_v4());
    }

    pub(crate) fn new_epoch(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).epoch = Uuid::new_v4();
    }
}
