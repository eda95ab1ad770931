//! One freeze of a VM, from when it is asked for until it is forgotten.
//!
//! 1. *Freezing*: a thread of its own asks the platform, which may take minutes.
//! 2. *Frozen*: disks are read; [`VmDiskUse`] counts who does.
//! 3. *Sealing*, where the platform names the moment for good only when all was read, and then *sealed*.
//! 4. *Committing* or *aborting*. From step 3 on reads fail, so that every handle is closed before the platform is told;
//!    a thread of its own closes them and tells it.
//! 5. Ended, one way or another: only the outcome is kept, for a client that lost the answer.
//!
//! The state is behind one lock that is held for moments only; the platform's own object is behind another one, which
//! is held while the platform is asked.

use jiff::{SignedDuration, Timestamp};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken, Extent, RangeSet};
use vmtide_hypervisor::remote::{FreezeDocument, FreezeState, FreezeView, MomentView};
use vmtide_hypervisor::{Changes, ErrorReport, FrozenVm, HypervisorError, Result, Seal};

/// How long the end of a freeze waits for reads of one of its disks that are under way. One that hangs in the host's
/// file system for longer keeps its handle; the platform then says what it could not do.
const READS_END: Duration = Duration::from_secs(60);

/// A disk that can be closed whoever still has it: a client that takes nothing of what was read for it must not keep
/// its VM's files open.
struct Slot(RwLock<Option<Arc<dyn BlockDevice>>>);

impl Slot {
    fn close(&self) {
        match self.0.try_write_for(READS_END) {
            Some(mut device) => drop(device.take()),
            None => {
                tracing::warn!("a disk of a frozen VM is read for longer than its end can wait")
            }
        }
    }
}

/// A moment as it is served.
pub struct Moment {
    view: MomentView,
    disks: Vec<Arc<Slot>>,
    /// What may differ from the bases; none for everything.
    changes: Vec<Option<Arc<RangeSet>>>,
}

impl Moment {
    fn new(frozen: &dyn FrozenVm) -> Self {
        let changes = frozen.disks().iter().map(|disk| match &disk.changes {
            Changes::Everything(_) => None,
            Changes::Ranges(ranges) => Some(Arc::new(ranges.clone())),
        });
        Self {
            view: MomentView::new(frozen),
            disks: frozen
                .disks()
                .iter()
                .map(|disk| Arc::new(Slot(RwLock::new(Some(Arc::clone(&disk.device))))))
                .collect(),
            changes: changes.collect(),
        }
    }
}

struct Progress {
    state: FreezeState,
    /// There while it is frozen.
    moment: Option<Moment>,
    seal: Option<Seal>,
    error: Option<ErrorReport>,
    notes: Vec<String>,
    ttl_seconds: u64,
    used_at: Instant,
}

/// One freeze.
pub struct VmFreeze {
    pub id: String,
    pub client: Arc<str>,
    pub document: FreezeDocument,
    created_at: Timestamp,
    progress: Mutex<Progress>,
    frozen: Mutex<Option<Box<dyn FrozenVm>>>,
    cancel: CancelToken,
    uses: AtomicUsize,
    /// What is closed before the platform is told.
    closing: Mutex<Vec<Arc<Slot>>>,
}

/// What is next for a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Seal,
    Commit,
    Abort,
}

impl VmFreeze {
    pub fn new(
        id: String,
        client: Arc<str>,
        document: FreezeDocument,
        ttl_seconds: u64,
        cancel: CancelToken,
    ) -> Self {
        let progress = Progress {
            state: FreezeState::Freezing,
            moment: None,
            seal: None,
            error: None,
            notes: Vec::new(),
            ttl_seconds,
            used_at: Instant::now(),
        };
        Self {
            id,
            client,
            document,
            created_at: Timestamp::now(),
            progress: Mutex::new(progress),
            frozen: Mutex::new(None),
            cancel,
            uses: AtomicUsize::new(0),
            closing: Mutex::default(),
        }
    }

    pub fn state(&self) -> FreezeState {
        self.progress.lock().state
    }

    /// Begins its life anew, with another time to live where one is given.
    pub fn touch(&self, ttl_seconds: Option<u64>) {
        let mut progress = self.progress.lock();
        progress.used_at = Instant::now();
        progress.ttl_seconds = ttl_seconds.unwrap_or(progress.ttl_seconds);
    }

    /// How it stands; `with_moment` is asked for by whoever reads it, since that may have megabytes.
    pub fn view(&self, with_moment: bool) -> FreezeView {
        let progress = self.progress.lock();
        let expires_at = (!progress.state.is_final()).then(|| {
            let left = match self.uses.load(Ordering::Acquire) {
                0 => left(&progress, Instant::now()).unwrap_or_default(),
                _ => Duration::from_secs(progress.ttl_seconds),
            };
            let left = SignedDuration::try_from(left).unwrap_or_default();
            Timestamp::now().checked_add(left).unwrap_or(self.created_at).to_string()
        });
        FreezeView {
            id: self.id.clone(),
            client_token: self.document.client_token.clone(),
            vm: self.document.vm.clone(),
            state: progress.state,
            created_at: self.created_at.to_string(),
            expires_at,
            ttl_seconds: progress.ttl_seconds,
            error: progress.error.clone(),
            notes: progress.notes.clone(),
            seal: progress.seal.clone(),
            moment: progress
                .moment
                .as_ref()
                .filter(|_| with_moment)
                .map(|moment| moment.view.clone()),
        }
    }

    /// Whether nobody has asked for it for as long as it lives, and the platform is not at its end already.
    pub fn has_expired(&self, now: Instant) -> bool {
        let progress = self.progress.lock();
        let is_at_end = progress.state.is_final()
            || matches!(progress.state, FreezeState::Committing | FreezeState::Aborting);
        // One that is being sealed is given up when that is over.
        !is_at_end
            && progress.state != FreezeState::Sealing
            && self.uses.load(Ordering::Acquire) == 0
            && left(&progress, now).is_none()
    }

    pub fn note(&self, note: String) {
        self.progress.lock().notes.push(note);
    }

    /// Takes what the platform made, on the thread that asked it.
    pub fn made(&self, outcome: Result<Box<dyn FrozenVm>>) {
        let frozen = match outcome {
            Ok(frozen) => frozen,
            Err(error) => return self.not_made(&error),
        };
        let moment = Moment::new(&*frozen);
        let mut slot = self.frozen.lock();
        let mut progress = self.progress.lock();
        if progress.state == FreezeState::Freezing {
            progress.state = FreezeState::Frozen;
            progress.moment = Some(moment);
            progress.used_at = Instant::now();
            *slot = Some(frozen);
            return;
        }
        // It was given up meanwhile. What reads it is closed first.
        drop((progress, slot, moment));
        self.ended(Step::Abort, frozen.abort().map(|()| Vec::new()));
    }

    fn not_made(&self, error: &HypervisorError) {
        let mut progress = self.progress.lock();
        // Where it was given up meanwhile, that it could not be made is its end, too.
        progress.state = match progress.state {
            FreezeState::Aborting => FreezeState::Aborted,
            _ => FreezeState::Failed,
        };
        progress.error = Some(error.into());
        tracing::info!(freeze = self.id, vm = self.document.vm, %error, "a VM was not frozen");
    }

    /// Begins the next step. Answers whether there is something to [`finish`](Self::finish) now.
    ///
    /// # Errors
    /// The state, where it is one that does not go with this step.
    pub fn begin_step(&self, step: Step) -> std::result::Result<bool, FreezeState> {
        use FreezeState as State;
        let mut progress = self.progress.lock();
        progress.used_at = Instant::now();
        let (next, is_now) = match (progress.state, step) {
            (State::Frozen, Step::Seal) => (State::Sealing, true),
            (State::Frozen | State::Sealed, Step::Commit) => (State::Committing, true),
            (State::Frozen | State::Sealed | State::SealFailed, Step::Abort) => {
                (State::Aborting, true)
            }
            (State::Freezing, Step::Abort) => {
                self.cancel.cancel();
                (State::Aborting, false)
            }
            // Asked for again.
            (state @ (State::Sealing | State::Sealed | State::SealFailed), Step::Seal)
            | (
                state @ (State::Committing | State::Committed | State::CommitFailed),
                Step::Commit,
            )
            | (
                state @ (State::Aborting | State::Aborted | State::AbortFailed | State::Failed),
                Step::Abort,
            ) => (state, false),
            (state, _) => return Err(state),
        };
        if next != progress.state {
            progress.state = next;
            if let Some(moment) = progress.moment.take() {
                *self.closing.lock() = moment.disks;
            }
        }
        Ok(is_now)
    }

    /// Does the step, once the handles of all disks are closed. Blocks for as long as the platform needs.
    pub fn finish(&self, step: Step) {
        for disk in std::mem::take(&mut *self.closing.lock()) {
            disk.close();
        }
        let mut slot = self.frozen.lock();
        if let (Step::Seal, Some(frozen)) = (step, &mut *slot) {
            let sealed = frozen.seal();
            drop(slot);
            return self.sealed(sealed);
        }
        let frozen = slot.take();
        drop(slot);
        let Some(frozen) = frozen else { return self.failed(step, lost_inside()) };
        let outcome = match step {
            Step::Commit => frozen.commit(),
            Step::Seal | Step::Abort => frozen.abort().map(|()| Vec::new()),
        };
        self.ended(step, outcome);
    }

    fn sealed(&self, outcome: Result<Seal>) {
        let mut progress = self.progress.lock();
        progress.used_at = Instant::now();
        match outcome {
            Ok(seal) => {
                progress.state = FreezeState::Sealed;
                progress.seal = Some(seal);
            }
            Err(error) => {
                tracing::warn!(freeze = self.id, vm = self.document.vm, %error, "a moment was not sealed");
                progress.state = FreezeState::SealFailed;
                progress.error = Some((&error).into());
            }
        }
    }

    /// Notes that a step could not be done at all: there is no thread for it, or it panicked.
    pub fn failed(&self, step: Step, error: HypervisorError) {
        match step {
            Step::Seal => self.sealed(Err(error)),
            Step::Commit | Step::Abort => self.ended(step, Err(error)),
        }
    }

    /// Notes how it ended.
    fn ended(&self, step: Step, outcome: Result<Vec<String>>) {
        let mut progress = self.progress.lock();
        progress.moment = None;
        progress.state = match (step, &outcome) {
            (Step::Commit, Ok(_)) => FreezeState::Committed,
            (Step::Commit, Err(_)) => FreezeState::CommitFailed,
            (_, Ok(_)) => FreezeState::Aborted,
            (_, Err(_)) => FreezeState::AbortFailed,
        };
        match outcome {
            Ok(left) => progress.notes.extend(left),
            Err(error) => {
                tracing::warn!(freeze = self.id, vm = self.document.vm, %error, "a freeze ended badly");
                progress.error = Some((&error).into());
            }
        }
    }

    /// Whether its disks have shown the one moment up to now; none where it is not frozen. Blocks.
    pub fn check(&self) -> Option<Result<()>> {
        self.touch(None);
        self.frozen.lock().as_ref().map(|frozen| frozen.check())
    }

    /// What may differ from the base on a disk, and its size; none where it is not frozen or has no such disk, the
    /// inner none for everything.
    pub fn changes(&self, index: usize) -> Option<(Option<Arc<RangeSet>>, u64)> {
        self.touch(None);
        let progress = self.progress.lock();
        let moment = progress.moment.as_ref()?;
        let size_bytes = moment.view.disks.get(index)?.size_bytes;
        Some((moment.changes.get(index)?.clone(), size_bytes))
    }

    /// Uses a disk; none where it is not frozen or has no such disk.
    pub fn use_disk(self: &Arc<Self>, index: usize) -> Option<VmDiskUse> {
        let mut progress = self.progress.lock();
        progress.used_at = Instant::now();
        let moment = progress.moment.as_ref()?;
        let disk = Arc::clone(moment.disks.get(index)?);
        let view = moment.view.disks.get(index)?;
        let block_size_bytes = disk.0.read().as_ref()?.block_size_bytes();
        self.uses.fetch_add(1, Ordering::AcqRel);
        Some(VmDiskUse {
            disk,
            name: format!("{}/{}", self.document.vm, view.id),
            size_bytes: view.size_bytes,
            block_size_bytes,
            _used: Used(Arc::clone(self)),
        })
    }
}

impl Drop for VmFreeze {
    fn drop(&mut self) {
        let Some(frozen) = self.frozen.get_mut().take() else { return };
        self.progress.get_mut().moment = None;
        // Ending waits for the platform: not on a thread that answers others.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(frozen))),
            Err(_) => drop(frozen),
        }
    }
}

fn lost_inside() -> HypervisorError {
    HypervisorError::failed("end a freeze", "it was lost inside the agent")
}

fn left(progress: &Progress, now: Instant) -> Option<Duration> {
    let ttl = Duration::from_secs(progress.ttl_seconds);
    ttl.checked_sub(now.saturating_duration_since(progress.used_at))
}

/// Counts one use of a freeze.
struct Used(Arc<VmFreeze>);

impl Drop for Used {
    fn drop(&mut self) {
        self.0.touch(None);
        self.0.uses.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A disk of a frozen VM while something is done with it: its freeze does not expire meanwhile, and reading ends when
/// the freeze does.
pub struct VmDiskUse {
    disk: Arc<Slot>,
    name: String,
    size_bytes: u64,
    block_size_bytes: u32,
    _used: Used,
}

impl VmDiskUse {
    fn with<T>(
        &self,
        read: impl FnOnce(&dyn BlockDevice) -> vmtide_block::Result<T>,
    ) -> vmtide_block::Result<T> {
        match &*self.disk.0.read() {
            Some(device) => read(&**device),
            None => {
                let error = std::io::Error::other("its freeze was ended");
                Err(BlockError::io(self.name.clone(), error))
            }
        }
    }
}

impl BlockDevice for VmDiskUse {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn block_size_bytes(&self) -> u32 {
        self.block_size_bytes
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.with(|device| device.read_at(buffer, offset))
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.with(|device| device.extents(range))
    }
}
