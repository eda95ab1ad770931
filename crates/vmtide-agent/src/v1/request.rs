//! What every request of `/v1` brings: a key, and parameters.

use super::error::{ApiError, Result};
use crate::audit::Note;
use crate::auth::{self, Caller};
use crate::state::Shared;
use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use std::convert::Infallible;
use std::str::FromStr;
use std::sync::Arc;

/// The most parameters that are looked at.
const MAX_PARAMETERS: usize = 32;

/// The parameters of a query, decoded as forms are: `+` is a space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Reads a query.
    pub(super) fn parse(query: &str) -> Result<Self> {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let mut parameters = Vec::new();
        for pair in pairs {
            if parameters.len() >= MAX_PARAMETERS {
                return Err(ApiError::bad_request("the query has too many parameters"));
            }
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            parameters.push((decode(name)?, decode(value)?));
        }
        Ok(Self(parameters))
    }

    /// A parameter, which may stand there once at most.
    pub(super) fn get(&self, name: &str) -> Result<Option<&str>> {
        let mut found = self.0.iter().filter(|(other, _)| other == name);
        let first = found.next().map(|(_, value)| value.as_str());
        match found.next() {
            None => Ok(first),
            Some(_) => Err(ApiError::bad_request(format!("{name} is given twice"))),
        }
    }

    /// A parameter that must be there.
    pub(super) fn required(&self, name: &str) -> Result<&str> {
        let missing = || ApiError::bad_request(format!("the parameter {name} is missing"));
        self.get(name)?.filter(|value| !value.is_empty()).ok_or_else(missing)
    }

    /// A parameter that is a number, without a sign.
    pub(super) fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.get(name)? else {
            return Ok(None);
        };
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let wrong = || ApiError::bad_request(format!("{name} is no number that can be used"));
        let value = digits.then(|| text.parse().ok()).flatten();
        value.map(Some).ok_or_else(wrong)
    }

    /// Refuses parameters that a route does not know: one that is misspelt must not be passed over.
    pub(super) fn only(&self, known: &[&str]) -> Result<()> {
        match self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) => {
                let name: String = name.chars().take(40).collect();
                Err(ApiError::bad_request(format!("the parameter {name:?} is not known here")))
            }
        }
    }
}

fn decode(text: &str) -> Result<String> {
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8();
    let decoded = decoded.map_err(|_| ApiError::bad_request("the query is not UTF-8"))?;
    Ok(decoded.into_owned())
}

/// Who asks, and with which parameters. There before any handler of a route that needs a key.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) caller: Caller,
    pub(super) parameters: Parameters,
}

impl Asked {
    /// Succeeds for a key that may write.
    pub(super) fn may_write(&self) -> Result<()> {
        match self.caller.may_write() {
            true => Ok(()),
            false => Err(ApiError::new("read_only_key", "this key may only read")),
        }
    }

    /// What is known of the request for the audit log.
    pub(super) fn note(&self) -> Note {
        let disk = self.parameters.get("path").ok().flatten().map(str::to_owned);
        Note { key: Some(Arc::clone(&self.caller.name)), disk, ..Note::default() }
    }

    /// The disk of the parameter `path`.
    pub(super) fn path(&self) -> Result<String> {
        self.parameters.required("path").map(str::to_owned)
    }
}

impl FromRequestParts<Shared> for Asked {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self> {
        let missing = || ApiError::new("unauthorized", "a key is needed");
        parts.extensions.get::<Self>().cloned().ok_or_else(missing)
    }
}

/// The layer in front of all routes that need a key: nothing of a request without one is looked at.
pub(super) async fn require_key(
    State(state): State<Shared>,
    mut request: Request,
    next: Next,
) -> std::result::Result<Response, Infallible> {
    let Ok(caller) = auth::caller(&state, request.headers()) else {
        let message = "a key is needed: Authorization: Bearer, or the header auth_key";
        return Ok(ApiError::new("unauthorized", message).into_response());
    };
    let parameters = Parameters::parse(request.uri().query().unwrap_or_default());
    let (parameters, error) = match parameters {
        Ok(parameters) => (parameters, None),
        Err(error) => (Parameters::default(), Some(error)),
    };
    let asked = Asked { caller, parameters };
    let note = asked.note();
    let response = match error {
        None => {
            request.extensions_mut().insert(asked);
            next.run(request).await
        }
        Some(error) => error.into_response(),
    };
    Ok(noted(response, note))
}

/// The response with a note for the audit log, unless it has one.
pub(super) fn noted(mut response: Response, note: Note) -> Response {
    response.extensions_mut().get_or_insert_with(|| note);
    response
}

/// A value as a JSON answer.
pub(super) fn json(value: &impl Serialize) -> Result<Response> {
    let text = serde_json::to_vec(value).map_err(|error| {
        ApiError::new("failed", format!("the answer cannot be written: {error}"))
    })?;
    Ok(([(http::header::CONTENT_TYPE, "application/json")], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_once_and_strictly() {
        let parameters =
            Parameters::parse("path=C%3A%5Ca+b%2Bc.vhdx&since=rctX%3A1&&x&limit=10").unwrap();
        assert_eq!(parameters.required("path").unwrap(), "C:\\a b+c.vhdx");
        assert_eq!(parameters.number::<u64>("limit").unwrap(), Some(10));
        assert_eq!(parameters.number::<u64>("cursor").unwrap(), None);
        assert!(parameters.required("x").is_err() && parameters.number::<u64>("since").is_err());
        assert!(parameters.only(&["path", "since", "x"]).is_err());
        assert_eq!(Parameters::parse("path=%255C").unwrap().required("path").unwrap(), "%5C");
        assert!(Parameters::parse("path=%ff").is_err());
        assert!(Parameters::parse("path=a&path=b").unwrap().get("path").is_err());
        assert!(Parameters::parse(&"a=1&".repeat(40)).is_err());
        for bad in ["-1", "+1", "1e3", "18446744073709551616", "%201"] {
            let parameters = Parameters::parse(&format!("n={bad}")).unwrap();
            assert!(parameters.number::<u64>("n").is_err(), "{bad}");
        }
    }
}
