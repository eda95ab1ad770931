//! Keeps scratch space from taking the last bytes of a file system that others use too.
//!
//! A scratch file that fills its file system breaks the backup by itself and never the guest. But
//! if the VM's own images share that file system, they could not grow any more. So the free space
//! is looked at every second, and below the reserve the frozen views are given up: readers get an
//! error, and the scratch space is free again.

use crate::cleanup::{Cleanup, Scope};
use crate::qmp::QmpClient;
use crate::scratch;
use crate::steps::Step;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use vmtide_hypervisor::JobId;

/// How often the free space is looked at. In a second a fast disk writes 2 GiB; what is not
/// caught breaks the backup in QEMU.
const INTERVAL: Duration = Duration::from_secs(1);

/// A watch that ends when dropped.
pub(crate) struct ScratchWatch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ScratchWatch {
    /// Watches `directory` for the job whose journal holds `steps`.
    pub fn start(
        qmp: Arc<QmpClient>,
        job: JobId,
        steps: Vec<Step>,
        directory: PathBuf,
        reserve_bytes: u64,
    ) -> Self {
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let free = scratch::free_bytes(&directory).unwrap_or(u64::MAX);
                if free >= reserve_bytes {
                    continue;
                }
                tracing::error!(
                    directory = %directory.display(), free, reserve_bytes,
                    "scratch space is running out: giving up the backup for the guest's sake"
                );
                let cleanup = Cleanup::new(&qmp, Scope::Job(job.as_str()), &steps);
                match cleanup.run() {
                    Ok(report) if report.failed.is_empty() => return,
                    Ok(report) => tracing::error!(failed = report.failed.join("; "), "not freed"),
                    Err(error) => tracing::error!(%error, "scratch space not freed"),
                }
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for ScratchWatch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A watch that panicked watches no more; there is nothing else to learn from it.
            let _ = thread.join();
        }
    }
}
