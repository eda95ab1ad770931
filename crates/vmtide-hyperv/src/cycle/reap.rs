//! Removing what killed jobs left.

use crate::cycle::HypervHypervisor;
use crate::cycle::checkpoint::{ORPHAN_AGE_S, created_s};
use crate::cycle::disks::Bases;
use crate::cycle::ledger::Ledger;
use crate::cycle::points::{is_among, same_point};
use crate::cycle::steps::{self, JobState};
use crate::cycle::undo::{self, Fate, Undo};
use crate::gates::{Checkpoints, job_of_checkpoint};
use crate::{SnapshotRecord, VmRecord};
use vmtide_block::CancelToken;
use vmtide_hypervisor::{HypervisorError, JobId, Journal, ReapReport, Result};

/// What a VM is reaped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReapFor {
    /// For a backup of it: merges are waited for, and what is left is told as long as it matters to a backup.
    Backup,
    /// Because somebody looks after the host: all that is left is told.
    Host {
        /// Whether what carries our name and belongs to no job of here goes as well.
        orphans: bool,
    },
}

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
    /// Removes what killed jobs left on every VM of the host that no living job works on; with `orphans` also checkpoints with
    /// our name that no job of here knows.
    pub(super) fn reap_host(&self, orphans: bool, cancel: &CancelToken) -> Result<ReapReport> {
        let mut report = ReapReport::default();
        let mut failed = Vec::new();
        let (vms, unreadable) = self.host().all_vms()?;
        report.notes.extend(unreadable.iter().map(|vm| {
            format!("{}: what killed jobs left on it was not looked for: {}", vm.name, vm.error)
        }));
        for vm in vms {
            let _lock = match self.lock(&vm.name, vm.id, &JobId::random()) {
                Ok(lock) => lock,
                Err(HypervisorError::Busy { vm, detail }) => {
                    report.in_use.push(format!("{vm}: {detail}"));
                    continue;
                }
                Err(error) => return Err(error),
            };
            match self.reap_vm(&vm, ReapFor::Host { orphans }, cancel) {
                Ok(reaped) => {
                    let named = |what: String| format!("{}: {what}", vm.name);
                    report.removed.extend(reaped.removed.into_iter().map(named));
                    report.in_use.extend(reaped.in_use.into_iter().map(named));
                    report.notes.extend(reaped.notes.into_iter().map(named));
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

    /// Removes what killed jobs left on a VM, which is locked.
    ///
    /// # Errors
    /// Where a checkpoint of ours cannot be removed; where the host cannot be asked.
    pub(super) fn reap_vm(
        &self,
        vm: &VmRecord,
        what_for: ReapFor,
        cancel: &CancelToken,
    ) -> Result<VmReap> {
        let mut reap = VmReap::default();
        let directory = &self.options().state_directory;
        let journals = Journal::leftovers(directory, &steps::target_of(vm.id))?;
        let mut ledger = Ledger::open(directory, vm.id)?;
        let states = journals.iter().map(|journal| JobState::of(journal.entry()));
        let of_jobs: Vec<String> = states.filter_map(|state| state.point).collect();
        for mut journal in journals {
            let undo = Undo {
                hyperv: self,
                vm: vm.id,
                journal: &mut journal,
                fate: Fate::Unknown,
                ledger: &mut ledger,
                of_other_jobs: &of_jobs,
                wait: what_for == ReapFor::Backup,
            };
            let mut done = undo.run(cancel)?;
            if !done.stuck.is_empty() {
                return Err(HypervisorError::failed(
                    format!("remove what an earlier job left on {}", vm.name),
                    done.stuck.join("; "),
                ));
            }
            let mut complete = done.is_complete();
            match what_for {
                ReapFor::Backup => {
                    // Neither stands in the way of a backup. A point is told by the first one, and then to who asks.
                    if let Some(elsewhere) = done.elsewhere.take() {
                        tracing::info!(elsewhere, vm = %vm.name, "left by an earlier job");
                    }
                    if !done.is_new_doubt {
                        done.doubtful.clear();
                    }
                }
                ReapFor::Host { orphans } => {
                    if orphans && done.elsewhere.is_some() {
                        let job = &journal.entry().job;
                        reap.removed.push(format!("the journal of job {job}, of another host"));
                        done.elsewhere = None;
                        complete = done.is_complete();
                    }
                }
            }
            reap.notes.extend(done.left());
            reap.removed.extend(done.removed);
            if complete {
                journal.finish()?;
            }
        }
        let orphans = what_for == ReapFor::Host { orphans: true };
        self.reap_names(vm, orphans, &mut reap, cancel)?;
        Ok(reap)
    }

    /// Checkpoints with our name that no journal here knows: of another installation, or of one whose state was lost. They are
    /// not ours to remove, however old: a job of another installation may read them. With `orphans` a person has said
    /// that there is none.
    fn reap_names(
        &self,
        vm: &VmRecord,
        orphans: bool,
        reap: &mut VmReap,
        cancel: &CancelToken,
    ) -> Result<()> {
        let checkpoints = Checkpoints::of(self.host().snapshots(vm.id)?);
        reap.others = checkpoints.warning();
        for snapshot in &checkpoints.ours {
            let name = &snapshot.settings.name;
            // A journal that is kept has told of it already, and tries again.
            if self.is_journalled(vm, name)? {
                continue;
            }
            if orphans {
                self.host().destroy_snapshot(snapshot, cancel)?;
                reap.removed.push(format!("checkpoint {name:?}, which no job of here knows"));
                continue;
            }
            let told = format!(
                "checkpoint {name:?} is of another installation of vmtide, or of one whose state directory was lost; if \
                 no backup of it runs, remove it with vmtide doctor --remove-leftovers, or with: Get-VMSnapshot \
                 -VMName '{}' -Name '{name}' | Remove-VMSnapshot",
                vm.name
            );
            if self.is_old(snapshot) { reap.notes.push(told) } else { reap.in_use.push(told) }
        }
        Ok(())
    }

    /// Whether the job whose checkpoint has this name has a journal here.
    fn is_journalled(&self, vm: &VmRecord, name: &str) -> Result<bool> {
        let Some(job) = job_of_checkpoint(name) else { return Ok(false) };
        let journals =
            Journal::leftovers(&self.options().state_directory, &steps::target_of(vm.id))?;
        Ok(journals.iter().any(|journal| journal.entry().job.as_str() == job))
    }

    /// Whether a checkpoint is so old that hardly a backup still reads it. Both times are of the host's clock.
    fn is_old(&self, snapshot: &SnapshotRecord) -> bool {
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
        let here = self.host().identity();
        let mut left = Vec::new();
        for id in useless {
            let error = match points.iter().find(|point| same_point(&point.instance_id, &id)) {
                Some(point) => undo::destroy_point(self, point, cancel)?,
                None => {
                    ledger.remove_missing(&id, here.as_deref())?;
                    continue;
                }
            };
            match error {
                None => ledger.remove(&id)?,
                Some(error) => left.push(format!("reference point {id}: {error}")),
            }
        }
        Ok(left)
    }
}
