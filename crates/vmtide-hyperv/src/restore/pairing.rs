//! Which disk of a VM that is restored in place is which of the restore point, and what it holds.
//!
//! The place of a disk alone does not tell: disks are swapped, and controllers are counted anew where one is
//! added. Writing one disk's content over another could not be undone. So where the restore point knows the id
//! in the image (`VIRTUAL_DISK_ID`), the disk must have it, in its old place or in another. Only a user who says
//! that the VM is another one ([`InPlaceRequest::into_other_vm`]), such as a copy that is to be refreshed, has
//! disks without that id matched by their places.

use super::hardware::PLATFORM;
use super::host_path::{extension_of, file_name_of};
use super::outdated::Notes;
use super::{HypervRestorer, refused, tracking};
use crate::cycle::{BaseToken, FileFacts, Line, changed_since, order_doubt, same_point};
use crate::model::read::parse_uuid;
use crate::model::types::{DiskAttachment, ReferencePointRecord, VmRecord};
use uuid::Uuid;
use vmtide_hypervisor::{
    DiskContent, DiskToRestore, FullReason, HypervisorError, InPlaceRequest, Result,
};

/// A disk of the request with the one of the VM.
pub(super) struct Pair<'a> {
    pub wanted: &'a DiskToRestore,
    pub attachment: DiskAttachment,
    pub content: DiskContent,
    /// How many bytes larger than in the restore point it is.
    larger_by_bytes: u64,
    /// Whether another disk of the VM has the same id, so that what the host tracks may be the other's.
    twin: bool,
}

impl Pair<'_> {
    /// What the user should know of it.
    pub fn warnings(&self) -> Vec<String> {
        let place = self.attachment.location.to_string();
        let id = &self.wanted.id;
        let mut warnings = Vec::new();
        if place != id.0 {
            warnings.push(format!("the disk {id} of the restore point is {place} now, by its id"));
        }
        // Less is what a platform added to have whole sectors.
        if self.larger_by_bytes >= 4096 {
            warnings.push(format!(
                "disk {id} has grown by {} bytes since the restore point: what lies behind its end then is left \
                 as it is, and the partition table of the guest does not know of it",
                self.larger_by_bytes
            ));
        }
        warnings
    }
}

/// The disks of the VM for all disks of the request, with what they hold.
///
/// # Errors
/// Where one is not there, is another disk, cannot be written, or is smaller.
pub(super) fn pairs_of<'a>(
    restorer: &HypervRestorer,
    vm: &VmRecord,
    request: &'a InPlaceRequest,
) -> Result<Vec<Pair<'a>>> {
    let what = || format!("restore {} in place", vm.name);
    let config = &request.config;
    let own = config.id.as_ref().and_then(|id| parse_uuid(id));
    let is_other = config.platform == PLATFORM && own.is_some_and(|id| id != vm.id);
    if is_other && !request.into_other_vm {
        return Err(refused(
            what(),
            format!(
                "it is not the VM of the restore point, {} with the id {}: name that one, or restore to a \
                 new VM; --into-other-vm overwrites this one's disks",
                config.name,
                own.unwrap_or_default()
            ),
        ));
    }
    let attached = restorer.host().disks(&vm.settings)?;
    let mut pairs: Vec<Pair<'_>> = Vec::with_capacity(request.disks.len());
    for wanted in &request.disks {
        let pair = pair_of(restorer, vm, request, wanted, &attached)?;
        check_writable(vm, wanted, &pair.attachment)?;
        let path = &pair.attachment.host_resource;
        if pairs.iter().any(|one| one.attachment.host_resource.eq_ignore_ascii_case(path)) {
            return Err(refused(
                what(),
                format!("two disks of the restore point mean {path}: restore to a new VM"),
            ));
        }
        pairs.push(pair);
    }
    let mut points = tracking::points_of(restorer.host(), vm.id)?;
    let outdated = Notes::beside(restorer.files(), vm.id, &attached).read()?;
    points.retain(|point| !outdated.holds(&point.instance_id));
    for pair in &mut pairs {
        if let Some(content) = tracked_content(restorer, vm, pair, &points, request)? {
            pair.content = content;
        }
    }
    Ok(pairs)
}

/// The disk of the VM that a disk of the restore point is.
fn pair_of<'a>(
    restorer: &HypervRestorer,
    vm: &VmRecord,
    request: &InPlaceRequest,
    wanted: &'a DiskToRestore,
    attached: &[DiskAttachment],
) -> Result<Pair<'a>> {
    let what = || format!("restore {} in place", vm.name);
    let found = |attachment: &DiskAttachment, twin| {
        let content = DiskContent::Unknown(FullReason::NoTrackingId);
        Ok(Pair { wanted, attachment: attachment.clone(), content, larger_by_bytes: 0, twin })
    };
    let is_in_place = |disk: &&DiskAttachment| disk.location.to_string() == wanted.id.0;
    let in_place = attached.iter().find(is_in_place);
    let missing = || {
        let there: Vec<_> = attached.iter().map(|disk| disk.location.to_string()).collect();
        refused(what(), format!("it has no disk {} now (it has {})", wanted.id, there.join(", ")))
    };
    let Some(known) = known_id(wanted, request) else {
        return found(in_place.ok_or_else(missing)?, false);
    };
    // One that cannot be opened is not the one that is looked for.
    let has_id = |disk: &&DiskAttachment| {
        !disk.pass_through
            && !disk.shared
            && restorer
                .files()
                .open_disk(&disk.host_resource)
                .is_ok_and(|file| file.disk_id == Some(known))
    };
    let others: Vec<_> = attached.iter().filter(|disk| !is_in_place(disk)).filter(has_id).collect();
    let mut now = None;
    if let Some(disk) = in_place {
        check_writable(vm, wanted, disk)?;
        now = restorer.files().open_disk(&disk.host_resource)?.disk_id;
        if now == Some(known) {
            return found(disk, !others.is_empty());
        }
    }
    match (others.as_slice(), in_place) {
        ([one], _) => found(one, false),
        (_, Some(disk)) if request.into_other_vm => {
            tracing::info!(disk = %disk.host_resource, "is overwritten, whatever disk it was");
            found(disk, false)
        }
        ([], None) => Err(missing()),
        ([], Some(disk)) => Err(refused(
            what(),
            format!(
                "{} ({}) is another disk than in the restore point: its id was {known} and is {}; \
                 attach the disk that it was, or restore to a new VM; --into-other-vm overwrites it",
                wanted.id,
                disk.host_resource,
                now.map_or_else(|| "not known".to_owned(), |id| id.to_string())
            ),
        )),
        _ => Err(refused(
            what(),
            format!(
                "several of its disks have the id of disk {}, {known}: restore to a new VM",
                wanted.id
            ),
        )),
    }
}

/// The id in the image of a disk of the restore point, where it knows it.
fn known_id(wanted: &DiskToRestore, request: &InPlaceRequest) -> Option<Uuid> {
    let token = wanted.tracking.as_ref().and_then(|tracking| BaseToken::parse(tracking).ok());
    token.map(|token| token.disk).or_else(|| {
        let disk = request.config.disks.iter().find(|disk| disk.id == wanted.id)?;
        parse_uuid(disk.image_id.as_ref()?)
    })
}

/// Whether the file of a disk is all of it, and only this VM's.
fn check_writable(vm: &VmRecord, wanted: &DiskToRestore, disk: &DiskAttachment) -> Result<()> {
    let what = || format!("restore {} in place", vm.name);
    if disk.pass_through || disk.shared {
        return Err(HypervisorError::Unsupported {
            what: what(),
            detail: format!("disk {} is handed through or shared", wanted.id),
        });
    }
    let extension = extension_of(file_name_of(&disk.host_resource)).to_lowercase();
    if extension == "avhdx" || extension == "avhd" {
        return Err(refused(
            what(),
            format!("disk {} is still being merged into its base: wait for it", wanted.id),
        ));
    }
    Ok(())
}

/// What the disk holds, by the host's change tracking since the restore point; none where its tracking id
/// says nothing. Checks the size on the way.
fn tracked_content(
    restorer: &HypervRestorer,
    vm: &VmRecord,
    pair: &mut Pair<'_>,
    points: &[ReferencePointRecord],
    request: &InPlaceRequest,
) -> Result<Option<DiskContent>> {
    let path = &pair.attachment.host_resource;
    let file = restorer.files().open_disk(path)?;
    let size_bytes = file.device.size_bytes();
    if size_bytes < pair.wanted.size_bytes {
        return Err(refused(
            format!("restore {} in place", vm.name),
            format!(
                "disk {} has {size_bytes} bytes, and {} in the restore point: restore to a new VM",
                pair.wanted.id, pair.wanted.size_bytes
            ),
        ));
    }
    pair.larger_by_bytes = size_bytes - pair.wanted.size_bytes;
    let Some(tracking) = &pair.wanted.tracking else { return Ok(None) };
    let unknown = |reason| Ok(Some(DiskContent::Unknown(reason)));
    let token = match BaseToken::parse(tracking) {
        Ok(token) => token,
        Err(why) => return unknown(FullReason::TrackingLost(why)),
    };
    if let Some(doubt) = token.doubt(vm.id, &FileFacts::from(&file)) {
        return unknown(doubt);
    }
    let line = Line::of(restorer.host(), vm.id, &vm.settings)?;
    let newest = file.most_recent_tracking_id.as_deref();
    let reverted = line
        .doubt(&pair.attachment, token.held.as_deref())
        .or_else(|| order_doubt(&token.rct, newest, false));
    if let Some(doubt) = reverted {
        return unknown(doubt);
    }
    if pair.twin {
        return unknown(FullReason::TrackingLost("another disk of the VM has the same id".into()));
    }
    // Its id may outlive it, and a restore that removed it has written what the host does not know of.
    if !points.iter().any(|point| same_point(&point.instance_id, &token.point)) {
        return unknown(FullReason::TrackingLost(
            "its reference point is gone from the host".into(),
        ));
    }
    drop(file);
    let answer = changed_since(restorer.files(), path, &token.rct, size_bytes, &request.cancel)?;
    Ok(Some(match answer {
        Ok(ranges) => DiskContent::DiffersWithin(ranges),
        Err(reason) => DiskContent::Unknown(reason),
    }))
}
