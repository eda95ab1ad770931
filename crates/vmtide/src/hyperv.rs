//! How to get at Hyper-V hosts without an agent: the options on the command line, in the environment and in settings files.

use clap::{Args, ValueEnum, ValueHint};
use std::io::Read;
use std::path::{Path, PathBuf};
use vmtide_engine::hyperv::{
    Authentication, BackupType, ClientCertificate, Fingerprint, HypervAccess, Login, Mapping,
    Method, Protection, WinrmUrl,
};
use vmtide_engine::{EngineError, Result};
use zeroize::Zeroizing;

/// The variables that hold passwords.
const WINRM_PASSWORD: &str = "VMTIDE_WINRM_PASSWORD";
const SMB_PASSWORD: &str = "VMTIDE_SMB_PASSWORD";

/// The most bytes of a password file; more is another file by mistake.
const MAX_PASSWORD_FILE_BYTES: u64 = 64 << 10;

/// How to get at Hyper-V hosts without an agent. Passwords come from files or the environment, never from the command
/// line, which every user of the machine can read.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Hyper-V hosts without an agent (hyperv+winrm://)")]
pub struct HypervAccessArgs {
    /// The user: DOMAIN\\USER, USER@DOMAIN, or USER for an account of the host
    #[arg(long, global = true, value_name = "USER", env = "VMTIDE_WINRM_USER")]
    #[arg(hide_env_values = true)]
    winrm_user: Option<String>,
    /// The file with the user's password [default: the password in VMTIDE_WINRM_PASSWORD]
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_WINRM_PASSWORD_FILE")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath)]
    winrm_password_file: Option<PathBuf>,
    /// negotiate, ntlm, kerberos, basic or certificate; the last two need HTTPS
    #[arg(long, global = true, value_name = "HOW", env = "VMTIDE_WINRM_AUTH")]
    #[arg(hide_env_values = true, value_parser = parse_authentication)]
    winrm_auth: Option<Authentication>,
    /// Ask the host over HTTPS [default: where the URL has port 5986]
    #[arg(long, global = true, env = "VMTIDE_WINRM_HTTPS", hide_env_values = true)]
    winrm_https: bool,
    /// The SHA-256 of the host's certificate
    #[arg(long, global = true, value_name = "SHA256", env = "VMTIDE_WINRM_FINGERPRINT")]
    #[arg(hide_env_values = true, value_parser = parse_fingerprint)]
    winrm_fingerprint: Option<Fingerprint>,
    /// The authorities of hosts' certificates (PEM) [default: those of the system]
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_WINRM_CA_FILE")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath)]
    winrm_ca_file: Option<PathBuf>,
    /// The user's own certificate (PEM), for --winrm-auth certificate
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_WINRM_CERT")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath, requires = "winrm_key")]
    winrm_cert: Option<PathBuf>,
    /// The key of --winrm-cert (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_WINRM_KEY")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath, requires = "winrm_cert")]
    winrm_key: Option<PathBuf>,
    /// A server of the Kerberos domain, HOST or HOST:PORT [default: as krb5.conf or the domain's name says]
    #[arg(long, global = true, value_name = "HOST", env = "VMTIDE_WINRM_KDC")]
    #[arg(hide_env_values = true)]
    winrm_kdc: Option<String>,
    /// The user for SMB where that is not the one for WinRM; the password is in VMTIDE_SMB_PASSWORD
    #[arg(
        long,
        global = true,
        value_name = "USER",
        env = "VMTIDE_SMB_USER",
        hide_env_values = true
    )]
    smb_user: Option<String>,
    /// The file with the password of --smb-user
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_SMB_PASSWORD_FILE")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath, requires = "smb_user")]
    smb_password_file: Option<PathBuf>,
    /// The port of SMB [default: 445]
    #[arg(
        long,
        global = true,
        value_name = "PORT",
        env = "VMTIDE_SMB_PORT",
        hide_env_values = true
    )]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    smb_port: Option<u16>,
    /// encrypted-where-offered, encrypted (a server that does not is refused), or signed
    #[arg(long, global = true, value_enum, value_name = "HOW", env = "VMTIDE_SMB_PROTECTION")]
    #[arg(hide_env_values = true, hide_possible_values = true)]
    smb_protection: Option<ProtectionArg>,
    /// Read disks on this server, too, e.g. the file server of a cluster; may be repeated
    #[arg(long, global = true, value_name = "HOST")]
    smb_server: Vec<String>,
    /// A part of the host's files that is under another share: D:\\VMs=\\\\HOST\\SHARE; may be repeated
    #[arg(long, global = true, value_name = "PATH=SHARE", value_parser = parse_mapping)]
    smb_map: Vec<Mapping>,
    /// Tell applications in the guest that this is their full backup, so that they cut their logs
    #[arg(long, global = true)]
    vss_full: bool,
    /// No other program backs up these VMs: a checkpoint that appeared while a killed job asked for one is vmtide's, and
    /// removed, also where the host tells nothing of whose it is (with an agent: give it to the agent)
    #[arg(long, global = true, env = "VMTIDE_ONLY_BACKUP_PROGRAM", hide_env_values = true)]
    only_backup_program: bool,
}

/// The values of `--smb-protection`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProtectionArg {
    EncryptedWhereOffered,
    Encrypted,
    Signed,
}

fn parse_authentication(text: &str) -> std::result::Result<Authentication, String> {
    text.parse().map_err(|error| format!("{error}"))
}

fn parse_fingerprint(text: &str) -> std::result::Result<Fingerprint, String> {
    text.parse().map_err(|error| format!("{error}"))
}

fn parse_mapping(text: &str) -> std::result::Result<Mapping, String> {
    text.parse().map_err(|error| format!("{error}"))
}

impl HypervAccessArgs {
    /// Whether nothing else backs up the VMs, also where they are those of an agent that is started.
    pub fn only_backup_program(&self) -> bool {
        self.only_backup_program
    }

    /// The options, with the passwords, where `source` is a host without an agent; otherwise no secret is looked at.
    ///
    /// # Errors
    /// Where a password cannot be read.
    pub fn options(&self, source: &str) -> Result<HypervAccess> {
        let mut access = HypervAccess {
            backup_type: if self.vss_full { BackupType::Full } else { BackupType::Copy },
            only_backup_program: self.only_backup_program,
            ..HypervAccess::default()
        };
        if !WinrmUrl::is_winrm_url(source) {
            return Ok(access);
        }
        let password = self.winrm_password_file.as_deref();
        access.login = login(self.winrm_user.as_deref(), password, WINRM_PASSWORD)?;
        let password = self.smb_password_file.as_deref();
        access.smb_login = login(self.smb_user.as_deref(), password, SMB_PASSWORD)?;
        access.authentication = self.winrm_auth.unwrap_or_default();
        access.https = self.winrm_https;
        access.fingerprint = self.winrm_fingerprint;
        access.ca_file.clone_from(&self.winrm_ca_file);
        access.kdc.clone_from(&self.winrm_kdc);
        if let (Some(certificate), Some(key)) = (&self.winrm_cert, &self.winrm_key) {
            let (certificate, key) = (certificate.clone(), key.clone());
            access.client_certificate = Some(ClientCertificate { certificate, key });
        }
        access.smb_port = self.smb_port;
        access.smb_protection = match self.smb_protection {
            None | Some(ProtectionArg::EncryptedWhereOffered) => Protection::EncryptedWhereOffered,
            Some(ProtectionArg::Encrypted) => Protection::Encrypted,
            Some(ProtectionArg::Signed) => Protection::Signed,
        };
        access.smb_servers.clone_from(&self.smb_server);
        access.smb_mappings.clone_from(&self.smb_map);
        Ok(access)
    }
}

/// A user with the password; none where no user is given.
fn login(user: Option<&str>, file: Option<&Path>, variable: &str) -> Result<Option<Login>> {
    let Some(user) = user.filter(|user| !user.is_empty()) else {
        return Ok(None);
    };
    let password = match (file, std::env::var(variable)) {
        (Some(path), _) => read_password(path)?,
        (None, Ok(text)) => Zeroizing::new(text),
        (None, Err(std::env::VarError::NotPresent)) => {
            return Err(EngineError::usage(format!(
                "no password for {user}: set {variable}, or give a file"
            )));
        }
        (None, Err(_)) => return Err(EngineError::usage(format!("{variable} is not UTF-8"))),
    };
    Ok(Some(Login { user: user.to_owned(), password, method: Method::default(), kdc: None }))
}

fn read_password(path: &Path) -> Result<Zeroizing<String>> {
    let io = |error| EngineError::io(format!("read the password file {}", path.display()), error);
    let mut text = Zeroizing::new(String::new());
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(MAX_PASSWORD_FILE_BYTES).read_to_string(&mut text).map_err(io)?;
    // Editors end a file with a line feed, which nobody means.
    let kept = text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text).len());
    if let Some(kept) = kept {
        text.truncate(kept);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_come_from_files_and_are_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        std::fs::write(&file, "s3cret\r\n").unwrap();
        let args = HypervAccessArgs {
            winrm_user: Some(r"LAB\backup".into()),
            winrm_password_file: Some(file.clone()),
            smb_protection: Some(ProtectionArg::Signed),
            vss_full: true,
            only_backup_program: true,
            ..HypervAccessArgs::default()
        };
        let access = args.options("hyperv+winrm://hv1/web").unwrap();
        assert_eq!(access.login.as_ref().unwrap().password.as_str(), "s3cret");
        assert_eq!(access.smb_protection, Protection::Signed);
        assert!(access.only_backup_program);
        assert!(!format!("{access:?}").contains("s3cret"));
        // Who has no use for the password does not read it.
        std::fs::remove_file(file).unwrap();
        assert!(args.options("disk.qcow2").unwrap().login.is_none());
        assert_eq!(args.options("hyperv://hv1/web").unwrap().backup_type, BackupType::Full);
        assert!(args.options("hyperv+winrm://hv1/web").is_err());
    }
}
