//! A Hyper-V host's files over SMB.

use crate::client::{ServerLink, SmbClient};
use crate::disk::WholeAtFlush;
use crate::error::{Result as SmbResult, SmbError};
use crate::file::SmbFile;
use crate::path::{PathMap, SharePath};
use crate::requests::Purpose;
use crate::session::Protection;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, WritableBlockDevice};
use vmtide_hyperv::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
use vmtide_hypervisor::{HealthCheck, HypervisorError, Result};
use vmtide_image::vhdx::{VhdxCreateOptions, VhdxKind, VhdxWriter};
use vmtide_image::{
    ImageFiles, ParentLink, open_chain_in, open_writer_in, windows_parents, windows_path,
};

/// The changes of how much disk are asked for at once. A list of 4 KiB pieces every 8 KiB in it would be 8 million long,
/// which no answer takes; then it is halved.
const CHANGES_BYTES: u64 = 64 << 30;
/// Below this a list that is still too large means something else.
const LEAST_CHANGES_BYTES: u64 = 1 << 20;
/// The answers from one slice on after which twice as much is asked for again.
const GROW_AFTER: u64 = 16;

/// The name of what is checked of the way to the files.
const NETWORK: &str = "network";

/// `STATUS_DIRECTORY_NOT_EMPTY`.
const DIRECTORY_NOT_EMPTY: u32 = 0xC000_0101;

/// Asks the host what changed: path, tracking id, range. Normally `GetVirtualDiskChanges`.
pub type AskChanges =
    Arc<dyn Fn(&str, &str, ByteRange) -> Result<ChangePage, ChangesError> + Send + Sync>;

/// The files of a host over SMB, with changes told by its management interface.
pub struct SmbFiles {
    client: Arc<SmbClient>,
    map: PathMap,
    ask_changes: AskChanges,
    changes_bytes: AtomicU64,
    small_answers: AtomicU64,
}

impl SmbFiles {
    /// The files that `map` finds, through `client`.
    pub fn new(client: Arc<SmbClient>, map: PathMap, ask_changes: AskChanges) -> Self {
        Self {
            client,
            map,
            ask_changes,
            changes_bytes: AtomicU64::new(CHANGES_BYTES),
            small_answers: AtomicU64::new(0),
        }
    }

    /// The client, e.g. to ask for its traffic.
    pub const fn client(&self) -> &Arc<SmbClient> {
        &self.client
    }

    fn locate(&self, path: &str) -> SmbResult<SharePath> {
        self.map.locate(path)
    }

    fn files(&self) -> Files<'_> {
        Files { client: &self.client, map: &self.map }
    }
}

/// The files that the images of one chain are in.
struct Files<'a> {
    client: &'a Arc<SmbClient>,
    map: &'a PathMap,
}

impl ImageFiles for Files<'_> {
    fn open(&self, path: &str) -> vmtide_block::Result<Arc<dyn BlockDevice>> {
        let place = self.map.locate(path)?;
        Ok(Arc::new(SmbFile::open(self.client, &place)?))
    }

    fn parents(&self, child: &str, link: &ParentLink) -> Vec<String> {
        windows_parents(child, link)
    }

    fn key(&self, path: &str) -> String {
        windows_path(path).unwrap_or_else(|| path.to_owned()).to_lowercase()
    }
}

/// What a disk says in a way that fits a job's errors.
fn of_block(error: BlockError) -> HypervisorError {
    match &error {
        BlockError::Io { context, source } => match source.kind() {
            ErrorKind::NotFound => {
                HypervisorError::NotFound { what: "a disk".into(), detail: context.clone() }
            }
            ErrorKind::PermissionDenied => {
                HypervisorError::Denied { what: "a disk".into(), detail: context.clone() }
            }
            ErrorKind::ResourceBusy => {
                HypervisorError::Busy { vm: "the disk".into(), detail: context.clone() }
            }
            _ => error.into(),
        },
        BlockError::Disconnected { context, detail } => {
            HypervisorError::Unreachable { peer: context.clone(), detail: detail.clone() }
        }
        _ => error.into(),
    }
}

fn none_where_missing<T>(result: SmbResult<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(SmbError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What is to be said of the way to one server.
fn examined(link: &ServerLink, protection: Protection) -> HealthCheck {
    let ServerLink { server, encryption, login, fallback } = link;
    let kept = match encryption {
        Some(cipher) => format!("encrypted by {cipher}"),
        None => "signed, not encrypted".to_owned(),
    };
    let detail = format!("SMB 3.1.1 to {server}, {kept}, logged in by {login}");
    if let Some(why) = fallback {
        return HealthCheck::warn(
            NETWORK,
            format!("{detail} instead of Kerberos: {why}"),
            "call the host by its full name in the domain, and see that the domain's servers answer; \
             --winrm-auth kerberos takes nothing weaker",
        );
    }
    if encryption.is_none() && protection != Protection::Signed {
        return HealthCheck::warn(
            NETWORK,
            format!("{detail}: who listens on the network reads the disks"),
            "switch encryption on for the host's shares (Set-SmbServerConfiguration -EncryptData $true); \
             --smb-protection signed says that the network is trusted",
        );
    }
    HealthCheck::ok(NETWORK, detail)
}

impl HostFiles for SmbFiles {
    fn examine_way(&self) -> Vec<HealthCheck> {
        let mut servers = self.client.connected();
        if servers.is_empty() {
            servers.push(self.map.host.clone());
        }
        let protection = self.client.options().protection;
        let examine = |server: &String| match self.client.link(server) {
            Ok(link) => examined(&link, protection),
            Err(error) => HealthCheck::fail(
                NETWORK,
                HypervisorError::from(error).to_string(),
                format!(
                    "disks are read over SMB: see that port {} of {server} is let through by its firewall, and the \
                     user and password for it",
                    self.client.options().port
                ),
            ),
        };
        servers.iter().map(examine).collect()
    }

    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        let chain = open_chain_in(&self.files(), path).map_err(of_block)?;
        let mut layers = chain.into_iter();
        let Some(top) = layers.next() else {
            return Err(HypervisorError::protocol(path, "a chain without images"));
        };
        let disk_id = top.info.identifiers.get("virtual_disk_id").and_then(|id| id.parse().ok());
        Ok(FrozenFile {
            device: top.image,
            format: top.info.format.to_string(),
            disk_id,
            // The file does not hold it: the host keeps it beside.
            most_recent_tracking_id: None,
            subtype: top.info.subformat.unwrap_or_default(),
            logical_sector_bytes: top.info.logical_sector_bytes.unwrap_or(512),
            physical_sector_bytes: top.info.physical_sector_bytes.unwrap_or(512),
            block_bytes: top
                .info
                .block_size_bytes
                .and_then(|bytes| u32::try_from(bytes).ok())
                .unwrap_or(0),
        })
    }

    fn changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError> {
        loop {
            let bytes = self.changes_bytes.load(Ordering::Relaxed);
            let slice = ByteRange::new(range.offset, range.length.min(bytes));
            match (self.ask_changes)(path, tracking_id, slice) {
                Err(ChangesError::TooLarge(_)) if slice.length > LEAST_CHANGES_BYTES => {
                    let half = (slice.length / 2).max(LEAST_CHANGES_BYTES);
                    self.changes_bytes.store(half, Ordering::Relaxed);
                    self.small_answers.store(0, Ordering::Relaxed);
                }
                Ok(page) => {
                    // One dense place must not make the rest of a large disk slow.
                    let answers = self.small_answers.fetch_add(1, Ordering::Relaxed) + 1;
                    if bytes < CHANGES_BYTES && answers.is_multiple_of(GROW_AFTER) {
                        self.changes_bytes.store(bytes * 2, Ordering::Relaxed);
                    }
                    return Ok(page);
                }
                other => return other,
            }
        }
    }

    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        let place = self.locate(path)?;
        let Some(file) = none_where_missing(SmbFile::open(&self.client, &place))? else {
            return Ok(None);
        };
        let size_bytes = file.size_bytes();
        if size_bytes > limit_bytes {
            return Err(HypervisorError::failed(
                format!("read {path}"),
                format!("it has {size_bytes} bytes, more than the {limit_bytes} that are taken"),
            ));
        }
        let mut content = vec![0; usize::try_from(size_bytes).unwrap_or(0)];
        file.read_at(&mut content, 0).map_err(of_block)?;
        Ok(Some(content))
    }

    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        let place = self.locate(directory)?;
        let Some(listed) = none_where_missing(self.client.list(&place))? else {
            return Ok(None);
        };
        let files = listed.into_iter().filter(|found| !found.is_directory);
        let entry = |found: crate::requests::Listed| FileEntry {
            name: found.name,
            size_bytes: found.size_bytes,
        };
        Ok(Some(files.map(entry).collect()))
    }

    fn free_bytes(&self, directory: &str) -> Result<Option<u64>> {
        let place = self.locate(directory)?;
        let what = place.to_string();
        let asked = self.client.with_open(&place, Purpose::Directory, |session, tree, id, _| {
            session.free_bytes(tree, id, &what)
        });
        match asked {
            Err(SmbError::Unsupported { .. }) => Ok(None),
            asked => none_where_missing(asked),
        }
    }

    fn create_directory(&self, path: &str) -> Result<()> {
        let place = self.locate(path)?;
        let mut made = SharePath { path: String::new(), ..place.clone() };
        for part in place.path.split('\\').filter(|part| !part.is_empty()) {
            if !made.path.is_empty() {
                made.path.push('\\');
            }
            made.path.push_str(part);
            self.client.with_open(&made, Purpose::CreateDirectory, |_, _, _, _| Ok(()))?;
        }
        Ok(())
    }

    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let file = SmbFile::create(&self.client, &self.locate(path)?)?;
        file.resize(content.len() as u64).map_err(of_block)?;
        file.write_at(content, 0).map_err(of_block)?;
        file.flush().map_err(of_block)
    }

    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        if !path.to_ascii_lowercase().ends_with(".vhdx") {
            return Err(HypervisorError::Unsupported {
                what: format!("making {path}"),
                detail: "new disks are VHDX, and their names end in .vhdx".into(),
            });
        }
        let options = VhdxCreateOptions {
            block_size_bytes: (disk.block_bytes > 0).then_some(disk.block_bytes),
            logical_sector_bytes: disk.logical_sector_bytes,
            physical_sector_bytes: disk.physical_sector_bytes,
            kind: if disk.fixed { VhdxKind::Fixed } else { VhdxKind::Dynamic },
            disk_id: disk.disk_id.map(|id| id.to_string()),
            ..VhdxCreateOptions::new(disk.size_bytes)
        };
        let file = Arc::new(SmbFile::create(&self.client, &self.locate(path)?)?);
        let writer = VhdxWriter::create_device(file, &options).map_err(of_block)?;
        Ok(Arc::new(WholeAtFlush(Arc::new(writer))))
    }

    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        let file = Arc::new(SmbFile::open_writable(&self.client, &self.locate(path)?)?);
        let writer = open_writer_in(&self.files(), path, file).map_err(of_block)?;
        Ok(Arc::new(WholeAtFlush(writer)))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        let place = self.locate(path)?;
        let removed = self.client.with_open(&place, Purpose::Remove, |_, _, _, _| Ok(()));
        none_where_missing(removed).map(drop)
    }

    fn remove_directory(&self, path: &str) -> Result<()> {
        let place = self.locate(path)?;
        // Windows takes the request for one that is not empty, and leaves it; Samba refuses it.
        match self.client.with_open(&place, Purpose::RemoveDirectory, |_, _, _, _| Ok(())) {
            Err(SmbError::Refused { status: DIRECTORY_NOT_EMPTY, .. }) => Ok(()),
            removed => none_where_missing(removed).map(drop),
        }
    }
}
