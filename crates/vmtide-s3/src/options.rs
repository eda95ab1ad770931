//! Where a repository is in S3, and how to get there.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use vmtide_repo::{RepoError, Result};
use zeroize::Zeroizing;

/// The longest prefix. Keys have at most 1,024 bytes, names of objects in a repository 200.
const MAX_PREFIX_BYTES: usize = 512;

/// How long a request is tried again before the job fails. Shorter than what a server needs to
/// restart, jobs fail for nothing; much longer, nobody learns that the store is gone.
const DEFAULT_RETRY_TIME: Duration = Duration::from_secs(300);

/// Keys given directly, as tests do. Everybody else uses the standard places.
#[derive(Clone)]
pub struct StaticCredentials {
    /// The access key id.
    pub key_id: String,
    /// The secret access key.
    pub secret_key: Zeroizing<String>,
    /// The session token, of temporary keys.
    pub token: Option<Zeroizing<String>>,
}

impl fmt::Debug for StaticCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticCredentials").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

/// How the server is to encrypt what it stores; vmtide encrypts before that in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEncryption {
    /// With a key of S3's own (`AES256`).
    S3,
    /// With a key of KMS (`aws:kms`): the one named, else that of the bucket or account.
    Kms(Option<String>),
}

impl FromStr for ServerEncryption {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "AES256" => Ok(Self::S3),
            "aws:kms" => Ok(Self::Kms(None)),
            _ => match text.strip_prefix("aws:kms:") {
                // A key's ARN contains colons itself; it goes to the end.
                Some(key) if is_header_text(key) => Ok(Self::Kms(Some(key.to_owned()))),
                _ => Err(RepoError::Invalid(format!(
                    "{text:?} is no server-side encryption; use AES256, aws:kms or aws:kms:KEY"
                ))),
            },
        }
    }
}

/// Whether a text can be sent as the value of a header.
fn is_header_text(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A repository in S3. What is not given here comes from the standard environment variables and
/// from the profile in `~/.aws`.
#[derive(Clone, Debug)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// Where in the bucket, without slashes at the ends; empty for all of it.
    pub prefix: String,
    /// The server, as `https://host[:port]`; none for AWS.
    pub endpoint: Option<String>,
    /// The region; none for that of the environment or profile, else `us-east-1`.
    pub region: Option<String>,
    /// Whether the bucket stands in the path (`https://host/bucket/key`) or in the name of the host
    /// (`https://bucket.host/key`); none for the host on AWS and the path elsewhere.
    pub path_style: Option<bool>,
    /// Certificates of authorities to trust instead of the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// Whether HTTP without TLS is allowed to other machines. To this one it always is.
    pub allow_http: bool,
    /// How the server is to encrypt; none for the bucket's default.
    pub encryption: Option<ServerEncryption>,
    /// The storage class; none for the bucket's default.
    pub storage_class: Option<String>,
    /// The profile in `~/.aws`; none for `AWS_PROFILE`, else `default`.
    pub profile: Option<String>,
    /// Keys; none for the standard places.
    pub credentials: Option<StaticCredentials>,
    /// How long a request is tried again.
    pub retry_time: Duration,
    /// Where packs are gathered until they are sent, one PUT each; none for `TMPDIR`, else
    /// `/var/tmp`, which is a disk also where `/tmp` is memory. Where nothing can be written there, they are sent in parts of 8 MiB.
    pub spool_directory: Option<PathBuf>,
}

impl S3Options {
    /// The place that `s3://bucket/prefix` names, everything else as by default.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for what is no such URL.
    pub fn parse(url: &str) -> Result<Self> {
        let wrong = |what: &str| RepoError::Invalid(format!("{url}: {what}"));
        let rest = url.strip_prefix("s3://").ok_or_else(|| wrong("not an s3://BUCKET/PREFIX"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains(['@', ':']) {
            return Err(wrong(
                "keys and ports do not belong in the URL: give --s3-endpoint for another server, \
                 and keys by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile",
            ));
        }
        if !is_bucket(bucket) {
            return Err(wrong(
                "the name of a bucket has 3 to 63 lower-case letters, digits, dots and hyphens",
            ));
        }
        let prefix = prefix.trim_end_matches('/');
        if !is_prefix(prefix) {
            return Err(wrong(
                "the prefix has empty, \".\" or \"..\" components, control characters or more \
                 than 512 bytes",
            ));
        }
        Ok(Self::new(bucket, prefix))
    }

    /// As [`parse`](Self::parse), of parts that are known to be right.
    fn new(bucket: &str, prefix: &str) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: prefix.into(),
            endpoint: None,
            region: None,
            path_style: None,
            ca_file: None,
            allow_http: false,
            encryption: None,
            storage_class: None,
            profile: None,
            credentials: None,
            retry_time: DEFAULT_RETRY_TIME,
            spool_directory: None,
        }
    }

    /// The place as a URL.
    pub fn url(&self) -> String {
        match self.prefix.as_str() {
            "" => format!("s3://{}", self.bucket),
            prefix => format!("s3://{}/{prefix}", self.bucket),
        }
    }
}

/// Old buckets have capitals and underscores; what would change the host or path is refused.
fn is_bucket(text: &str) -> bool {
    (3..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && !text.contains("..")
}

fn is_prefix(text: &str) -> bool {
    text.is_empty()
        || (text.len() <= MAX_PREFIX_BYTES
            && !text.chars().any(|character| character.is_control() || character == '\\')
            && text.split('/').all(|part| !matches!(part, "" | "." | "..")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_bucket_and_prefix() {
        for (url, bucket, prefix) in [
            ("s3://backups", "backups", ""),
            ("s3://backups/", "backups", ""),
            ("s3://my.bucket-1/a/b c/", "my.bucket-1", "a/b c"),
        ] {
            let options = S3Options::parse(url).unwrap();
            assert_eq!((options.bucket.as_str(), options.prefix.as_str()), (bucket, prefix));
        }
        assert_eq!(S3Options::parse("s3://backups/vm/").unwrap().url(), "s3://backups/vm");
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for url in [
            "s3://",
            "s3:///x",
            "s3://ab",
            "s3://KEY:SECRET@bucket/x",
            "s3://host:9000/bucket",
            "s3://bucket//x",
            "s3://bucket/../x",
            "s3://bucket/a/./b",
            "s3://buck et",
            "s3://bucket?x",
            "s3://bucket/a\u{7}",
            "https://bucket",
        ] {
            assert!(matches!(S3Options::parse(url), Err(RepoError::Invalid(_))), "{url}");
        }
    }

    #[test]
    fn encryptions_are_named_as_aws_names_them() {
        assert_eq!("AES256".parse::<ServerEncryption>().unwrap(), ServerEncryption::S3);
        assert_eq!("aws:kms".parse::<ServerEncryption>().unwrap(), ServerEncryption::Kms(None));
        let key = "arn:aws:kms:eu-central-1:1:key/2";
        let parsed = format!("aws:kms:{key}").parse::<ServerEncryption>().unwrap();
        assert_eq!(parsed, ServerEncryption::Kms(Some(key.into())));
        assert!("aws:kms:a b".parse::<ServerEncryption>().is_err());
        assert!("aes".parse::<ServerEncryption>().is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = StaticCredentials {
            key_id: "AKIA".into(),
            secret_key: Zeroizing::new("geheim".into()),
            token: Some(Zeroizing::new("geheim".into())),
        };
        let text = format!("{credentials:?}");
        assert!(text.contains("AKIA") && !text.contains("geheim"), "{text}");
    }
}
