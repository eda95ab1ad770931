//! The disks of a checkpoint: opened, and each asked what changed since the moment of its base.

use crate::cycle::HypervHypervisor;
use crate::cycle::changes::changed_since;
use crate::cycle::device::FrozenDevice;
use crate::cycle::exclusions;
use crate::cycle::gate::Gates;
use crate::cycle::line::Line;
use crate::cycle::points::same_point;
use crate::cycle::token::{self, BaseToken, FileFacts};
use crate::restore::OutdatedPoints;
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
    /// What is kept of the checkpoints of users, by which a revert shows at the next backup.
    pub held: String,
    /// The disk it was at the base, where it stood elsewhere.
    pub moved_from: Option<DiskId>,
    /// Whether its changes can be tracked.
    pub trackable: bool,
}

/// The id by which people and restore points know a disk.
pub(crate) fn id_of(attachment: &DiskAttachment) -> DiskId {
    DiskId(attachment.location.to_string())
}

/// The disks that a checkpoint holds.
pub(crate) struct HeldDisks {
    /// Those that are backed up.
    pub wanted: Vec<DiskAttachment>,
    /// Those that the user leaves out. They are opened all the same, only to learn which disks they are: their places
    /// are no proof of that.
    pub excluded: Vec<DiskAttachment>,
    /// The checkpoints of users beside it.
    pub line: Line,
}

/// The bases of a request by disk, with their tokens read.
pub(crate) struct Bases<'a> {
    bases: &'a BTreeMap<DiskId, Base>,
    tokens: BTreeMap<&'a DiskId, Result<BaseToken, String>>,
    /// The GUIDs of the disks, also of those whose tokens are of no use any more.
    pub guids: Vec<(&'a DiskId, Uuid)>,
}

impl<'a> Bases<'a> {
    /// Reads the tokens of a request.
    pub fn of(bases: &'a BTreeMap<DiskId, Base>) -> Self {
        let tokens = bases.iter().filter_map(|(id, base)| {
            base.tracking.as_ref().map(|tracking| (id, BaseToken::parse(tracking)))
        });
        let tokens: BTreeMap<_, _> = tokens.collect();
        let guid_of = |(id, token): (&&'a DiskId, &Result<BaseToken, String>)| {
            token.as_ref().ok().map(|token| (*id, token.disk))
        };
        let guids = tokens.iter().filter_map(guid_of).collect();
        Self { bases, tokens, guids }
    }

    /// Whether several disks of the base have this GUID, so that it does not tell which of them a disk is.
    fn has_twins(&self, disk: Uuid) -> bool {
        self.guids.iter().filter(|(_, guid)| *guid == disk).count() > 1
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

    /// Believes no base whose reference point a restore in place has outdated.
    pub fn forget_points(&mut self, outdated: &OutdatedPoints) {
        for token in self.tokens.values_mut() {
            if let Ok(known) = token
                && outdated.holds(&known.point)
            {
                *token = Err(
                    "a restore in place has written its disks since, which the host does not track"
                        .into(),
                );
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

/// Opens the disks and asks what changed on each. The configuration learns what their files say, and has the warnings.
///
/// # Errors
/// Where a disk cannot be opened: a restore point without it would be incomplete; and where an exclusion hits a disk
/// that the base has in another place. Change tracking that fails is only a reason to read all of that disk.
pub(crate) fn open(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    held: HeldDisks,
    bases: &Bases<'_>,
    gates: &Gates,
    configuration: &mut Configuration,
    request: &FreezeRequest,
) -> Result<Vec<OpenDisk>> {
    let mut files = Vec::with_capacity(held.wanted.len());
    for attachment in &held.wanted {
        request.cancel.check()?;
        let file = open_file(hyperv, attachment)?;
        configuration.set_disk(attachment, &file);
        files.push(file);
    }
    let here: Vec<Uuid> = files.iter().filter_map(|file| file.disk_id).collect();
    let excluded = exclusions::look_at(hyperv, &held.excluded, request)?;
    configuration.warnings.extend(exclusions::check(&vm.name, bases, &here, &excluded)?);
    let guids: Vec<Uuid> = here.into_iter().chain(exclusions::guids(&excluded)).collect();
    let mut opened = Vec::with_capacity(files.len());
    for (attachment, file) in held.wanted.into_iter().zip(&files) {
        let id = id_of(&attachment);
        let twin = |guid: &Uuid| guids.iter().filter(|other| *other == guid).count() > 1;
        let untracked = gates
            .untracked(&attachment, file)
            .or_else(|| file.disk_id.filter(twin).map(|guid| not_apart(guid, "of the VM")));
        // A disk with a twin gets no base either: the other one could stand in its place at the next backup.
        let trackable = untracked.is_none();
        let twins_before = file.disk_id.filter(|guid| bases.has_twins(*guid));
        let untracked = untracked
            .or_else(|| twins_before.map(|guid| not_apart(guid, "of the previous restore point")));
        let base = bases.find(&id, file.disk_id);
        let changes = match (untracked, base) {
            (Some(reason), _) => Changes::Everything(reason),
            (None, None) => Changes::Everything(FullReason::FirstBackup),
            (None, Some(base)) => {
                let disk = Frozen { attachment: &attachment, file, line: &held.line };
                changes(hyperv, vm, &disk, bases, base, request)?
            }
        };
        // A disk that is read in full is stored on top of what was in its place, and no worse for it.
        let moved_from = base.filter(|base| **base != id && matches!(changes, Changes::Ranges(_)));
        let moved_from = moved_from.cloned();
        let kept = held.line.to_keep(&attachment.host_resource);
        let open = open_disk(vm, id, attachment, file, changes);
        opened.push(OpenDisk { moved_from, trackable, held: kept, ..open });
    }
    Ok(opened)
}

/// Why a disk whose GUID others have as well is read in full: differencing files of one parent have its GUID, and so
/// have copies of a file, and what changed on one says nothing of the other.
fn not_apart(guid: Uuid, whose: &str) -> FullReason {
    FullReason::NoTracking(format!("two disks {whose} have the id {guid} and cannot be told apart"))
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
        held: String::new(),
        moved_from: None,
        trackable: true,
    }
}

pub(super) fn open_file(
    hyperv: &HypervHypervisor,
    attachment: &DiskAttachment,
) -> Result<FrozenFile> {
    let path = &attachment.host_resource;
    hyperv.files().open_disk(path).map_err(|error| match error {
        HypervisorError::Busy { detail, .. } => HypervisorError::failed(
            format!("open the frozen disk {path}"),
            format!("another program holds it ({detail}); exclude *.vhdx and *.avhdx from virus scanners"),
        ),
        other => other,
    })
}

/// A disk as the checkpoint holds it.
struct Frozen<'a> {
    attachment: &'a DiskAttachment,
    file: &'a FrozenFile,
    line: &'a Line,
}

/// What may differ from the base.
fn changes(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    disk: &Frozen<'_>,
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
    let Frozen { attachment, file, line } = disk;
    let newest = file.most_recent_tracking_id.as_deref();
    let doubt = token
        .doubt(vm.id, &FileFacts::from(*file))
        .or_else(|| line.doubt(attachment, token.held.as_deref()))
        .or_else(|| token::order_doubt(&token.rct, newest, true));
    if let Some(reason) = doubt {
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
