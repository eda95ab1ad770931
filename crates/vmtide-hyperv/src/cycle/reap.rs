//! Removing what killed jobs left.

use crate::cycle::HypervHypervisor;
use crate::cycle::checkpoint::{ORPHAN_AGE_S, created_s};
use crate::cycle::disks::Bases;
use crate::cycle::ledger::Ledger;
use crate::cycle::points::{is_among, same_point};
use crate::cycle::steps;
use crate::cycle::undo::{self, Fate, Undo};
use crate::gates::Checkpoints;
use crate::{SnapshotRecord, VmRecord};
use vmtide_block::CancelToken;
use vmtide_hypervisor::{HypervisorError, JobId, Journal, ReapReport, Result};

/// What was done on one VM.
#[derive(Debug, Default)]
pub(crate) struct VmReap {
    /// What was removed, one line each.
    pub removed: Vec<String>,
    /// Checkpoints with our name that another installation may be working with.
    pub in_use: Vec<String>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// What to tell of other products' checkpoints.
    pub others: Option<String>,
}

impl HypervHypervisor {
    /// Removes what killed jobs left on every VM of the host that no living job works on.
    pub(super) fn reap_host(&self, cancel: &CancelToken) -> Result<ReapReport> {
        let mut report = ReapReport::default();
        let mut failed = Vec::new();
        for vm in self.host().vms()? {
            let _lock = match self.lock(&vm.name, vm.id, &JobId::random()) {
                Ok(lock) => lock,
                Err(HypervisorError::Busy { vm, detail }) => {
                    report.in_use.push(format!("{vm}: {detail}"));
                    continue;
                }
                Err(error) => return Err(error),
            };
            match self.reap_vm(&vm, false, cancel) {
                Ok(reaped) => {
                    let named = |what: String| format!("{}: {what}", vm.name);
                    report.removed.extend(reaped.removed.into_iter().map(named));
                    report.in_use.extend(reaped.in_use.into_iter().chain(reaped.notes).map(named));
                }
                // The others are worth it all the same.
                Err(error) => failed.push(format!("{}: {error}", vm.name)),
            }
        }
        if failed.is_empty() {
            return Ok(report);
        }
        Err(HypervisorError::failed("remove what earlier jobs left", failed.join("; ")))
    }

    /// Removes what killed jobs left on a VM, which is locked. `wait` says whether merges are waited for.
    ///
    /// # Errors
    /// Where a checkpoint of ours cannot be removed; where the host cannot be asked.
    pub(super) fn reap_vm(
        &self,
        vm: &VmRecord,
        wait: bool,
        cancel: &CancelToken,
    ) -> Result<VmReap> {
        let mut reap = VmReap::default();
        let directory = &self.options().state_directory;
        let journals = Journal::leftovers(directory, &steps::target_of(vm.id))?;
        let mut ledger = Ledger::open(directory, vm.id)?;
        for mut journal in journals {
            let undo = Undo {
                hyperv: self,
                vm: vm.id,
                journal: &mut journal,
                fate: Fate::Unknown,
                ledger: &mut ledger,
                wait,
            };
            let done = undo.run(cancel)?;
            if !done.stuck.is_empty() {
                return Err(HypervisorError::failed(
                    format!("remove what an earlier job left on {}", vm.name),
                    done.stuck.join("; "),
                ));
            }
            reap.notes.extend(done.left());
            reap.notes.extend(done.doubtful.iter().cloned());
            let complete = done.is_complete();
            reap.removed.extend(done.removed);
            if complete {
                journal.finish()?;
            }
        }
        self.reap_names(vm, &mut reap, cancel)?;
        Ok(reap)
    }

    /// Checkpoints with our name that no journal here knows: of another installation, or of one whose state was lost.
    fn reap_names(&self, vm: &VmRecord, reap: &mut VmReap, cancel: &CancelToken) -> Result<()> {
        let checkpoints = Checkpoints::of(self.host().snapshots(vm.id)?);
        reap.others = checkpoints.warning();
        for snapshot in &checkpoints.ours {
            let name = &snapshot.settings.name;
            if self.is_orphan(snapshot) {
                self.host().destroy_snapshot(snapshot, cancel)?;
                reap.removed.push(format!("checkpoint {name:?}, which no job of here knows"));
            } else {
                reap.in_use.push(format!(
                    "checkpoint {name:?} of another installation of vmtide; if no backup of it runs, \
                     remove it with: Get-VMSnapshot -VMName '{}' -Name '{name}' | Remove-VMSnapshot",
                    vm.name
                ));
            }
        }
        Ok(())
    }

    fn is_orphan(&self, snapshot: &SnapshotRecord) -> bool {
        // Both times are of the host's clock.
        created_s(snapshot)
            .is_some_and(|created| created.saturating_add(ORPHAN_AGE_S) < self.host().unix_s())
    }

    /// Destroys the reference points of a lineage that the base shows to be of no use: those of jobs that were killed
    /// before or after their restore point was committed, whichever it was. Without a base nobody knows, and all stay.
    pub(super) fn drop_useless_points(
        &self,
        vm: &VmRecord,
        lineage: &str,
        bases: &Bases<'_>,
        ledger: &mut Ledger,
        cancel: &CancelToken,
    ) -> Result<Vec<String>> {
        let needed = bases.points(lineage, vm.id);
        let useless: Vec<String> = ledger
            .of(lineage)
            .map(|point| point.id.clone())
            .filter(|id| !needed.is_empty() && !is_among(id, &needed))
            .collect();
        if useless.is_empty() {
            return Ok(Vec::new());
        }
        let points = self.host().reference_points(vm.id)?;
        let mut left = Vec::new();
        for id in useless {
            let error = match points.iter().find(|point| same_point(&point.instance_id, &id)) {
                Some(point) => undo::destroy_point(self, point, cancel)?,
                None => None,
            };
            match error {
                None => ledger.remove(&id)?,
                Some(error) => left.push(format!("reference point {id}: {error}")),
            }
        }
        Ok(left)
    }
}
