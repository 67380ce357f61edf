//! API keys.

use std::{net::SocketAddr, sync::Arc};

use atlas_shared::config::ApiKey;
use axum::{
    extract::{ConnectInfo, FromRequestParts, Request, State},
    http::{HeaderMap, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

use super::{App, Problem};
use crate::error::GatewayError;

/// Who calls: the name of its key, or its address where no keys are set. Rate limits go by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Caller {
    pub(super) name: Arc<str>,
    /// The only tenant it may read and write; `None`: all.
    pub(super) tenant: Option<Arc<str>>,
}

impl Caller {
    /// The tenant that a request is about, given the one it names.
    pub(super) fn tenant(&self, named: Option<String>) -> Result<Option<String>, GatewayError> {
        match (&self.tenant, named) {
            (None, named) => Ok(named),
            (Some(own), None) => Ok(Some(own.to_string())),
            (Some(own), Some(named)) if **own == *named => Ok(Some(named)),
            // Whether the other one exists is none of this caller's business.
            (Some(own), Some(_)) => Err(GatewayError::Forbidden(format!(
                "this key belongs to tenant {own:?}; leave `tenant` out, or name that one"
            ))),
        }
    }

    /// Refuses callers that belong to a tenant.
    pub(super) fn is_everybodys(&self) -> Result<(), GatewayError> {
        match &self.tenant {
            None => Ok(()),
            Some(own) => Err(GatewayError::Forbidden(format!(
                "this key belongs to tenant {own:?}, and this concerns all of them"
            ))),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // `authenticate` stands before every route that asks; without it nobody gets in.
        parts.extensions.get::<Self>().cloned().ok_or_else(Problem::internal)
    }
}

/// The keys of `API_KEYS`, hashed. None: open to whoever reaches the port.
pub(super) struct Keys(Vec<(Caller, [u8; 32])>);

impl Keys {
    pub(super) fn new(keys: &[ApiKey]) -> Self {
        let caller = |key: &ApiKey| Caller {
            name: Arc::from(key.name.as_str()),
            tenant: key.tenant.as_deref().map(Arc::from),
        };
        Self(keys.iter().map(|key| (caller(key), key.sha256)).collect())
    }

    /// The caller with this key. Takes the same time whichever key it is, and whether it is one:
    /// hashes are compared, all of them, without a branch.
    fn caller(&self, key: &str) -> Option<Caller> {
        let presented: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let mut found = u32::MAX;
        for (number, (_, hash)) in (0_u32..).zip(&self.0) {
            let equal: Choice = hash.ct_eq(&presented);
            found = u32::conditional_select(&found, &number, equal);
        }
        let (caller, _) = self.0.get(usize::try_from(found).ok()?)?;
        Some(caller.clone())
    }
}

/// `Authorization: Bearer KEY` or `X-API-Key: KEY`.
pub(super) async fn authenticate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let caller = if app.keys.0.is_empty() {
        let address = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
        let name = address.map_or_else(|| "anyone".to_owned(), |address| address.to_string());
        Caller { name: Arc::from(name), tenant: None }
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
            ApiKey::new("worker", "key-of-the-worker", None),
            ApiKey::new("ci", "key-of-ci", Some("acme")),
        ]);
        let caller = |key: &str| {
            keys.caller(key)
                .map(|caller| (caller.name.to_string(), caller.tenant.map(|tenant| tenant.to_string())))
        };
        assert_eq!(caller("key-of-the-worker"), Some(("worker".to_owned(), None)));
        assert_eq!(caller("key-of-ci"), Some(("ci".to_owned(), Some("acme".to_owned()))));
        assert_eq!(caller("key-of-"), None);
        assert_eq!(caller(""), None);
    }

    #[test]
    fn a_bound_caller_speaks_for_its_tenant_only() {
        let bound = Caller { name: Arc::from("ci"), tenant: Some(Arc::from("acme")) };
        let named = |tenant: &str| bound.tenant(Some(tenant.to_owned())).ok();
        assert_eq!(bound.tenant(None).ok(), Some(Some("acme".to_owned())));
        assert_eq!(named("acme"), Some(Some("acme".to_owned())));
        for other in ["", "other", "ACME", "acme ", "*"] {
            assert_eq!(named(other), None, "{other:?}");
        }
        assert!(bound.is_everybodys().is_err());
        let free = Caller { name: Arc::from("worker"), tenant: None };
        assert_eq!(free.tenant(Some("x".to_owned())).ok(), Some(Some("x".to_owned())));
        assert_eq!(free.tenant(None).ok(), Some(None));
    }
}
