//! Decides, per disk and before anything is touched, which bitmap answers what changed, or why
//! none does.
//!
//! The request names the base: the tracking id of the last *committed* restore point. That also
//! settles what a killed job left: of two bitmaps of one lineage the one the base names is the
//! right one, whichever is older, because every bitmap keeps recording from its own moment until
//! it is removed.

use crate::inventory::{Bitmap, Drive};
use crate::names::{self, GRANULARITY_BYTES, Mark};
use vmtide_hypervisor::{Base, FreezeRequest, FullReason, TrackingId};

/// Bitmaps of one lineage kept on one disk while no base says which is right. More can only come
/// from as many killed full backups in a row; then they go, and the next backup reads in full.
const MAX_UNDECIDED: usize = 4;

/// What is to be done with one disk.
#[derive(Clone, Debug)]
pub(crate) struct DiskPlan {
    /// Its number in this job, part of the names of what is made for it.
    pub index: usize,
    pub drive: Drive,
    /// The bitmap that holds what changed since the base, or why none does.
    pub base: Result<String, FullReason>,
    /// Bitmaps of this lineage that can be of no use any more.
    pub useless: Vec<String>,
    /// The bitmap that starts at this moment.
    pub mark: Mark,
}

impl DiskPlan {
    /// The tracking id of this moment.
    pub fn tracking(&self) -> TrackingId {
        self.mark.to_id()
    }
}

/// Plans all disks that are not excluded.
pub(crate) fn plan(drives: &[Drive], request: &FreezeRequest) -> Vec<DiskPlan> {
    drives
        .iter()
        .filter(|drive| !request.exclude.contains(&drive.id))
        .enumerate()
        .map(|(index, drive)| {
            let base = find_base(drive, request);
            DiskPlan {
                index,
                useless: useless(drive, &base, &request.lineage),
                mark: Mark {
                    bitmap: names::tracking(&request.lineage, &request.job, &drive.id),
                    granularity: GRANULARITY_BYTES,
                    persistent: drive.keeps_bitmaps,
                    driver: drive.driver.clone(),
                },
                drive: drive.clone(),
                base,
            }
        })
        .collect()
}

fn find_base(drive: &Drive, request: &FreezeRequest) -> Result<String, FullReason> {
    let Some(base) = request.bases.get(&drive.id) else {
        return Err(FullReason::FirstBackup);
    };
    let mark = mark_of(base, &request.lineage)?;
    if base.size_bytes != drive.size_bytes {
        return Err(FullReason::Resized {
            from_bytes: base.size_bytes,
            to_bytes: drive.size_bytes,
        });
    }
    if !is_of(&mark.bitmap, drive) {
        return Err(FullReason::TrackingLost(format!(
            "bitmap {} does not belong to disk {}",
            mark.bitmap, drive.id
        )));
    }
    let Some(bitmap) = drive.bitmaps.iter().find(|b| b.name == mark.bitmap) else {
        return Err(missing(&mark, drive, &request.lineage));
    };
    check(bitmap, &mark, drive)?;
    Ok(mark.bitmap)
}

/// Reads the base's tracking id.
pub(crate) fn mark_of(base: &Base, lineage: &str) -> Result<Mark, FullReason> {
    let Some(id) = &base.tracking else {
        return Err(FullReason::NoTrackingId);
    };
    let mark = Mark::parse(id)
        .ok_or_else(|| FullReason::TrackingLost(format!("{id} names no bitmap of QEMU")))?;
    if names::parse_tracking(&mark.bitmap).is_none_or(|name| name.lineage != lineage) {
        return Err(FullReason::TrackingLost(format!(
            "bitmap {} belongs to another repository or VM",
            mark.bitmap
        )));
    }
    Ok(mark)
}

fn is_of(bitmap: &str, drive: &Drive) -> bool {
    names::parse_tracking(bitmap).is_some_and(|name| name.is_of(&drive.id))
}

fn missing(mark: &Mark, drive: &Drive, lineage: &str) -> FullReason {
    // Images carry their bitmaps along when they change places.
    let foreign = drive.bitmaps.iter().find(|bitmap| {
        names::parse_tracking(&bitmap.name)
            .is_some_and(|name| name.lineage == lineage && !name.is_of(&drive.id))
    });
    if let Some(foreign) = foreign {
        return FullReason::DiskReplaced(format!(
            "node {} has bitmap {}, which belongs to another disk of this VM",
            drive.node, foreign.name
        ));
    }
    let hint = if mark.persistent {
        "the disk was replaced, restored from a copy, or put on an external snapshot"
    } else {
        "it was kept in QEMU's memory only, and QEMU was restarted or the disk plugged anew"
    };
    FullReason::TrackingLost(format!(
        "bitmap {} is not on node {}: {hint}",
        mark.bitmap, drive.node
    ))
}

/// Whether a bitmap that was found can be believed.
pub(crate) fn check(bitmap: &Bitmap, mark: &Mark, drive: &Drive) -> Result<(), FullReason> {
    let name = &bitmap.name;
    if bitmap.inconsistent {
        return Err(FullReason::TrackingInconsistent(format!(
            "bitmap {name} was not saved when QEMU or the host ended without warning"
        )));
    }
    if mark.driver != drive.driver {
        return Err(FullReason::DiskReplaced(format!(
            "the image was {} and is {} now",
            mark.driver, drive.driver
        )));
    }
    if bitmap.granularity_bytes != mark.granularity || bitmap.persistent != mark.persistent {
        return Err(FullReason::TrackingLost(format!(
            "bitmap {name} was made anew by somebody else"
        )));
    }
    if !bitmap.recording {
        return Err(FullReason::TrackingLost(format!(
            "bitmap {name} was switched off and has missed writes"
        )));
    }
    Ok(())
}

fn useless(drive: &Drive, base: &Result<String, FullReason>, lineage: &str) -> Vec<String> {
    let of_lineage: Vec<&Bitmap> = drive
        .bitmaps
        .iter()
        .filter(|b| names::parse_tracking(&b.name).is_some_and(|name| name.lineage == lineage))
        .collect();
    let undecided = of_lineage.len();
    of_lineage
        .into_iter()
        .filter(|bitmap| match base {
            Ok(base) => bitmap.name != *base,
            Err(_) => bitmap.inconsistent || undecided >= MAX_UNDECIDED,
        })
        .map(|bitmap| bitmap.name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use vmtide_block::CancelToken;
    use vmtide_hypervisor::{Consistency, DiskId, JobId};

    const LINEAGE: &str = "00000000000000aa";

    fn bitmap(lineage: &str) -> Bitmap {
        Bitmap {
            name: names::tracking(lineage, &JobId::random(), &DiskId("vda".into())),
            granularity_bytes: GRANULARITY_BYTES,
            recording: true,
            persistent: true,
            inconsistent: false,
        }
    }

    fn drive(bitmaps: Vec<Bitmap>) -> Drive {
        Drive {
            id: DiskId("vda".into()),
            qom_path: None,
            node: "n".into(),
            driver: "qcow2".into(),
            size_bytes: 1 << 20,
            filename: "f".into(),
            keeps_bitmaps: true,
            bitmaps,
        }
    }

    fn request(base: Option<&str>) -> FreezeRequest {
        let base = base.map(|bitmap| {
            let mark = Mark {
                bitmap: bitmap.into(),
                granularity: GRANULARITY_BYTES,
                persistent: true,
                driver: "qcow2".into(),
            };
            let base = Base { tracking: Some(mark.to_id()), size_bytes: 1 << 20 };
            (DiskId("vda".into()), base)
        });
        FreezeRequest {
            vm: String::new(),
            job: JobId::random(),
            lineage: LINEAGE.into(),
            consistency: Consistency::Crash,
            allow_downgrade: false,
            bases: base.into_iter().collect::<BTreeMap<_, _>>(),
            exclude: Vec::new(),
            cancel: CancelToken::new(),
        }
    }

    #[test]
    fn the_base_decides_between_the_bitmaps_a_killed_job_left() {
        let (old, new, foreign) = (bitmap(LINEAGE), bitmap(LINEAGE), bitmap("00000000000000bb"));
        let drive = drive(vec![old.clone(), foreign, new.clone()]);
        for (base, other) in [(&old, &new), (&new, &old)] {
            let plan = plan(std::slice::from_ref(&drive), &request(Some(&base.name)));
            assert_eq!(plan[0].base.as_ref(), Ok(&base.name));
            assert_eq!(plan[0].useless.join(" "), other.name);
        }
    }

    #[test]
    fn a_bitmap_of_another_disk_is_not_believed() {
        let job = JobId::random();
        let name_for = |disk: &str| names::tracking(LINEAGE, &job, &DiskId(disk.into()));
        let named = |name: &str| Bitmap { name: name.into(), ..bitmap(LINEAGE) };
        let plan_of = |there: &str, base: &str| {
            let drive = drive(vec![named(there)]);
            plan(std::slice::from_ref(&drive), &request(Some(base))).remove(0).base
        };
        let (own, other) = (name_for("vda"), name_for("vdb"));
        assert_eq!(plan_of(&own, &own), Ok(own.clone()));
        assert!(matches!(plan_of(&other, &own), Err(FullReason::DiskReplaced(_))));
        assert!(matches!(plan_of(&other, &other), Err(FullReason::TrackingLost(_))));
        let nameless = format!("vmtide-{LINEAGE}-{job}");
        assert!(matches!(plan_of(&nameless, &nameless), Err(FullReason::TrackingLost(_))));
    }

    #[test]
    fn without_a_base_bitmaps_stay_until_there_are_too_many() {
        let mut drive = drive((1..MAX_UNDECIDED).map(|_| bitmap(LINEAGE)).collect());
        drive.bitmaps[0].inconsistent = true;
        let plan_one = plan(std::slice::from_ref(&drive), &request(None));
        assert_eq!(plan_one[0].base, Err(FullReason::FirstBackup));
        assert_eq!(plan_one[0].useless.join(" "), drive.bitmaps[0].name);
        drive.bitmaps.push(bitmap(LINEAGE));
        let plan_two = plan(std::slice::from_ref(&drive), &request(None));
        assert_eq!(plan_two[0].useless.len(), MAX_UNDECIDED);
    }
}
