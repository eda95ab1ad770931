//! Who sent a request: the key it brings, looked up in constant time.
//!
//! A key comes in the header `auth_key`, as rct-service's clients send it, or as `Authorization: Bearer`. It is
//! compared with every key there is, by their salted hashes and without stopping early, so that the time that an
//! answer takes says nothing of any key. Keys can be changed while the agent runs: the file is looked at every
//! [`RELOAD_INTERVAL`], and at once on SIGHUP. A file that cannot be read then revokes nothing.

pub mod file;
pub mod keys;
mod store;

pub use keys::{KeySet, NewKey, Rights};
pub use store::{FileStamp, KeyStore, RELOAD_INTERVAL};

use crate::state::{AppState, Shared};
use axum::extract::FromRequestParts;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use std::sync::Arc;

/// The header in which rct-service's clients send their key.
pub const KEY_HEADER: &str = "auth_key";

/// Whose key a request brought. An extractor: a handler that takes it is reached with a good key only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The name of the key.
    pub name: Arc<str>,
    /// What it is good for.
    pub rights: Rights,
}

/// There was no key, or none that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoKey;

impl Caller {
    /// Whether it may change anything.
    pub fn may_write(&self) -> bool {
        self.rights == Rights::ReadWrite
    }
}

/// Finds out whose key a request brings.
///
/// # Errors
/// [`NoKey`].
pub fn caller(state: &AppState, headers: &HeaderMap) -> Result<Caller, NoKey> {
    presented(headers).and_then(|key| state.keys.current().find(key)).ok_or(NoKey)
}

/// The key that a request brings, in whichever header.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get(KEY_HEADER) {
        return Some(key.as_bytes());
    }
    let (scheme, key) = headers.get(AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = axum::response::Response;

    async fn from_request_parts(
        parts: &mut Parts,
        state: &Shared,
    ) -> Result<Self, Self::Rejection> {
        caller(state, &parts.headers).map_err(|NoKey| unauthorized())
    }
}

/// The answer to a request without a good key.
pub fn unauthorized() -> axum::response::Response {
    use axum::response::IntoResponse;
    let header = [(WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, header, "a key is needed: header auth_key, or Authorization: Bearer")
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_key_is_found_in_either_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(presented(&headers), None);
        headers.insert(AUTHORIZATION, HeaderValue::from_static("Basic c3dvcmRmaXNo"));
        assert_eq!(presented(&headers), None);
        headers.insert(AUTHORIZATION, HeaderValue::from_static("bearer  swordfish "));
        assert_eq!(presented(&headers), Some(b"swordfish".as_slice()));
        headers.insert(KEY_HEADER, HeaderValue::from_static("trout"));
        assert_eq!(presented(&headers), Some(b"trout".as_slice()));
    }
}
