//! Undoing a restore that did not come to its end: at once, or after its process was killed.
//!
//! One procedure for both, that works from the steps of the journal and from what the host says now, and
//! can be repeated. A VM that has its name is complete and stays; then only what was temporary goes.
//!
//! | stopped | what is there | what is done |
//! |---|---|---|
//! | before a VM was registered | files | removed |
//! | within an import | perhaps a planned VM under its old name | told by its id, or by its disks and origin, and removed; then the files |
//! | after it | a VM or planned VM under the job's name, or by its id | removed; then the files |
//! | at the commit | the VM under its name, or still under the job's | kept; or removed with its files |
//! | while the host is still at something | what it makes after this | told as above by later looks, and removed; its files are gone |

use super::host_path::{extension_of, is_absolute, join, same};
use super::journal::{Step, given_up_at, is_temporary_name, temporary_name};
use super::management::{Management, PlannedVm};
use crate::files::HostFiles;
use crate::model::types::VmRecord;
use vmtide_hypervisor::{JobId, Result};

/// The extensions of the files that a VM's configuration and its guest's state lie in.
const CONFIGURATION: [&str; 4] = ["vmcx", "vmrs", "vmgs", "xml"];

/// The directories that a host makes in that of a VM.
const OF_HOST: [&str; 2] = ["Virtual Machines", "Snapshots"];

/// What was undone.
#[derive(Debug, Default)]
pub(super) struct Undone {
    /// What was removed, one line each.
    pub removed: Vec<String>,
    /// What was left because somebody uses it, one line each.
    pub left: Vec<String>,
    /// The VM is complete under its name: it was kept.
    pub is_complete: bool,
}

/// Undoes the steps of `job`.
///
/// # Errors
/// The first thing that could not be undone; all else has been tried.
pub(super) fn undo(
    management: &Management<'_>,
    files: &dyn HostFiles,
    job: &JobId,
    steps: &[Step],
) -> Result<Undone> {
    let complete = complete(management, job, steps)?;
    let mut undone = Undone { is_complete: complete.is_some(), ..Undone::default() };
    if complete.is_none() {
        undone.removed = remove_systems(management, job, steps)?;
    }
    remove_files(management, files, steps, complete.as_ref(), &mut undone)?;
    Ok(undone)
}

/// The VM, where it has got its name.
fn complete(management: &Management<'_>, job: &JobId, steps: &[Step]) -> Result<Option<VmRecord>> {
    let committed = steps.iter().find_map(|step| match step {
        Step::Commit { id } => Some(*id),
        _ => None,
    });
    let Some(id) = committed else { return Ok(None) };
    let name = temporary_name(job);
    Ok(management.host.vms()?.into_iter().find(|vm| vm.id == id && vm.name != name))
}

/// Removes the VM and planned VMs of `job`, by its name and by its steps. Answers with what was removed.
///
/// # Errors
/// Where one is there and cannot be removed.
pub(super) fn remove_systems(
    management: &Management<'_>,
    job: &JobId,
    steps: &[Step],
) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let name = temporary_name(job);
    for vm in management.host.vms()? {
        if vm.name == name {
            management.destroy(&vm.path, &format!("the incomplete VM {name}"))?;
            removed.push(format!("the incomplete VM {name}"));
        }
    }
    // After an import the disks are those of the original, until they are changed.
    for planned in management.planned()? {
        // Another job keeps the same id, and has got further.
        let is_others = planned.settings.name != name && is_temporary_name(&planned.settings.name);
        let is_ours = planned.settings.name == name
            || match given_up_at(steps) {
                // Later somebody may import the VM by other means: its id and its disks prove nothing then.
                Some(_) => comes_from_import(&planned, steps),
                None => is_known(&planned, steps) || is_import(management, &planned, steps)?,
            };
        if is_ours && !is_others {
            management
                .destroy(&planned.system(), &format!("the planned VM {}", planned.settings.name))?;
            removed.push(format!("the planned VM {}", planned.settings.name));
        }
    }
    Ok(removed)
}

/// Whether its id was written down as ours.
fn is_known(planned: &PlannedVm, steps: &[Step]) -> bool {
    steps.iter().any(|step| matches!(step, Step::System { id } if *id == planned.settings.vm))
}

/// Whether its configuration lies where we imported from, which was a directory of our own.
fn comes_from_import(planned: &PlannedVm, steps: &[Step]) -> bool {
    steps.iter().any(|step| match step {
        Step::Import { before, directory, .. } => {
            !before.contains(&planned.settings.vm) && planned.comes_from(directory)
        }
        _ => false,
    })
}

/// Whether it came of our import and was not renamed yet: it was not there before, and has the id we kept,
/// or comes from our directory, or has the very disks that our configuration names.
fn is_import(management: &Management<'_>, planned: &PlannedVm, steps: &[Step]) -> Result<bool> {
    for step in steps {
        let Step::Import { before, keeps_id, disks, directory } = step else { continue };
        if before.contains(&planned.settings.vm) {
            continue;
        }
        if *keeps_id == Some(planned.settings.vm) || planned.comes_from(directory) {
            return Ok(true);
        }
        let own = management.host.disks(&planned.settings)?;
        let is_named = |file: &str| disks.iter().any(|disk| same(disk, file));
        if !own.is_empty() && own.iter().all(|disk| is_named(&disk.host_resource)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes the files and then the directories, the last first. A file that a VM uses by now is left: it
/// has become somebody's.
fn remove_files(
    management: &Management<'_>,
    files: &dyn HostFiles,
    steps: &[Step],
    complete: Option<&VmRecord>,
    undone: &mut Undone,
) -> Result<()> {
    let in_use = used_files(management)?;
    let is_configuration = |path: &str| complete.is_some_and(|vm| may_be_configuration(vm, path));
    let mut failed = None;
    // A later restore may have made files of the same names since.
    let is_late = given_up_at(steps).is_some();
    for step in steps.iter().rev().filter(|_| !is_late) {
        let Step::File { path, temporary } = step else { continue };
        if complete.is_some() && !temporary {
            continue;
        }
        if is_configuration(path) || in_use.iter().any(|used| same(used, path)) {
            undone.left.push(format!("{path} is used by a VM and was left"));
            continue;
        }
        match files.remove_file(path) {
            Ok(()) => undone.removed.push(path.clone()),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    for step in steps.iter().rev() {
        let Step::Directory { path, temporary } = step else { continue };
        if complete.is_some() && !temporary {
            continue;
        }
        // Those that the host has made in it by itself; none is removed that is not empty.
        let of_host = OF_HOST.iter().filter(|_| complete.is_none()).map(|name| join(path, name));
        for path in of_host.chain([path.clone()]) {
            if let Err(error) = files.remove_directory(&path) {
                failed = failed.or(Some(error));
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Whether a complete VM goes on in the file at `path`.
fn may_be_configuration(vm: &VmRecord, path: &str) -> bool {
    // Where the host does not tell which files are the VM's, all that can be are.
    let extension = extension_of(path).to_lowercase();
    if vm.settings.configuration_file.is_none() && CONFIGURATION.contains(&extension.as_str()) {
        return true;
    }
    let stem = path.rsplit_once('.').map_or(path, |(stem, _)| stem);
    configuration_stems(vm).iter().any(|own| same(own, stem))
}

/// The files a VM's configuration lies in, without their extensions: a host that took no notice of where
/// the planned VM was to go has them where they were imported from.
fn configuration_stems(vm: &VmRecord) -> Vec<String> {
    let settings = &vm.settings;
    let definition = settings.configuration_file.as_ref();
    // Some hosts tell the whole path.
    let within = |root: &str, file: &str| {
        if is_absolute(file) { file.to_owned() } else { join(root, file) }
    };
    let definition = definition.map(|file| within(&settings.configuration_root, file));
    let state = settings.guest_state.as_ref().map(|(root, file)| within(root, file));
    let stem =
        |path: String| path.rsplit_once('.').map_or(path.clone(), |(stem, _)| stem.to_owned());
    definition.into_iter().chain(state).map(stem).collect()
}

/// The files that VMs and checkpoints of the host use.
fn used_files(management: &Management<'_>) -> Result<Vec<String>> {
    let text = "SELECT * FROM Msvm_StorageAllocationSettingData";
    let all = management.host.query(text)?;
    Ok(all
        .iter()
        .flat_map(|one| one.texts("HostResource").unwrap_or_default())
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::types::{Generation, VmSettings, VmState};
    use uuid::Uuid;
    use vmtide_cim::{CimInstance, ObjectPath};

    fn vm(file: Option<&str>, state: Option<&str>) -> VmRecord {
        let path = ObjectPath::new("Msvm_ComputerSystem", &[]);
        let settings = VmSettings {
            instance_id: "Microsoft:x".into(),
            path: path.clone(),
            vm: Uuid::nil(),
            name: "web".into(),
            system_type: String::new(),
            version: (9, 0),
            generation: Generation::Two,
            configuration_root: r"D:\VMs\web".into(),
            configuration_file: file.map(str::to_owned),
            guest_state: state.map(|file| (r"D:\VMs\web".into(), file.into())),
            snapshot_root: None,
            secure_boot: None,
            instance: CimInstance::new("Msvm_VirtualSystemSettingData"),
        };
        VmRecord { id: Uuid::nil(), name: "web".into(), state: VmState::Off, path, settings }
    }

    #[test]
    fn files_that_a_complete_vm_may_go_on_in_are_told_from_temporary_ones() {
        let file = r"D:\VMs\web\Virtual Machines\A.vmgs";
        for known in [
            vm(Some(r"Virtual Machines\A.vmcx"), None),
            vm(Some(r"D:\VMs\web\Virtual Machines\A.vmcx"), None),
            vm(Some(r"C:\elsewhere\B.vmcx"), Some(r"d:\vms\web\Virtual Machines\A.VMGS")),
            vm(None, None),
        ] {
            assert!(may_be_configuration(&known, file), "{:?}", known.settings);
        }
        let elsewhere = vm(Some(r"C:\elsewhere\B.vmcx"), Some(r"C:\elsewhere\B.vmgs"));
        assert!(!may_be_configuration(&elsewhere, file));
        assert!(!may_be_configuration(&vm(None, None), r"D:\VMs\web\INCOMPLETE.txt"));
    }
}
