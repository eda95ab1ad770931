//! In which form, and which part of it, content is answered.

use super::error::{ApiError, Result};
use super::request::Parameters;
use crate::stream::{Encoding, frame};
use http::HeaderMap;
use http::header::{ACCEPT, ACCEPT_ENCODING, IF_RANGE, RANGE};

/// The form of an answer with content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form(Encoding);

impl Form {
    /// What the parameters say, and where they say nothing, the headers.
    pub(super) fn choose(parameters: &Parameters, headers: &HeaderMap) -> Result<Self> {
        let framed = match parameters.get("format")? {
            Some("ranges") => true,
            Some("raw") => false,
            Some(_) => return Err(ApiError::bad_request("format is raw or ranges")),
            None => mentions(headers, ACCEPT, frame::CONTENT_TYPE),
        };
        let compress = match parameters.get("compress")? {
            Some("zstd") => Some(true),
            Some("none") => Some(false),
            Some(_) => return Err(ApiError::bad_request("compress is zstd or none")),
            None => None,
        };
        // A part of the bytes is asked for as they are: parts of compressed bytes help nobody.
        let negotiated =
            || mentions(headers, ACCEPT_ENCODING, "zstd") && !headers.contains_key(RANGE);
        Ok(Self(match framed {
            true => Encoding::Ranges { compress: compress.unwrap_or(false) },
            false if compress.unwrap_or_else(negotiated) => Encoding::Zstd,
            false => Encoding::Plain,
        }))
    }

    pub(super) const fn encoding(self) -> Encoding {
        self.0
    }

    pub(super) const fn content_type(self) -> &'static str {
        match self.0 {
            Encoding::Ranges { .. } => frame::CONTENT_TYPE,
            Encoding::Plain | Encoding::Zstd => "application/octet-stream",
        }
    }
}

/// Whether a header has `wanted` in its list, and not with the weight 0.
fn mentions(headers: &HeaderMap, name: http::HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| {
        let mut parts = item.split(';').map(str::trim);
        let named = parts.next().is_some_and(|item| item.eq_ignore_ascii_case(wanted));
        named && !parts.any(|weight| matches!(weight, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
    })
}

/// Which positions of the content are answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) from: u64,
    pub(super) until: u64,
    /// The value of `Content-Range`, where a `Range` was asked for.
    pub(super) content_range: Option<String>,
}

impl Window {
    /// The content from position `from`, and of plain content the part that a header `Range` asks for; one that
    /// has several parts, or that cannot be read, counts as none (RFC 9110, 14.2).
    pub(super) fn choose(from: u64, total: u64, form: Form, headers: &HeaderMap) -> Result<Self> {
        if from > total {
            return Err(not_satisfiable(total));
        }
        let all = Self { from, until: total, content_range: None };
        // There is nothing to compare an If-Range with, so it never holds.
        if form.encoding() != Encoding::Plain || headers.contains_key(IF_RANGE) {
            return Ok(all);
        }
        let length = total - from;
        let range = headers.get(RANGE).and_then(|value| value.to_str().ok());
        let Some((first, last)) = range.and_then(|range| parse_range(range, length)) else {
            return Ok(all);
        };
        if first >= length {
            return Err(not_satisfiable(length));
        }
        let last = last.min(length - 1);
        let content_range = Some(format!("bytes {first}-{last}/{length}"));
        Ok(Self { from: from + first, until: from + last + 1, content_range })
    }
}

fn not_satisfiable(length: u64) -> ApiError {
    ApiError::new("range_not_satisfiable", format!("the content has {length} bytes from there on"))
}

/// The first and the last byte of `bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-COUNT`.
fn parse_range(text: &str, length: u64) -> Option<(u64, u64)> {
    let (first, last) = text.trim().strip_prefix("bytes=")?.split_once('-')?;
    let number = |digits: &str| match digits.bytes().all(|byte| byte.is_ascii_digit()) {
        true => digits.parse::<u64>().ok(),
        false => None,
    };
    match (first.trim(), last.trim()) {
        ("", count) => {
            let count = number(count)?;
            // The last 0 bytes cannot be satisfied: a first byte past the end.
            Some((if count == 0 { length } else { length.saturating_sub(count) }, u64::MAX))
        }
        (first, "") => Some((number(first)?, u64::MAX)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some((first, last))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(HeaderName, &'static str)| {
            (name.clone(), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    fn form(query: &str, pairs: &[(HeaderName, &'static str)]) -> Result<Encoding> {
        let parameters = Parameters::parse(query)?;
        Form::choose(&parameters, &headers(pairs)).map(Form::encoding)
    }

    #[test]
    fn the_form_is_negotiated() {
        let framed = Encoding::Ranges { compress: false };
        for (query, pairs, expected) in [
            ("", &[][..], Encoding::Plain),
            ("", &[(ACCEPT_ENCODING, "gzip, zstd;q=0.5")], Encoding::Zstd),
            ("", &[(ACCEPT_ENCODING, "gzip, zstd;q=0")], Encoding::Plain),
            ("", &[(ACCEPT_ENCODING, "zstd"), (RANGE, "bytes=1-")], Encoding::Plain),
            ("compress=none", &[(ACCEPT_ENCODING, "zstd")], Encoding::Plain),
            ("compress=zstd", &[], Encoding::Zstd),
            ("", &[(ACCEPT, "application/vnd.vmtide.ranges")], framed),
            ("format=ranges", &[(ACCEPT_ENCODING, "zstd")], framed),
            ("format=ranges&compress=zstd", &[], Encoding::Ranges { compress: true }),
            ("format=raw", &[(ACCEPT, "application/vnd.vmtide.ranges")], Encoding::Plain),
        ] {
            assert_eq!(form(query, pairs).unwrap(), expected, "{query} {pairs:?}");
        }
        assert!(form("format=xml", &[]).is_err() && form("compress=gzip", &[]).is_err());
    }

    #[test]
    fn ranges_of_bytes_are_cut_out_of_the_rest() {
        let window = |from, range| {
            let chosen =
                Window::choose(from, 100, Form(Encoding::Plain), &headers(&[(RANGE, range)]));
            chosen.map(|window| (window.from, window.until, window.content_range))
        };
        let part = |from, until, text: &str| Ok((from, until, Some(text.to_owned())));
        assert_eq!(window(0, "bytes=10-"), part(10, 100, "bytes 10-99/100"));
        assert_eq!(window(0, "bytes=10-19"), part(10, 20, "bytes 10-19/100"));
        assert_eq!(window(0, "bytes=10-1000"), part(10, 100, "bytes 10-99/100"));
        assert_eq!(window(0, "bytes=-30"), part(70, 100, "bytes 70-99/100"));
        assert_eq!(window(0, "bytes=-1000"), part(0, 100, "bytes 0-99/100"));
        assert_eq!(window(40, "bytes=10-19"), part(50, 60, "bytes 10-19/60"));
        for ignored in
            ["bytes=1-2,4-5", "bytes=5-4", "bytes=a-", "lines=1-2", "bytes=+1-2", "bytes=-"]
        {
            assert_eq!(window(0, ignored), Ok((0, 100, None)), "{ignored}");
        }
        for past in ["bytes=100-", "bytes=-0", "bytes=18446744073709551615-"] {
            assert_eq!(window(0, past).unwrap_err().code, "range_not_satisfiable", "{past}");
        }
        assert!(window(101, "bytes=0-").is_err());
        assert_eq!(window(100, "bytes=0-").unwrap_err().code, "range_not_satisfiable");
    }
}
