//! Moments of several disks, held for a client until it is done or has been forgotten.
//!
//! A freeze costs the host something as long as it lasts: old content that is kept, a handle, an attachment. So
//! it has a time to live that begins anew with every use, and a reaper. It does not end while content is read
//! from it. [`FreezeUse`] is what a request holds meanwhile; the disks are let go when the last one is dropped,
//! on a thread that may block.

use crate::count::Count;
use crate::limits::Limits;
use crate::provider::{FrozenDisk, FrozenDisks};
use crate::transfers::random_id;
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use thiserror::Error;
use vmtide_block::{BlockDevice, ByteRange, Extent};

/// How often it is looked which freezes have expired.
const REAP_INTERVAL: Duration = Duration::from_secs(1);

/// Why there is no freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FreezeError {
    /// This client has as many as it may.
    #[error("this key holds {limit} freezes, as many as it may: end one")]
    Client {
        /// The limit.
        limit: usize,
    },
    /// All clients together have.
    #[error("the agent holds {limit} freezes, as many as it does: ask again later")]
    Agent {
        /// The limit.
        limit: usize,
    },
}

/// A freeze as it is told.
#[derive(Clone, Debug, Serialize)]
pub struct FreezeView {
    /// Its id.
    pub id: String,
    /// The moment, nearly.
    pub created_at: Timestamp,
    /// When it ends unless it is used.
    pub expires_at: Timestamp,
    /// How long it lives after its last use.
    pub ttl_seconds: u64,
    /// Its disks.
    pub disks: Vec<FrozenDiskView>,
}

/// A disk of a freeze as it is told.
#[derive(Clone, Debug, Serialize)]
pub struct FrozenDiskView {
    /// Its place in the list.
    pub index: usize,
    /// As it was asked for.
    pub path: String,
    /// The size at the moment.
    pub size_bytes: u64,
    /// The tracking id of the moment.
    pub tracking_id: Option<String>,
}

struct Freeze {
    /// Counts the thread that lets go.
    threads: Count,
    id: String,
    client: Arc<str>,
    created_at: Timestamp,
    disks: Vec<FrozenDiskView>,
    /// None once it is being let go.
    frozen: Option<Box<dyn FrozenDisks>>,
    life: Mutex<Life>,
    uses: AtomicUsize,
}

#[derive(Clone, Copy)]
struct Life {
    ttl_seconds: u64,
    used_at: Instant,
}

impl Life {
    fn left(self, now: Instant) -> Option<Duration> {
        let ttl = Duration::from_secs(self.ttl_seconds);
        ttl.checked_sub(now.saturating_duration_since(self.used_at))
    }
}

impl Freeze {
    fn view(&self) -> FreezeView {
        let life = *self.life.lock();
        let left = match self.uses.load(Ordering::Acquire) {
            0 => life.left(Instant::now()).unwrap_or_default(),
            _ => Duration::from_secs(life.ttl_seconds),
        };
        let left = SignedDuration::try_from(left).unwrap_or_default();
        FreezeView {
            id: self.id.clone(),
            created_at: self.created_at,
            expires_at: Timestamp::now().checked_add(left).unwrap_or(self.created_at),
            ttl_seconds: life.ttl_seconds,
            disks: self.disks.clone(),
        }
    }

    fn touch(&self) {
        self.life.lock().used_at = Instant::now();
    }

    fn has_expired(&self, now: Instant) -> bool {
        self.uses.load(Ordering::Acquire) == 0 && self.life.lock().left(now).is_none()
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        let frozen = self.frozen.take();
        // Letting go may wait for the platform: not on a thread that answers others.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                let counted = self.threads.enter();
                drop(runtime.spawn_blocking(move || {
                    drop(frozen);
                    drop(counted);
                }));
            }
            Err(_) => drop(frozen),
        }
    }
}

/// All freezes of an agent.
pub struct Freezes {
    /// The threads that let go of disks.
    threads: Count,
    per_client: usize,
    total: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    freezes: HashMap<String, Arc<Freeze>>,
    /// Those that are being made, by client.
    reserved: Vec<Arc<str>>,
    reaper_runs: bool,
}

impl std::fmt::Debug for Freezes {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Freezes").field("held", &self.held()).finish_non_exhaustive()
    }
}

/// The right to make one freeze; given back when it is dropped.
pub struct Reservation {
    freezes: Arc<Freezes>,
    client: Arc<str>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.freezes.state.lock();
        if let Some(at) = state.reserved.iter().position(|client| *client == self.client) {
            state.reserved.swap_remove(at);
        }
    }
}

impl Freezes {
    /// None yet.
    pub fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            threads: Count::default(),
            per_client: limits.freezes_per_client,
            total: limits.freezes_total,
            state: Mutex::default(),
        })
    }

    /// The threads that let go of disks now.
    pub const fn threads(&self) -> &Count {
        &self.threads
    }

    /// How many there are.
    pub fn held(&self) -> usize {
        self.state.lock().freezes.len()
    }

    /// Takes a place for a freeze that is about to be made.
    ///
    /// # Errors
    /// [`FreezeError`] where a limit is reached.
    pub fn reserve(self: &Arc<Self>, client: &Arc<str>) -> Result<Reservation, FreezeError> {
        let mut state = self.state.lock();
        if state.freezes.len() + state.reserved.len() >= self.total {
            return Err(FreezeError::Agent { limit: self.total });
        }
        let made = state.freezes.values().filter(|freeze| freeze.client == *client).count();
        let own = made + state.reserved.iter().filter(|other| *other == client).count();
        if own >= self.per_client {
            return Err(FreezeError::Client { limit: self.per_client });
        }
        state.reserved.push(Arc::clone(client));
        Ok(Reservation { freezes: Arc::clone(self), client: Arc::clone(client) })
    }

    /// Keeps what was frozen; `requested` are the disks as they were asked for. Inside of a tokio runtime, where
    /// the reaper runs.
    pub fn keep(
        self: &Arc<Self>,
        reservation: Reservation,
        frozen: Box<dyn FrozenDisks>,
        requested: &[String],
        ttl_seconds: u64,
    ) -> FreezeView {
        let view = |(index, (disk, path)): (usize, (&FrozenDisk, &String))| FrozenDiskView {
            index,
            path: path.clone(),
            size_bytes: disk.device.size_bytes(),
            tracking_id: disk.tracking_id.clone(),
        };
        let freeze = Arc::new(Freeze {
            threads: self.threads.clone(),
            id: random_id(),
            client: Arc::clone(&reservation.client),
            created_at: Timestamp::now(),
            disks: frozen.disks().iter().zip(requested).enumerate().map(view).collect(),
            frozen: Some(frozen),
            life: Mutex::new(Life { ttl_seconds, used_at: Instant::now() }),
            uses: AtomicUsize::new(0),
        });
        let mut state = self.state.lock();
        state.freezes.insert(freeze.id.clone(), Arc::clone(&freeze));
        if !std::mem::replace(&mut state.reaper_runs, true) {
            drop(tokio::spawn(reap(Arc::downgrade(self))));
        }
        drop(state);
        drop(reservation);
        freeze.view()
    }

    fn get(&self, client: &str, id: &str) -> Option<Arc<Freeze>> {
        let state = self.state.lock();
        let freeze = state.freezes.get(id).filter(|freeze| &*freeze.client == client)?;
        (!freeze.has_expired(Instant::now())).then(|| Arc::clone(freeze))
    }

    /// Those of a client, the oldest first.
    pub fn of_client(&self, client: &str) -> Vec<FreezeView> {
        let state = self.state.lock();
        let own = state.freezes.values().filter(|freeze| &*freeze.client == client);
        let mut views: Vec<_> = own.map(|freeze| freeze.view()).collect();
        views.sort_by(|one, other| (one.created_at, &one.id).cmp(&(other.created_at, &other.id)));
        views
    }

    /// One of a client.
    pub fn find(&self, client: &str, id: &str) -> Option<FreezeView> {
        self.get(client, id).map(|freeze| freeze.view())
    }

    /// Begins the life of a freeze of a client anew, with another time to live where one is given.
    pub fn renew(&self, client: &str, id: &str, ttl_seconds: Option<u64>) -> Option<FreezeView> {
        let freeze = self.get(client, id)?;
        let mut life = freeze.life.lock();
        life.used_at = Instant::now();
        life.ttl_seconds = ttl_seconds.unwrap_or(life.ttl_seconds);
        drop(life);
        Some(freeze.view())
    }

    /// Ends a freeze of a client; false where there is none. What is being read from it is read to its end.
    pub fn end(&self, client: &str, id: &str) -> bool {
        if self.get(client, id).is_none() {
            return false;
        }
        // Dropped after the lock.
        let ended = self.state.lock().freezes.remove(id);
        ended.is_some()
    }

    /// Uses a disk of a freeze of a client.
    pub fn use_disk(&self, client: &str, id: &str, index: usize) -> Option<FreezeUse> {
        let freeze = self.get(client, id)?;
        freeze.disks.get(index)?;
        freeze.uses.fetch_add(1, Ordering::AcqRel);
        freeze.touch();
        Some(FreezeUse { freeze, index })
    }

    /// Lets go of what has expired.
    fn reap(&self) -> usize {
        let now = Instant::now();
        let mut expired = Vec::new();
        let mut state = self.state.lock();
        state.freezes.retain(|_, freeze| {
            let keep = !freeze.has_expired(now);
            if !keep {
                expired.push(Arc::clone(freeze));
            }
            keep
        });
        if state.freezes.is_empty() {
            state.reaper_runs = false;
        }
        let left = state.freezes.len();
        drop(state);
        for freeze in expired {
            tracing::info!(freeze = freeze.id, client = %freeze.client, "a freeze has expired");
        }
        left
    }
}

async fn reap(freezes: Weak<Freezes>) {
    loop {
        tokio::time::sleep(REAP_INTERVAL).await;
        match freezes.upgrade() {
            Some(freezes) if freezes.reap() > 0 => {}
            _ => return,
        }
    }
}

/// A disk of a freeze while something is done with it.
pub struct FreezeUse {
    freeze: Arc<Freeze>,
    index: usize,
}

impl FreezeUse {
    /// The disk as it was asked for.
    pub fn requested(&self) -> &str {
        self.freeze.disks.get(self.index).map_or("", |disk| &disk.path)
    }

    /// Its content at the moment; none of a freeze with fewer disks than it told.
    pub fn into_device(self) -> Option<Arc<dyn BlockDevice>> {
        let frozen = self.freeze.frozen.as_ref()?;
        let device = Arc::clone(&frozen.disks().get(self.index)?.device);
        Some(Arc::new(HeldDevice { device, _used: self }))
    }
}

impl Drop for FreezeUse {
    fn drop(&mut self) {
        self.freeze.touch();
        self.freeze.uses.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A disk that keeps its freeze from expiring.
struct HeldDevice {
    device: Arc<dyn BlockDevice>,
    _used: FreezeUse,
}

impl BlockDevice for HeldDevice {
    fn name(&self) -> String {
        self.device.name()
    }
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.device.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.device.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.device.extents(range)
    }
    fn storage_order(&self) -> Option<&dyn vmtide_block::StorageOrder> {
        self.device.storage_order()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    struct Fixed {
        disks: Vec<FrozenDisk>,
        ended: Arc<AtomicUsize>,
    }

    impl FrozenDisks for Fixed {
        fn disks(&self) -> &[FrozenDisk] {
            &self.disks
        }
    }

    impl Drop for Fixed {
        fn drop(&mut self) {
            self.ended.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn fixed(ended: &Arc<AtomicUsize>) -> Box<dyn FrozenDisks> {
        let disk = FrozenDisk {
            path: "/a".into(),
            device: Arc::new(MemoryDevice::new(4096)),
            tracking_id: None,
        };
        Box::new(Fixed { disks: vec![disk], ended: Arc::clone(ended) })
    }

    fn age(freezes: &Freezes, id: &str, seconds: u64) {
        let freeze = Arc::clone(&freezes.state.lock().freezes[id]);
        let used_at = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        freeze.life.lock().used_at = used_at;
    }

    async fn until(done: impl Fn() -> bool) {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_freeze_lives_while_it_is_used_and_ends_when_it_is_forgotten() {
        let ended = Arc::new(AtomicUsize::new(0));
        let freezes = Freezes::new(&Limits::default());
        let client: Arc<str> = "a".into();
        let reservation = freezes.reserve(&client).unwrap();
        let view = freezes.keep(reservation, fixed(&ended), &["/a".into()], 10);
        assert_eq!((view.disks[0].size_bytes, view.ttl_seconds), (4096, 10));
        assert!(freezes.find("b", &view.id).is_none() && !freezes.end("b", &view.id));

        let used = freezes.use_disk(&client, &view.id, 0).unwrap();
        assert!(freezes.use_disk(&client, &view.id, 1).is_none());
        let device = used.into_device().unwrap();
        age(&freezes, &view.id, 3600);
        assert_eq!(freezes.reap(), 1);
        assert_eq!(device.size_bytes(), 4096);
        drop(device);
        // The end of the use was one, too.
        assert_eq!(freezes.reap(), 1);
        age(&freezes, &view.id, 3600);
        assert!(freezes.renew(&client, &view.id, None).is_none(), "too late");
        assert_eq!(freezes.reap(), 0);
        until(|| ended.load(Ordering::SeqCst) == 1).await;
    }

    #[tokio::test]
    async fn a_freeze_that_was_ended_serves_what_is_under_way() {
        let ended = Arc::new(AtomicUsize::new(0));
        let freezes = Freezes::new(&Limits::default());
        let client: Arc<str> = "a".into();
        let reservation = freezes.reserve(&client).unwrap();
        let view = freezes.keep(reservation, fixed(&ended), &["/a".into()], 10);
        let device = freezes.use_disk(&client, &view.id, 0).unwrap().into_device().unwrap();
        assert!(freezes.end(&client, &view.id) && !freezes.end(&client, &view.id));
        device.read_at(&mut [0; 512], 0).unwrap();
        assert_eq!((freezes.held(), ended.load(Ordering::SeqCst)), (0, 0));
        drop(device);
        until(|| ended.load(Ordering::SeqCst) == 1).await;
    }

    #[tokio::test]
    async fn places_are_limited_also_while_freezes_are_made() {
        let limits = Limits { freezes_per_client: 2, freezes_total: 3, ..Limits::default() };
        let freezes = Freezes::new(&limits);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let first = freezes.reserve(&a).unwrap();
        let kept = freezes.keep(first, fixed(&Arc::default()), &["/a".into()], 10);
        let second = freezes.reserve(&a).unwrap();
        assert_eq!(freezes.reserve(&a).err(), Some(FreezeError::Client { limit: 2 }));
        let _third = freezes.reserve(&b).unwrap();
        assert_eq!(freezes.reserve(&b).err(), Some(FreezeError::Agent { limit: 3 }));
        drop(second);
        assert!(freezes.end(&a, &kept.id));
        assert!(freezes.reserve(&a).is_ok());
    }
}
