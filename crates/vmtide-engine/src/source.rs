//! SOURCE: from what a user writes to a platform that can be backed up.

use crate::hyperv::{self, HypervAccess, WinrmUrl};
use crate::image::open::{OpenDiskOptions, hint, image_options};
use crate::in_use::{Use, check_not_in_use};
use crate::peer::NbdPeer;
use crate::qemu::{self, TrackedImage};
use crate::{EngineError, Result};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_agent_client::{AgentClient, AgentOptions, AgentSource, AgentUrl, HypervUrl};
use vmtide_block::{BlockDevice, RangeSet};
use vmtide_hypervisor::{Hypervisor, ImageSource};
use vmtide_image::{BackingPolicy, Format};
use vmtide_nbd::{NbdOptions, NbdUrl};
use vmtide_repo::Repository;

/// The schemes that the design names and this build does not have, with what works instead.
const NOT_YET: &[(&str, &str)] = &[
    ("libvirt", "use the VM's QMP socket: qemu+unix:///PATH"),
    ("proxmox", "use the VM's QMP socket: qemu+unix:///var/run/qemu-server/ID.qmp"),
    ("vsphere", "back up its disk images instead"),
];

/// A source as the user wrote it, understood but not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A disk image file or a block device.
    Image(PathBuf),
    /// A running VM of QEMU, by its monitor; the URL.
    Qemu(String),
    /// An NBD export.
    Nbd(NbdUrl),
    /// Disks of an agent.
    Agent(AgentUrl),
    /// VMs of a Hyper-V host, by the agent there or as this machine's own.
    Hyperv(HypervUrl),
    /// VMs of a Hyper-V host on which nothing was installed.
    Winrm(WinrmUrl),
}

impl SourceSpec {
    /// Understands a path or URL.
    ///
    /// # Errors
    /// [`EngineError::Usage`] with what is wrong with it, or that this build lacks it.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(EngineError::usage("the source is empty"));
        }
        if NbdUrl::is_nbd_url(text) {
            let url = text.parse().map_err(|error| EngineError::usage(format!("{error}")))?;
            return Ok(Self::Nbd(url));
        }
        if AgentUrl::is_agent_url(text) {
            return Ok(Self::Agent(AgentUrl::parse(text)?));
        }
        if HypervUrl::is_hyperv_url(text) {
            return Ok(Self::Hyperv(HypervUrl::parse(text)?));
        }
        if WinrmUrl::is_winrm_url(text) {
            return Ok(Self::Winrm(WinrmUrl::parse(text)?));
        }
        let Some((scheme, rest)) = split_scheme(text) else {
            return Ok(Self::Image(text.into()));
        };
        match scheme {
            "file" => Ok(Self::Image(file_path(text, rest)?)),
            "qemu+unix" | "qemu+tcp" => {
                qemu::check_url(text)?;
                Ok(Self::Qemu(text.into()))
            }
            scheme => Err(unknown_scheme(scheme)),
        }
    }

    /// The source without what must not be recorded. No scheme of today carries a secret.
    pub fn display(&self) -> String {
        match self {
            Self::Image(path) => path.display().to_string(),
            Self::Qemu(url) => url.clone(),
            Self::Nbd(url) => url.to_string(),
            Self::Agent(url) => url.to_string(),
            Self::Hyperv(url) => url.to_string(),
            Self::Winrm(url) => url.to_string(),
        }
    }

    /// The same source with one of its VMs in place of a selection of them.
    #[must_use]
    pub fn of_vm(&self, vm: &str) -> Self {
        match self {
            Self::Hyperv(url) => Self::Hyperv(url.with_vm(vm)),
            Self::Winrm(url) => Self::Winrm(url.with_vm(vm)),
            one => one.clone(),
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// What opening the image or connecting says.
    pub fn open(&self, options: &SourceOptions) -> Result<OpenSource> {
        match self {
            Self::Image(path) => open_image(path, options),
            Self::Nbd(url) => open_nbd(url, options),
            Self::Qemu(url) => open_qemu(url, options),
            Self::Agent(url) => open_agent(url, options),
            Self::Hyperv(url) => hyperv::open(url, options),
            Self::Winrm(url) => hyperv::open_winrm(url, options),
        }
    }
}

fn unknown_scheme(scheme: &str) -> EngineError {
    let known = NOT_YET.iter().find(|(name, _)| *name == scheme);
    EngineError::usage(match known {
        Some((name, instead)) => {
            format!("{name}:// sources are not in this build yet; {instead}")
        }
        None => format!(
            "unknown source {scheme}://: give a disk image, qemu+unix://, hyperv://, hyperv+winrm://, \
             nbd://, nbd+unix:// or agent+https://"
        ),
    })
}

/// `scheme` and the rest of `scheme://rest`; none for a path.
pub fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    // `C://x` is a path on Windows.
    let is_drive = cfg!(windows) && scheme.len() == 1;
    let is_scheme = !is_drive
        && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    is_scheme.then_some((scheme, rest))
}

/// The path of a `file:///path` URL, taken literally; on Windows also of `file:///C:/path`.
///
/// # Errors
/// [`EngineError::Usage`] where it names another host.
pub fn file_path(url: &str, rest: &str) -> Result<PathBuf> {
    if cfg!(windows)
        && let [b'/', letter, b':', ..] = rest.as_bytes()
        && letter.is_ascii_alphabetic()
    {
        return Ok(rest.trim_start_matches('/').into());
    }
    if rest.starts_with('/') {
        return Ok(rest.into());
    }
    Err(EngineError::usage(format!(
        "{url}: write file:///PATH with three slashes, or just the path"
    )))
}

/// How to open a source.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// The VM's name; none takes the platform's, or the image's file name.
    pub name: Option<String>,
    /// The format of an image; none probes it.
    pub format: Option<Format>,
    /// Whether files that an image names are opened. None, where the user said nothing: those in
    /// the image's directory if [`format`](Self::format) is given or the file's name says the format
    /// that was found, and otherwise none, because a guest that makes its raw disk look like an
    /// image would choose them.
    pub backing: Option<BackingPolicy>,
    /// The format of a parent whose child does not say it.
    pub backing_format: Option<Format>,
    /// Directories in which the parents of an image are looked for, beside its own.
    pub search: Vec<PathBuf>,
    /// The changed ranges since the previous restore point, from outside.
    pub changes: Option<RangeSet>,
    /// Where journals and locks are kept.
    pub state_directory: PathBuf,
    /// The executable that guards a frozen guest; normally vmtide itself.
    pub guardian: Option<PathBuf>,
    /// Whether to begin tracking changes: in a qcow2 image at rest by a persistent dirty bitmap, on an agent by
    /// its change tracking.
    pub track: bool,
    /// The id of the only disk of an image whose changes are tracked; none takes that of `tracked`,
    /// else the default.
    pub disk_id: Option<String>,
    /// The disks of the newest restore point of this VM, so that tracking which began while the VM
    /// ran is found in its image and goes on.
    pub tracked: Vec<TrackedDisk>,
    /// How to get at agents.
    pub agent: AgentOptions,
    /// How to get at Hyper-V hosts without agents.
    pub hyperv: HypervAccess,
}

/// A disk with its tracking id, as the newest restore point has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackedDisk {
    /// The disk.
    pub id: String,
    /// Its tracking id.
    pub tracking: String,
}

/// The disks of the newest restore point of `vm` that have a tracking id.
///
/// # Errors
/// Those of the repository.
pub fn tracked_disks(repository: &Repository, vm: &str) -> Result<Vec<TrackedDisk>> {
    let disks = repository.latest(vm)?.into_iter().flat_map(|point| point.disks);
    let tracked =
        disks.filter_map(|disk| Some(TrackedDisk { id: disk.id, tracking: disk.tracking.id? }));
    Ok(tracked.collect())
}

/// A source that can be listed, described and backed up.
pub struct OpenSource {
    /// The platform.
    pub hypervisor: Box<dyn Hypervisor>,
    /// The VM to ask it for.
    pub vm: String,
    /// Whether the name comes from the user, so that the platform's does not count.
    pub name: Option<String>,
    /// The source as it is recorded.
    pub display: String,
}

fn open_image(path: &Path, options: &SourceOptions) -> Result<OpenSource> {
    if let Err(error) = std::fs::metadata(path)
        && error.kind() == std::io::ErrorKind::NotFound
    {
        return Err(EngineError::NotFound {
            what: format!("the disk image {}", path.display()),
            hint: String::new(),
        });
    }
    crate::delta::check_complete(path)?;
    let disk = OpenDiskOptions {
        format: options.format,
        backing: options.backing,
        backing_format: options.backing_format,
        search: options.search.clone(),
        ..OpenDiskOptions::default()
    };
    let (open, format) = image_options(path, &disk)?;
    let device = vmtide_image::open_read_only(path, &open)
        .map_err(|error| hint(error, path, &disk, format))?;
    let name = match &options.name {
        Some(name) => name.clone(),
        None => image_name(path)?,
    };
    let display = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    if let Some(disk) = tracked_in_image(path, format, options)? {
        // It was opened above only to hold its backing files against the policy.
        drop(device);
        let display = display.display().to_string();
        let image = TrackedImage { path, name, format, disk, display };
        return qemu::open_tracked(image, options);
    }
    // Tracking needs QEMU's own tools, which see its locks themselves, once what a killed job of ours
    // left is removed.
    check_not_in_use(path, Use::Read)?;
    one_disk(name, format, device, options, display.display().to_string())
}

/// Whether the changes of an image are tracked in it, and as which disk. Some where the user asks
/// for tracking, or the newest restore point names a bitmap that the image has; the inner none is
/// the default disk id.
fn tracked_in_image(
    path: &Path,
    format: Format,
    options: &SourceOptions,
) -> Result<Option<Option<String>>> {
    if options.track && (format != Format::Qcow2 || options.changes.is_some()) {
        return Err(EngineError::usage(
            "--track needs a qcow2 image, which can keep a dirty bitmap, and excludes --changes",
        ));
    }
    if format != Format::Qcow2 || options.changes.is_some() {
        return Ok(None);
    }
    let obstacle = qemu::cannot_track();
    if let (true, Some(reason)) = (options.track, obstacle) {
        return Err(EngineError::refused(format!("track changes in {}", path.display()), reason));
    }
    let bitmaps = vmtide_image::image_info(path, Some(format))?.bitmaps;
    let known = options.tracked.iter().find(|disk| {
        let mut parts = disk.tracking.split(':');
        parts.any(|part| bitmaps.iter().any(|bitmap| bitmap.name == part))
    });
    let disk = options.disk_id.clone().or_else(|| known.map(|disk| disk.id.clone()));
    // Nobody asked for QEMU's tools: without them the image is read in full, and that is recorded.
    let goes_on = known.is_some() && obstacle.is_none();
    Ok((options.track || goes_on).then_some(disk))
}

/// The name of a VM that is backed up from an image: the file name without its extension.
///
/// # Errors
/// [`EngineError::Usage`] where the path has none.
pub fn image_name(path: &Path) -> Result<String> {
    path.file_stem().and_then(OsStr::to_str).map(ToOwned::to_owned).ok_or_else(|| {
        EngineError::usage(format!("{} gives no name for the VM: add --name", path.display()))
    })
}

fn open_nbd(url: &NbdUrl, options: &SourceOptions) -> Result<OpenSource> {
    let name = match (&options.name, url.export.as_str()) {
        (Some(name), _) => name.clone(),
        (None, "") => {
            return Err(EngineError::usage(format!("{url} gives no name for the VM: add --name")));
        }
        (None, export) => export.trim_matches('/').replace('/', "-"),
    };
    if options.format.is_some_and(|format| format != Format::Raw) {
        return Err(EngineError::usage("an NBD export is a raw disk: --format does not apply"));
    }
    let connect = NbdOptions { read_only: true, ..NbdOptions::default() };
    let device = NbdPeer::connect(url, &connect)?;
    one_disk(name, Format::Raw, Arc::new(device), options, url.to_string())
}

fn one_disk(
    name: String,
    format: Format,
    device: Arc<dyn BlockDevice>,
    options: &SourceOptions,
    display: String,
) -> Result<OpenSource> {
    let size_bytes = device.size_bytes();
    let mut source = ImageSource::new(name.clone(), format.to_string(), device);
    if let Some(changes) = &options.changes {
        if let Some(range) = changes.iter().find(|range| range.end() > size_bytes) {
            return Err(EngineError::usage(format!(
                "the changed range {range} reaches past the end of {display} ({size_bytes} bytes)"
            )));
        }
        source = source.with_changes(changes.clone());
    }
    Ok(OpenSource { hypervisor: Box::new(source), vm: name.clone(), name: Some(name), display })
}

fn open_qemu(url: &str, options: &SourceOptions) -> Result<OpenSource> {
    if options.changes.is_some() {
        return Err(EngineError::usage(
            "--changes is for images and NBD exports: QEMU tracks changes itself",
        ));
    }
    qemu::open(url, options)
}

fn open_agent(url: &AgentUrl, options: &SourceOptions) -> Result<OpenSource> {
    if options.changes.is_some() || options.format.is_some() || options.disk_id.is_some() {
        return Err(EngineError::usage(format!(
            "{url}: --changes, --format and --disk-id are for images; an agent tells these itself"
        )));
    }
    let name = match &options.name {
        Some(name) => name.clone(),
        None => url.vm_name().ok_or_else(|| {
            EngineError::usage(format!("{url} gives no name for the VM: add --name"))
        })?,
    };
    let client = AgentClient::new(url, &options.agent)?;
    let source = AgentSource::new(client, url.clone(), name.clone()).with_tracking(options.track);
    Ok(OpenSource {
        hypervisor: Box::new(source),
        vm: name.clone(),
        name: Some(name),
        display: url.to_string(),
    })
}

/// Removes from a running VM the dirty bitmaps that vmtide tracks changes with: those of one
/// [`lineage`](crate::lineage), or all. The next backup reads in full. Answers with what was
/// removed, one line each.
///
/// # Errors
/// [`EngineError::Usage`] for a source without bitmaps of ours; what QEMU says.
pub fn untrack(
    source: &SourceSpec,
    state_directory: &Path,
    lineage: Option<&str>,
) -> Result<Vec<String>> {
    match source {
        SourceSpec::Qemu(url) => qemu::untrack(url, state_directory, lineage),
        SourceSpec::Image(path) => Err(EngineError::usage(format!(
            "{}: only a running VM can be untracked (qemu+unix://…); in an image at rest, \
             `qemu-img bitmap --remove` does it",
            path.display()
        ))),
        SourceSpec::Nbd(url) => {
            Err(EngineError::usage(format!("{url}: nothing is tracked in an NBD export")))
        }
        SourceSpec::Hyperv(_) | SourceSpec::Winrm(_) => Err(EngineError::usage(format!(
            "{}: Hyper-V keeps its change tracking in files of its own, which cost nothing but their space",
            source.display()
        ))),
        SourceSpec::Agent(url) => Err(EngineError::usage(format!(
            "{url}: tracking on an agent's host may serve others, too; whoever knows that nobody needs it switches \
             it off with `vmtide-rct --disable-rct`"
        ))),
    }
}

/// The changed ranges of a JSON document `[{"offset":0,"length":65536},…]`, in any order, also
/// overlapping. Empty ranges are dropped.
///
/// # Errors
/// [`EngineError::Usage`] where it is none, or a range passes the largest possible disk.
pub fn parse_changes(origin: &str, json: &[u8]) -> Result<RangeSet> {
    let ranges: Vec<vmtide_block::ByteRange> = serde_json::from_slice(json).map_err(|error| {
        EngineError::usage(format!(
            "{origin} is no list of changed ranges like [{{\"offset\":0,\"length\":65536}}]: {error}"
        ))
    })?;
    if let Some(range) = ranges.iter().find(|range| range.checked_end().is_none()) {
        return Err(EngineError::usage(format!(
            "{origin}: the range {range} is larger than any disk"
        )));
    }
    Ok(RangeSet::from(ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let parse = |text: &str| SourceSpec::parse(text);
        assert_eq!(parse("disk.qcow2").unwrap(), SourceSpec::Image("disk.qcow2".into()));
        assert_eq!(parse("file:///a/b c").unwrap(), SourceSpec::Image("/a/b c".into()));
        assert_eq!(parse("./nbd:x").unwrap(), SourceSpec::Image("./nbd:x".into()));
        assert!(matches!(parse("qemu+unix:///run/vm.qmp").unwrap(), SourceSpec::Qemu(_)));
        assert!(matches!(parse("nbd://host/x").unwrap(), SourceSpec::Nbd(_)));
        assert!(matches!(parse("nbd+unix:///?socket=s").unwrap(), SourceSpec::Nbd(_)));
        assert!(matches!(parse("agent+https://h/C:/a.vhdx").unwrap(), SourceSpec::Agent(_)));
        assert!(matches!(parse("hyperv://h/web").unwrap(), SourceSpec::Hyperv(_)));
        assert!(matches!(parse("hyperv+winrm://h/web*").unwrap(), SourceSpec::Winrm(_)));
        for (text, word) in [
            ("vsphere://host/VM", "not in this build yet"),
            ("hyperv+winrm://user@host/VM", "VMTIDE_WINRM_USER"),
            ("hyperv+winrm://host/a/b", "%2F"),
            ("hyperv://user@host/VM", "hyperv://"),
            ("libvirt:///web", "qemu+unix"),
            ("http://x/y", "unknown source http://"),
            ("file://host/a", "three slashes"),
            ("qemu+unix://relative", "absolute"),
            ("nbd://host:x/y", "port"),
            ("agent+https://key@host/a.vhdx", "VMTIDE_AGENT_KEY"),
            ("", "empty"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, EngineError::Usage(_)), "{text}: {error:?}");
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn an_image_is_named_after_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.disk.raw");
        std::fs::write(&path, [1; 4096]).unwrap();
        let source = SourceSpec::Image(path.clone());
        let open = source.open(&SourceOptions::default()).unwrap();
        assert_eq!(open.name.as_deref(), Some("web.disk"));
        let config = open.hypervisor.describe(&open.vm).unwrap();
        assert_eq!((config.name.as_str(), config.disks.len()), ("web.disk", 1));

        let changes = parse_changes("x", br#"[{"offset":4000,"length":97}]"#).unwrap();
        let options = SourceOptions { changes: Some(changes), ..SourceOptions::default() };
        let error = source.open(&options).err().unwrap();
        assert!(error.to_string().contains("past the end"), "{error}");
        let missing = SourceSpec::Image(directory.path().join("none"));
        let error = missing.open(&SourceOptions::default()).err().unwrap();
        assert!(matches!(error, EngineError::NotFound { .. }), "{error}");
    }

    #[test]
    fn what_a_guest_can_forge_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let secret = directory.path().join("secret");
        std::fs::write(&secret, vec![1; 65536]).unwrap();
        let overlay = directory.path().join("web");
        let backing = vmtide_image::qcow2::CreateBacking {
            name: "secret".into(),
            format: Format::Raw,
            device: Arc::new(
                vmtide_block::RawDevice::open(&secret, vmtide_block::OpenMode::ReadOnly).unwrap(),
            ),
        };
        let mut create = vmtide_image::qcow2::Qcow2CreateOptions::new(65536);
        create.backing = Some(backing);
        drop(vmtide_image::qcow2::Qcow2Writer::create(&overlay, &create).unwrap());
        let open = |path: &Path, options: &SourceOptions| {
            SourceSpec::Image(path.into()).open(options).map(drop)
        };
        let error = open(&overlay, &SourceOptions::default()).unwrap_err();
        assert!(error.to_string().contains("--backing same-directory"), "{error}");
        let given = SourceOptions { format: Some(Format::Qcow2), ..SourceOptions::default() };
        open(&overlay, &given).unwrap();
        let policy = Some(BackingPolicy::SameDirectory);
        open(&overlay, &SourceOptions { backing: policy, ..SourceOptions::default() }).unwrap();
        let policy = Some(BackingPolicy::Refuse);
        open(&overlay, &SourceOptions { backing: policy, ..given.clone() }).unwrap_err();

        let raw = directory.path().join("web.raw");
        std::fs::rename(&overlay, &raw).unwrap();
        let error = open(&raw, &SourceOptions::default()).unwrap_err();
        assert!(matches!(error, EngineError::Refused { .. }), "{error:?}");
        let as_raw = SourceOptions { format: Some(Format::Raw), ..SourceOptions::default() };
        open(&raw, &as_raw).unwrap();
    }

    #[test]
    fn lists_of_changes_are_checked() {
        let set = parse_changes("x", br#"[{"offset":8,"length":8},{"offset":0,"length":8}]"#);
        assert_eq!(set.unwrap().total_bytes(), 16);
        for bad in [
            &b"{}"[..],
            b"[{\"offset\":-1,\"length\":2}]",
            b"[{\"offset\":18446744073709551615,\"length\":2}]",
            b"[{\"offset\":1}]",
            b"",
        ] {
            assert!(matches!(parse_changes("x", bad), Err(EngineError::Usage(_))));
        }
    }
}
