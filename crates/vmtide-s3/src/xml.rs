//! The documents that S3 answers with. What a server adds is passed over, what it leaves out has a
//! default; how long one may be is bounded by who reads it.

use jiff::Timestamp;
use quick_xml::events::Event;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt::Write as _;
use std::io::{Error, ErrorKind};
use vmtide_repo::{RepoError, Result};

/// An error.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ErrorDocument {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) region: Option<String>,
}

/// A page of a listing (`ListObjectsV2`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ObjectPage {
    #[serde(default)]
    pub(crate) is_truncated: bool,
    pub(crate) next_continuation_token: Option<String>,
    #[serde(default)]
    pub(crate) contents: Vec<ObjectInPage>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ObjectInPage {
    pub(crate) key: String,
    pub(crate) size: u64,
    pub(crate) last_modified: String,
}

/// A page of versions (`ListObjectVersions`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct VersionPage {
    #[serde(default)]
    pub(crate) is_truncated: bool,
    pub(crate) next_key_marker: Option<String>,
    pub(crate) next_version_id_marker: Option<String>,
    #[serde(default, rename = "Version")]
    pub(crate) versions: Vec<VersionInPage>,
    #[serde(default, rename = "DeleteMarker")]
    pub(crate) delete_markers: Vec<VersionInPage>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct VersionInPage {
    pub(crate) key: String,
    pub(crate) version_id: String,
}

/// Uploads that nobody completed (`ListMultipartUploads`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct UploadPage {
    #[serde(default)]
    pub(crate) is_truncated: bool,
    pub(crate) next_key_marker: Option<String>,
    pub(crate) next_upload_id_marker: Option<String>,
    #[serde(default, rename = "Upload")]
    pub(crate) uploads: Vec<UploadInPage>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct UploadInPage {
    pub(crate) key: String,
    pub(crate) upload_id: String,
    pub(crate) initiated: String,
}

/// The beginning of an upload in parts.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct UploadBegun {
    pub(crate) upload_id: String,
}

/// Whether a bucket keeps versions.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct VersioningDocument {
    pub(crate) status: Option<String>,
}

/// Whether a bucket has object lock, and its default.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct LockDocument {
    pub(crate) object_lock_enabled: Option<String>,
    pub(crate) rule: Option<LockRule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct LockRule {
    pub(crate) default_retention: Option<DefaultRetention>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DefaultRetention {
    pub(crate) mode: Option<String>,
    pub(crate) days: Option<u32>,
    pub(crate) years: Option<u32>,
}

/// Reads a document.
///
/// # Errors
/// [`RepoError::Io`] where the server answered something else.
pub(crate) fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    let unreadable = |error: &dyn std::fmt::Display| {
        let text = format!("the server's answer is not what S3 answers: {error}");
        RepoError::io(what, Error::new(ErrorKind::InvalidData, text))
    };
    let text = std::str::from_utf8(bytes).map_err(|error| unreadable(&error))?;
    quick_xml::de::from_str(text).map_err(|error| unreadable(&error))
}

/// Reads a page of a listing, whose root element must be `root`: all that it holds can be left out,
/// so that any other document would be an empty listing.
///
/// # Errors
/// As [`parse`].
pub(crate) fn parse_page<T: DeserializeOwned>(what: &str, root: &str, bytes: &[u8]) -> Result<T> {
    let mut reader = quick_xml::Reader::from_reader(bytes);
    let is_root = loop {
        match reader.read_event() {
            Ok(Event::Start(start) | Event::Empty(start)) => {
                break start.local_name().as_ref() == root.as_bytes();
            }
            Ok(Event::Eof) | Err(_) => break false,
            Ok(_) => {}
        }
    };
    if is_root {
        return parse(what, bytes);
    }
    let text = format!("the server's answer is not what S3 answers: it is no {root}");
    Err(RepoError::io(what, Error::new(ErrorKind::InvalidData, text)))
}

/// The error of a listing that says that there is more, and not how to get it.
pub(crate) fn not_whole(what: &str) -> RepoError {
    let text = "the server's listing is not whole: it was cut, and does not say how it goes on, so \
                that no repository can be kept there";
    RepoError::io(what, Error::new(ErrorKind::InvalidData, text))
}

/// The error in an answer; empty where it says nothing.
pub(crate) fn parse_error(bytes: &[u8]) -> ErrorDocument {
    std::str::from_utf8(bytes)
        .ok()
        .filter(|text| text.contains("<Error"))
        .and_then(|text| quick_xml::de::from_str(text).ok())
        .unwrap_or_default()
}

/// A time as S3 writes it in XML.
pub(crate) fn time(text: &str) -> Option<Timestamp> {
    text.trim().parse().ok()
}

/// The request that completes an upload, from the tags of its parts in order.
pub(crate) fn complete_upload(tags: &[String]) -> String {
    let mut xml = String::from("<CompleteMultipartUpload>");
    for (number, tag) in tags.iter().enumerate() {
        let tag = tag.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        // Writing to a text does not fail.
        let _ =
            write!(xml, "<Part><PartNumber>{}</PartNumber><ETag>{tag}</ETag></Part>", number + 1);
    }
    xml.push_str("</CompleteMultipartUpload>");
    xml
}

/// The request that keeps an object until a time.
pub(crate) fn retention(mode: &str, until: &str) -> String {
    format!(
        "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{mode}</Mode>\
         <RetainUntilDate>{until}</RetainUntilDate></Retention>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_whatever_else_is_in_them() {
        let page: ObjectPage = parse(
            "list",
            br#"<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
            <Name>b</Name><IsTruncated>true</IsTruncated><Contents><Key>a&amp;b</Key>
            <LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>"x"</ETag><Size>7</Size>
            <Owner><ID>1</ID></Owner></Contents><Surprise><Deep/></Surprise><Contents><Key>c</Key>
            <LastModified>2026-01-02T03:04:05Z</LastModified><Size>0</Size></Contents>
            <NextContinuationToken>t</NextContinuationToken></ListBucketResult>"#,
        )
        .unwrap();
        assert!(page.is_truncated);
        assert_eq!(page.next_continuation_token.as_deref(), Some("t"));
        let keys: Vec<_> = page.contents.iter().map(|object| object.key.as_str()).collect();
        assert_eq!(keys, ["a&b", "c"]);
        assert_eq!(
            time(&page.contents[0].last_modified),
            Some("2026-01-02T03:04:05Z".parse().unwrap())
        );
        let empty: ObjectPage = parse("list", b"<ListBucketResult/>").unwrap();
        assert!(empty.contents.is_empty() && !empty.is_truncated);
    }

    #[test]
    fn a_page_is_that_of_the_listing_that_was_asked_for() {
        let page =
            |text: &str| parse_page::<ObjectPage>("list", "ListBucketResult", text.as_bytes());
        for right in [
            "<?xml version=\"1.0\"?>\n<ListBucketResult xmlns=\"x\"></ListBucketResult>",
            "<!-- s3 --><s3:ListBucketResult xmlns:s3=\"x\"/>",
        ] {
            assert!(page(right).unwrap().contents.is_empty(), "{right}");
        }
        for wrong in
            ["<html></html>", "<ListVersionsResult/>", "<ListAllMyBucketsResult/>", "", "{}", "<"]
        {
            let error = page(wrong).unwrap_err();
            assert!(error.to_string().contains("not what S3 answers"), "{wrong}: {error}");
        }
    }

    #[test]
    fn versions_and_markers_are_told_apart() {
        let page: VersionPage = parse(
            "versions",
            b"<ListVersionsResult><DeleteMarker><Key>k</Key><VersionId>3</VersionId></DeleteMarker>
            <Version><Key>k</Key><VersionId>2</VersionId></Version><Version><Key>k2</Key>
            <VersionId>null</VersionId></Version></ListVersionsResult>",
        )
        .unwrap();
        assert_eq!((page.versions.len(), page.delete_markers.len()), (2, 1));
    }

    #[test]
    fn errors_are_found_where_there_are_any() {
        let error = parse_error(
            b"<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>x</Message></Error>",
        );
        assert_eq!(error.code, "SlowDown");
        for nothing in [&b""[..], b"<html>502</html>", b"<Error", &[0xff, 0xfe], b"{}"] {
            assert_eq!(parse_error(nothing).code, "");
        }
        assert!(parse::<ObjectPage>("list", b"<html><body>Proxy</html>").is_err());
    }
}
