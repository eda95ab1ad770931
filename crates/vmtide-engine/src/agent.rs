//! Questions to an agent that are no job: what a disk is, and what changed on it.

use crate::source::SourceSpec;
use crate::{EngineError, Result};
use serde::Serialize;
use vmtide_agent_client::AgentClient;
pub use vmtide_agent_client::{AgentError, AgentKey, AgentOptions, AgentUrl, Fingerprint};
use vmtide_block::{CancelToken, RangeSet};

/// What an agent tells of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AgentDiskReport {
    /// The disk's path on the agent's host.
    pub path: String,
    /// The image format; none where the agent does not tell.
    pub format: Option<String>,
    /// Size that the guest sees, in bytes.
    pub size_bytes: u64,
    /// Size of the file in bytes; none where the agent does not tell.
    pub file_size_bytes: Option<u64>,
    /// `fixed`, `dynamic` or `differencing`; none where the agent does not tell.
    pub subformat: Option<&'static str>,
    /// Logical sector in bytes; none where the agent does not tell.
    pub logical_sector_bytes: Option<u32>,
    /// Physical sector in bytes; none where the agent does not tell.
    pub physical_sector_bytes: Option<u32>,
    /// The parent of a differencing disk.
    pub parent_path: Option<String>,
    /// The disk's own id, where it has one and the agent tells.
    pub disk_id: Option<String>,
    /// Whether its writes are tracked.
    pub tracking: bool,
    /// The most recent tracking id; empty where there is none.
    pub most_recent_id: String,
    /// Whether the agent is vmtide's own, which can freeze and write disks.
    pub has_v1: bool,
}

/// Asks an agent what its disks are, one answer for each of the URL.
///
/// # Errors
/// Those of the connection; where there is no such disk.
pub fn agent_disks(url: &AgentUrl, options: &AgentOptions) -> Result<Vec<AgentDiskReport>> {
    let client = AgentClient::new(url, options)?;
    let cancel = CancelToken::new();
    let has_v1 = client.has_v1(&cancel)?;
    let mut reports = Vec::with_capacity(url.paths().len());
    for path in url.paths() {
        let info = client.info(path, &cancel)?;
        let details = client.details(path, &cancel)?;
        let state = client.tracking(path, &cancel)?;
        let by_number = match info.virtual_storage_type {
            2 => Some("vhd".to_owned()),
            3 => Some("vhdx".to_owned()),
            _ => None,
        };
        let known = |bytes: u32| (bytes > 0).then_some(bytes);
        reports.push(AgentDiskReport {
            path: path.clone(),
            format: details.as_ref().map(|details| details.format.clone()).or(by_number),
            size_bytes: info.virtual_size,
            file_size_bytes: details.as_ref().map(|details| details.physical_size_bytes),
            subformat: match info.provider_sub_type {
                2 => Some("fixed"),
                3 => Some("dynamic"),
                4 => Some("differencing"),
                _ => None,
            },
            logical_sector_bytes: details
                .as_ref()
                .and_then(|details| known(details.logical_sector_bytes)),
            physical_sector_bytes: details
                .as_ref()
                .and_then(|details| known(details.physical_sector_bytes)),
            parent_path: info.parent_path,
            disk_id: details.and_then(|details| details.disk_id),
            tracking: state.enabled,
            most_recent_id: state.most_recent_id,
            has_v1,
        });
    }
    Ok(reports)
}

/// What changed on the disks of an agent since a tracking id, or why that is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskChangesReport {
    /// The disk's path on the agent's host.
    pub path: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether its writes are tracked.
    pub tracking: bool,
    /// The most recent tracking id; empty where there is none.
    pub most_recent_id: String,
    /// Whether something was written since.
    pub newer_changes: bool,
    /// The id that changes were asked since, if any.
    pub since: Option<String>,
    /// The changed ranges; none where no id was given or the answer is in doubt.
    pub ranges: Option<RangeSet>,
    /// Why there are no ranges although an id was given.
    pub reason: Option<String>,
}

/// Asks an agent what changed on a disk since `since`; without it, only for the state of its tracking.
///
/// # Errors
/// [`EngineError::Usage`] for a source that is no agent's, or names several disks; those of the connection.
pub fn changes_of(
    source: &SourceSpec,
    agent: &AgentOptions,
    since: Option<&str>,
) -> Result<DiskChangesReport> {
    let SourceSpec::Agent(url) = source else {
        return Err(EngineError::usage(format!(
            "{}: only an agent's disk (agent+https://…) can be asked for its changes",
            source.display()
        )));
    };
    let [path] = url.paths() else {
        return Err(EngineError::usage(format!(
            "{url}: give one disk: every disk has ids of its own"
        )));
    };
    let client = AgentClient::new(url, agent)?;
    let cancel = CancelToken::new();
    let state = client.tracking(path, &cancel)?;
    let size_bytes = client.info(path, &cancel)?.virtual_size;
    let asked = since.map(|id| client.changes(path, id, size_bytes, &cancel)).transpose()?;
    let (ranges, reason) = match asked {
        None => (None, None),
        Some(Ok(ranges)) => (Some(ranges), None),
        Some(Err(doubt)) => (None, Some(doubt.to_string())),
    };
    Ok(DiskChangesReport {
        path: path.clone(),
        size_bytes,
        tracking: state.enabled,
        most_recent_id: state.most_recent_id,
        newer_changes: state.newer_changes,
        since: since.map(ToOwned::to_owned),
        ranges,
        reason,
    })
}
