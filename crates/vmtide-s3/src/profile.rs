//! The profile in `~/.aws/config` and `~/.aws/credentials`, as the AWS tools write them.
//!
//! Of a profile, keys, session token, `credential_process`, region and endpoint are used. One that
//! assumes a role or signs in by SSO is refused by name, with `credential_process` as the way.

use object_store::aws::AwsCredential;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use vmtide_repo::{RepoError, Result};

/// The most bytes of such a file that are read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The settings of one profile.
#[derive(Clone, Default)]
pub(crate) struct Profile {
    name: String,
    values: BTreeMap<String, String>,
    /// Whether the user named it, so that it must be there.
    named: bool,
}

impl Profile {
    /// Reads the profile `name`, else that of `AWS_PROFILE`, else `default`.
    ///
    /// # Errors
    /// [`RepoError::NotFound`] where a named profile is in no file; those of reading the files.
    pub(crate) fn load(name: Option<&str>) -> Result<Self> {
        let from_environment = std::env::var("AWS_PROFILE").ok().filter(|name| !name.is_empty());
        let chosen = name.map(str::to_owned).or(from_environment);
        let mut profile = Self {
            named: chosen.is_some(),
            name: chosen.unwrap_or_else(|| "default".into()),
            values: BTreeMap::new(),
        };
        let (config, credentials) =
            (file("AWS_CONFIG_FILE", "config"), file("AWS_SHARED_CREDENTIALS_FILE", "credentials"));
        let mut found = false;
        // Keys of the credentials file go before those of the config file.
        for (path, is_config) in [(config, true), (credentials, false)] {
            let Some(path) = path else { continue };
            let Some(text) = read(&path)? else { continue };
            found |= profile.take(&text, is_config);
        }
        if profile.named && !found {
            return Err(RepoError::NotFound {
                what: format!("AWS profile {:?}", profile.name),
                hint: "it is neither in ~/.aws/config nor in ~/.aws/credentials".into(),
            });
        }
        Ok(profile)
    }

    /// A setting.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Whether the user named it.
    pub(crate) const fn is_named(&self) -> bool {
        self.named
    }

    /// Takes the settings of this profile from the text of a file. Answers whether it is there.
    fn take(&mut self, text: &str, is_config: bool) -> bool {
        let mut inside = false;
        let mut found = false;
        for line in text.lines() {
            // Settings of services are nested, by indentation: they are not those of the profile.
            if line.starts_with([' ', '\t', '#', ';']) {
                continue;
            }
            let line = line.trim();
            if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
                inside = section_name(section, is_config) == Some(self.name.as_str());
                found |= inside;
            } else if let (true, Some((key, value))) = (inside, line.split_once('=')) {
                let value = value.split(" #").next().unwrap_or_default().trim();
                self.values.insert(key.trim().to_ascii_lowercase(), value.to_owned());
            }
        }
        found
    }

    /// The keys that the profile has or gets from its program.
    ///
    /// # Errors
    /// [`RepoError::Denied`] where the program fails or the profile needs what is not supported.
    pub(crate) fn credentials(&self) -> Result<Option<ProfileCredentials>> {
        if let (Some(key_id), Some(secret_key)) =
            (self.get("aws_access_key_id"), self.get("aws_secret_access_key"))
        {
            return Ok(Some(ProfileCredentials::Keys(Arc::new(AwsCredential {
                key_id: key_id.into(),
                secret_key: secret_key.into(),
                token: self.get("aws_session_token").map(str::to_owned),
            }))));
        }
        if let Some(command) = self.get("credential_process") {
            return Ok(Some(ProfileCredentials::Process(command.to_owned())));
        }
        let unsupported = ["role_arn", "sso_session", "sso_start_url", "login_session"];
        match unsupported.iter().find(|key| self.get(key).is_some()) {
            Some(key) => Err(denied(format!(
                "profile {:?} signs in by {key}, which is not supported: add to it \
                 `credential_process = aws configure export-credentials --profile {} \
                 --format process`, under another name",
                self.name, self.name
            ))),
            None => Ok(None),
        }
    }
}

/// Where a profile's keys come from.
#[derive(Clone)]
pub(crate) enum ProfileCredentials {
    /// They are in the file.
    Keys(Arc<AwsCredential>),
    /// A program prints them.
    Process(String),
}

/// What a `credential_process` prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<jiff::Timestamp>,
}

/// Runs the program of a profile. Answers with the keys and with when they end.
///
/// # Errors
/// [`RepoError::Denied`] where it fails or prints something else.
pub(crate) fn run_process(command: &str) -> Result<(AwsCredential, Option<jiff::Timestamp>)> {
    let output = shell(command).stdin(std::process::Stdio::null()).output();
    let output = output.map_err(|error| denied(format!("credential_process: {error}")))?;
    if !output.status.success() {
        // What it printed may hold secrets; its exit status does not.
        return Err(denied(format!("credential_process ended with {}", output.status)));
    }
    let printed: Printed = serde_json::from_slice(&output.stdout)
        .map_err(|_| denied("credential_process printed something else than keys".into()))?;
    let credential = AwsCredential {
        key_id: printed.access_key_id,
        secret_key: printed.secret_access_key,
        token: printed.session_token,
    };
    Ok((credential, printed.expiration))
}

/// The system's own shell with this command line.
#[cfg(unix)]
fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    shell
}

/// The system's own shell with this command line, which it gets as it is: `cmd` takes off the outer
/// quotation marks and knows no other quoting.
#[cfg(windows)]
fn shell(command: &str) -> Command {
    let mut shell = Command::new("cmd");
    std::os::windows::process::CommandExt::raw_arg(&mut shell, format!("/D /S /C \"{command}\""));
    shell
}

fn denied(text: String) -> RepoError {
    let source = std::io::Error::new(ErrorKind::PermissionDenied, text);
    RepoError::io("get AWS credentials", source)
}

/// The profile that a section is: `[default]` and `[profile x]` in the config file, `[x]` in the
/// credentials file.
fn section_name(section: &str, is_config: bool) -> Option<&str> {
    let section = section.trim();
    match section.strip_prefix("profile ") {
        Some(name) if is_config => Some(name.trim().trim_matches('"')),
        None if !is_config || section == "default" => Some(section),
        _ => None,
    }
}

fn file(variable: &str, name: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".aws").join(name)))
}

fn read(path: &Path) -> Result<Option<String>> {
    let failed = |error| Err(RepoError::io(format!("read {}", path.display()), error));
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            return failed(std::io::Error::new(ErrorKind::InvalidData, "larger than 1 MiB"));
        }
        _ => {}
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: &str) -> Profile {
        Profile { name: name.into(), ..Profile::default() }
    }

    const CONFIG: &str = "\
[default]\nregion = eu-west-1 # near\n\n[profile backup]\nregion=eu-central-1\ns3 =\n  \
addressing_style = path\nendpoint_url = https://s3.example\n[backup]\nregion = wrong\n";

    #[test]
    fn sections_are_named_differently_in_both_files() {
        let mut backup = profile("backup");
        assert!(backup.take(CONFIG, true));
        assert_eq!(backup.get("region"), Some("eu-central-1"));
        assert_eq!(backup.get("endpoint_url"), Some("https://s3.example"));
        assert_eq!(backup.get("addressing_style"), None);
        let keys = "[backup]\naws_access_key_id = A\naws_secret_access_key = B=C\n";
        assert!(backup.take(keys, false));
        let Some(ProfileCredentials::Keys(found)) = backup.credentials().unwrap() else {
            panic!("no keys")
        };
        assert_eq!((found.key_id.as_str(), found.secret_key.as_str()), ("A", "B=C"));
        let mut default = profile("default");
        assert!(default.take(CONFIG, true));
        assert_eq!(default.get("region"), Some("eu-west-1"));
        assert!(!profile("other").take(CONFIG, true));
    }

    #[test]
    fn a_profile_that_signs_in_otherwise_is_refused_with_the_way_out() {
        let mut role = profile("role");
        role.take("[role]\nrole_arn = arn:x\nsource_profile = y\n", false);
        let error = role.credentials().err().unwrap().to_string();
        assert!(error.contains("role_arn") && error.contains("credential_process"), "{error}");
        assert!(profile("none").credentials().unwrap().is_none());
    }

    #[cfg(unix)]
    #[test]
    fn programs_print_keys() {
        let text = r#"{"Version":1,"AccessKeyId":"A","SecretAccessKey":"B","SessionToken":"C","Expiration":"2030-01-01T00:00:00Z"}"#;
        let (credential, end) = run_process(&format!("echo '{text}'")).unwrap();
        assert_eq!((credential.key_id.as_str(), credential.token.as_deref()), ("A", Some("C")));
        assert!(end.is_some());
        assert!(run_process("echo '{\"secret\": 1}'").is_err());
        let error = run_process("echo geheim; exit 3").err().unwrap().to_string();
        assert!(error.contains('3') && !error.contains("geheim"), "{error}");
    }
}
