//! The files of a host, by way of the agent there: those below its roots.

use crate::AgentError;
use crate::changes::Doubt;
use crate::client::AgentClient;
use crate::contract::json;
use crate::resend::{self, CreateDocument};
use crate::transport::Request;
use crate::url::segment;
use http::Method;
use serde::Deserialize;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{ByteRange, CancelToken, RangeSet, WritableBlockDevice};
use vmtide_hyperv::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
use vmtide_hypervisor::{HypervisorError, Result};

/// The most files of a directory that are told, in bytes of their list.
const MAX_LIST_BYTES: usize = 32 << 20;

/// A host's files as its agent gives them. Disks are read at rest: whoever opens one sees to it that nobody writes it.
pub struct AgentFiles {
    client: AgentClient,
    /// Ends what was begun before.
    cancel: CancelToken,
    /// Never cancelled: small files and directories are what a job that was cancelled has to remove.
    undoing: CancelToken,
}

#[derive(Deserialize)]
struct DirectoryDocument {
    free_bytes: Option<u64>,
    files: Vec<EntryDocument>,
}

#[derive(Deserialize)]
struct EntryDocument {
    name: String,
    size_bytes: u64,
}

impl AgentFiles {
    /// Those of the host whose agent `client` talks to; `cancel` ends what is done then, and not the little that has
    /// to be undone after it.
    pub fn new(client: AgentClient, cancel: CancelToken) -> Self {
        Self { client, cancel, undoing: CancelToken::new() }
    }

    /// What ends something small that begins now: what begins after the job was cancelled undoes.
    fn small(&self) -> &CancelToken {
        if self.cancel.is_cancelled() { &self.undoing } else { &self.cancel }
    }

    fn told(&self, path: &str, error: AgentError) -> HypervisorError {
        match error {
            AgentError::NotFound { detail, .. } => HypervisorError::NotFound {
                what: format!("{path} at {}", self.client.agent()),
                detail: format!("{detail}; it must lie below a directory that the agent serves"),
            },
            AgentError::Refused { code, detail, .. } if code == "in_use" => {
                HypervisorError::Busy { vm: path.into(), detail }
            }
            other => other.into(),
        }
    }

    fn directory(&self, path: &str) -> Result<Option<DirectoryDocument>> {
        let request =
            Request::get(format!("/v1/files?path={}", segment(path))).at_most(MAX_LIST_BYTES);
        let transport = &self.client.shared().transport;
        match transport.document(&request, self.small()) {
            Ok(body) => Ok(Some(json(&transport.agent, &body)?)),
            Err(AgentError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.told(path, error)),
        }
    }

    /// Sends a request that is right to send again, and drops the answer.
    fn send(&self, path: &str, request: &Request) -> Result<()> {
        let sent = self.client.shared().transport.document(request, self.small());
        sent.map(drop).map_err(|error| self.told(path, error))
    }
}

impl HostFiles for AgentFiles {
    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        let told = |error| self.told(path, error);
        self.client.need_v1("describe disks", &self.cancel)?;
        let details = self.client.details(path, &self.cancel).map_err(told)?;
        let details = details.ok_or_else(|| {
            HypervisorError::protocol(self.client.agent(), "no details of a disk")
        })?;
        let tracking = self.client.tracking(path, &self.cancel).map_err(told)?;
        let device = Arc::new(self.client.open(path, &self.cancel).map_err(told)?);
        let subtype = match details.provider_sub_type {
            2 => "fixed",
            4 => "differencing",
            _ => "dynamic",
        };
        Ok(FrozenFile {
            device,
            format: details.format,
            disk_id: details.disk_id.and_then(|id| Uuid::parse_str(&id).ok()),
            most_recent_tracking_id: Some(tracking.most_recent_id)
                .filter(|id| tracking.enabled && !id.is_empty()),
            subtype: subtype.to_owned(),
            logical_sector_bytes: details.logical_sector_bytes,
            physical_sector_bytes: details.physical_sector_bytes,
            block_bytes: details.block_size_bytes,
        })
    }

    fn changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError> {
        let failed = |error: AgentError| ChangesError::Failed(error.to_string());
        let info = self.client.info(path, &self.cancel).map_err(failed)?;
        let size_bytes = info.virtual_size;
        let changes = self.client.changes(path, tracking_id, size_bytes, &self.cancel);
        match changes.map_err(failed)? {
            // All of the disk is asked for at once: pages are the client's own matter.
            Ok(ranges) => Ok(ChangePage {
                ranges: RangeSet::from(ranges.within(range).as_slice().to_vec()),
                processed_bytes: range.length,
            }),
            Err(Doubt::Disabled(text)) => Err(ChangesError::NotTracked(text)),
            Err(Doubt::Lost(text)) => Err(ChangesError::UnknownId(text)),
            Err(Doubt::Broken(text)) => Err(ChangesError::Failed(text)),
        }
    }

    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
        let target = format!("/v1/files/content?path={}", segment(path));
        let transport = &self.client.shared().transport;
        match transport.document(&Request::get(target).at_most(limit), self.small()) {
            Ok(body) => Ok(Some(body.to_vec())),
            Err(AgentError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.told(path, error)),
        }
    }

    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        let entry =
            |entry: EntryDocument| FileEntry { name: entry.name, size_bytes: entry.size_bytes };
        Ok(self.directory(directory)?.map(|list| list.files.into_iter().map(entry).collect()))
    }

    fn free_bytes(&self, directory: &str) -> Result<Option<u64>> {
        Ok(self.directory(directory)?.and_then(|list| list.free_bytes))
    }

    fn create_directory(&self, path: &str) -> Result<()> {
        let target = format!("/v1/files/directories?path={}", segment(path));
        self.send(path, &Request::new(Method::POST, target))
    }

    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let target = format!("/v1/files/content?path={}", segment(path));
        let request =
            Request::new(Method::POST, target).body("application/octet-stream", content.to_vec());
        let transport = &self.client.shared().transport;
        let cancel = self.small();
        let written = transport.persist(cancel, |earlier| {
            let Err(failure) = transport.attempt(&request, cancel) else { return Ok(()) };
            if earlier == 0 || failure.error.code() != "exists" {
                return Err(failure);
            }
            // The try whose answer was lost may have made it.
            match self.read_file(path, content.len() as u64 + 1) {
                Ok(Some(there)) if there == content => Ok(()),
                _ => Err(failure),
            }
        });
        written.map_err(|error| self.told(path, error))
    }

    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        self.client.need_v1("make disks", &self.cancel)?;
        let format = path.rsplit_once('.').map_or("", |(_, extension)| extension);
        let given = |bytes: u32| Some(bytes).filter(|bytes| *bytes > 0);
        let document = CreateDocument {
            format: format.to_ascii_lowercase(),
            virtual_size_bytes: disk.size_bytes,
            fixed: disk.fixed,
            logical_sector_bytes: given(disk.logical_sector_bytes),
            physical_sector_bytes: given(disk.physical_sector_bytes),
            block_size_bytes: given(disk.block_bytes),
            disk_id: disk.disk_id.map(|id| id.to_string()),
        };
        resend::create(&self.client.shared().transport, path, &document, &self.cancel)
            .map_err(|error| self.told(path, error))?;
        self.open_disk_writable(path)
    }

    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        let disk = self.client.open_writable(path, &self.cancel);
        Ok(Arc::new(disk.map_err(|error| self.told(path, error))?))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        let target = format!("/v1/files?path={}", segment(path));
        match self.send(path, &Request::new(Method::DELETE, target)) {
            Err(HypervisorError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    fn remove_directory(&self, path: &str) -> Result<()> {
        let target = format!("/v1/files/directories?path={}", segment(path));
        match self.send(path, &Request::new(Method::DELETE, target)) {
            Err(HypervisorError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }
}
