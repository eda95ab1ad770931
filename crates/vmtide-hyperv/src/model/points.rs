//! Reference points: found and removed.

use super::read::{self, guid};
use super::types::ReferencePointRecord;
use crate::Host;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_cim::{CimValue, ObjectPath, wql};
use vmtide_hypervisor::{HypervisorError, Result};

/// The class of reference points.
const POINT: &str = "Msvm_VirtualSystemReferencePoint";

/// Whether a path is that of a reference point.
pub(crate) fn point_path(path: &ObjectPath) -> bool {
    path.class.eq_ignore_ascii_case(POINT)
}

impl Host {
    /// The reference points of a VM, those of other products too, in the order the host tells them.
    ///
    /// # Errors
    /// [`HypervisorError::Unsupported`] on hosts before Windows Server 2016, or as
    /// [`from_cim`](crate::from_cim) says.
    pub fn reference_points(&self, vm: Uuid) -> Result<Vec<ReferencePointRecord>> {
        // The InstanceID begins with the VM's id on some versions of Windows only.
        let found = self.query_if_known(&format!(
            "SELECT * FROM {POINT} WHERE VirtualSystemIdentifier={}",
            wql::quote(&guid(vm))
        ))?;
        let Some(found) = found else {
            return Err(HypervisorError::Unsupported {
                what: format!("change tracking on {}", self.peer()),
                detail: "it needs Windows Server 2016 or newer".into(),
            });
        };
        let mut points = Vec::new();
        for instance in found {
            let point = read::reference_point(&instance)?;
            if point.vm == vm {
                points.push(point);
            }
        }
        Ok(points)
    }

    /// The `InstanceID`s of the reference points that a job names as its results. None where the host has forgotten the job,
    /// which it does some five minutes after its end.
    pub(crate) fn points_of_job(&self, job: &ObjectPath) -> Vec<String> {
        let results = self.affected(job).into_iter().filter(point_path);
        results.filter_map(|path| path.key("InstanceID").map(str::to_owned)).collect()
    }

    /// Removes a reference point. One that is gone is no error.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn destroy_reference_point(
        &self,
        point: &ReferencePointRecord,
        cancel: &CancelToken,
    ) -> Result<()> {
        let what = format!("removing the reference point {}", point.instance_id);
        let service = self.service("Msvm_VirtualSystemReferencePointService")?;
        let path = ObjectPath::new(POINT, &[("InstanceID", &point.instance_id)]);
        let parameters = [("AffectedReferencePoint", CimValue::from(&path))];
        match self.destroy(&service, "DestroyReferencePoint", &parameters, &what, cancel) {
            Ok(()) => Ok(()),
            Err(error) => match self.exists(&path) {
                Ok(false) => Ok(()),
                _ => Err(error),
            },
        }
    }
}
