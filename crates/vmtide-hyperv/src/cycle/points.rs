//! What a reference point says, held against what must be true of it before its ids are used as a base.

use crate::cycle::token::{check_tracking_id, is_not_later};
use crate::{DiskAttachment, ReferencePointRecord};
use uuid::Uuid;

/// `ReferencePointType`: by resilient change tracking. (The page of `CreateReferencePoint` numbers them otherwise, which
/// is why that method is not used.)
const RESILIENT: u16 = 2;

/// A disk that was frozen, as far as its tracking id is to be found.
pub(crate) struct SealedDisk<'a> {
    /// The attachment that the checkpoint held.
    pub attachment: &'a DiskAttachment,
    /// `VIRTUAL_DISK_ID`.
    pub disk: Option<Uuid>,
    /// The most recent id that the frozen file knew; none where the way to it cannot tell.
    pub most_recent: Option<&'a str>,
}

/// Why no id of the point can be a base; none where they can.
pub(crate) fn defect(point: &ReferencePointRecord, vm: Uuid) -> Option<String> {
    if point.vm != vm {
        return Some(format!("it is of the VM {}", point.vm));
    }
    if point.kind != RESILIENT {
        return Some(format!(
            "it has the type {} and not {RESILIENT}, by change tracking",
            point.kind
        ));
    }
    let (disks, ids) = (point.disk_identifiers.len(), point.tracking_ids.len());
    if disks != ids {
        return Some(format!("it names {disks} disks and {ids} tracking ids"));
    }
    if ids == 0 {
        return Some("it names no tracking ids".into());
    }
    None
}

/// The tracking id of a disk in a point without a [`defect`].
///
/// # Errors
/// Why there is none that can be a base.
pub(crate) fn id_of<'a>(
    point: &'a ReferencePointRecord,
    disk: &SealedDisk<'_>,
) -> Result<&'a str, String> {
    let pairs = point.disk_identifiers.iter().zip(&point.tracking_ids);
    let mut found =
        pairs.filter(|(identifier, _)| is_of(identifier, disk)).map(|(_, id)| id.as_str());
    let id = found.next().ok_or("the reference point does not name it")?;
    if found.any(|other| other != id) {
        return Err("the reference point names it twice".into());
    }
    check_tracking_id(id)?;
    match disk.most_recent {
        Some(frozen) if !is_not_later(id, frozen) => Err(format!(
            "the reference point seals {id}, and the frozen file is of {frozen}, which may be earlier"
        )),
        Some(frozen) if !id.eq_ignore_ascii_case(frozen) => {
            tracing::info!(sealed = id, frozen, "the reference point seals an earlier moment");
            Ok(id)
        }
        _ => Ok(id),
    }
}

/// Whether an element of `VirtualDiskIdentifiers` means the disk. It is the `InstanceID` of an allocation of the
/// checkpoint or of the VM, `Microsoft:OWNER\DISK\CONTROLLER\LOCATION\L`: what follows the owner is the same in both.
fn is_of(identifier: &str, disk: &SealedDisk<'_>) -> bool {
    let own = &disk.attachment.instance_id;
    let tail = |text: &str| text.split_once('\\').map(|(_, tail)| tail.to_lowercase());
    identifier.eq_ignore_ascii_case(own)
        || tail(identifier).is_some_and(|found| tail(own).as_ref() == Some(&found))
        || disk.disk.is_some_and(|id| identifier.trim_matches(['{', '}']).parse() == Ok(id))
}

/// Whether two `InstanceID`s name the same reference point: `Microsoft:VM\POINT` becomes `Microsoft:POINT` when the host is
/// upgraded.
pub(crate) fn same_point(one: &str, other: &str) -> bool {
    let own = |id: &str| id.rsplit(['\\', ':']).next().unwrap_or(id).to_lowercase();
    one.eq_ignore_ascii_case(other) || (!own(one).is_empty() && own(one) == own(other))
}

/// Whether a reference point is among these `InstanceID`s.
pub(crate) fn is_among(id: &str, ids: &[String]) -> bool {
    ids.iter().any(|other| same_point(id, other))
}

/// The point that came of one of our `checkpoints`, among those that were not there before: by the ids that its frozen files
/// were sealed under, which no other point has; because it names the disks of that checkpoint, whose id no other has; or else
/// as a result of the host's job. None where nothing proves it: that it is new does not, as other products convert
/// checkpoints of theirs.
pub(crate) fn made_of<'a>(
    points: &'a [ReferencePointRecord],
    before: &[String],
    tracking: &[String],
    checkpoints: &[String],
    named: impl FnOnce() -> Vec<String>,
) -> Option<&'a ReferencePointRecord> {
    let new = || points.iter().filter(|point| !is_among(&point.instance_id, before));
    let known = |id: &String| tracking.iter().any(|frozen| frozen.eq_ignore_ascii_case(id));
    let by_ids =
        only(new().filter(|point| {
            !point.tracking_ids.is_empty() && point.tracking_ids.iter().any(known)
        }));
    if by_ids.is_some() || new().next().is_none() {
        return by_ids;
    }
    if let Some(point) = only(new().filter(|point| is_of_checkpoints(point, checkpoints))) {
        return Some(point);
    }
    let named = named();
    only(new().filter(|point| is_among(&point.instance_id, &named)))
}

/// Whether all the disks that a point names are those of one of these checkpoints: `Microsoft:CHECKPOINT\DISK\…`. Some
/// hosts name those of the VM.
fn is_of_checkpoints(point: &ReferencePointRecord, checkpoints: &[String]) -> bool {
    let owner =
        |identifier: &String| identifier.split_once('\\').map(|(owner, _)| owner.to_owned());
    let is_of = |identifier: &String, checkpoint: &String| {
        owner(identifier).is_some_and(|owner| owner.eq_ignore_ascii_case(checkpoint))
    };
    !point.disk_identifiers.is_empty()
        && checkpoints.iter().any(|id| point.disk_identifiers.iter().all(|disk| is_of(disk, id)))
}

/// The element of an iterator that has one.
pub(crate) fn only<T>(mut found: impl Iterator<Item = T>) -> Option<T> {
    let one = found.next()?;
    found.next().is_none().then_some(one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ControllerKind, DiskLocation};
    use vmtide_cim::{CimInstance, ObjectPath};

    fn attachment(instance_id: &str) -> DiskAttachment {
        DiskAttachment {
            instance_id: instance_id.into(),
            path: ObjectPath::default(),
            host_resource: r"C:\a.vhdx".into(),
            location: DiskLocation {
                controller: ControllerKind::Scsi,
                controller_number: 0,
                location: 0,
            },
            pass_through: false,
            shared: false,
            instance: CimInstance::default(),
        }
    }

    fn point(disks: &[&str], ids: &[&str]) -> ReferencePointRecord {
        ReferencePointRecord {
            instance_id: "Microsoft:P".into(),
            vm: Uuid::from_u128(1),
            kind: 2,
            consistency: None,
            disk_identifiers: disks.iter().map(|id| (*id).to_owned()).collect(),
            tracking_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        }
    }

    #[test]
    fn a_point_is_held_against_what_must_be_true_of_it() {
        let vm = Uuid::from_u128(1);
        let good = point(&["a"], &["x"]);
        assert_eq!(defect(&good, vm), None);
        assert!(defect(&good, Uuid::nil()).is_some());
        assert!(defect(&ReferencePointRecord { kind: 1, ..good.clone() }, vm).is_some());
        assert!(defect(&point(&["a", "b"], &["x"]), vm).is_some());
        assert!(defect(&point(&[], &[]), vm).is_some());
    }

    #[test]
    fn a_disk_is_found_by_what_the_vm_or_the_checkpoint_calls_it() {
        let attachment = attachment(r"Microsoft:SNAP\D1\0\0\L");
        let disk = SealedDisk {
            attachment: &attachment,
            disk: Some(Uuid::from_u128(7)),
            most_recent: None,
        };
        for name in [
            r"microsoft:snap\d1\0\0\L",
            r"Microsoft:VM\D1\0\0\L",
            "00000000-0000-0000-0000-000000000007",
        ] {
            assert_eq!(id_of(&point(&["other", name], &["y", "x"]), &disk), Ok("x"), "{name}");
        }
        assert!(id_of(&point(&[r"Microsoft:VM\D2\0\0\L"], &["x"]), &disk).is_err());
        let twice = point(&[r"Microsoft:VM\D1\0\0\L", r"Microsoft:SNAP\D1\0\0\L"], &["x", "y"]);
        assert!(id_of(&twice, &disk).is_err());
        assert!(id_of(&point(&[r"Microsoft:VM\D1\0\0\L"], &[""]), &disk).is_err());
    }

    #[test]
    fn an_id_of_a_later_moment_is_no_base() {
        let attachment = attachment(r"M:S\D");
        let id = |counter: u32| format!("rctX:a:{counter:08}");
        let frozen = id(4);
        let disk = SealedDisk { attachment: &attachment, disk: None, most_recent: Some(&frozen) };
        for (counter, good) in [(3, true), (4, true), (5, false)] {
            assert_eq!(
                id_of(&point(&[r"M:V\D"], &[&id(counter)]), &disk).is_ok(),
                good,
                "{counter}"
            );
        }
    }

    #[test]
    fn only_a_point_with_our_ids_is_ours() {
        let mut points = vec![point(&["a"], &["x"]), point(&["a"], &["y"])];
        points[1].instance_id = "Microsoft:Q".into();
        let found = made_of(&points, &[], &["Y".into()], &[], Vec::new);
        assert_eq!(found.map(|point| point.instance_id.as_str()), Some("Microsoft:Q"));
        assert_eq!(made_of(&points, &["Microsoft:Q".into()], &["y".into()], &[], Vec::new), None);
        assert_eq!(made_of(&points, &[], &["x".into(), "y".into()], &[], Vec::new), None);
        assert_eq!(made_of(&points, &[], &[], &[], Vec::new), None);
        let named = |id: &str| made_of(&points, &[], &[], &[], || vec![id.to_owned()]);
        assert_eq!(named("Microsoft:Q"), Some(&points[1]));
        assert_eq!(named("Microsoft:R"), None);
    }

    #[test]
    fn a_point_that_names_the_disks_of_our_checkpoint_is_ours() {
        let mut points = vec![point(&[r"Microsoft:VM\d"], &[]), point(&[r"Microsoft:VM\d"], &[])];
        points[1].instance_id = "Microsoft:Q".into();
        let ours = ["microsoft:snap".to_owned()];
        let find = |points: &[ReferencePointRecord]| {
            made_of(points, &[], &[], &ours, Vec::new).map(|point| point.instance_id.clone())
        };
        assert_eq!(find(&points), None);
        points[1].disk_identifiers = vec![r"Microsoft:SNAP\d".into(), r"Microsoft:SNAP\e".into()];
        assert_eq!(find(&points).as_deref(), Some("Microsoft:Q"));
        points[1].disk_identifiers.push(r"Microsoft:SNAP2\f".into());
        assert_eq!(find(&points), None);
        points[1].disk_identifiers.clear();
        assert_eq!(find(&points), None);
    }

    #[test]
    fn a_point_is_the_same_after_the_host_was_upgraded() {
        let (vm, point, other) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let long = format!(r"Microsoft:{vm}\{point}");
        assert!(same_point(&long, &format!("Microsoft:{point}").to_uppercase()));
        assert!(!same_point(&long, &format!("Microsoft:{other}")));
        assert!(!same_point(&long, &format!("Microsoft:{vm}")));
        assert!(!same_point(r"a\", r"b\") && same_point("A:p", "a:P"));
    }
}
