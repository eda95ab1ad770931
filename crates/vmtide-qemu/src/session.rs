//! What one job holds on one VM from the first thing made to the last thing removed.

use crate::cleanup::{self, Cleanup, Report, Scope};
use crate::names;
use crate::plan::DiskPlan;
use crate::qmp::{QmpClient, QmpError};
use crate::steps::Step;
use serde_json::json;
use std::sync::Arc;
use vmtide_hypervisor::{HypervisorError, JobId, Journal, Result, VmLock};

/// The state of one job.
pub(crate) struct Session {
    pub qmp: Arc<QmpClient>,
    pub job: JobId,
    pub lineage: String,
    pub plans: Vec<DiskPlan>,
    pub journal: Journal,
    /// Held as long as the job.
    pub _lock: VmLock,
}

impl Session {
    /// Writes a step down before it is taken.
    pub fn record(&mut self, step: &Step) -> Result<()> {
        step.record(&mut self.journal)
    }

    /// Removes everything of this job but the tracking bitmaps.
    pub fn clean(&self) -> Result<Report, QmpError> {
        let steps = Step::all(self.journal.entry());
        Cleanup::new(&self.qmp, Scope::Job(self.job.as_str()), &steps).run()
    }

    /// No restore point: removes the new bitmaps too. The old ones were never switched off and
    /// have recorded all along.
    pub fn undo(self) -> Result<()> {
        let outcome = self.clean().and_then(|mut report| {
            for plan in &self.plans {
                self.remove_bitmap(&plan.drive.node, &plan.mark.bitmap, &mut report)?;
            }
            Ok(report)
        });
        match outcome {
            Ok(report) if report.failed.is_empty() && report.unanswered.is_empty() => {
                self.journal.finish()
            }
            Ok(report) => Err(HypervisorError::failed(
                format!("undo job {}", self.job),
                [report.failed, report.unanswered].concat().join("; "),
            )),
            Err(error) => {
                // With QEMU gone so is all that was made in it; files are left.
                cleanup::remove_files(&Step::all(self.journal.entry()));
                Err(error.into())
            }
        }
    }

    /// The restore point stands: keeps the new bitmaps, removes all others of this lineage.
    /// Answers with what could not be removed.
    pub fn keep(self) -> Result<Vec<String>> {
        let mut report = self.clean()?;
        let present = cleanup::nodes_with_bitmaps(&self.qmp)?;
        let mut lost = Vec::new();
        for plan in &self.plans {
            let node = &plan.drive.node;
            let bitmaps = present
                .iter()
                .find(|(name, _)| name == node)
                .map_or(&[][..], |(_, bitmaps)| bitmaps);
            let good = |bitmap: &&crate::inventory::Bitmap| {
                bitmap.name == plan.mark.bitmap && bitmap.recording && !bitmap.inconsistent
            };
            if bitmaps.iter().find(good).is_none() {
                lost.push(format!("bitmap {} of disk {}", plan.mark.bitmap, plan.drive.id));
                continue;
            }
            for bitmap in bitmaps {
                let ours = names::parse_tracking(&bitmap.name)
                    .is_some_and(|name| name.lineage == self.lineage);
                if ours && bitmap.name != plan.mark.bitmap {
                    self.remove_bitmap(node, &bitmap.name, &mut report)?;
                }
            }
        }
        if report.failed.is_empty() {
            self.journal.finish()?;
        }
        if lost.is_empty() {
            return Ok(report.failed);
        }
        Err(HypervisorError::failed(
            "keep change tracking",
            format!(
                "{} vanished during the backup; the next backup reads these disks in full",
                lost.join(", ")
            ),
        ))
    }

    fn remove_bitmap(&self, node: &str, name: &str, report: &mut Report) -> Result<(), QmpError> {
        let data = json!({"node": node, "name": name});
        match self.qmp.execute("block-dirty-bitmap-remove", data) {
            Ok(_) => report.removed.push(format!("bitmap {name} of node {node}")),
            Err(error) if error.is_connection() => return Err(error),
            Err(error) => {
                // Not there at all is as good as removed.
                let there = cleanup::nodes_with_bitmaps(&self.qmp)?
                    .iter()
                    .any(|(on, bitmaps)| on == node && bitmaps.iter().any(|b| b.name == name));
                if there {
                    report.failed.push(error.to_string());
                }
            }
        }
        Ok(())
    }
}
