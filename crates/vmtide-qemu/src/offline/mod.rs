//! The disk image of a VM that is powered off, with its persistent dirty bitmaps.
//!
//! The same bitmaps that track a running VM lie in its qcow2 image while it is off, so an
//! incremental chain goes on over powered-off backups: give [`OfflineImage`] the VM's name and the
//! disk's id, and the lineage is the same. The image is read through a `qemu-nbd` child with a
//! private socket, which holds QEMU's image lock: a VM that runs is refused here, and one that is
//! off cannot be started until the backup has ended. `qemu-nbd` ends by itself when its last
//! client is gone, so it does not outlive a killed job. Nothing else writes to the image meanwhile,
//! so no scratch space is needed and the new bitmap stays empty until the VM runs again.

mod image;
mod server;

use crate::export;
use crate::inventory::Drive;
use crate::names;
use crate::plan::{self, DiskPlan};
use crate::scratch;
use crate::steps::Step;
use image::ImageFile;
use server::ImageServer;
use std::path::PathBuf;
use vmtide_hypervisor::{
    Consistency, DiskBus, DiskConfig, DiskId, FreezeRequest, FrozenDisk, FrozenVm, FullReason,
    Hypervisor, HypervisorError, ImageSource, JobId, Journal, ReapReport, Result, VmConfig, VmLock,
    VmSummary,
};
use vmtide_nbd::NbdUrl;

/// Why a VM that is off is only crash consistent.
const NO_GUEST: &str = "the VM is powered off and has no guest to ask";

/// The image of a powered-off VM as a source of backups.
#[derive(Clone, Debug)]
pub struct OfflineImage {
    path: PathBuf,
    state_directory: PathBuf,
    name: Option<String>,
    disk: DiskId,
    format: Option<String>,
}

impl OfflineImage {
    /// The image at `path`. Locks and journals go to `state_directory`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>, state_directory: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            state_directory: state_directory.into(),
            name: None,
            disk: DiskId(ImageSource::DISK.into()),
            format: None,
        }
    }

    /// The VM's name in restore points; without it the file's name without extension.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The disk's id in restore points, the one it has while the VM runs.
    #[must_use]
    pub fn with_disk_id(mut self, disk: DiskId) -> Self {
        self.disk = disk;
        self
    }

    /// The image's format as QEMU names it. Without it the format is found by content; a guest
    /// that may write to a raw disk can make it look like another format.
    #[must_use]
    pub fn with_format(mut self, format: impl Into<String>) -> Self {
        self.format = Some(format.into());
        self
    }

    fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            let stem = self.path.file_stem();
            stem.map_or_else(|| "image".into(), |stem| stem.to_string_lossy().into_owned())
        })
    }

    fn open(&self) -> Result<(ImageFile, Drive)> {
        let image = ImageFile::find(&self.path, self.format.as_deref())?;
        let drive = image.drive(self.disk.clone())?;
        Ok((image, drive))
    }

    fn config(&self, drive: &Drive) -> VmConfig {
        VmConfig {
            name: self.name(),
            platform: "image".into(),
            disks: vec![DiskConfig {
                id: drive.id.clone(),
                size_bytes: drive.size_bytes,
                bus: DiskBus::Other,
                format: Some(drive.driver.clone()),
                path: Some(drive.filename.clone()),
                ..DiskConfig::default()
            }],
            ..VmConfig::default()
        }
    }

    fn lock(&self, image: &ImageFile, job: &JobId) -> Result<VmLock> {
        VmLock::acquire(&self.state_directory, &self.name(), image.key(), job)
    }

    /// Ends servers and removes sockets that killed jobs left. The image's lock is held.
    fn reap_locked(&self, image: &ImageFile) -> Result<ReapReport> {
        let mut report = ReapReport::default();
        for journal in Journal::leftovers(&self.state_directory, image.key())? {
            let steps = Step::all(journal.entry());
            for step in &steps {
                if let Step::Server { socket } = step
                    && server::end_leftover(socket)?
                {
                    report.removed.push(format!("qemu-nbd at {}", socket.display()));
                }
            }
            let files = crate::cleanup::remove_files(&steps);
            if !files.failed.is_empty() {
                return Err(HypervisorError::failed(
                    "remove what an earlier job left",
                    files.failed.join("; "),
                ));
            }
            report.removed.extend(files.removed);
            journal.finish()?;
        }
        Ok(report)
    }

    fn plan(drive: &Drive, request: &FreezeRequest) -> Result<DiskPlan> {
        let planned = plan::plan(std::slice::from_ref(drive), request).pop();
        let mut plan = planned.ok_or_else(|| HypervisorError::NotFound {
            what: format!("a disk of {} to back up", drive.filename),
            detail: "the only disk is excluded".into(),
        })?;
        if !drive.keeps_bitmaps && request.bases.contains_key(&drive.id) {
            plan.base = Err(FullReason::NoTracking(format!(
                "a {} image at rest holds no dirty bitmaps",
                drive.driver
            )));
        }
        Ok(plan)
    }

    /// Makes everything, or nothing.
    fn make(&self, mut work: Work, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        match self.make_all(&mut work, request) {
            Ok(disk) => Ok(Box::new(FrozenImage {
                config: self.config(&work.plan.drive),
                downgraded: request.consistency > Consistency::Crash,
                disks: vec![disk],
                work: Some(work),
            })),
            Err(error) => {
                if let Err(undo) = work.undo() {
                    tracing::error!(%undo, "left for the next job to remove");
                }
                Err(error)
            }
        }
    }

    fn make_all(&self, work: &mut Work, request: &FreezeRequest) -> Result<FrozenDisk> {
        request.cancel.check()?;
        for name in &work.plan.useless {
            work.image.remove_bitmap(name)?;
        }
        if work.plan.drive.keeps_bitmaps {
            let name = work.plan.mark.bitmap.clone();
            Step::Bitmap { node: work.image.key().into(), name: name.clone() }
                .record(&mut work.journal)?;
            work.image.add_bitmap(&name)?;
        }
        let directory = scratch::private_directory_path(&self.state_directory, &request.job)?;
        let socket = directory.join(scratch::SOCKET_NAME);
        Step::Directory { path: directory.clone() }.record(&mut work.journal)?;
        Step::Server { socket: socket.clone() }.record(&mut work.journal)?;
        scratch::make_private_directory(&directory)?;
        let bitmap = work.plan.base.as_deref().map_err(Clone::clone);
        let server = ImageServer::start(&work.image, bitmap.as_deref().ok(), &socket)?;
        work.server = Some(server);
        let url = NbdUrl::unix(socket.to_string_lossy(), server::EXPORT);
        let (device, changes) = export::open_export(&url, bitmap, &request.cancel)?;
        Ok(FrozenDisk {
            id: work.plan.drive.id.clone(),
            device,
            changes,
            tracking: work.plan.drive.keeps_bitmaps.then(|| work.plan.tracking()),
        })
    }
}

impl Hypervisor for OfflineImage {
    fn list(&self) -> Result<Vec<VmSummary>> {
        self.open()?;
        Ok(vec![VmSummary { name: self.name(), id: None, state: "shut off".into(), disks: 1 }])
    }

    /// The one VM, by any name.
    fn describe(&self, _vm: &str) -> Result<VmConfig> {
        Ok(self.config(&self.open()?.1))
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        crate::freeze::check_lineage(request)?;
        if request.consistency > Consistency::Crash && !request.allow_downgrade {
            return Err(HypervisorError::ConsistencyNotReached {
                wanted: request.consistency,
                detail: NO_GUEST.into(),
            });
        }
        let path = image::canonical(&self.path)?;
        let found = ImageFile::at(path.clone());
        let lock = self.lock(&found, &request.job)?;
        // What a killed job left may still hold the image.
        self.reap_locked(&found)?;
        let (image, drive) = self.open()?;
        let plan = Self::plan(&drive, request)?;
        let journal = Journal::begin(&self.state_directory, request.job.clone(), image.key())?;
        let lineage = request.lineage.clone();
        let work = Work { image, plan, lineage, server: None, journal, _lock: lock };
        self.make(work, request)
    }

    fn reap(&self) -> Result<ReapReport> {
        let image = ImageFile::at(image::canonical(&self.path)?);
        match self.lock(&image, &JobId::random()) {
            Ok(_lock) => self.reap_locked(&image),
            Err(HypervisorError::Busy { vm, detail }) => {
                let in_use = vec![format!("{vm}: {detail}")];
                Ok(ReapReport { in_use, ..ReapReport::default() })
            }
            Err(error) => Err(error),
        }
    }
}

/// What one job holds on one image.
struct Work {
    image: ImageFile,
    plan: DiskPlan,
    lineage: String,
    server: Option<ImageServer>,
    journal: Journal,
    /// Held as long as the job.
    _lock: VmLock,
}

impl Work {
    fn close(&mut self) -> Result<()> {
        // The server holds the image's lock: it has to end before the image can be changed.
        if let Some(server) = self.server.take() {
            server.end();
        }
        let files = crate::cleanup::remove_files(&Step::all(self.journal.entry()));
        if files.failed.is_empty() {
            return Ok(());
        }
        Err(HypervisorError::failed("remove the socket", files.failed.join("; ")))
    }

    fn undo(mut self) -> Result<()> {
        self.close()?;
        if self.plan.drive.keeps_bitmaps {
            let name = &self.plan.mark.bitmap;
            let there = self.image.drive(self.plan.drive.id.clone())?.bitmaps;
            if there.iter().any(|bitmap| bitmap.name == *name) {
                self.image.remove_bitmap(name)?;
            }
        }
        self.journal.finish()
    }

    fn keep(mut self) -> Result<Vec<String>> {
        self.close()?;
        let mut failed = Vec::new();
        if self.plan.drive.keeps_bitmaps {
            let kept = &self.plan.mark.bitmap;
            let bitmaps = self.image.drive(self.plan.drive.id.clone())?.bitmaps;
            if !bitmaps.iter().any(|b| b.name == *kept && b.recording && !b.inconsistent) {
                return Err(HypervisorError::failed(
                    "keep change tracking",
                    format!("bitmap {kept} vanished; the next backup reads the disk in full"),
                ));
            }
            for bitmap in bitmaps {
                let ours = names::parse_tracking(&bitmap.name)
                    .is_some_and(|name| name.lineage == self.lineage);
                if ours
                    && bitmap.name != *kept
                    && let Err(error) = self.image.remove_bitmap(&bitmap.name)
                {
                    failed.push(error.to_string());
                }
            }
        }
        self.journal.finish()?;
        Ok(failed)
    }
}

struct FrozenImage {
    config: VmConfig,
    downgraded: bool,
    disks: Vec<FrozenDisk>,
    work: Option<Work>,
}

impl FrozenImage {
    fn close(&mut self) -> Result<Work> {
        self.disks.clear();
        self.work
            .take()
            .ok_or_else(|| HypervisorError::failed("end the backup", "it has ended before"))
    }
}

impl FrozenVm for FrozenImage {
    fn config(&self) -> &VmConfig {
        &self.config
    }

    fn consistency(&self) -> Consistency {
        Consistency::Crash
    }

    fn downgrade_reason(&self) -> Option<&str> {
        self.downgraded.then_some(NO_GUEST)
    }

    fn warnings(&self) -> &[String] {
        &[]
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn commit(mut self: Box<Self>) -> Result<Vec<String>> {
        self.close()?.keep()
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        self.close()?.undo()
    }
}

impl Drop for FrozenImage {
    fn drop(&mut self) {
        if let Ok(work) = self.close()
            && let Err(error) = work.undo()
        {
            tracing::error!(%error, "left for the next job to remove");
        }
    }
}
