//! What a key that belongs to a tenant may know of: a collection in which it may read nothing is, for it, not there.

use std::{sync::Arc, time::Duration};

use moka::sync::Cache;

use super::{App, auth::Caller};
use crate::{error::GatewayError, index::Selection, search::check_collection_name};

/// How long a collection that was seen counts as visible. Less is only a 404 more or less: what is read in it is
/// filtered anyway.
const SEEN: Duration = Duration::from_secs(60);
const MANY_SEEN: u64 = 10_000;

/// Collections that tenants have seen, so that most of their queries need no look.
pub(super) struct Visible(Cache<(Arc<str>, String), ()>);

impl Visible {
    pub(super) fn new() -> Self {
        Self(Cache::builder().max_capacity(MANY_SEEN).time_to_live(SEEN).build())
    }
}

/// What a tenant may read of a collection: its own, and what is nobody's.
pub(super) fn readable(tenant: &str) -> Selection {
    Selection { tenants: Some(vec![String::new(), tenant.to_owned()]), ..Selection::default() }
}

/// Refuses a collection that the caller cannot see as one that does not exist: one way to the answer for both.
///
/// Where the index does not answer, what follows says so, or answers from the cache what this tenant was told before.
pub(super) async fn check(app: &App, caller: &Caller, collection: &str) -> Result<(), GatewayError> {
    let Some(tenant) = &caller.tenant else { return Ok(()) };
    check_collection_name(collection)?;
    let key = (Arc::clone(tenant), collection.to_owned());
    if app.visible.0.contains_key(&key) {
        return Ok(());
    }
    match app.index.count(collection, &readable(tenant)).await {
        Ok(0) => return Err(GatewayError::UnknownCollection(collection.to_owned())),
        Ok(_) => app.visible.0.insert(key, ()),
        Err(error) => tracing::debug!(error = %error, collection, "not looked at for a tenant"),
    }
    Ok(())
}
