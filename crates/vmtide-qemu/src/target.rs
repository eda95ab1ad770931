//! Which QEMU process to work on, and how.

use crate::agent::FREEZE_TIMEOUT;
use crate::channel::Address;
use percent_encoding::percent_decode_str;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmtide_hypervisor::HypervisorError;

/// How the frozen view of a running VM is made.
/// `docs/decisions/0002-qemu-frozen-view.md` tells why there are two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreezeMethod {
    /// [`Filter`](Self::Filter) where QEMU and all disks can, otherwise [`Job`](Self::Job).
    #[default]
    Auto,
    /// A copy-before-write filter is put under the guest's device: scratch space that fails or
    /// fills breaks the backup, never the guest. Needs QEMU 7.1.
    Filter,
    /// A backup job with `sync=none`: scratch space that fills would give the guest write errors,
    /// so all of it is reserved beforehand. Needs QEMU 5.2.
    Job,
}

/// A VM of one QEMU process, as a target of jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuTarget {
    /// The monitor.
    pub qmp: Address,
    /// The guest agent's socket; none asks QEMU for it.
    pub agent: Option<Address>,
    /// The VM's name in restore points; none asks QEMU for it.
    pub name: Option<String>,
    /// Where locks and journals are kept, the same for all jobs of this host.
    pub state_directory: PathBuf,
    /// Where the old content of blocks goes that the guest overwrites during a backup; none means
    /// the state directory.
    pub scratch_directory: Option<PathBuf>,
    /// How many bytes of the scratch file system must stay free, so that images which share it
    /// keep room to grow. The backup is broken off before it takes them.
    pub scratch_reserve_bytes: u64,
    /// The executable that, called with `internal-guardian …`, runs
    /// [`guardian::run`](crate::guardian::run); normally vmtide itself. None works without a
    /// guardian: then a killed job can leave the guest frozen until the next one.
    pub guardian: Option<PathBuf>,
    /// How the frozen view is made.
    pub method: FreezeMethod,
    /// How long the guest agent may take to freeze the file systems, its hooks included.
    pub freeze_timeout: Duration,
}

impl QemuTarget {
    /// What stays free on the scratch file system unless said otherwise: 256 MiB, enough for an
    /// image to grow while the backup is broken off.
    pub const DEFAULT_SCRATCH_RESERVE_BYTES: u64 = 256 << 20;

    /// The VM whose monitor is the Unix socket `qmp`.
    pub fn new(qmp: impl Into<PathBuf>, state_directory: impl Into<PathBuf>) -> Self {
        Self {
            qmp: Address::Unix(qmp.into()),
            agent: None,
            name: None,
            state_directory: state_directory.into(),
            scratch_directory: None,
            scratch_reserve_bytes: Self::DEFAULT_SCRATCH_RESERVE_BYTES,
            guardian: None,
            method: FreezeMethod::Auto,
            freeze_timeout: FREEZE_TIMEOUT,
        }
    }

    /// Parses `qemu+unix:///run/vm.qmp?agent=/run/vm.qga&scratch=/var/tmp&name=web&method=filter`
    /// or `qemu+tcp://localhost:port?…`, which has to be this host. Everything after `?` is optional; `method` is `auto`,
    /// `filter` or `job`. Paths may be percent-encoded.
    ///
    /// # Errors
    /// [`HypervisorError::Unsupported`] with what is wrong in the URL.
    pub fn parse_url(
        url: &str,
        state_directory: impl Into<PathBuf>,
    ) -> Result<Self, HypervisorError> {
        let bad = |detail: &str| HypervisorError::Unsupported {
            what: format!("the source {url}"),
            detail: format!(
                "{detail}; write qemu+unix:///PATH/OF/MONITOR[?agent=PATH&scratch=DIR&name=NAME&method=auto|filter|job]"
            ),
        };
        let (body, query) = url.split_once('?').unwrap_or((url, ""));
        let qmp = if let Some(path) = body.strip_prefix("qemu+unix://") {
            let path = decode(path).ok_or_else(|| bad("the path is not UTF-8"))?;
            if !path.starts_with('/') {
                return Err(bad("the path of the monitor socket must be absolute"));
            }
            Address::Unix(path.into())
        } else if let Some(address) = body.strip_prefix("qemu+tcp://") {
            if address
                .rsplit_once(':')
                .is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
            {
                return Err(bad("HOST:PORT is missing"));
            }
            if !is_this_host(address) {
                return Err(bad(
                    "the monitor must be on this host: it asks for no password and encrypts nothing, and disks are read over a local socket",
                ));
            }
            Address::Tcp(address.into())
        } else {
            return Err(bad("it does not begin with qemu+unix:// or qemu+tcp://"));
        };
        let mut target = Self::new("", state_directory);
        target.qmp = qmp;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value).ok_or_else(|| bad("an option is not UTF-8"))?;
            if value.is_empty() {
                return Err(bad(&format!("the option {key} has no value")));
            }
            match (key, value.as_str()) {
                ("agent", _) => target.agent = Some(Address::Unix(value.into())),
                ("scratch", _) => target.scratch_directory = Some(value.into()),
                ("name", _) => target.name = Some(value),
                ("method", "auto") => target.method = FreezeMethod::Auto,
                ("method", "filter") => target.method = FreezeMethod::Filter,
                ("method", "job") => target.method = FreezeMethod::Job,
                _ => return Err(bad(&format!("unknown option {pair}"))),
            }
        }
        Ok(target)
    }

    /// Where scratch files go.
    pub fn scratch(&self) -> &Path {
        self.scratch_directory.as_deref().unwrap_or(&self.state_directory)
    }

    /// What locks and journals call this VM: the same for every way to write its socket's path.
    pub(crate) fn key(&self) -> String {
        match &self.qmp {
            Address::Unix(path) => {
                std::fs::canonicalize(path).unwrap_or_else(|_| path.clone()).display().to_string()
            }
            Address::Tcp(address) => address.clone(),
        }
    }
}

/// Whether `HOST:PORT` can only be reached from this host.
fn is_this_host(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn decode(text: &str) -> Option<String> {
    Some(percent_decode_str(text).decode_utf8().ok()?.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_everything_and_mistakes_are_named() {
        let target = QemuTarget::parse_url(
            "qemu+unix:///run/a%20b.qmp?agent=/run/vm.qga&scratch=/var/tmp&name=web&method=job",
            "/var/lib/vmtide",
        )
        .unwrap();
        assert_eq!(target.qmp, Address::Unix("/run/a b.qmp".into()));
        assert_eq!(target.agent, Some(Address::Unix("/run/vm.qga".into())));
        assert_eq!(target.scratch(), Path::new("/var/tmp"));
        assert_eq!(target.name.as_deref(), Some("web"));
        assert_eq!(target.method, FreezeMethod::Job);
        for (url, word) in [
            ("qemu+unix://relative", "absolute"),
            ("qemu+tcp://host", "HOST:PORT"),
            ("qemu+tcp://host:4444", "on this host"),
            ("qemu+tcp://192.0.2.1:4444", "on this host"),
            ("qemu+tcp://127.0.0.1.example.org:4444", "on this host"),
            ("http://x", "begin"),
            ("qemu+unix:///a?agnt=/x", "agnt"),
            ("qemu+unix:///a?agent=", "no value"),
        ] {
            let error = QemuTarget::parse_url(url, "/s").unwrap_err().to_string();
            assert!(error.contains(word), "{url}: {error}");
        }
        for local in ["localhost:4444", "127.0.0.1:4444", "[::1]:4444"] {
            let target = QemuTarget::parse_url(&format!("qemu+tcp://{local}"), "/s").unwrap();
            assert_eq!(target.qmp, Address::Tcp(local.into()));
        }
    }
}
