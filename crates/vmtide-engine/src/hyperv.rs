//! Hyper-V hosts: by the agent on them (`hyperv://HOST/VM`), by what every Windows host has (`hyperv+winrm://HOST/VM`:
//! WS-Management for control, SMB for data), or from the host itself (`hyperv:///VM`).
//!
//! Whatever the way, it is two seams: [`Host`] says and changes what the host's VMs are, [`HostFiles`] reads and writes
//! their disks.

use crate::source::{OpenSource, SourceOptions};
use crate::{EngineError, Result};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
pub use vmtide_agent_client::HypervUrl;
use vmtide_agent_client::{AgentCim, AgentClient, AgentFiles, AgentHypervisor, AgentOptions};
use vmtide_block::CancelToken;
pub use vmtide_hyperv::BackupType;
use vmtide_hyperv::{Host, HostFiles, HostOptions, HypervHypervisor, HypervOptions};
use vmtide_hypervisor::Hypervisor;
pub use vmtide_smb::{Login, Mapping, Method, Protection};
use vmtide_smb::{PathMap, SmbClient, SmbFiles, SmbOptions};
pub use vmtide_wsman::{Authentication, ClientCertificate, Fingerprint};
use vmtide_wsman::{Credentials, OptionsError, Scheme, WsmanCim, WsmanOptions};

const SCHEME: &str = "hyperv+winrm://";
/// The port of WinRM over HTTPS, which a URL with this port means.
const HTTPS_PORT: u16 = 5986;
/// The longest name of a VM: Hyper-V takes 100 characters; patterns and ids are no longer.
const MAX_NAME_BYTES: usize = 1024;
/// What of a name is written as %XX where people read it.
const UNREADABLE: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#').add(b'"').add(b'/');

/// `hyperv+winrm://HOST[:PORT]/VM`: VMs of a host on which nothing was installed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WinrmUrl {
    /// The host's name or address, addresses of version 6 without brackets.
    pub host: String,
    /// The port of WinRM; none for the usual one.
    pub port: Option<u16>,
    /// The VM by name, id or pattern; none for the host as a whole.
    pub vm: Option<String>,
}

impl WinrmUrl {
    /// Whether a text is meant as such a URL.
    pub fn is_winrm_url(text: &str) -> bool {
        text.get(..SCHEME.len()).is_some_and(|start| start.eq_ignore_ascii_case(SCHEME))
    }

    /// Understands a URL. The VM's name is percent-encoded where it has `%`, `?`, `#` or `/`.
    ///
    /// # Errors
    /// [`EngineError::Usage`] with what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        // Never the whole text: somebody may have written a password into it.
        let wrong = |what: &str| EngineError::usage(format!("a {SCHEME} URL {what}"));
        if !Self::is_winrm_url(text) {
            return Err(wrong("begins with hyperv+winrm://"));
        }
        let rest = text.get(SCHEME.len()..).unwrap_or_default();
        let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            return Err(wrong(
                "has no user in it: set VMTIDE_WINRM_USER and VMTIDE_WINRM_PASSWORD, or --winrm-user",
            ));
        }
        let (host, port) = split_port(authority).ok_or_else(|| {
            wrong("names a host, with a port from 1 to 65535 if any: hyperv+winrm://hv1/web")
        })?;
        if name.contains(['?', '#']) || name.trim_end_matches('/').contains('/') {
            return Err(wrong("ends with one VM; write / ? and # of its name as %2F %3F and %23"));
        }
        let name = percent_decode_str(name.trim_end_matches('/'))
            .decode_utf8()
            .map_err(|_| wrong("names its VM in UTF-8"))?;
        if name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            return Err(wrong("names a VM that cannot be"));
        }
        let vm = Some(name.into_owned()).filter(|name| !name.is_empty());
        Ok(Self { host, port, vm })
    }

    /// The same host with another VM.
    #[must_use]
    pub fn with_vm(&self, vm: &str) -> Self {
        Self { vm: Some(vm.to_owned()), ..self.clone() }
    }
}

/// `host:port` in its parts; none where it is no host.
fn split_port(authority: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some(""))?)
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let port = match port {
        "" if authority.ends_with(':') => return None,
        "" => None,
        text => Some(text.parse().ok().filter(|port| *port > 0)?),
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    (!host.is_empty() && host.chars().all(is_name)).then(|| (host.to_owned(), port))
}

impl fmt::Display for WinrmUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vm = utf8_percent_encode(self.vm.as_deref().unwrap_or_default(), UNREADABLE);
        match self.host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => write!(f, "{SCHEME}[{address}]")?,
            Err(_) => write!(f, "{SCHEME}{}", self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        write!(f, "/{vm}")
    }
}

/// How to get at hosts without an agent, and how backups are made there.
#[derive(Clone, Debug, Default)]
pub struct HypervAccess {
    /// Who logs in, for WinRM and, unless `smb_login` says otherwise, for SMB. Needed by all but certificates.
    pub login: Option<Login>,
    /// Who logs in over SMB where that is somebody else.
    pub smb_login: Option<Login>,
    /// How the user is made known.
    pub authentication: Authentication,
    /// A server of the Kerberos domain; none looks it up.
    pub kdc: Option<String>,
    /// Whether WinRM is over HTTPS, whatever the port.
    pub https: bool,
    /// The fingerprint of the host's certificate.
    pub fingerprint: Option<Fingerprint>,
    /// Authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// The user's own certificate.
    pub client_certificate: Option<ClientCertificate>,
    /// The port of SMB; none for 445.
    pub smb_port: Option<u16>,
    /// How SMB is protected.
    pub smb_protection: Protection,
    /// Other servers on which the host's disks may lie.
    pub smb_servers: Vec<String>,
    /// Parts of the host's files that are under other shares than `C$`, `D$` and so on.
    pub smb_mappings: Vec<Mapping>,
    /// What VSS tells the applications in the guest.
    pub backup_type: BackupType,
    /// Whether nothing else backs up these VMs: [`HypervOptions::only_backup_program`]. An agent has a setting of its own.
    pub only_backup_program: bool,
}

/// A host: what it is and can do, and its files.
pub struct HypervHost {
    /// Control.
    pub host: Host,
    /// Data.
    pub files: Arc<dyn HostFiles>,
}

impl HypervAccess {
    /// The ways to a host over the network. Nothing is asked yet.
    ///
    /// # Errors
    /// [`EngineError::Usage`] for options that make no sense together, those of files that cannot be read.
    pub fn connect(&self, url: &WinrmUrl) -> Result<HypervHost> {
        let cim = WsmanCim::new(self.winrm(url)?).map_err(of_options)?;
        let host = Host::new(Arc::new(cim), HostOptions::default());
        let files = Arc::new(self.files(&url.host, &host)?);
        Ok(HypervHost { host, files })
    }

    fn winrm(&self, url: &WinrmUrl) -> Result<WsmanOptions> {
        let mut options = WsmanOptions::new(url.host.clone());
        options.port = url.port;
        let is_https = self.https || url.port == Some(HTTPS_PORT);
        options.scheme = if is_https { Scheme::Https } else { Scheme::Http };
        options.authentication = self.authentication;
        if let Some(login) = &self.login {
            let credentials = Credentials::new(&login.user, login.password.clone());
            options.credentials = Some(credentials.map_err(of_options)?);
        }
        options.client_certificate.clone_from(&self.client_certificate);
        options.fingerprint = self.fingerprint;
        options.ca_file.clone_from(&self.ca_file);
        options.kdc.clone_from(&self.kdc);
        Ok(options)
    }

    fn files(&self, host_name: &str, host: &Host) -> Result<SmbFiles> {
        let login = self.smb_login.as_ref().or(self.login.as_ref()).ok_or_else(|| {
            EngineError::usage(
                "disks are read over SMB, which needs a user and a password: set VMTIDE_SMB_USER and \
                 VMTIDE_SMB_PASSWORD, or those of WinRM",
            )
        })?;
        let mut login = login.clone();
        login.method = match self.authentication {
            Authentication::Kerberos => Method::Kerberos,
            Authentication::Negotiate => Method::Negotiate,
            // Basic and certificates are ways of WinRM alone; the account is one of the host.
            Authentication::Ntlm | Authentication::Basic | Authentication::Certificate => {
                Method::Ntlm
            }
        };
        login.kdc.clone_from(&self.kdc);
        let mut options = SmbOptions::new(login);
        options.port = self.smb_port.unwrap_or(vmtide_smb::DEFAULT_PORT);
        options.protection = self.smb_protection;
        let map = PathMap {
            host: host_name.to_owned(),
            mappings: self.smb_mappings.clone(),
            servers: self.smb_servers.clone(),
        };
        let asked = host.clone();
        let ask = Arc::new(move |path: &str, id: &str, range| {
            asked.virtual_disk_changes(path, id, range)
        });
        Ok(SmbFiles::new(Arc::new(SmbClient::new(options)), map, ask))
    }
}

/// The ways to a host by the agent on it: its management objects and its files; for this host, its own. `cancel` ends
/// what is done with disks.
///
/// # Errors
/// Those of the options of the agent; [`EngineError::Usage`] where the URL means this host and it has no Hyper-V.
pub fn connect_agent(
    url: &HypervUrl,
    options: &AgentOptions,
    cancel: &CancelToken,
) -> Result<HypervHost> {
    if url.authority().is_none() {
        return connect_local(url);
    }
    let client = AgentClient::for_vms(url, options)?;
    let host = Host::new(Arc::new(AgentCim::new(client.clone())), HostOptions::default());
    Ok(HypervHost { host, files: Arc::new(AgentFiles::new(client, cancel.clone())) })
}

/// The VMs of a host by the agent there, or this machine's own.
///
/// # Errors
/// Those of the options.
pub(crate) fn open(url: &HypervUrl, options: &SourceOptions) -> Result<OpenSource> {
    check_options(url, options)?;
    if url.authority().is_none() {
        return local(url, options);
    }
    let client = AgentClient::for_vms(url, &options.agent)?;
    let hypervisor = Box::new(AgentHypervisor::new(client));
    Ok(source(hypervisor, url.vm(), options, url.to_string()))
}

/// The VMs of a host by what every Windows host has.
///
/// # Errors
/// Those of the options.
pub(crate) fn open_winrm(url: &WinrmUrl, options: &SourceOptions) -> Result<OpenSource> {
    check_options(url, options)?;
    let HypervHost { host, files } = options.hyperv.connect(url)?;
    let hypervisor = Box::new(HypervHypervisor::new(host, files, cycle_options(options)));
    Ok(source(hypervisor, url.vm.as_deref(), options, url.to_string()))
}

/// This machine's own VMs.
fn local(url: &HypervUrl, options: &SourceOptions) -> Result<OpenSource> {
    let HypervHost { host, files } = connect_local(url)?;
    let hypervisor = Box::new(HypervHypervisor::new(host, files, cycle_options(options)));
    Ok(source(hypervisor, url.vm(), options, url.to_string()))
}

/// How backups are made.
fn cycle_options(options: &SourceOptions) -> HypervOptions {
    let mut how = HypervOptions::new(&options.state_directory);
    how.backup_type = options.hyperv.backup_type;
    how.only_backup_program = options.hyperv.only_backup_program;
    how
}

/// The management objects of this machine over COM, and its files.
#[cfg(windows)]
#[allow(clippy::unnecessary_wraps, reason = "elsewhere there is nothing to connect to")]
fn connect_local(_url: &HypervUrl) -> Result<HypervHost> {
    let cim = Arc::new(vmtide_wmi_ffi::ComCim::new());
    let host = Host::new(cim, HostOptions::default());
    Ok(HypervHost { host, files: Arc::new(vmtide_hyperv::LocalFiles::new()) })
}

/// There is Hyper-V on Windows only.
#[cfg(not(windows))]
fn connect_local(url: &HypervUrl) -> Result<HypervHost> {
    Err(not_here(url))
}

fn source(
    hypervisor: Box<dyn Hypervisor>,
    vm: Option<&str>,
    options: &SourceOptions,
    display: String,
) -> OpenSource {
    OpenSource {
        hypervisor,
        vm: vm.unwrap_or_default().to_owned(),
        name: options.name.clone(),
        display,
    }
}

fn check_options(url: &dyn fmt::Display, options: &SourceOptions) -> Result<()> {
    if options.changes.is_some() || options.format.is_some() || options.disk_id.is_some() {
        return Err(EngineError::usage(format!(
            "{url}: --changes, --format and --disk-id are for images; Hyper-V tells these itself"
        )));
    }
    Ok(())
}

/// Why this machine's own VMs are not to be had.
#[cfg(not(windows))]
fn not_here(url: &HypervUrl) -> EngineError {
    EngineError::usage(format!(
        "{url}: the VMs of this machine are to be had where vmtide for Windows runs on a Hyper-V host; of another \
         host they are hyperv://HOST/VM with an agent there, or hyperv+winrm://HOST/VM without"
    ))
}

fn of_options(error: OptionsError) -> EngineError {
    match error {
        OptionsError::Usage(text) => EngineError::Usage(text),
        other => EngineError::refused("connecting to the host", other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_hosts_and_vms() {
        for (text, host, port, vm, shown) in [
            ("hyperv+winrm://hv1/web", "hv1", None, Some("web"), "hyperv+winrm://hv1/web"),
            (
                "HYPERV+WINRM://hv1.lab:5986/a%2Fb c",
                "hv1.lab",
                Some(5986),
                Some("a/b c"),
                "hyperv+winrm://hv1.lab:5986/a%2Fb%20c",
            ),
            (
                "hyperv+winrm://[fe80::1]:5985/web-*",
                "fe80::1",
                Some(5985),
                Some("web-*"),
                "hyperv+winrm://[fe80::1]:5985/web-*",
            ),
            ("hyperv+winrm://10.0.0.7", "10.0.0.7", None, None, "hyperv+winrm://10.0.0.7/"),
        ] {
            let url = WinrmUrl::parse(text).unwrap();
            assert_eq!(
                (url.host.as_str(), url.port, url.vm.as_deref()),
                (host, port, vm),
                "{text}"
            );
            assert_eq!(url.to_string(), shown);
            assert_eq!(WinrmUrl::parse(shown).unwrap(), url);
        }
        for text in [
            "hyperv+winrm://",
            "hyperv+winrm:///web",
            "hyperv+winrm://u:s3cret@hv1/web",
            "hyperv+winrm://hv1:0/web",
            "hyperv+winrm://hv1:/web",
            "hyperv+winrm://hv1:x/web",
            "hyperv+winrm://[hv1]/web",
            "hyperv+winrm://h v/web",
            "hyperv+winrm://hv1/a?b",
            "hyperv+winrm://hv1/%00",
        ] {
            let error = WinrmUrl::parse(text).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_login_is_needed_before_anybody_is_asked() {
        let url = WinrmUrl::parse("hyperv+winrm://hv1/web").unwrap();
        let error = HypervAccess::default().connect(&url).err().unwrap();
        assert!(matches!(error, EngineError::Usage(_)), "{error}");
        let login = Login {
            user: r"LAB\backup".into(),
            password: "s3cret".to_owned().into(),
            method: Method::Ntlm,
            kdc: None,
        };
        let access = HypervAccess { login: Some(login), ..HypervAccess::default() };
        access.connect(&url).unwrap();
        assert!(!format!("{access:?}").contains("s3cret"));
        let basic = HypervAccess { authentication: Authentication::Basic, ..access };
        let error = basic.connect(&url).err().unwrap();
        assert!(error.to_string().contains("HTTPS"), "{error}");
    }
}
