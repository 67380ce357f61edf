//! API keys.

use std::{net::SocketAddr, sync::Arc};

use atlas_shared::Secret;
use axum::{
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

use super::{App, Problem};

/// Who calls: the name of its key, or its address where no keys are set. Rate limits go by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Caller(pub(super) Arc<str>);

/// The keys of `API_KEYS`, hashed. None: open to whoever reaches the port.
pub(super) struct Keys(Vec<(Arc<str>, [u8; 32])>);

impl Keys {
    pub(super) fn new(keys: &[(String, Secret)]) -> Self {
        Self(keys.iter().map(|(name, key)| (Arc::from(name.as_str()), hash(key.expose()))).collect())
    }

    /// The caller with this key. Takes the same time whichever key it is, and whether it is one:
    /// hashes are compared, all of them, without a branch.
    fn caller(&self, key: &str) -> Option<Caller> {
        let presented = hash(key);
        let mut found = u32::MAX;
        for (number, (_, hash)) in (0_u32..).zip(&self.0) {
            let equal: Choice = hash.ct_eq(&presented);
            found = u32::conditional_select(&found, &number, equal);
        }
        let (name, _) = self.0.get(usize::try_from(found).ok()?)?;
        Some(Caller(Arc::clone(name)))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// `Authorization: Bearer KEY` or `X-API-Key: KEY`.
pub(super) async fn authenticate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let caller = if app.keys.0.is_empty() {
        let address = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
        Caller(Arc::from(address.map_or_else(|| "anyone".to_owned(), |address| address.to_string())))
    } else {
        let Some(caller) = presented(request.headers()).and_then(|key| app.keys.caller(key)) else {
            let detail = "Send one of the keys in the gateway's API_KEYS, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.";
            return Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail).into_response();
        };
        caller
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

fn presented(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    bearer.or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_caller() {
        let keys = Keys::new(&[
            ("worker".to_owned(), Secret::new("key-of-the-worker")),
            ("ci".to_owned(), Secret::new("key-of-ci")),
        ]);
        let name = |key: &str| keys.caller(key).map(|caller| caller.0.to_string());
        assert_eq!(name("key-of-the-worker").as_deref(), Some("worker"));
        assert_eq!(name("key-of-ci").as_deref(), Some("ci"));
        assert_eq!(name("key-of-"), None);
        assert_eq!(name(""), None);
    }
}
