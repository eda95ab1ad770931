//! Repositories in S3: their options on the command line, in the environment and in settings files.

use clap::Args;
use std::path::PathBuf;
use vmtide_engine::Result;
use vmtide_engine::doctor::{Check, CheckStatus};
use vmtide_s3::{
    Guarantee, ObjectLockState, ProbeDepth, S3Options, S3Store, ServerEncryption, StoreGuarantees,
    Versioning,
};

/// How to get at a repository in S3. Keys come from where the AWS tools have them.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Repositories in S3")]
pub struct S3Args {
    /// The server of s3:// repositories [default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS itself]
    #[arg(long, global = true, value_name = "URL", env = "VMTIDE_S3_ENDPOINT")]
    #[arg(hide_env_values = true)]
    s3_endpoint: Option<String>,
    /// Its region [default: AWS_REGION, AWS_DEFAULT_REGION, that of the profile, us-east-1]
    #[arg(long, global = true, value_name = "REGION", env = "VMTIDE_S3_REGION")]
    #[arg(hide_env_values = true)]
    s3_region: Option<String>,
    /// The profile in ~/.aws with keys, region and endpoint [default: AWS_PROFILE]
    #[arg(long, global = true, value_name = "NAME", env = "VMTIDE_S3_PROFILE")]
    #[arg(hide_env_values = true)]
    s3_profile: Option<String>,
    /// Whether the bucket stands in the path of URLs, not in the host [default: false on AWS, true
    /// elsewhere]
    #[arg(long, global = true, value_name = "BOOL", env = "VMTIDE_S3_PATH_STYLE")]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    #[arg(hide_env_values = true)]
    s3_path_style: Option<bool>,
    /// Certificates (PEM) to trust instead of the system's [default: AWS_CA_BUNDLE]
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_S3_CA_FILE")]
    #[arg(hide_env_values = true)]
    s3_ca_file: Option<PathBuf>,
    /// Encryption by the server, beside vmtide's own: AES256, aws:kms or aws:kms:KEY
    #[arg(long, global = true, value_name = "SSE", env = "VMTIDE_S3_SSE")]
    #[arg(hide_env_values = true)]
    s3_sse: Option<ServerEncryption>,
    /// The storage class of what is written; one that can be read at once
    #[arg(long, global = true, value_name = "CLASS", env = "VMTIDE_S3_STORAGE_CLASS")]
    #[arg(hide_env_values = true, value_parser = parse_class)]
    s3_storage_class: Option<String>,
    /// Allow HTTP without TLS to other machines than this one
    #[arg(long, global = true, env = "VMTIDE_S3_ALLOW_HTTP", hide_env_values = true)]
    s3_allow_http: bool,
}

/// Classes whose objects must be thawed first cannot hold a repository: hours for every read.
fn parse_class(text: &str) -> std::result::Result<String, String> {
    match text {
        "GLACIER" | "DEEP_ARCHIVE" => {
            Err("cannot be read at once; use GLACIER_IR, STANDARD_IA or another".into())
        }
        _ if !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_' || b.is_ascii_digit()) => {
            Ok(text.to_owned())
        }
        _ => Err("no storage class: STANDARD, STANDARD_IA, ONEZONE_IA, INTELLIGENT_TIERING, GLACIER_IR, …".into()),
    }
}

impl S3Args {
    /// The options of the repository at `location`, an `s3://` URL.
    ///
    /// # Errors
    /// Where it is no such URL.
    pub fn options(&self, location: &str) -> Result<S3Options> {
        let mut options = S3Options::parse(location)?;
        options.endpoint.clone_from(&self.s3_endpoint);
        options.region.clone_from(&self.s3_region);
        options.profile.clone_from(&self.s3_profile);
        options.path_style = self.s3_path_style;
        options.ca_file.clone_from(&self.s3_ca_file);
        options.encryption.clone_from(&self.s3_sse);
        options.storage_class.clone_from(&self.s3_storage_class);
        options.allow_http = self.s3_allow_http;
        Ok(options)
    }
}

/// What a server guarantees, for `doctor`.
pub fn check(store: &S3Store) -> Vec<Check> {
    let found = match store.probe(ProbeDepth::Full) {
        Ok(found) => found,
        Err(error) => {
            let advice = "see docs/s3.md for what the keys need".to_owned();
            return vec![finding("store", CheckStatus::Fail, error.to_string(), Some(advice))];
        }
    };
    let mut checks = vec![match found.refusal() {
        None => finding("store", CheckStatus::Ok, summary(&found), None),
        Some(reason) => {
            let advice = "keep the repository on another server".to_owned();
            finding("store", CheckStatus::Fail, reason, Some(advice))
        }
    }];
    checks.extend(
        found.remarks().into_iter().map(|text| finding("store", CheckStatus::Ok, text, None)),
    );
    checks
}

fn finding(name: &str, status: CheckStatus, detail: String, advice: Option<String>) -> Check {
    Check { name: name.into(), status, detail, advice }
}

/// The guarantees in a line.
pub fn summary(found: &StoreGuarantees) -> String {
    let word = |guarantee| match guarantee {
        Guarantee::Yes => "yes",
        Guarantee::No => "no",
        Guarantee::Denied => "not with these keys",
        Guarantee::Untried => "not tried",
    };
    let versions = match found.versioning {
        Versioning::Off => "no",
        Versioning::On => "yes",
        Versioning::Suspended => "suspended",
        Versioning::Unknown => "not told",
    };
    let lock = match &found.object_lock {
        ObjectLockState::Off => "no".to_owned(),
        ObjectLockState::On(None) => "yes".to_owned(),
        ObjectLockState::On(Some(default)) => {
            format!("yes, {} days of {} by default", default.days, default.mode.to_lowercase())
        }
        ObjectLockState::Unknown => "not told".to_owned(),
    };
    format!(
        "write {}, read after write {}, parts {}, list after write {}, in pages {}, list after removal {}, \
         conditional write {}, removal {}, versions {versions}, object lock {lock}",
        word(found.write),
        word(found.read_after_write),
        word(found.ranged_read),
        word(found.list_after_write),
        word(found.list_in_pages),
        word(found.list_after_delete),
        word(found.conditional_write),
        word(found.delete),
    )
}
