//! Where the keys come from: given, environment, web identity, profile, container, machine.

use crate::options::S3Options;
use crate::profile::{Profile, ProfileCredentials, run_process};
use jiff::{SignedDuration, Timestamp};
use object_store::aws::{AmazonS3Builder, AwsCredential, AwsCredentialProvider};
use object_store::client::{ClientOptions, HttpClient, HttpConnector};
use object_store::{BackoffConfig, RetryConfig};
use parking_lot::Mutex;
use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::time::Duration;
use vmtide_repo::{RepoError, Result};

/// How long before their end keys are renewed.
const RENEW_BEFORE: SignedDuration = SignedDuration::from_mins(5);

/// What to do where there are no keys.
const NO_KEYS: &str = "no keys found in the environment (AWS_ACCESS_KEY_ID and \
AWS_SECRET_ACCESS_KEY), in a profile of ~/.aws, nor from the machine this runs on";

/// The keys in use, and how new ones are had.
pub(crate) enum Credentials {
    /// They do not change.
    Fixed(Arc<AwsCredential>),
    /// A program prints them.
    Process { command: String, current: Mutex<Option<Current>> },
    /// Web identity, container or machine.
    Provider(AwsCredentialProvider),
}

/// Keys and when they end.
pub(crate) struct Current {
    credential: Arc<AwsCredential>,
    end: Option<Timestamp>,
}

impl Credentials {
    /// Finds out where the keys come from, without asking anybody yet.
    ///
    /// # Errors
    /// [`RepoError::Denied`] where half of a pair is missing or the profile cannot be used.
    pub(crate) fn new(
        options: &S3Options,
        profile: &Profile,
        region: &str,
        http: &reqwest::Client,
    ) -> Result<Self> {
        if let Some(given) = &options.credentials {
            return Ok(Self::fixed(AwsCredential {
                key_id: given.key_id.clone(),
                secret_key: given.secret_key.to_string(),
                token: given.token.as_deref().cloned(),
            }));
        }
        // A profile named by an option goes before the environment, as with the AWS tools.
        if options.profile.is_some() {
            return Self::of_profile(profile, &options.bucket, region, http);
        }
        match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
            (Some(key_id), Some(secret_key)) => {
                let token = variable("AWS_SESSION_TOKEN");
                Ok(Self::fixed(AwsCredential { key_id, secret_key, token }))
            }
            (None, None) if variable("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() => {
                Self::of_machine(&options.bucket, region, http)
            }
            (None, None) => Self::of_profile(profile, &options.bucket, region, http),
            (Some(_), None) => {
                Err(denied("AWS_ACCESS_KEY_ID is set, AWS_SECRET_ACCESS_KEY is not"))
            }
            (None, Some(_)) => {
                Err(denied("AWS_SECRET_ACCESS_KEY is set, AWS_ACCESS_KEY_ID is not"))
            }
        }
    }

    fn fixed(credential: AwsCredential) -> Self {
        Self::Fixed(Arc::new(credential))
    }

    fn of_profile(
        profile: &Profile,
        bucket: &str,
        region: &str,
        http: &reqwest::Client,
    ) -> Result<Self> {
        match profile.credentials()? {
            Some(ProfileCredentials::Keys(credential)) => Ok(Self::Fixed(credential)),
            Some(ProfileCredentials::Process(command)) => {
                Ok(Self::Process { command, current: Mutex::new(None) })
            }
            None if profile.is_named() => Err(denied("the AWS profile has no keys")),
            None => Self::of_machine(bucket, region, http),
        }
    }

    fn of_machine(bucket: &str, region: &str, http: &reqwest::Client) -> Result<Self> {
        // Off AWS nobody answers: to learn that must not take minutes.
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 2,
            retry_timeout: Duration::from_secs(5),
        };
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_region(region)
            .with_retry(retry)
            .with_http_connector(Connector(http.clone()))
            .build()
            .map_err(|error| denied(&error.to_string()))?;
        Ok(Self::Provider(Arc::clone(store.credentials())))
    }

    /// The keys to sign with now.
    ///
    /// # Errors
    /// [`RepoError::Denied`] where there are none.
    pub(crate) async fn get(&self) -> Result<Arc<AwsCredential>> {
        match self {
            Self::Fixed(credential) => Ok(Arc::clone(credential)),
            Self::Process { command, current } => {
                if let Some(credential) = Self::still_good(current) {
                    return Ok(credential);
                }
                let command = command.clone();
                let (credential, end) = tokio::task::spawn_blocking(move || run_process(&command))
                    .await
                    .map_err(|error| denied(&error.to_string()))??;
                let credential = Arc::new(credential);
                *current.lock() = Some(Current { credential: Arc::clone(&credential), end });
                Ok(credential)
            }
            Self::Provider(provider) => provider.get_credential().await.map_err(|error| {
                tracing::debug!(%error, "no credentials");
                denied(NO_KEYS)
            }),
        }
    }

    fn still_good(current: &Mutex<Option<Current>>) -> Option<Arc<AwsCredential>> {
        let current = current.lock();
        let current = current.as_ref()?;
        let ends = current.end.is_some_and(|end| end <= Timestamp::now() + RENEW_BEFORE);
        (!ends).then(|| Arc::clone(&current.credential))
    }
}

/// Gives `object_store` the connection that trusts what the user trusts.
#[derive(Debug)]
struct Connector(reqwest::Client);

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

/// An environment variable that says something.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn denied(text: &str) -> RepoError {
    RepoError::io("get AWS credentials", Error::new(ErrorKind::PermissionDenied, text))
}
