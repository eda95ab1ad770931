//! Failed requests, and what they are to a person: what was done, where, and what to do.

use std::io::{Error, ErrorKind};
use std::time::Duration;
use vmtide_repo::RepoError;

/// The most of a server's own words that are repeated.
const MAX_WORDS: usize = 300;

/// Why a request failed for good.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What the server answered, if it did.
    pub(crate) cause: Cause,
    /// How many tries failed.
    pub(crate) tries: u32,
    /// In how much time.
    pub(crate) elapsed: Duration,
}

/// See [`Failure`].
#[derive(Debug)]
pub(crate) enum Cause {
    /// An answer that is no success.
    Answer {
        /// The HTTP status.
        status: u16,
        /// S3's code, such as `NoSuchKey`; empty where the answer had none.
        code: String,
        /// The server's words.
        message: String,
        /// The region the bucket is in, where the server says so.
        region: Option<String>,
    },
    /// None, or one that was cut.
    Connection(String),
    /// The request could not be made.
    Own(RepoError),
}

impl Failure {
    /// Whether the server answered with this status or code.
    pub(crate) fn is(&self, wanted_status: u16, wanted_code: &str) -> bool {
        matches!(&self.cause, Cause::Answer { status, code, .. }
            if *status == wanted_status || code == wanted_code)
    }

    /// Whether there is no such object, or version.
    pub(crate) fn is_missing(&self) -> bool {
        match &self.cause {
            // A missing bucket is an error of its own; HEAD cannot tell.
            Cause::Answer { status: 404, code, .. } => code != "NoSuchBucket",
            _ => false,
        }
    }

    /// Whether the server does not let these keys do it.
    pub(crate) fn is_denied(&self) -> bool {
        matches!(self.cause, Cause::Answer { status: 401 | 403, .. })
    }

    /// Whether the server does not know the request or one of its headers.
    pub(crate) fn is_unknown(&self) -> bool {
        matches!(self.cause, Cause::Answer { status: 405 | 501, .. })
    }

    /// The error of having tried `what` on `location` (of `bucket`, at `server`).
    pub(crate) fn into_error(self, what: &str, location: &str, server: &str) -> RepoError {
        let context = format!("{what} in {location}");
        let tries = match self.tries {
            0 | 1 => String::new(),
            tries => format!(" ({tries} tries in {} s)", self.elapsed.as_secs()),
        };
        match self.cause {
            Cause::Own(error) => error,
            Cause::Connection(text) => {
                let text = format!("{server}: {text}{tries}");
                RepoError::io(context, Error::new(ErrorKind::NotConnected, text))
            }
            Cause::Answer { status: 404, code, .. } if code == "NoSuchBucket" => {
                RepoError::NotFound {
                    what: format!("bucket of {location} at {server}"),
                    hint: "make it first; vmtide does not make buckets".into(),
                }
            }
            Cause::Answer { status: 404, .. } => {
                RepoError::NotFound { what: context, hint: String::new() }
            }
            Cause::Answer { status, code, message, region } => {
                let advice = advice(status, &code, region.as_deref());
                let mut text = format!("{server} answered {status}");
                for part in [code.as_str(), message.as_str()] {
                    if !part.is_empty() {
                        text.push_str(if part == code { " " } else { ": " });
                        text.push_str(part);
                    }
                }
                text.push_str(&tries);
                if let Some(advice) = advice {
                    text.push_str("; ");
                    text.push_str(&advice);
                }
                RepoError::io(context, Error::new(kind(status), text))
            }
        }
    }
}

fn kind(status: u16) -> ErrorKind {
    match status {
        401 | 403 => ErrorKind::PermissionDenied,
        507 => ErrorKind::StorageFull,
        _ => ErrorKind::Other,
    }
}

/// What to do about an answer.
fn advice(status: u16, code: &str, region: Option<&str>) -> Option<String> {
    if let Some(region) = region
        && matches!(
            (status, code),
            (301 | 307, _) | (_, "AuthorizationHeaderMalformed" | "PermanentRedirect")
        )
    {
        return Some(format!("the bucket is in {region}: give --s3-region {region}"));
    }
    let text = match (status, code) {
        (_, "InvalidAccessKeyId") => "the server does not know this access key id",
        (_, "SignatureDoesNotMatch") => {
            "the secret key does not belong to the access key id, or something on the way changes \
             requests"
        }
        (_, "RequestTimeTooSkewed") => "the clock of this machine is wrong: set it by NTP",
        (_, "ExpiredToken") => "the keys have ended: get new ones",
        (_, "AccessDenied") => {
            "the policy of these keys does not allow it; docs/s3.md has policies"
        }
        (_, "SlowDown") | (503, _) => "the server is overloaded: try again later",
        (301 | 307, _) => "the bucket is elsewhere: check --s3-region and --s3-endpoint",
        (_, "AuthorizationHeaderMalformed") => "check --s3-region",
        _ => return None,
    };
    Some(text.into())
}

/// A server's words, on one line and not too many.
pub(crate) fn words(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(MAX_WORDS)
        .collect();
    line.trim().to_owned()
}

/// What failed in a chain of errors: the innermost says it, the outer ones only where.
pub(crate) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut current = Some(error);
    while let Some(error) = current {
        texts.push(error.to_string());
        current = error.source();
    }
    let last = texts.pop().unwrap_or_default();
    match texts.pop() {
        Some(outer) if last.len() < 25 && !outer.contains(&last) && !outer.contains("http") => {
            words(&format!("{outer}: {last}"))
        }
        _ => words(&last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16, code: &str, region: Option<&str>) -> RepoError {
        let cause = Cause::Answer {
            status,
            code: code.into(),
            message: "said the server".into(),
            region: region.map(Into::into),
        };
        let failure = Failure { cause, tries: 1, elapsed: Duration::ZERO };
        failure.into_error("write points/x", "s3://b/p", "https://s3.example")
    }

    #[test]
    fn answers_become_errors_that_say_what_to_do() {
        let denied = error(403, "AccessDenied", None);
        assert!(matches!(denied, RepoError::Denied { .. }), "{denied}");
        for word in ["points/x", "s3://b/p", "https://s3.example", "policy"] {
            assert!(denied.to_string().contains(word), "{denied}");
        }
        assert!(matches!(error(404, "NoSuchKey", None), RepoError::NotFound { .. }));
        let bucket = error(404, "NoSuchBucket", None);
        assert!(bucket.to_string().contains("make it first"), "{bucket}");
        let moved = error(301, "PermanentRedirect", Some("eu-north-1"));
        assert!(moved.to_string().contains("--s3-region eu-north-1"), "{moved}");
        assert!(error(403, "RequestTimeTooSkewed", None).to_string().contains("clock"));
        assert!(matches!(error(500, "InternalError", None), RepoError::Io { .. }));
    }

    #[test]
    fn words_of_a_server_are_one_bounded_line() {
        assert_eq!(words(" a\r\nb\u{1b}[31m "), "a  b [31m");
        assert_eq!(words(&"x".repeat(5000)).len(), MAX_WORDS);
    }
}
