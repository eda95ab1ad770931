//! Freezing a VM, from the lock to the opened disks.

use crate::cycle::checkpoint::{self, Made};
use crate::cycle::disks::{self, Bases, HeldDisks, OpenDisk};
use crate::cycle::frozen::FrozenHyperv;
use crate::cycle::gate::Gates;
use crate::cycle::ledger::Ledger;
use crate::cycle::line::Line;
use crate::cycle::reap::ReapFor;
use crate::cycle::steps::{self, Step};
use crate::cycle::undo::{Fate, Undo, Undone};
use crate::cycle::{HypervHypervisor, merge};
use crate::restore::Completeness;
use crate::{DiskAttachment, VmRecord};
use vmtide_block::CancelToken;
use vmtide_hypervisor::{
    DiskId, FreezeRequest, FrozenVm, HypervisorError, JobId, Journal, Result, VmConfig, VmLock,
};

/// A job on a VM: what it holds and what it wrote down.
pub(crate) struct Session {
    pub hyperv: HypervHypervisor,
    pub vm: VmRecord,
    pub job: JobId,
    pub lineage: String,
    pub journal: Journal,
    pub ledger: Ledger,
    _lock: VmLock,
}

impl Session {
    /// Writes a step down, before it is taken.
    pub fn record(&mut self, step: &Step) -> Result<()> {
        steps::record(&mut self.journal, step)
    }

    /// Removes what the steps say is to be removed. A journal that is needed no longer is gone then.
    pub fn undo(self, wait: bool) -> Result<Undone> {
        let Self { hyperv, vm, mut journal, mut ledger, _lock, .. } = self;
        let undo = Undo {
            hyperv: &hyperv,
            vm: vm.id,
            journal: &mut journal,
            fate: Fate::Told,
            ledger: &mut ledger,
            of_other_jobs: &[],
            wait,
        };
        // Also of a job that was cancelled: what it made has to go.
        let done = undo.run(&CancelToken::new())?;
        if done.is_complete() {
            journal.finish()?;
        }
        Ok(done)
    }
}

/// What a freeze made.
struct Parts {
    made: Made,
    config: VmConfig,
    disks: Vec<OpenDisk>,
    /// Whether any of them can be tracked, so that a reference point is of use.
    trackable: bool,
}

impl HypervHypervisor {
    pub(super) fn freeze_vm(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        request.cancel.check()?;
        let vm = self.host().find(&request.vm)?;
        let lock = self.lock(&vm.name, vm.id, &request.job)?;
        let mut warnings = self.check_complete(&vm)?;
        let reaped = self.reap_vm(&vm, ReapFor::Backup, &request.cancel)?;
        for what in &reaped.removed {
            tracing::info!(what, vm = %vm.name, "removed what a killed job left");
        }
        if let Some(other) = reaped.in_use.into_iter().next() {
            return Err(HypervisorError::Busy { vm: vm.name, detail: other });
        }
        for note in &reaped.notes {
            // It may be why the host refuses what follows, and then no restore point tells of it.
            tracing::warn!(note, vm = %vm.name, "left by an earlier job");
        }
        warnings.extend(reaped.notes);
        warnings.extend(reaped.others);
        let mut bases = Bases::of(&request.bases);
        bases.require_points(&match self.host().reference_points(vm.id) {
            // A host before Windows Server 2016 has none, and its VMs are read in full.
            Err(HypervisorError::Unsupported { .. }) => Vec::new(),
            points => points?,
        });
        bases.forget_points(&crate::restore::outdated_points(self.host(), self.files(), &vm)?);
        let directory = &self.options().state_directory;
        let mut ledger = Ledger::open(directory, vm.id)?;
        warnings.extend(self.drop_useless_points(
            &vm,
            &request.lineage,
            &bases,
            &mut ledger,
            &request.cancel,
        )?);
        // Merges that ended meanwhile have changed the paths of its disks.
        let vm = self.host().vm(vm.id)?;
        let attachments = self.host().disks(&vm.settings)?;
        let gates = Gates::of(&vm);
        warnings.extend(gates.warning());
        check_any(&vm, &attachments, &gates, request)?;
        let journal = Journal::begin(directory, request.job.clone(), &steps::target_of(vm.id))?;
        let session = Session {
            hyperv: self.clone(),
            vm,
            job: request.job.clone(),
            lineage: request.lineage.clone(),
            journal,
            ledger,
            _lock: lock,
        };
        self.make(session, request, &bases, &attachments, &gates, warnings)
    }

    /// Refuses a VM that a restore has left in the middle. Answers with a warning where that cannot be seen.
    fn check_complete(&self, vm: &VmRecord) -> Result<Vec<String>> {
        let state = &self.options().state_directory;
        match crate::restore::completeness(self.host(), self.files(), state, vm)? {
            Completeness::Complete => Ok(Vec::new()),
            Completeness::NotSeen(directories) => Ok(vec![format!(
                "whether a restore of the VM was left unfinished by another machine cannot be seen, because {} may not \
                 be listed: give the account the right to list it",
                directories.join(", ")
            )]),
            Completeness::Incomplete => Err(HypervisorError::failed(
                format!("back up {}", vm.name),
                "a restore of it was not finished, so its disks are neither what they were nor what they \
                 are to be: run the restore again first",
            )),
        }
    }

    /// Makes everything, or nothing.
    fn make(
        &self,
        mut session: Session,
        request: &FreezeRequest,
        bases: &Bases<'_>,
        attachments: &[DiskAttachment],
        gates: &Gates,
        mut warnings: Vec<String>,
    ) -> Result<Box<dyn FrozenVm>> {
        let parts = match make_all(&mut session, request, bases, attachments, gates, &mut warnings)
        {
            Ok(parts) => parts,
            Err(error) => {
                let vm = session.vm.name.clone();
                match session.undo(!request.cancel.is_cancelled()) {
                    Ok(done) if done.is_complete() => {}
                    Ok(done) => {
                        tracing::error!(vm, left = ?done.left(), "left for the next job to remove");
                    }
                    Err(undo) => tracing::error!(vm, %undo, "left for the next job to remove"),
                }
                return Err(error);
            }
        };
        let older = bases.points(&request.lineage, session.vm.id);
        Ok(Box::new(FrozenHyperv::new(
            session,
            parts.made,
            parts.config,
            parts.disks,
            older,
            parts.trackable,
            warnings,
            request.cancel.clone(),
        )))
    }

    /// The files that the VM writes to now.
    pub(super) fn live_paths(&self, vm: &VmRecord) -> Result<Vec<String>> {
        let vm = self.host().vm(vm.id)?;
        let disks = self.host().disks(&vm.settings)?;
        Ok(disks
            .into_iter()
            .filter(|disk| !disk.pass_through)
            .map(|disk| disk.host_resource)
            .collect())
    }
}

/// Refuses a VM of which nothing would be backed up, before anything is made.
fn check_any(
    vm: &VmRecord,
    attachments: &[DiskAttachment],
    gates: &Gates,
    request: &FreezeRequest,
) -> Result<()> {
    let any = attachments.iter().any(|disk| gates.is_held(disk) && !is_excluded(disk, request));
    if any {
        return Ok(());
    }
    Err(HypervisorError::NotFound {
        what: format!("a disk of {} to back up", vm.name),
        detail: "the VM has no virtual disk, or all are excluded".into(),
    })
}

fn is_excluded(disk: &DiskAttachment, request: &FreezeRequest) -> bool {
    request.exclude.contains(&disks::id_of(disk))
}

fn make_all(
    session: &mut Session,
    request: &FreezeRequest,
    bases: &Bases<'_>,
    attachments: &[DiskAttachment],
    gates: &Gates,
    warnings: &mut Vec<String>,
) -> Result<Parts> {
    let begun = Step::Begun {
        vm: session.vm.name.clone(),
        lineage: request.lineage.clone(),
        host: session.hyperv.host().identity(),
    };
    session.record(&begun)?;
    let made = checkpoint::make(&session.hyperv, &session.vm, request, &mut session.journal)?;
    request.cancel.check()?;
    let mut configuration = session.hyperv.capture(&session.vm, &made.snapshot)?;
    warnings.append(&mut configuration.warnings);
    let held = configuration.disks.iter().filter(|disk| gates.is_held(disk));
    let held: Vec<_> = held.cloned().collect();
    let all_held = configuration.disks.clone();
    warn_of_skipped(attachments, &held, gates, request, warnings);
    let (excluded, held): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|disk| is_excluded(disk, request));
    if held.is_empty() {
        return Err(HypervisorError::failed(
            format!("back up {}", session.vm.name),
            "the host's checkpoint holds none of its disks",
        ));
    }
    let leaves = leaves(session, &held, &all_held)?;
    session.record(&Step::Frozen { leaves: leaves.clone(), tracking: Vec::new() })?;
    let is_held = |id: &DiskId| held.iter().any(|disk| disks::id_of(disk) == *id);
    configuration.config.disks.retain(|disk| is_held(&disk.id));
    let line = Line::of(session.hyperv.host(), session.vm.id, &made.snapshot.settings)?;
    let held = HeldDisks { wanted: held, excluded, line };
    let opened =
        disks::open(&session.hyperv, &session.vm, held, bases, gates, &mut configuration, request)?;
    warnings.append(&mut configuration.warnings);
    let tracking = opened.iter().filter_map(|disk| disk.file.most_recent.clone()).collect();
    session.record(&Step::Frozen { leaves, tracking })?;
    let trackable = opened.iter().any(|disk| disk.trackable);
    Ok(Parts { made, config: configuration.config, disks: opened, trackable })
}

/// The files that the VM writes to since the checkpoint: at the places of all disks that it holds, also of those that are
/// not backed up. A disk that is attached meanwhile goes on in its own file.
///
/// # Errors
/// Where it still writes to one that is said to be frozen.
fn leaves(
    session: &Session,
    held: &[DiskAttachment],
    all_held: &[DiskAttachment],
) -> Result<Vec<String>> {
    let vm = session.hyperv.host().vm(session.vm.id)?;
    let live = session.hyperv.host().disks(&vm.settings)?;
    let frozen = |disk: &&DiskAttachment| {
        held.iter().any(|other| other.host_resource.eq_ignore_ascii_case(&disk.host_resource))
    };
    if let Some(disk) = live.iter().filter(|disk| !disk.pass_through).find(frozen) {
        return Err(HypervisorError::failed(
            format!("freeze {}", session.vm.name),
            format!(
                "the host reports a checkpoint, and the VM still writes to {}",
                disk.host_resource
            ),
        ));
    }
    Ok(merge::leaves(&live, all_held))
}

/// Tells which disks of the VM the checkpoint does not hold. The host leaves them out without a word.
fn warn_of_skipped(
    attachments: &[DiskAttachment],
    held: &[DiskAttachment],
    gates: &Gates,
    request: &FreezeRequest,
    warnings: &mut Vec<String>,
) {
    let is_held = |disk: &DiskAttachment| held.iter().any(|other| other.location == disk.location);
    for disk in attachments.iter().filter(|disk| !is_held(disk) && !is_excluded(disk, request)) {
        let id = disks::id_of(disk);
        let why = gates.skipped(disk);
        warnings.push(format!("disk {id} ({}) is not backed up: {why}", disk.host_resource));
    }
}
