//! What every request works with.

use crate::audit::AuditLog;
use crate::auth::KeyStore;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::parents;
use crate::provider::{
    self, ChangePage, DiskInfo, DiskProvider, FrozenDisks, NewDisk, ProviderError, TrackingState,
};
use crate::roots::{Located, Roots, Vacant};
use crate::vms::Vms;
use crate::work::Work;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};

/// What every request works with; one per agent, shared by all its threads.
pub struct AppState {
    /// The disks of this platform.
    pub provider: Arc<dyn DiskProvider>,
    /// Its VMs; none where the host has no platform that has some.
    pub vms: Option<Arc<Vms>>,
    /// Where disks may lie.
    pub roots: Roots,
    /// Who may do what.
    pub keys: Arc<KeyStore>,
    /// What one client may use at once.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Metrics,
    /// Who did what.
    pub audit: AuditLog,
    /// What is going on: transfers, freezes, disks that are written.
    pub work: Work,
}

/// The state as handlers get it.
pub type Shared = Arc<AppState>;

impl AppState {
    /// Finds the disk that a client named, and runs `work` on it on a thread that may block.
    ///
    /// What lies outside of the roots is [`NotFound`](ProviderError::NotFound), like what is not there: nobody
    /// learns which files this host has. Afterwards it is looked again whether the name still means the same
    /// file, so that one that was exchanged meanwhile for a link to somewhere else is noticed, unless it was
    /// exchanged back: see [`roots`](crate::roots).
    ///
    /// # Errors
    /// Those of `work`; [`ProviderError::NotFound`]; [`ProviderError::Failed`] where `work` panics.
    pub async fn with_disk<T: Send + 'static>(
        self: &Arc<Self>,
        requested: &str,
        work: impl FnOnce(&Self, &Path) -> provider::Result<T> + Send + 'static,
    ) -> provider::Result<T> {
        let requested = requested.to_owned();
        self.blocking(move |state| state.with_located(&requested, work)).await
    }

    /// The same on the thread of the caller. Blocks.
    ///
    /// # Errors
    /// Those of `work`; [`ProviderError::NotFound`]; [`ProviderError::InUse`] where the file was exchanged.
    pub fn with_located<T>(
        &self,
        requested: &str,
        work: impl FnOnce(&Self, &Path) -> provider::Result<T>,
    ) -> provider::Result<T> {
        let located = self.locate(requested)?;
        let done = work(self, located.path())?;
        located.recheck().map_err(|refusal| ProviderError::InUse {
            path: requested.to_owned(),
            reason: refusal.to_string(),
        })?;
        Ok(done)
    }

    /// Runs `work` on a thread that may block.
    ///
    /// # Errors
    /// Those of `work`; [`ProviderError::Failed`] where it panics.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> provider::Result<T> + Send + 'static,
    ) -> provider::Result<T> {
        let state = Arc::clone(self);
        let working = move || {
            let _counted = state.metrics.threads.enter();
            work(&state)
        };
        match tokio::task::spawn_blocking(working).await {
            Ok(result) => result,
            Err(error) => {
                tracing::error!(%error, "a request ended in a panic");
                Err(ProviderError::Failed {
                    path: "the request".into(),
                    reason: "failed inside the agent; its log says more".into(),
                })
            }
        }
    }

    /// Finds the disk that a client named. Blocks.
    ///
    /// # Errors
    /// [`ProviderError::NotFound`] where it is not there, not inside a root, or no file.
    pub fn locate(&self, requested: &str) -> provider::Result<Located> {
        self.roots.locate(requested).map_err(|error| {
            tracing::debug!(path = requested, %error, "refused");
            ProviderError::NotFound { path: requested.to_owned() }
        })
    }

    /// Finds the place of a disk to be made. Blocks.
    ///
    /// # Errors
    /// [`ProviderError::NotFound`] where its directory is not there or not inside a root, or its name is none;
    /// [`ProviderError::Exists`].
    pub fn locate_new(&self, requested: &str) -> provider::Result<Vacant> {
        let vacant = self.roots.locate_new(requested).map_err(|error| {
            tracing::debug!(path = requested, %error, "refused");
            ProviderError::NotFound { path: requested.to_owned() }
        })?;
        if std::fs::symlink_metadata(vacant.path()).is_ok() {
            return Err(ProviderError::Exists { path: requested.to_owned() });
        }
        Ok(vacant)
    }

    /// Makes a disk at a place that a client named, and looks afterwards whether it is there. Blocks.
    ///
    /// # Errors
    /// As [`locate_new`](Self::locate_new) and [`DiskProvider::create`]; [`ProviderError::Invalid`] for what no disk can
    /// be; [`ProviderError::Failed`] where its directory was exchanged meanwhile, so that the new file may be anywhere.
    pub fn create(
        &self,
        requested: &str,
        disk: &NewDisk,
        cancel: &CancelToken,
    ) -> provider::Result<()> {
        disk.check().map_err(|reason| ProviderError::Invalid { path: requested.into(), reason })?;
        let vacant = self.locate_new(requested)?;
        self.provider.create(vacant.path(), disk, cancel)?;
        vacant.recheck().map_err(|refusal| {
            tracing::error!(path = requested, %refusal, "a new disk may lie outside of the roots");
            ProviderError::Failed {
                path: requested.to_owned(),
                reason: format!("the new disk is not where it was asked for: that {refusal}"),
            }
        })
    }

    /// The state of its change tracking, once its parents are known to lie in the roots, too. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::tracking`] and [`check_parents`](Self::check_parents).
    pub fn tracking(&self, path: &Path) -> provider::Result<TrackingState> {
        self.check_parents(path)?;
        self.provider.tracking(path)
    }

    /// Switches change tracking, likewise. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::set_tracking`] and [`check_parents`](Self::check_parents).
    pub fn set_tracking(&self, path: &Path, enabled: bool) -> provider::Result<()> {
        self.check_parents(path)?;
        self.provider.set_tracking(path, enabled)
    }

    /// What changed, likewise. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::changes`] and [`check_parents`](Self::check_parents).
    pub fn changes(&self, path: &Path, id: &str, range: ByteRange) -> provider::Result<ChangePage> {
        self.check_parents(path)?;
        self.provider.changes(path, id, range)
    }

    /// One moment of these disks, likewise. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::freeze`] and [`check_parents`](Self::check_parents).
    pub fn freeze(&self, paths: &[PathBuf]) -> provider::Result<Box<dyn FrozenDisks>> {
        for path in paths {
            self.check_parents(path)?;
        }
        self.provider.freeze(paths)
    }

    /// Opens a disk for reading once its parents are known to lie in the roots, too. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::open`] and [`check_parents`](Self::check_parents).
    pub fn open(&self, path: &Path) -> provider::Result<Arc<dyn BlockDevice>> {
        self.check_parents(path)?;
        self.provider.open(path)
    }

    /// Opens a disk for writing once its parents are known to lie in the roots, too. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::open_writable`] and [`check_parents`](Self::check_parents).
    pub fn open_writable(&self, path: &Path) -> provider::Result<Arc<dyn WritableBlockDevice>> {
        self.check_parents(path)?;
        self.provider.open_writable(path)
    }

    /// Succeeds where all images that the disk is read through lie in the roots. Blocks.
    ///
    /// # Errors
    /// [`ProviderError::Denied`], naming the parent; those of [`DiskProvider::parents`].
    pub fn check_parents(&self, path: &Path) -> provider::Result<()> {
        parents::check(&*self.provider, &self.roots, path, None).map_err(|error| error.of(path))
    }

    /// What the disk is; its parent where it was found, if that lies in the roots, else as the disk names it. Nothing is
    /// looked at but images in the roots. Blocks.
    ///
    /// # Errors
    /// As [`DiskProvider::info`].
    pub fn info(&self, path: &Path) -> provider::Result<DiskInfo> {
        let mut info = self.provider.info(path)?;
        if info.parent_path.is_some()
            && let Ok(Some(parent)) = parents::parent(&*self.provider, &self.roots, path, None)
        {
            info.parent_path = Some(parent.display().to_string());
        }
        Ok(info)
    }
}
