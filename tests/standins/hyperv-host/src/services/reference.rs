//! `Msvm_VirtualSystemReferencePointService`, and the making of reference points.

use super::arguments::Arguments;
use super::snapshot::{gone, internal};
use super::{INVALID_PARAMETER, INVALID_STATE, NOT_SUPPORTED};
use crate::faults::PointIds;
use crate::jobs::{Answer, EFFECT_CREATE, Effect, JobError};
use crate::state::{Point, State, guid};
use uuid::Uuid;
use vmtide_cim::ObjectPath;
use vmtide_image::Format;

/// `ReferencePointType` of a point by resilient change tracking.
pub(crate) const BY_TRACKING: u16 = 2;

/// A checkpoint to be turned into a reference point.
pub(crate) struct ConvertPoint {
    pub(crate) snapshot: Uuid,
}

impl State {
    pub(crate) fn reference_service(
        &mut self,
        method: &str,
        arguments: &Arguments,
    ) -> Option<Answer> {
        Some(match method {
            "DestroyReferencePoint" => {
                if let Some(code) = self.faults.point_destruction_code {
                    return Some(Answer::code(code));
                }
                let path = arguments.reference("AffectedReferencePoint");
                match path.and_then(|path| self.point_of(&path)) {
                    Some(id) => {
                        self.harm += u64::from(self.points[&id].by_other);
                        let caption = "Deleting reference point".into();
                        let effect = Effect::DestroyPoint(id);
                        self.begin("DestroyReferencePoint", caption, effect, None)
                    }
                    None => Answer::code(INVALID_PARAMETER),
                }
            }
            "CreateReferencePoint" => {
                // The documents disagree on the number of the type; the class page says 2.
                match arguments.number("ReferencePointType") {
                    2 => self.create_point(arguments),
                    _ => Answer::code(INVALID_PARAMETER),
                }
            }
            "ExportReferencePoint" => Answer::code(NOT_SUPPORTED),
            _ => return None,
        })
    }

    /// The reference point that a path means.
    pub(crate) fn point_of(&self, path: &ObjectPath) -> Option<Uuid> {
        let id = path.key("InstanceID")?;
        let mut points = self.points.values();
        points.find(|p| self.id_of_point(p).eq_ignore_ascii_case(id)).map(|point| point.id)
    }

    /// A reference point without a checkpoint: one is made and converted within the job.
    fn create_point(&mut self, arguments: &Arguments) -> Answer {
        let Some(vm) = arguments.vm("AffectedSystem").filter(|vm| self.vms.contains_key(vm)) else {
            return Answer::code(INVALID_PARAMETER);
        };
        if self.snapshots.values().any(|snapshot| snapshot.vm == vm && snapshot.recovery) {
            return Answer::code(INVALID_STATE);
        }
        let new = super::snapshot::NewSnapshot {
            vm,
            recovery: true,
            consistency: 2,
            skip_others: true,
            by_other: false,
        };
        let made = self.create_snapshot(new).and_then(|made| {
            let snapshot = made.iter().find(|(_, effect)| *effect == EFFECT_CREATE);
            let id = snapshot.and_then(|(path, _)| path.key("InstanceID"));
            let id = id.and_then(super::arguments::id_of).ok_or_else(|| gone("the checkpoint"))?;
            self.convert_snapshot(&ConvertPoint { snapshot: id })
        });
        let caption = "Creating reference point".into();
        let effect = Effect::Done(made);
        self.begin("CreateReferencePoint", caption, effect, Some("ResultingReferencePoint"))
    }

    /// Turns a checkpoint into a reference point; its disks merge afterwards.
    pub(crate) fn convert_snapshot(
        &mut self,
        convert: &ConvertPoint,
    ) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        if let Some(code) = self.faults.conversion_job {
            return Err(JobError::new(
                code,
                "Failed to write VHD attachment: the user has not been granted the requested logon type (0x8007052F).",
            ));
        }
        let snapshot = self.snapshots.remove(&convert.snapshot);
        let snapshot = snapshot.ok_or_else(|| gone("the checkpoint"))?;
        let owner =
            if self.options.points_name_checkpoint_disks { snapshot.id } else { snapshot.vm };
        let mut disks = Vec::new();
        for (suffix, frozen) in &snapshot.disks {
            let tracked = self.disks.get(&frozen.disk).is_some_and(|d| d.format == Format::Vhdx);
            if let Some(sealed) = frozen.sealed.filter(|_| tracked) {
                disks.push((frozen.disk, format!(r"Microsoft:{}\{suffix}", guid(owner)), sealed));
            }
        }
        let mut shown_ids: Vec<String> =
            disks.iter().map(|(key, _, epoch)| self.disks[key].tracking.id(*epoch)).collect();
        match self.faults.point_ids {
            PointIds::Whole => {}
            PointIds::Empty => shown_ids.clear(),
            PointIds::Shorter => {
                shown_ids.pop();
            }
            PointIds::Blank => shown_ids.iter_mut().for_each(String::clear),
        }
        let point = Point {
            id: self.random.guid(),
            vm: snapshot.vm,
            consistency: self.faults.point_consistency.unwrap_or(snapshot.consistency),
            kind: self.faults.point_kind.unwrap_or(BY_TRACKING),
            disks,
            shown_ids,
            made: self.number(),
            by_other: snapshot.by_other,
        };
        let path = self.path_of_point(&point);
        self.note(format!("reference point {} made", self.id_of_point(&point)));
        self.points.insert(point.id, point);
        self.forget_snapshot(&snapshot);
        self.forget_ids();
        let old = self.path_of_settings(snapshot.id);
        Ok(vec![(old, 0), (path, EFFECT_CREATE)])
    }

    /// Removes a reference point, and with it the tracking ids that nothing else stands for.
    pub(crate) fn destroy_point(&mut self, id: Uuid) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        let point = self.points.remove(&id).ok_or_else(|| internal("no such reference point"))?;
        self.note(format!("reference point {} removed", self.id_of_point(&point)));
        self.forget_ids();
        Ok(vec![(self.path_of_point(&point), 0)])
    }
}
