//! One freeze of a VM, from when it is asked for until it is forgotten.
//!
//! 1. *Freezing*: a thread of its own asks the platform, which may take minutes.
//! 2. *Frozen*: disks are read; [`VmDiskUse`] counts who does.
//! 3. *Committing* or *aborting*: reads fail from now on, so that every handle is closed before the platform is told;
//!    a thread of its own waits for that and tells it.
//! 4. Ended, one way or another: only the outcome is kept, for a client that lost the answer.
//!
//! The state is behind one lock that is held for moments only; the platform's own object is behind another one, which
//! is held while the platform is asked.

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, RangeSet, StorageOrder,
};
use vmtide_hypervisor::remote::{FreezeDocument, FreezeState, FreezeView, MomentView};
use vmtide_hypervisor::{Changes, ErrorReport, FrozenVm, HypervisorError, Result};

/// How long the end of a freeze waits for its readers, whose next read fails. A reader that hangs in the host's file
/// system for longer keeps its handle; the platform then says what it could not do.
const READERS_END: Duration = Duration::from_secs(60);
/// How often it is looked whether there are readers.
const READERS_INTERVAL: Duration = Duration::from_millis(20);

/// A moment as it is served.
pub struct Moment {
    view: MomentView,
    devices: Vec<Arc<dyn BlockDevice>>,
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
            devices: frozen.disks().iter().map(|disk| Arc::clone(&disk.device)).collect(),
            changes: changes.collect(),
        }
    }
}

struct Progress {
    state: FreezeState,
    /// There while it is frozen.
    moment: Option<Moment>,
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
    ending: AtomicBool,
}

/// How a freeze is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
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
            ending: AtomicBool::new(false),
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
        matches!(progress.state, FreezeState::Freezing | FreezeState::Frozen)
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
        self.ended(End::Abort, frozen.abort().map(|()| Vec::new()));
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

    /// Begins the end. Answers whether there is something to [`finish`](Self::finish) now.
    ///
    /// # Errors
    /// The state, where it is one that does not go with this end.
    pub fn begin_end(&self, end: End) -> std::result::Result<bool, FreezeState> {
        use FreezeState as State;
        let mut progress = self.progress.lock();
        progress.used_at = Instant::now();
        let (next, is_now) = match (progress.state, end) {
            (State::Frozen, End::Commit) => (State::Committing, true),
            (State::Frozen, End::Abort) => (State::Aborting, true),
            (State::Freezing, End::Abort) => {
                self.cancel.cancel();
                (State::Aborting, false)
            }
            // Asked for again.
            (state @ (State::Committing | State::Committed | State::CommitFailed), End::Commit)
            | (
                state @ (State::Aborting | State::Aborted | State::AbortFailed | State::Failed),
                End::Abort,
            ) => (state, false),
            (state, _) => return Err(state),
        };
        progress.state = next;
        self.ending.store(true, Ordering::Release);
        // Handles are closed before the platform is told.
        progress.moment = None;
        Ok(is_now)
    }

    /// Ends it, once its readers have closed their handles. Blocks for as long as the platform needs.
    pub fn finish(&self, end: End) {
        let until = Instant::now() + READERS_END;
        while self.uses.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(READERS_INTERVAL);
        }
        let frozen = self.frozen.lock().take();
        let Some(frozen) = frozen else {
            let error = HypervisorError::failed("end a freeze", "it was lost inside the agent");
            return self.ended(end, Err(error));
        };
        let outcome = match end {
            End::Commit => frozen.commit(),
            End::Abort => frozen.abort().map(|()| Vec::new()),
        };
        self.ended(end, outcome);
    }

    /// Notes how it ended; also for a thread that could not be had or that failed.
    pub fn ended(&self, end: End, outcome: Result<Vec<String>>) {
        let mut progress = self.progress.lock();
        progress.moment = None;
        progress.state = match (end, &outcome) {
            (End::Commit, Ok(_)) => FreezeState::Committed,
            (End::Commit, Err(_)) => FreezeState::CommitFailed,
            (End::Abort, Ok(_)) => FreezeState::Aborted,
            (End::Abort, Err(_)) => FreezeState::AbortFailed,
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
        let device = Arc::clone(moment.devices.get(index)?);
        let name = format!("{}/{}", self.document.vm, moment.view.disks.get(index)?.id);
        // With the state locked: whoever ends it sees the use, or this sees the end.
        self.uses.fetch_add(1, Ordering::AcqRel);
        Some(VmDiskUse { device, name, used: Used(Arc::clone(self)) })
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
    // Dropped first: the handle is closed before the use ends.
    device: Arc<dyn BlockDevice>,
    name: String,
    used: Used,
}

impl VmDiskUse {
    fn check(&self) -> vmtide_block::Result<()> {
        if self.used.0.ending.load(Ordering::Acquire) {
            let error = std::io::Error::other("its freeze was ended");
            return Err(BlockError::io(self.name.clone(), error));
        }
        Ok(())
    }
}

impl BlockDevice for VmDiskUse {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.device.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check()?;
        self.device.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.check()?;
        self.device.extents(range)
    }
    fn storage_order(&self) -> Option<&dyn StorageOrder> {
        self.device.storage_order()
    }
}
