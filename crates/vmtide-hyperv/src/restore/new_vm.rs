//! A new VM: checks, disks, and the registration as the last.

use super::exact::Exact;
use super::hardware::{Hardware, Wishes};
use super::journal::{RestoreJournal, Step, is_temporary_name, lock_name, temporary_name};
use super::layout::Layout;
use super::management::Management;
use super::native::{ConfigurationFiles, NativeSettings};
use super::portable::Portable;
use super::undo::{Undone, undo};
use super::{HypervRestorer, host_path, refused, tracking};
use crate::files::NewDisk;
use crate::model::types::VmRecord;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{CancelToken, WritableBlockDevice};
use vmtide_hypervisor::{
    DiskConfig, DiskContent, DiskId, DiskToRestore, HypervisorError, NewVmRequest, RestoreRoute,
    RestoredVm, RestoringDisk, RestoringVm, Result, VmIdentity,
};

/// The most characters of a VM's name (`ElementName`).
const MAX_NAME_CHARACTERS: usize = 100;

/// The sector sizes of a disk whose source did not tell them: what almost every virtual disk has.
const LOGICAL_SECTOR_BYTES: u32 = 512;
/// See [`LOGICAL_SECTOR_BYTES`]. Hyper-V makes its own disks so.
const PHYSICAL_SECTOR_BYTES: u32 = 4096;

/// The platform whose configurations have files and settings of Hyper-V.
const PLATFORM: &str = "hyper-v";

/// A new VM that is being restored.
pub(super) struct NewVm {
    restorer: HypervRestorer,
    request: NewVmRequest,
    plan: Plan,
    /// None when it has ended.
    journal: Option<RestoreJournal>,
    disks: Vec<RestoringDisk>,
    warnings: Vec<String>,
}

/// What was decided before anything was made.
struct Plan {
    layout: Layout,
    /// The files of the exact route; none for the portable one.
    exact: Option<ConfigurationFiles>,
    hardware: Hardware,
    /// The id it had, where it comes back as itself.
    original: Option<Uuid>,
    paths: BTreeMap<DiskId, String>,
}

/// Begins a new VM.
pub(super) fn begin(restorer: &HypervRestorer, request: &NewVmRequest) -> Result<NewVm> {
    check_name(&request.name)?;
    let (state, peer) = (&restorer.inner.state_directory, restorer.host().peer());
    let lock = lock_name(state, peer, &request.name, &request.job)?;
    let mut warnings = Vec::new();
    if let Err(error) = restorer.reap_all(Some(&request.name)) {
        warnings.push(format!("something of an earlier restore is still there: {error}"));
    }
    let management = Management::of(restorer.host(), &request.cancel)?;
    let plan = Plan::make(restorer, &management, request)?;
    warnings.extend(plan.warnings(request));
    let journal = RestoreJournal::begin(state, &request.job, peer, &request.name, vec![lock])?;
    let mut vm = NewVm {
        restorer: restorer.clone(),
        request: request.clone(),
        plan,
        journal: Some(journal),
        disks: Vec::new(),
        warnings,
    };
    match vm.make_files() {
        Ok(()) => Ok(vm),
        Err(error) => {
            // Nothing was asked of the host that it could still be at.
            vm.undone(false);
            Err(error)
        }
    }
}

fn check_name(name: &str) -> Result<()> {
    let what = || format!("restore to a VM named {name:?}");
    if name.trim() != name || name.is_empty() || name.chars().any(char::is_control) {
        return Err(refused(what(), "a name has no spaces around it and is not empty"));
    }
    if name.chars().count() > MAX_NAME_CHARACTERS {
        return Err(refused(what(), format!("it has more than {MAX_NAME_CHARACTERS} characters")));
    }
    if is_temporary_name(name) {
        return Err(refused(what(), "names of this form are those of VMs that are not complete"));
    }
    Ok(())
}

impl Plan {
    fn make(
        restorer: &HypervRestorer,
        management: &Management<'_>,
        request: &NewVmRequest,
    ) -> Result<Self> {
        let config = &request.config;
        let vms = restorer.host().vms()?;
        let wanted = request.name.to_lowercase();
        if vms.iter().any(|vm| vm.name.to_lowercase() == wanted) {
            return Err(refused(
                format!("restore to {}", request.name),
                "the host has a VM of this name: choose another, or --in-place to write its disks",
            ));
        }
        let is_native = config.platform == PLATFORM;
        let native = if is_native { NativeSettings::find(config)? } else { None };
        let exact = choose_route(request, is_native)?;
        let original = original_id(management, request, &vms)?;
        let ids: Vec<_> = request.disks.iter().map(|disk| disk.id.clone()).collect();
        let hardware = Hardware::plan(
            config,
            native.as_ref(),
            &Wishes {
                disks: &ids,
                is_original: original.is_some() || keeps_identity(request),
                networks: &request.networks,
                firmware: request.firmware,
            },
        )?;
        let root = match &request.directory {
            Some(directory) if host_path::is_absolute(directory) => directory.clone(),
            Some(directory) => {
                return Err(refused(
                    format!("restore below {directory}"),
                    r"give a directory of the host with its drive or share: C:\VMs, \\server\share\VMs",
                ));
            }
            None => default_root(management)?,
        };
        let layout = Layout::new(&root, &request.name);
        for directory in [&layout.directory, &layout.disks, &layout.import] {
            let there = restorer.files().list(directory)?;
            if there.is_some_and(|files| !files.is_empty()) {
                return Err(refused(
                    format!("restore to {directory}"),
                    "there are files already: choose another name, or another place (--directory)",
                ));
            }
        }
        let paths = layout.disk_paths(config, &request.name, &ids);
        let paths = ids.into_iter().zip(paths).collect();
        Ok(Self { layout, exact, hardware, original, paths })
    }

    fn warnings(&self, request: &NewVmRequest) -> Vec<String> {
        // The exact route keeps all settings, and warns of the rest itself.
        let mut warnings =
            if self.exact.is_some() { Vec::new() } else { self.hardware.warnings.clone() };
        if self.exact.is_some() && request.config.tpm == Some(true) {
            warnings.push(
                "the VM has a virtual TPM: on another host it starts only when that host has the keys of \
                 its guardian, and else asks for recovery keys"
                    .into(),
            );
        }
        warnings
    }
}

/// The configuration files, where the VM is made from them.
fn choose_route(request: &NewVmRequest, is_native: bool) -> Result<Option<ConfigurationFiles>> {
    let changes_firmware =
        request.firmware.is_some() && request.firmware != request.config.firmware;
    if request.route == RestoreRoute::Portable || !is_native || changes_firmware {
        if request.route == RestoreRoute::Exact {
            return Err(refused(
                "restore by the exact route",
                "that takes a restore point of Hyper-V and its own generation: use --route portable",
            ));
        }
        return Ok(None);
    }
    let files = ConfigurationFiles::find(&request.config)?;
    if files.is_none() && request.route == RestoreRoute::Exact {
        return Err(refused(
            "restore by the exact route",
            "the restore point holds no configuration file (.vmcx): use --route portable",
        ));
    }
    Ok(files)
}

/// Whether serial numbers, addresses and disk ids are kept, where the id of the VM cannot be.
fn keeps_identity(request: &NewVmRequest) -> bool {
    match request.identity {
        VmIdentity::Original => true,
        VmIdentity::New => false,
        VmIdentity::Auto => {
            request.config.platform != PLATFORM
                && request.name.to_lowercase() == request.config.name.to_lowercase()
        }
    }
}

/// The id to keep; none for a copy.
fn original_id(
    management: &Management<'_>,
    request: &NewVmRequest,
    vms: &[VmRecord],
) -> Result<Option<Uuid>> {
    let config = &request.config;
    let is_same_name = request.name.to_lowercase() == config.name.to_lowercase();
    let wants = match request.identity {
        VmIdentity::New => false,
        VmIdentity::Original => true,
        VmIdentity::Auto => is_same_name,
    };
    let id = config.id.as_deref().and_then(|id| Uuid::parse_str(id).ok());
    let Some(id) = id.filter(|_| wants && config.platform == PLATFORM) else { return Ok(None) };
    let mut taken = vms.iter().find(|vm| vm.id == id).map(|vm| format!("the VM {}", vm.name));
    if taken.is_none() {
        let planned = management.planned()?.into_iter().find(|planned| planned.settings.vm == id);
        taken = planned.map(|planned| {
            format!("the planned VM {} (Msvm_PlannedComputerSystem)", planned.settings.name)
        });
    }
    match (taken, request.identity) {
        (None, _) => Ok(Some(id)),
        (Some(vm), VmIdentity::Original) => Err(refused(
            format!("restore {} with its own id", config.name),
            format!("{vm} of the host has it: remove it, or restore a copy (--new-id)"),
        )),
        (Some(_), _) => Ok(None),
    }
}

/// Where the host keeps its VMs by default.
fn default_root(management: &Management<'_>) -> Result<String> {
    let class = "Msvm_VirtualSystemManagementServiceSettingData";
    let found = management.host.query(&format!("SELECT * FROM {class}"))?;
    let root = found.first().and_then(|settings| {
        settings.optional_text("DefaultExternalDataRoot").ok().flatten().map(str::to_owned)
    });
    root.filter(|root| host_path::is_absolute(root)).ok_or_else(|| {
        refused(
            "find the host's directory of VMs",
            "the host does not tell it: give one (--directory)",
        )
    })
}

impl NewVm {
    fn record(&mut self, step: &Step) -> Result<()> {
        let ended = || HypervisorError::failed("write the journal", "the restore has ended");
        self.journal.as_mut().ok_or_else(ended)?.record(step)
    }

    /// The directories, the mark, and the disks, empty.
    fn make_files(&mut self) -> Result<()> {
        let layout = self.plan.layout.clone();
        for path in [&layout.directory, &layout.disks] {
            self.record(&Step::Directory { path: path.clone(), temporary: false })?;
            self.restorer.files().create_directory(path)?;
        }
        self.record(&Step::File { path: layout.mark.clone(), temporary: true })?;
        let text = mark_text(&self.request.name, self.request.job.as_str());
        self.restorer.files().write_file(&layout.mark, text.as_bytes())?;
        self.check_space()?;
        for disk in self.request.disks.clone() {
            self.request.cancel.check()?;
            self.make_disk(&disk)?;
        }
        Ok(())
    }

    fn check_space(&self) -> Result<()> {
        let needed: u64 = self
            .request
            .disks
            .iter()
            .map(|disk| {
                let is_fixed = self.known(&disk.id).is_some_and(|known| known.fixed == Some(true));
                if is_fixed { disk.size_bytes } else { disk.data_bytes.unwrap_or(0) }
            })
            .fold(0, u64::saturating_add);
        let directory = &self.plan.layout.directory;
        match self.restorer.files().free_bytes(directory)? {
            Some(free) if free < needed => Err(refused(
                format!("restore to {directory}"),
                format!(
                    "its volume has {free} bytes free, and the disks hold {needed} bytes of data"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn known(&self, id: &DiskId) -> Option<&DiskConfig> {
        self.request.config.disks.iter().find(|disk| disk.id == *id)
    }

    fn make_disk(&mut self, disk: &DiskToRestore) -> Result<()> {
        let path = self.plan.paths.get(&disk.id).cloned().unwrap_or_default();
        let known = self.known(&disk.id);
        let sector = known.and_then(|known| known.logical_sector_bytes);
        let sector = sector.filter(|sector| [512, 4096].contains(sector));
        let sector = sector.unwrap_or(LOGICAL_SECTOR_BYTES);
        let physical = known.and_then(|known| known.physical_sector_bytes);
        let physical = physical.filter(|physical| [512, 4096].contains(physical));
        let keeps_ids = self.plan.original.is_some() || keeps_identity(&self.request);
        let disk_id = known.and_then(|known| Uuid::parse_str(known.image_id.as_deref()?).ok());
        let new = NewDisk {
            size_bytes: disk.size_bytes.next_multiple_of(sector.into()),
            disk_id: disk_id.filter(|_| keeps_ids),
            logical_sector_bytes: sector,
            physical_sector_bytes: physical.unwrap_or(PHYSICAL_SECTOR_BYTES).max(sector),
            block_bytes: known.and_then(|known| known.block_bytes).unwrap_or(0),
            fixed: known.and_then(|known| known.fixed).unwrap_or(false),
        };
        self.record(&Step::File { path: path.clone(), temporary: false })?;
        let device: Arc<dyn WritableBlockDevice> =
            self.restorer.files().create_disk(&path, &new)?;
        self.disks.push(RestoringDisk {
            id: disk.id.clone(),
            path,
            format: "vhdx".into(),
            device,
            content: DiskContent::Zeros,
        });
        Ok(())
    }

    /// Registers the VM, complete but for its name.
    fn register(&mut self) -> Result<(VmRecord, RestoreRoute)> {
        self.record(&Step::Registering)?;
        // The files are closed before the host opens them.
        let paths: Vec<_> = self.disks.drain(..).map(|disk| disk.path).collect();
        for path in &paths {
            tracking::remove_files(self.restorer.files(), path)?;
        }
        if self.plan.exact.is_none() {
            return Ok((self.register_portable()?, RestoreRoute::Portable));
        }
        match self.register_exact() {
            Ok(vm) => Ok((vm, RestoreRoute::Exact)),
            // Also one that does not know imports, or misses what the files name.
            Err(
                error @ (HypervisorError::Failed { .. }
                | HypervisorError::Unsupported { .. }
                | HypervisorError::NotFound { .. }),
            ) if self.request.route == RestoreRoute::Auto => {
                let why = error.to_string();
                self.forget_systems()?;
                self.warnings.push(format!(
                    "the host does not take the VM's own configuration files ({why}): it was made from \
                     its settings, with a new id"
                ));
                self.warnings.extend(self.plan.hardware.warnings.clone());
                self.plan.original = None;
                Ok((self.register_portable()?, RestoreRoute::Portable))
            }
            Err(error) => Err(error),
        }
    }

    /// Removes what the exact route has registered, before the portable one begins.
    fn forget_systems(&mut self) -> Result<()> {
        let cancel = self.request.cancel.clone();
        let management = Management::of(self.restorer.host(), &cancel)?;
        let steps = self.journal.as_ref().map(RestoreJournal::steps).unwrap_or_default();
        super::undo::remove_systems(&management, &self.request.job, &steps).map(drop)
    }

    fn register_exact(&mut self) -> Result<VmRecord> {
        let ended = || HypervisorError::failed("register the VM", "the restore has ended");
        let cancel = self.request.cancel.clone();
        let management = Management::of(self.restorer.host(), &cancel)?;
        let name = temporary_name(&self.request.job);
        let route = Exact {
            management: &management,
            files: self.restorer.files(),
            configuration: self.plan.exact.as_ref().ok_or_else(ended)?,
            config: &self.request.config,
            disks: &self.plan.paths,
            directory: &self.plan.layout.directory,
            import_directory: &self.plan.layout.import,
            name: &name,
            keeps_id: self.plan.original,
            networks: &self.request.networks,
        };
        let (planned, warnings) = route.plan(self.journal.as_mut().ok_or_else(ended)?)?;
        self.warnings.extend(warnings);
        self.warnings.extend(management.validate(&planned)?);
        management.realize(&planned)?;
        let id = planned.settings.vm;
        match self.restorer.host().vm(id) {
            Ok(vm) => Ok(vm),
            // The page does not say that the id stays.
            Err(HypervisorError::NotFound { .. }) => {
                let vms = self.restorer.host().vms()?;
                vms.into_iter().find(|vm| vm.name == name).ok_or_else(|| {
                    HypervisorError::protocol(
                        self.restorer.host().peer(),
                        "the VM that was registered is not there",
                    )
                })
            }
            Err(error) => Err(error),
        }
    }

    fn register_portable(&mut self) -> Result<VmRecord> {
        let cancel = self.request.cancel.clone();
        let management = Management::of(self.restorer.host(), &cancel)?;
        let name = temporary_name(&self.request.job);
        let route = Portable {
            management: &management,
            hardware: &self.plan.hardware,
            files: &self.plan.paths,
            directory: &self.plan.layout.directory,
            name: &name,
        };
        let (vm, warnings) = route.define()?;
        self.warnings.extend(warnings);
        let warnings = route.equip(&vm)?;
        self.warnings.extend(warnings);
        let wants_id =
            self.request.identity == VmIdentity::Original || self.plan.original.is_some();
        if wants_id && self.request.config.platform == PLATFORM {
            self.warnings.push(
                "the VM has a new id: Hyper-V gives one to every VM that is made from its settings"
                    .into(),
            );
        }
        Ok(vm)
    }

    /// Gives the VM its name: from here on it is complete.
    fn commit(&mut self, vm: &VmRecord) -> Result<()> {
        self.request.cancel.check()?;
        self.record(&Step::Commit { id: vm.id })?;
        let host = self.restorer.host();
        let renamed = host.rename(&vm.settings, &self.request.name);
        let Err(error) = renamed else { return Ok(()) };
        // The answer may have been lost and not the call.
        match host.vm(vm.id) {
            Ok(now) if now.name == self.request.name => Ok(()),
            _ => Err(error),
        }
    }

    /// What is left when the VM is complete. Nothing of it can make the restore fail. Answers whether it was
    /// started.
    fn tidy_up(&mut self, vm: &VmRecord, power_on: bool) -> bool {
        let cancel = CancelToken::new();
        let steps = self.journal.as_ref().map(RestoreJournal::steps).unwrap_or_default();
        let tidied = Management::of(self.restorer.host(), &cancel).and_then(|management| {
            undo(&management, self.restorer.files(), &self.request.job, &steps)
        });
        let is_tidy = tidied.is_ok();
        if let Err(error) = tidied {
            self.warnings
                .push(format!("the VM is complete, but not all temporary files are gone: {error}"));
        }
        let powered_on = power_on && self.start(vm);
        self.end(is_tidy);
        powered_on
    }

    fn start(&mut self, vm: &VmRecord) -> bool {
        let cancel = CancelToken::new();
        let started = Management::of(self.restorer.host(), &cancel)
            .and_then(|management| management.start(&vm.path, &self.request.name));
        if let Err(error) = &started {
            self.warnings.push(format!("the VM is complete and was not started: {error}"));
        }
        started.is_ok()
    }

    fn end(&mut self, is_tidy: bool) {
        if let Some(journal) = self.journal.take()
            && is_tidy
            && let Err(error) = journal.finish()
        {
            tracing::warn!(%error, "a journal of a restore that has ended was left");
        }
    }

    /// Undoes everything. Answers whether that found the VM complete.
    fn undone(&mut self, may_go_on: bool) -> bool {
        match self.undo(may_go_on) {
            Ok(undone) => undone.is_complete,
            Err(failed) => {
                tracing::warn!(%failed, "a restore could not be undone at once and is left to the next one");
                false
            }
        }
    }

    /// Undoes everything; where the host may still be at something, the journal stays, so that what comes of
    /// it is removed later.
    fn undo(&mut self, may_go_on: bool) -> Result<Undone> {
        self.disks.clear();
        let Some(mut journal) = self.journal.take() else { return Ok(Undone::default()) };
        // Not the job's: that one may be cancelled.
        let cancel = CancelToken::new();
        let host = self.restorer.host();
        let management = Management::of(host, &cancel)?;
        let undone = undo(&management, self.restorer.files(), journal.job(), &journal.steps())?;
        if may_go_on && !undone.is_complete {
            journal.record(&Step::GivenUp { unix_s: host.options().clock.unix_s() })?;
        } else {
            journal.finish()?;
        }
        Ok(undone)
    }
}

/// Whether the host may still be at what it was asked for when this came of it.
fn may_go_on(error: &HypervisorError) -> bool {
    matches!(
        error,
        HypervisorError::Timeout { .. }
            | HypervisorError::Unreachable { .. }
            | HypervisorError::Protocol { .. }
            | HypervisorError::Block(_)
    )
}

impl RestoringVm for NewVm {
    fn disks(&self) -> &[RestoringDisk] {
        &self.disks
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn finish(mut self: Box<Self>, power_on: bool) -> Result<RestoredVm> {
        let (vm, route) = match self.register() {
            Ok(done) => done,
            Err(error) => {
                self.undone(may_go_on(&error));
                return Err(error);
            }
        };
        let powered_on = match self.commit(&vm) {
            Ok(()) => self.tidy_up(&vm, power_on),
            // The call may have had its effect and only its answer been lost.
            Err(error) if self.undone(may_go_on(&error)) => {
                self.warnings.push(format!(
                    "the VM is complete, although the host's answer to giving it its name was lost ({error})"
                ));
                power_on && self.start(&vm)
            }
            Err(error) => return Err(error),
        };
        let known = self.request.config.id.as_deref().and_then(|id| Uuid::parse_str(id).ok());
        Ok(RestoredVm {
            name: self.request.name.clone(),
            id: vm.id.to_string(),
            directory: self.plan.layout.directory.clone(),
            route: Some(route),
            same_id: known == Some(vm.id),
            powered_on,
            warnings: std::mem::take(&mut self.warnings),
        })
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        // Before `finish` the host is asked for files only.
        self.undo(false).map(drop)
    }
}

impl Drop for NewVm {
    fn drop(&mut self) {
        if self.journal.is_some()
            && let Err(error) = self.undo(false)
        {
            tracing::warn!(%error, "a restore that was dropped is left to the next one");
        }
    }
}

/// What the mark says to whoever finds it.
fn mark_text(name: &str, job: &str) -> String {
    format!(
        "vmtide is restoring the VM {name} to this directory (job {job}).\r\n\
         As long as this file is here, the VM is not complete. If no restore is running any more,\r\n\
         run the restore again, which removes all of this first.\r\n"
    )
}
