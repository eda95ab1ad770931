//! An agent's disks as a platform that can be backed up.
//!
//! With `/v1` all disks are frozen at one moment and the tracking ids of that moment are the base of the next backup.
//! Without it nothing can be frozen: what is read is right only where nobody writes meanwhile, as with a disk image at
//! rest. The tracking id that counts is then the most recent one of *before* the reading, so that whatever is written
//! during it is in the next backup; and where the disk is tracked it is looked at the end whether anybody wrote.

use crate::changes::{Changes as Asked, Doubt};
use crate::client::AgentClient;
use crate::contract::TrackingState;
use crate::frozen::FrozenDisks;
use crate::url::AgentUrl;
use crate::{AgentError, Result as AgentResult};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, RangeSet};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskBus, DiskConfig, DiskId, FreezeRequest, FrozenDisk, FrozenVm,
    FullReason, Hypervisor, HypervisorError, ReapReport, Result, TrackingId, VmConfig, VmSummary,
};

/// Why an agent's disks are only crash consistent.
const NO_GUEST: &str = "an agent's disks are frozen as files; it has no guest to ask";

/// Disks of an agent as one VM.
pub struct AgentSource {
    client: AgentClient,
    url: AgentUrl,
    name: String,
    start_tracking: bool,
}

impl AgentSource {
    /// The disks of `url`, by way of `client`, as the VM `name`.
    pub const fn new(client: AgentClient, url: AgentUrl, name: String) -> Self {
        Self { client, url, name, start_tracking: false }
    }

    /// Whether change tracking is switched on for disks that have it off. Needs a key that may write.
    #[must_use]
    pub const fn with_tracking(mut self, start: bool) -> Self {
        self.start_tracking = start;
        self
    }

    /// The id of a disk: its place in the URL.
    pub fn disk_id(number: usize) -> DiskId {
        DiskId(format!("disk{number}"))
    }

    fn config(&self, cancel: &CancelToken) -> AgentResult<VmConfig> {
        let mut disks = Vec::with_capacity(self.url.paths().len());
        for (number, path) in self.url.paths().iter().enumerate() {
            let details = self.client.details(path, cancel)?;
            let (size_bytes, format) = match details {
                Some(details) => (details.virtual_size_bytes, Some(details.format)),
                None => {
                    let info = self.client.info(path, cancel)?;
                    let format = match info.virtual_storage_type {
                        2 => Some("vhd".to_owned()),
                        3 => Some("vhdx".to_owned()),
                        _ => None,
                    };
                    (info.virtual_size, format)
                }
            };
            disks.push(DiskConfig {
                id: Self::disk_id(number),
                size_bytes,
                bus: DiskBus::Other,
                format: format.filter(|format| !format.is_empty()),
                path: Some(path.clone()),
                ..DiskConfig::default()
            });
        }
        Ok(VmConfig {
            name: self.name.clone(),
            platform: "agent".into(),
            platform_version: None,
            disks,
            ..VmConfig::default()
        })
    }

    /// The disks at one moment; none where the agent has no freezes, with the reason.
    fn try_freeze(
        &self,
        paths: &[String],
        cancel: &CancelToken,
    ) -> AgentResult<std::result::Result<FrozenDisks, String>> {
        match self.client.freeze(paths, cancel) {
            Ok(frozen) => Ok(Ok(frozen)),
            Err(
                AgentError::Unsupported { detail, .. }
                | AgentError::Refused { status: 501, detail, .. },
            ) => Ok(Err(detail)),
            Err(error) => Err(error),
        }
    }

    fn frozen_disks(
        &self,
        frozen: &FrozenDisks,
        wanted: &[(DiskId, String)],
        request: &FreezeRequest,
    ) -> AgentResult<Vec<FrozenDisk>> {
        let mut disks = Vec::with_capacity(wanted.len());
        for (number, ((id, path), disk)) in wanted.iter().zip(frozen.disks()).enumerate() {
            let Some(device) = frozen.open(number) else { continue };
            let tracking = disk.tracking_id.clone().filter(|id| !id.is_empty()).map(TrackingId);
            let changes = changes_since(
                request.bases.get(id),
                disk.size_bytes,
                tracking.is_some(),
                path,
                |since| frozen.changes(number, since),
            )?;
            disks.push(FrozenDisk { id: id.clone(), device, changes, tracking });
        }
        Ok(disks)
    }

    fn live_disk(
        &self,
        id: &DiskId,
        path: &str,
        request: &FreezeRequest,
        watched: &mut Vec<Watched>,
    ) -> AgentResult<FrozenDisk> {
        let cancel = &request.cancel;
        // Before anything is read: what is written from now on is after this id.
        let state = self.client.tracking(path, cancel)?;
        let device: Arc<dyn BlockDevice> = Arc::new(self.client.open(path, cancel)?);
        let size_bytes = device.size_bytes();
        let tracking =
            Some(state.most_recent_id.clone()).filter(|id| state.enabled && !id.is_empty());
        let ask = |since: &str| self.client.changes(path, since, size_bytes, cancel);
        let changes = changes_since(request.bases.get(id), size_bytes, state.enabled, path, ask)?;
        let since_id = match &tracking {
            Some(id) if state.newer_changes => ask(id)?.ok(),
            _ => None,
        };
        watched.push(Watched { path: path.to_owned(), size_bytes, state, since_id });
        Ok(FrozenDisk { id: id.clone(), device, changes, tracking: tracking.map(TrackingId) })
    }
}

/// What may differ from the base, and any doubt about it.
fn changes_since(
    base: Option<&Base>,
    size_bytes: u64,
    is_tracked: bool,
    path: &str,
    ask: impl FnOnce(&str) -> AgentResult<Asked>,
) -> AgentResult<Changes> {
    let everything = |reason| Ok(Changes::Everything(reason));
    let Some(base) = base else { return everything(FullReason::FirstBackup) };
    if base.size_bytes != size_bytes {
        return everything(FullReason::Resized {
            from_bytes: base.size_bytes,
            to_bytes: size_bytes,
        });
    }
    let Some(id) = &base.tracking else {
        return everything(if is_tracked {
            FullReason::NoTrackingId
        } else {
            FullReason::NoTracking(format!("off for {path} (add --track to switch it on)"))
        });
    };
    if !is_tracked {
        return everything(FullReason::TrackingLost(format!("it was switched off for {path}")));
    }
    Ok(match ask(&id.0)? {
        Ok(ranges) => Changes::Ranges(ranges),
        Err(Doubt::Disabled(text) | Doubt::Lost(text)) => {
            Changes::Everything(FullReason::TrackingLost(text))
        }
        Err(Doubt::Broken(text)) => Changes::Everything(FullReason::AnswerDoubtful(text)),
    })
}

impl Hypervisor for AgentSource {
    fn list(&self) -> Result<Vec<VmSummary>> {
        Ok(vec![VmSummary {
            name: self.name.clone(),
            id: None,
            state: "image".into(),
            disks: self.url.paths().len(),
        }])
    }

    fn describe(&self, _vm: &str) -> Result<VmConfig> {
        Ok(self.config(&CancelToken::new())?)
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        if request.consistency > Consistency::Crash && !request.allow_downgrade {
            return Err(HypervisorError::ConsistencyNotReached {
                wanted: request.consistency,
                detail: NO_GUEST.into(),
            });
        }
        let cancel = &request.cancel;
        let config = self.config(cancel)?;
        let wanted: Vec<(DiskId, String)> = self
            .url
            .paths()
            .iter()
            .enumerate()
            .map(|(number, path)| (Self::disk_id(number), path.clone()))
            .filter(|(id, _)| !request.exclude.contains(id))
            .collect();
        if self.start_tracking {
            for (_, path) in &wanted {
                if !self.client.tracking(path, cancel)?.enabled {
                    self.client.set_tracking(path, true, cancel)?;
                }
            }
        }
        let paths: Vec<String> = wanted.iter().map(|(_, path)| path.clone()).collect();
        let mut vm = FrozenAgentVm {
            config,
            downgraded: request.consistency > Consistency::Crash,
            warnings: Vec::new(),
            disks: Vec::new(),
            frozen: None,
            watched: Vec::new(),
            client: self.client.clone(),
            cancel: cancel.clone(),
        };
        if paths.is_empty() {
            return Ok(Box::new(vm));
        }
        match self.try_freeze(&paths, cancel)? {
            Ok(frozen) => {
                vm.disks = self.frozen_disks(&frozen, &wanted, request)?;
                vm.frozen = Some(frozen);
            }
            Err(reason) => {
                for (id, path) in &wanted {
                    vm.disks.push(self.live_disk(id, path, request, &mut vm.watched)?);
                }
                vm.warn_of_live_disks(&reason);
            }
        }
        Ok(Box::new(vm))
    }

    fn reap(&self) -> Result<ReapReport> {
        // An agent ends by itself the freezes of clients that are gone; nothing else is made there.
        Ok(ReapReport::default())
    }
}

/// A disk that is read while it may be written, and what tells whether it was.
struct Watched {
    path: String,
    size_bytes: u64,
    state: TrackingState,
    /// What had changed since the most recent id, where that was something.
    since_id: Option<RangeSet>,
}

impl Watched {
    /// Whether tracking can show that nobody wrote.
    fn can_tell(&self) -> bool {
        self.state.enabled && !self.state.newer_changes && !self.state.most_recent_id.is_empty()
    }

    /// What speaks for somebody having written since.
    fn written(
        &self,
        client: &AgentClient,
        cancel: &CancelToken,
    ) -> AgentResult<Option<&'static str>> {
        if !self.state.enabled || self.state.most_recent_id.is_empty() {
            return Ok(None);
        }
        let now = client.tracking(&self.path, cancel)?;
        if !now.enabled {
            return Ok(Some("its change tracking was switched off"));
        }
        if now.newer_changes && !self.state.newer_changes {
            return Ok(Some("it was written"));
        }
        if now.most_recent_id != self.state.most_recent_id {
            return Ok(Some("a new moment was sealed"));
        }
        let Some(before) = &self.since_id else { return Ok(None) };
        Ok(match client.changes(&self.path, &now.most_recent_id, self.size_bytes, cancel)? {
            Ok(after) if after == *before => None,
            _ => Some("it was written"),
        })
    }
}

struct FrozenAgentVm {
    config: VmConfig,
    downgraded: bool,
    warnings: Vec<String>,
    disks: Vec<FrozenDisk>,
    frozen: Option<FrozenDisks>,
    watched: Vec<Watched>,
    client: AgentClient,
    cancel: CancelToken,
}

impl FrozenAgentVm {
    fn warn_of_live_disks(&mut self, reason: &str) {
        let unsure: Vec<_> = self.watched.iter().filter(|disk| !disk.can_tell()).collect();
        if !unsure.is_empty() {
            let paths: Vec<_> = unsure.iter().map(|disk| disk.path.as_str()).collect();
            self.warnings.push(format!(
                "{} is read without being frozen, and whether anybody writes to it meanwhile cannot be seen: the \
                 restore point is good only if nobody does ({reason})",
                paths.join(", ")
            ));
        }
    }
}

impl FrozenVm for FrozenAgentVm {
    fn config(&self) -> &VmConfig {
        &self.config
    }

    fn consistency(&self) -> Consistency {
        Consistency::Crash
    }

    fn downgrade_reason(&self) -> Option<&str> {
        self.downgraded.then_some(NO_GUEST)
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn check(&self) -> Result<()> {
        if let Some(frozen) = &self.frozen {
            frozen.check()?;
        }
        for disk in &self.watched {
            if let Some(what) = disk.written(&self.client, &self.cancel)? {
                return Err(HypervisorError::failed(
                    format!("reading {} at one moment", disk.path),
                    format!(
                        "{what} while it was read, and this agent cannot freeze it; stop its VM, or back up a checkpoint's parent"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn commit(mut self: Box<Self>) -> Result<Vec<String>> {
        // What could not be ended ends by itself.
        Ok(match self.frozen.take().map(FrozenDisks::end) {
            Some(Err(error)) => {
                vec![format!("a freeze that the agent ends within ten minutes ({error})")]
            }
            _ => Vec::new(),
        })
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        match self.frozen.take().map(FrozenDisks::end) {
            Some(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::ByteRange;

    fn decide(base: Option<(u64, Option<&str>)>, tracked: bool, answer: Asked) -> Changes {
        let base = base.map(|(size_bytes, id)| Base {
            tracking: id.map(|id| TrackingId(id.into())),
            size_bytes,
        });
        changes_since(base.as_ref(), 1000, tracked, "/a", |id| {
            assert_eq!(id, "rctX:1");
            Ok(answer)
        })
        .unwrap()
    }

    #[test]
    fn only_a_whole_answer_about_the_same_disk_is_believed() {
        let set = RangeSet::from(vec![ByteRange::new(0, 10)]);
        let known = Some((1000, Some("rctX:1")));
        assert_eq!(decide(known, true, Ok(set.clone())), Changes::Ranges(set.clone()));
        let reason = |changes| match changes {
            Changes::Everything(reason) => reason,
            Changes::Ranges(ranges) => panic!("trusted {ranges:?}"),
        };
        assert_eq!(reason(decide(None, true, Ok(set.clone()))), FullReason::FirstBackup);
        assert_eq!(
            reason(decide(Some((1000, None)), true, Ok(set.clone()))),
            FullReason::NoTrackingId
        );
        assert!(matches!(
            reason(decide(Some((1000, None)), false, Ok(set.clone()))),
            FullReason::NoTracking(_)
        ));
        assert!(matches!(
            reason(decide(Some((999, Some("rctX:1"))), true, Ok(set.clone()))),
            FullReason::Resized { .. }
        ));
        assert!(matches!(reason(decide(known, false, Ok(set))), FullReason::TrackingLost(_)));
        for doubt in [Doubt::Disabled("x".into()), Doubt::Lost("x".into())] {
            assert!(matches!(reason(decide(known, true, Err(doubt))), FullReason::TrackingLost(_)));
        }
        let broken = Err(Doubt::Broken("x".into()));
        assert!(matches!(reason(decide(known, true, broken)), FullReason::AnswerDoubtful(_)));
    }
}
