//! The addresses of bucket and objects.

use crate::credentials::variable;
use crate::options::S3Options;
use crate::profile::Profile;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use url::{Host, Url};
use vmtide_repo::{RepoError, Result};

/// What stands for itself in a signed path (AWS Signature Version 4, "URI encode"). A character
/// encoded otherwise than the server does makes every signature wrong.
const PATH: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// The same in a query, where the slash is encoded.
const QUERY: &AsciiSet = &PATH.add(b'/');

/// Where AWS keeps buckets whose region nobody named.
const DEFAULT_REGION: &str = "us-east-1";

/// Where the bucket is.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// The bucket's URL, without a slash at its end.
    base: String,
    /// For signatures.
    pub(crate) region: String,
    /// Whether the server is this machine.
    pub(crate) is_loopback: bool,
    /// The server, for people.
    pub(crate) server: String,
}

impl Endpoint {
    /// Works it out from options, environment and profile.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for an address that is none or that is not safe.
    pub(crate) fn new(options: &S3Options, profile: &Profile) -> Result<Self> {
        let region = options.region.clone();
        let region = region
            .or_else(|| variable("AWS_REGION"))
            .or_else(|| variable("AWS_DEFAULT_REGION"))
            .or_else(|| profile.get("region").map(str::to_owned))
            .unwrap_or_else(|| DEFAULT_REGION.into());
        if !region.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(RepoError::Invalid(format!("{region:?} is no region")));
        }
        let given = options.endpoint.clone();
        let given = given
            .or_else(|| variable("AWS_ENDPOINT_URL_S3"))
            .or_else(|| variable("AWS_ENDPOINT_URL"))
            .or_else(|| profile.get("endpoint_url").map(str::to_owned));
        let is_aws = given.is_none();
        let suffix = if region.starts_with("cn-") { ".cn" } else { "" };
        let server = given.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com{suffix}"));
        let url = parse(&server)?;
        let is_loopback = is_loopback(&url);
        if url.scheme() == "http" && !is_loopback && !options.allow_http {
            return Err(RepoError::Invalid(format!(
                "{server}: HTTP without TLS shows everything on the way to whoever listens; use \
                 https://, or allow it with --s3-allow-http"
            )));
        }
        // A certificate for *.s3.… does not cover a bucket with dots in its name.
        let in_host = is_aws && !options.bucket.contains('.');
        let path_style = options.path_style.unwrap_or(!in_host);
        let base = base(&url, &options.bucket, path_style)?;
        Ok(Self { base, region, is_loopback, server: server.trim_end_matches('/').to_owned() })
    }

    /// The URL of an object, or with an empty key of the bucket, with a query, both as they are
    /// signed.
    pub(crate) fn url(&self, key: &str, query: &[(&str, String)]) -> String {
        let mut url = format!("{}/{}", self.base, percent_encode(key.as_bytes(), PATH));
        for (number, (name, value)) in query.iter().enumerate() {
            url.push(if number == 0 { '?' } else { '&' });
            url.push_str(name);
            url.push('=');
            url.extend(percent_encode(value.as_bytes(), QUERY));
        }
        url
    }
}

fn parse(server: &str) -> Result<Url> {
    let wrong = |what: &str| RepoError::Invalid(format!("S3 endpoint {server}: {what}"));
    let url = Url::parse(server).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(wrong("give https://HOST, with :PORT where it is not 443"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        // Not repeated: it may be a secret.
        return Err(RepoError::Invalid("S3 endpoint: keys do not belong in the URL".into()));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it cannot have ? or #"));
    }
    Ok(url)
}

fn base(url: &Url, bucket: &str, path_style: bool) -> Result<String> {
    let path = url.path().trim_end_matches('/');
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let host = url.host_str().unwrap_or_default();
    if path_style {
        return Ok(format!("{}://{host}{port}{path}/{bucket}", url.scheme()));
    }
    match url.host() {
        Some(Host::Domain(_)) => Ok(format!("{}://{bucket}.{host}{port}{path}", url.scheme())),
        _ => Err(RepoError::Invalid(format!(
            "S3 endpoint {url}: an address has no names below it; use --s3-path-style true"
        ))),
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(change: impl FnOnce(&mut S3Options)) -> Result<Endpoint> {
        let mut options = S3Options::parse("s3://bucket/x").unwrap();
        options.region = Some("eu-west-1".into());
        change(&mut options);
        Endpoint::new(&options, &Profile::default())
    }

    #[test]
    fn buckets_stand_in_the_host_or_in_the_path() {
        let url = |change: &dyn Fn(&mut S3Options)| {
            endpoint(|options| change(options)).unwrap().url("a/b c", &[("list-type", "2".into())])
        };
        assert_eq!(url(&|_| {}), "https://bucket.s3.eu-west-1.amazonaws.com/a/b%20c?list-type=2");
        assert_eq!(
            url(&|options| options.path_style = Some(true)),
            "https://s3.eu-west-1.amazonaws.com/bucket/a/b%20c?list-type=2"
        );
        assert_eq!(
            url(&|options| options.bucket = "my.bucket".into()),
            "https://s3.eu-west-1.amazonaws.com/my.bucket/a/b%20c?list-type=2"
        );
        assert_eq!(
            url(&|options| options.endpoint = Some("http://127.0.0.1:9000/".into())),
            "http://127.0.0.1:9000/bucket/a/b%20c?list-type=2"
        );
        assert_eq!(
            url(&|options| {
                options.endpoint = Some("https://minio.example:9000".into());
                options.path_style = Some(false);
            }),
            "https://bucket.minio.example:9000/a/b%20c?list-type=2"
        );
        assert_eq!(
            url(&|options| options.endpoint = Some("https://[::1]:9000".into())),
            "https://[::1]:9000/bucket/a/b%20c?list-type=2"
        );
    }

    #[test]
    fn queries_are_encoded_as_signed() {
        let url = endpoint(|_| {}).unwrap().url("", &[("prefix", "a/b+c".into())]);
        assert_eq!(url, "https://bucket.s3.eu-west-1.amazonaws.com/?prefix=a%2Fb%2Bc");
    }

    #[test]
    fn what_is_not_safe_is_refused() {
        let refused = |server: &str| {
            endpoint(|options| options.endpoint = Some(server.into())).unwrap_err().to_string()
        };
        assert!(refused("http://minio.example").contains("--s3-allow-http"));
        assert!(refused("ftp://x").contains("https://HOST"));
        assert!(refused("nonsense").contains("nonsense"));
        let text = refused("https://KEY:geheim@host");
        assert!(!text.contains("geheim"), "{text}");
        let allowed = endpoint(|options| {
            options.endpoint = Some("http://minio.example".into());
            options.allow_http = true;
        });
        assert!(!allowed.unwrap().is_loopback);
        let in_address = endpoint(|options| {
            options.endpoint = Some("http://127.0.0.1:1".into());
            options.path_style = Some(false);
        });
        assert!(in_address.unwrap_err().to_string().contains("--s3-path-style"));
        assert!(endpoint(|options| options.region = Some("eu west".into())).is_err());
    }
}
