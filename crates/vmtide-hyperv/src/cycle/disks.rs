//! The disks of a checkpoint: opened, and each asked what changed since the moment of its base.

use crate::cycle::HypervHypervisor;
use crate::cycle::changes::changed_since;
use crate::cycle::device::FrozenDevice;
use crate::cycle::gate::Gates;
use crate::cycle::points::same_point;
use crate::cycle::token::{BaseToken, FileFacts};
use crate::{Configuration, DiskAttachment, FrozenFile, ReferencePointRecord, VmRecord};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_hypervisor::{
    Base, Changes, DiskId, FreezeRequest, FrozenDisk, FullReason, HypervisorError, Result,
};

/// A disk of a checkpoint, opened.
pub(crate) struct OpenDisk {
    /// What the job reads.
    pub frozen: FrozenDisk,
    /// The same device, to be closed.
    pub device: Arc<FrozenDevice>,
    /// Where the checkpoint holds it.
    pub attachment: DiskAttachment,
    /// What the file says of itself.
    pub file: FileFacts,
    /// The disk it was at the base, where it stood elsewhere.
    pub moved_from: Option<DiskId>,
    /// Whether its changes can be tracked.
    pub trackable: bool,
}

/// The id by which people and restore points know a disk.
pub(crate) fn id_of(attachment: &DiskAttachment) -> DiskId {
    DiskId(attachment.location.to_string())
}

/// The bases of a request by disk, with their tokens read.
pub(crate) struct Bases<'a> {
    bases: &'a BTreeMap<DiskId, Base>,
    tokens: BTreeMap<&'a DiskId, Result<BaseToken, String>>,
}

impl<'a> Bases<'a> {
    /// Reads the tokens of a request.
    pub fn of(bases: &'a BTreeMap<DiskId, Base>) -> Self {
        let tokens = bases.iter().filter_map(|(id, base)| {
            base.tracking.as_ref().map(|tracking| (id, BaseToken::parse(tracking)))
        });
        Self { bases, tokens: tokens.collect() }
    }

    /// Believes only bases whose reference point is among those of the host. One that is gone was removed by
    /// somebody who had a reason, such as a restore that wrote into the disks behind the host's back.
    pub fn require_points(&mut self, points: &[ReferencePointRecord]) {
        for token in self.tokens.values_mut() {
            if let Ok(known) = token
                && !points.iter().any(|point| same_point(&point.instance_id, &known.point))
            {
                *token = Err("its reference point is gone from the host".into());
            }
        }
    }

    /// The reference points of `line` and `vm` that the base needs.
    pub fn points(&self, line: &str, vm: Uuid) -> Vec<String> {
        let tokens = self.tokens.values().flatten();
        let ours = tokens.filter(|token| token.line == line && token.vm == vm);
        let mut points: Vec<String> = ours.map(|token| token.point.clone()).collect();
        points.sort();
        points.dedup();
        points
    }

    /// The base of the disk `id` with the GUID `disk`: the one in its place if it is the same disk, else the only one
    /// with its GUID, which has moved.
    fn find(&self, id: &DiskId, disk: Option<Uuid>) -> Option<&'a DiskId> {
        let is_it = |token: &Result<BaseToken, String>| {
            token.as_ref().is_ok_and(|token| Some(token.disk) == disk)
        };
        if self.tokens.get(id).is_some_and(is_it) {
            return self.bases.get_key_value(id).map(|(id, _)| id);
        }
        let mut moved = self.tokens.iter().filter(|(_, token)| is_it(token)).map(|(id, _)| *id);
        match (moved.next(), moved.next()) {
            (Some(from), None) => Some(from),
            _ => self.bases.get_key_value(id).map(|(id, _)| id),
        }
    }
}

/// Opens the disks and asks what changed on each. The configuration learns what their files say.
///
/// # Errors
/// Where a disk cannot be opened: a restore point without it would be incomplete. Change tracking that fails is only a
/// reason to read all of that disk.
pub(crate) fn open(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    attachments: Vec<DiskAttachment>,
    bases: &Bases<'_>,
    gates: &Gates,
    configuration: &mut Configuration,
    request: &FreezeRequest,
) -> Result<Vec<OpenDisk>> {
    let mut files = Vec::with_capacity(attachments.len());
    for attachment in &attachments {
        request.cancel.check()?;
        let file = open_file(hyperv, attachment)?;
        configuration.set_disk(attachment, &file);
        files.push(file);
    }
    let mut opened = Vec::with_capacity(files.len());
    for (attachment, file) in attachments.into_iter().zip(&files) {
        let twin = files.iter().filter(|other| other.disk_id == file.disk_id).count() > 1;
        let id = id_of(&attachment);
        let base = bases.find(&id, file.disk_id.filter(|_| !twin));
        let untracked = gates.untracked(&attachment, file);
        let trackable = untracked.is_none();
        let changes = match (untracked, base) {
            (Some(reason), _) => Changes::Everything(reason),
            (None, None) => Changes::Everything(FullReason::FirstBackup),
            (None, Some(base)) => changes(hyperv, vm, &attachment, file, bases, base, request)?,
        };
        // A disk that is read in full is stored on top of what was in its place, and no worse for it.
        let moved_from = base.filter(|base| **base != id && matches!(changes, Changes::Ranges(_)));
        let moved_from = moved_from.cloned();
        let open = open_disk(vm, id, attachment, file, changes);
        opened.push(OpenDisk { moved_from, trackable, ..open });
    }
    Ok(opened)
}

fn open_disk(
    vm: &VmRecord,
    id: DiskId,
    attachment: DiskAttachment,
    file: &FrozenFile,
    changes: Changes,
) -> OpenDisk {
    let name = format!("{} {id} ({})", vm.name, attachment.host_resource);
    let device = Arc::new(FrozenDevice::new(name, Arc::clone(&file.device)));
    OpenDisk {
        frozen: FrozenDisk {
            id,
            device: Arc::clone(&device) as Arc<dyn vmtide_block::BlockDevice>,
            changes,
            // The host names the moment when the checkpoint becomes a reference point.
            tracking: None,
        },
        device,
        attachment,
        file: FileFacts::from(file),
        moved_from: None,
        trackable: true,
    }
}

fn open_file(hyperv: &HypervHypervisor, attachment: &DiskAttachment) -> Result<FrozenFile> {
    let path = &attachment.host_resource;
    hyperv.files().open_disk(path).map_err(|error| match error {
        HypervisorError::Busy { detail, .. } => HypervisorError::failed(
            format!("open the frozen disk {path}"),
            format!("another program holds it ({detail}); exclude *.vhdx and *.avhdx from virus scanners"),
        ),
        other => other,
    })
}

/// What may differ from the base.
fn changes(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    attachment: &DiskAttachment,
    file: &FrozenFile,
    bases: &Bases<'_>,
    base: &DiskId,
    request: &FreezeRequest,
) -> Result<Changes> {
    let full = |reason| Ok(Changes::Everything(reason));
    let token = match bases.tokens.get(base) {
        None => return full(FullReason::NoTrackingId),
        Some(Err(why)) => return full(FullReason::TrackingLost(why.clone())),
        Some(Ok(token)) => token,
    };
    if let Some(reason) = token.doubt(vm.id, &FileFacts::from(file)) {
        return full(reason);
    }
    let size_bytes = file.device.size_bytes();
    if let Some(known) = bases.bases.get(base).filter(|known| known.size_bytes != size_bytes) {
        return full(FullReason::Resized { from_bytes: known.size_bytes, to_bytes: size_bytes });
    }
    let path = &attachment.host_resource;
    let answer = changed_since(hyperv.files(), path, &token.rct, size_bytes, &request.cancel)?;
    Ok(match answer {
        Ok(ranges) => Changes::Ranges(ranges),
        Err(reason) => Changes::Everything(reason),
    })
}
