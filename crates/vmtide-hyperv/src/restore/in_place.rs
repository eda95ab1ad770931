//! A VM whose disks go back to a restore point, in their files.
//!
//! Only what differs is written: where the host can tell what changed since the restore point, only that is
//! looked at, else all is compared. It cannot be undone. So the VM gets a name that says that it is not
//! complete, and a file beside its disks says so too, before the first byte is written; the same restore,
//! started again, goes on. Its settings stay as they are.

use super::host_path::{directory_of, extension_of, file_name_of, join, same};
use super::journal::{RestoreJournal, Step, leftovers, lock_name};
use super::management::Management;
use super::outdated::Notes;
use super::pairing::{self, Pair};
use super::{HypervRestorer, refused, tracking};
use crate::cycle::lock_key;
use crate::model::types::{VmRecord, VmState};
use crate::{Host, HostFiles};
use std::collections::BTreeSet;
use std::path::Path;
use vmtide_block::CancelToken;
use vmtide_hypervisor::{
    DiskContent, DiskId, FullReason, HypervisorError, InPlaceRequest, RestoredVm, RestoringDisk,
    RestoringVm, Result, VmLock,
};

/// What the name of a VM ends in while it is not complete.
pub(super) const SUFFIX: &str = " (restore incomplete)";

/// The most characters of a VM's name.
const MAX_NAME_CHARACTERS: usize = 100;

/// A VM that is changed in place.
pub(super) struct InPlaceVm {
    restorer: HypervRestorer,
    vm: VmRecord,
    /// The name it had and is to have again.
    name: String,
    marks: Vec<String>,
    disks: Vec<RestoringDisk>,
    warnings: Vec<String>,
    /// None when it has ended.
    journal: Option<RestoreJournal>,
}

/// Begins a restore in place.
pub(super) fn begin(restorer: &HypervRestorer, request: &InPlaceRequest) -> Result<InPlaceVm> {
    let host = restorer.host();
    let found = find(host, &request.vm)?;
    let state = &restorer.inner.state_directory;
    let lock = VmLock::acquire(state, &found.name, &lock_key(found.id), &request.job)?;
    // What was found before the lock may be another's work by now.
    let vm = host.vm(found.id)?;
    let name = vm.name.strip_suffix(SUFFIX).unwrap_or(&vm.name).to_owned();
    // The journal goes by the name: nobody must take it for that of a job that was killed.
    let by_name = lock_name(state, host.peer(), &name, &request.job)?;
    check_at_rest(host, &vm)?;
    // Also of a VM that somebody has given its old name again, or whose name has no room for the mark.
    let was_marked = vm.name != name || has_mark(host, restorer.files(), &vm)?;
    let mut pairs = pairing::pairs_of(restorer, &vm, request)?;
    if was_marked {
        check_covers(restorer, &vm, &name, &pairs, request)?;
        for pair in &mut pairs {
            let why = "an earlier restore of this VM was interrupted";
            pair.content = DiskContent::Unknown(FullReason::TrackingLost(why.into()));
        }
    }
    let locks = vec![lock, by_name];
    let mut journal = RestoreJournal::begin(state, &request.job, host.peer(), &name, locks)?;
    let files = pairs.iter().map(|pair| pair.attachment.host_resource.clone()).collect();
    journal.record(&Step::InPlace { id: vm.id, files })?;
    let mut in_place = InPlaceVm {
        restorer: restorer.clone(),
        name,
        marks: Vec::new(),
        disks: Vec::new(),
        warnings: pairs.iter().flat_map(Pair::warnings).collect(),
        journal: Some(journal),
        vm,
    };
    let opened = in_place.mark(request, &pairs).and_then(|()| in_place.open(request, pairs));
    match opened {
        Ok(()) => Ok(in_place),
        // Nothing was written: a VM that was whole is so.
        Err(error) => {
            if !was_marked && let Err(failed) = in_place.unmark() {
                tracing::warn!(%failed, "a VM is still marked as incomplete");
            } else if !was_marked {
                in_place.end();
            }
            Err(error)
        }
    }
}

/// The VM, also where an earlier try has marked it.
fn find(host: &Host, name: &str) -> Result<VmRecord> {
    match host.find(name) {
        Err(HypervisorError::NotFound { what, detail }) => {
            let marked = host.find(&format!("{name}{SUFFIX}"));
            marked.map_err(|_| HypervisorError::NotFound { what, detail })
        }
        found => found,
    }
}

/// The files of disks of the VM `id` that the job of these steps may have written; none where it did not
/// restore it in place.
fn files_written(steps: &[Step], id: uuid::Uuid) -> Option<&[String]> {
    steps.iter().find_map(|step| match step {
        Step::InPlace { id: of, files } if *of == id => Some(files.as_slice()),
        _ => None,
    })
}

/// Whether a VM that earlier tries left incomplete is complete after this one: it must write all the disks
/// that they may have written.
fn check_covers(
    restorer: &HypervRestorer,
    vm: &VmRecord,
    name: &str,
    pairs: &[Pair<'_>],
    request: &InPlaceRequest,
) -> Result<()> {
    let host = restorer.host();
    let earlier = leftovers(&restorer.inner.state_directory, host.peer(), Some(name))?;
    let tries: Vec<_> =
        earlier.jobs.iter().filter_map(|job| files_written(&job.steps, vm.id)).collect();
    let is_known = !tries.is_empty() && tries.iter().all(|files| !files.is_empty());
    let is_asked = |id: &DiskId| request.disks.iter().any(|disk| disk.id == *id);
    let missing: Vec<String> = if is_known {
        let is_written =
            |path: &str| tries.iter().any(|files| files.iter().any(|file| same(file, path)));
        let is_covered =
            |path: &str| pairs.iter().any(|pair| same(&pair.attachment.host_resource, path));
        let attached = host.disks(&vm.settings)?;
        attached
            .iter()
            .filter(|disk| is_written(&disk.host_resource) && !is_covered(&disk.host_resource))
            .map(|disk| disk.location.to_string())
            .collect()
    } else {
        // Another machine began it, or the journal is lost.
        let all = request.config.disks.iter().map(|disk| &disk.id);
        all.filter(|id| !is_asked(id)).map(DiskId::to_string).collect()
    };
    if missing.is_empty() {
        return Ok(());
    }
    Err(refused(
        format!("restore {name} in place"),
        format!(
            "an earlier restore of it was interrupted and may have written {} too: restore all disks",
            missing.join(", ")
        ),
    ))
}

/// Whether the VM has nothing in memory and nothing between its disks and the files.
fn check_at_rest(host: &Host, vm: &VmRecord) -> Result<()> {
    let what = || format!("restore {} in place", vm.name);
    match vm.state {
        VmState::Off => {}
        VmState::Saved => {
            return Err(refused(
                what(),
                "it is saved: what it has in memory does not fit older disks; discard the saved state \
                 (Remove-VMSavedState) if you mean it",
            ));
        }
        _ => return Err(refused(what(), "it is not off: shut it down first")),
    }
    if let Some(checkpoint) = host.snapshots(vm.id)?.first() {
        return Err(refused(
            what(),
            format!(
                "it has checkpoints ({}): remove them first, or restore to a new VM",
                checkpoint.settings.name
            ),
        ));
    }
    Ok(())
}

/// Whether steps of a killed job are those of a VM that is still marked as incomplete.
pub(super) fn is_unfinished(host: &Host, files: &dyn HostFiles, steps: &[Step]) -> Result<bool> {
    let id = steps.iter().find_map(|step| match step {
        Step::InPlace { id, .. } => Some(*id),
        _ => None,
    });
    let Some(id) = id else { return Ok(false) };
    match host.vm(id) {
        Ok(vm) => Ok(vm.name.ends_with(SUFFIX) || has_mark(host, files, &vm)?),
        Err(HypervisorError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a file beside the disks of `vm` says that it is not complete.
///
/// # Errors
/// Where the disks or their directories cannot be listed; a directory that must not be is passed over.
pub(super) fn has_mark(host: &Host, files: &dyn HostFiles, vm: &VmRecord) -> Result<bool> {
    look_for_mark(host, files, vm).map(|(found, _)| found)
}

/// Whether a job that was killed on this machine may have written into the disks of the VM `id`.
///
/// # Errors
/// Where the state directory cannot be read.
pub(super) fn is_journalled(state: &Path, peer: &str, id: uuid::Uuid) -> Result<bool> {
    let found = leftovers(state, peer, None)?;
    Ok(found.jobs.iter().any(|job| files_written(&job.steps, id).is_some()))
}

/// As [`has_mark`]; also the directories that may not be listed, in which one may lie.
///
/// # Errors
/// Where the disks or their directories cannot be listed for another reason.
pub(super) fn look_for_mark(
    host: &Host,
    files: &dyn HostFiles,
    vm: &VmRecord,
) -> Result<(bool, Vec<String>)> {
    let name = mark_name(vm.id);
    let disks = host.disks(&vm.settings)?;
    let directories: BTreeSet<_> = disks
        .iter()
        .filter(|disk| !disk.pass_through)
        .map(|disk| directory_of(&disk.host_resource))
        .collect();
    let mut not_seen = Vec::new();
    for directory in directories {
        let present = match files.list(directory) {
            // Who may read the disks need not be allowed to list what lies beside them.
            Err(HypervisorError::Denied { .. }) => {
                not_seen.push(directory.to_owned());
                continue;
            }
            present => present?.unwrap_or_default(),
        };
        if present.iter().any(|entry| entry.name.eq_ignore_ascii_case(&name)) {
            return Ok((true, not_seen));
        }
    }
    Ok((false, not_seen))
}

impl InPlaceVm {
    /// Says to everybody that the VM is not complete, and has the host forget its tracking.
    fn mark(&mut self, request: &InPlaceRequest, pairs: &[Pair<'_>]) -> Result<()> {
        let restorer = self.restorer.clone();
        let (host, files) = (restorer.host(), restorer.files());
        let directories: BTreeSet<_> =
            pairs.iter().map(|pair| directory_of(&pair.attachment.host_resource)).collect();
        // The name first: a file that says so beside a VM of the old name then means that somebody renamed it.
        let marked = format!("{}{SUFFIX}", self.name);
        if marked.chars().count() <= MAX_NAME_CHARACTERS {
            if self.vm.name != marked {
                host.rename(&self.vm.settings, &marked)?;
            }
        } else {
            self.warnings.push(
                "the VM's name is too long to be marked: only a file beside its disks says that it is \
                 incomplete"
                    .into(),
            );
        }
        let name = mark_name(self.vm.id);
        let text = format!(
            "vmtide is restoring disks of the VM {} to the restore point {} (job {}).\r\n\
             As long as this file is here, they are neither what they were nor what they are to be:\r\n\
             do not start the VM; it is not backed up. Run the same restore again to go on.\r\n",
            self.name, request.point, request.job
        );
        for directory in &directories {
            let present = files.list(directory)?.unwrap_or_default();
            let path = join(directory, &name);
            let is_there = present.iter().any(|entry| entry.name.eq_ignore_ascii_case(&name));
            // Before it is written: the answer may be lost, and not the file.
            self.marks.push(path.clone());
            if !is_there {
                files.write_file(&path, text.as_bytes())?;
            }
        }
        let state = &restorer.inner.state_directory;
        let (known, cancel) = (&request.known_tracking, &request.cancel);
        let others = tracking::destroy_points(host, state, self.vm.id, known, cancel)?;
        let attached = host.disks(&self.vm.settings)?;
        let notes = Notes::beside(files, self.vm.id, &attached);
        notes.replace(&directories, &others)?;
        if !others.is_empty() {
            self.warnings.push(format!(
                "{} reference points of other programs, installations or repositories were left: other programs \
                 that made them have to read the disks in full once, because the host does not track what a \
                 restore writes; vmtide does so by itself, by a note beside the disks",
                others.len()
            ));
        }
        for pair in pairs {
            tracking::remove_files(files, &pair.attachment.host_resource)?;
        }
        Ok(())
    }

    fn open(&mut self, request: &InPlaceRequest, pairs: Vec<Pair<'_>>) -> Result<()> {
        for pair in pairs {
            request.cancel.check()?;
            let path = pair.attachment.host_resource;
            let device = self.restorer.files().open_disk_writable(&path)?;
            self.disks.push(RestoringDisk {
                id: pair.wanted.id.clone(),
                format: extension_of(file_name_of(&path)).to_lowercase(),
                path,
                device,
                content: pair.content,
            });
        }
        Ok(())
    }

    /// All is written: the marks go, the name last.
    fn unmark(&mut self) -> Result<()> {
        for mark in &self.marks {
            self.restorer.files().remove_file(mark)?;
        }
        let vm = self.restorer.host().vm(self.vm.id)?;
        if vm.name == self.name {
            return Ok(());
        }
        if let Err(error) = self.restorer.host().rename(&vm.settings, &self.name) {
            match self.restorer.host().vm(self.vm.id) {
                Ok(now) if now.name == self.name => {}
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Journals of earlier tries on this VM have no more to say, and neither has this one.
    fn end(&mut self) {
        let peer = self.restorer.host().peer().to_owned();
        if let Some(journal) = self.journal.take()
            && let Err(error) = journal.finish()
        {
            tracing::warn!(%error, "a journal of a restore that has ended was left");
        }
        let Ok(found) = leftovers(&self.restorer.inner.state_directory, &peer, None) else {
            return;
        };
        for leftover in found.jobs {
            if files_written(&leftover.steps, self.vm.id).is_some()
                && let Err(error) = leftover.journal.finish()
            {
                tracing::warn!(%error, "a journal of an earlier try was left");
            }
        }
    }
}

/// The file that says that a VM is not complete.
fn mark_name(vm: uuid::Uuid) -> String {
    format!("INCOMPLETE - vmtide is restoring VM {}.txt", crate::model::read::guid(vm))
}

impl RestoringVm for InPlaceVm {
    fn disks(&self) -> &[RestoringDisk] {
        &self.disks
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn finish(mut self: Box<Self>, power_on: bool) -> Result<RestoredVm> {
        let directory = self.disks.first().map(|disk| directory_of(&disk.path).to_owned());
        // The files are closed before the host opens them.
        self.disks.clear();
        self.unmark()?;
        self.end();
        let mut powered_on = false;
        if power_on {
            let cancel = CancelToken::new();
            let started = Management::of(self.restorer.host(), &cancel)
                .and_then(|management| management.start(&self.vm.path, &self.name));
            match started {
                Ok(()) => powered_on = true,
                Err(error) => {
                    self.warnings.push(format!("the VM is complete and was not started: {error}"));
                }
            }
        }
        Ok(RestoredVm {
            name: std::mem::take(&mut self.name),
            id: self.vm.id.to_string(),
            directory: directory.unwrap_or_default(),
            route: None,
            same_id: true,
            powered_on,
            warnings: std::mem::take(&mut self.warnings),
        })
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        self.disks.clear();
        // The journal stays: it says with the marks that the VM is not complete.
        self.journal = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_names_the_vm_by_its_id() {
        let name = mark_name(uuid::Uuid::from_u128(0xab));
        assert!(name.contains("00000000-0000-0000-0000-0000000000AB"), "{name}");
        assert!(!name.contains(['\\', '/', ':']));
    }
}
