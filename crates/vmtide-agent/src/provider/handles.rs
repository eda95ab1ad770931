//! Disks that are open: shared by readers, exclusive for a writer, closed soon after their last use.
//!
//! A platform lets a disk be attached once, and attaching takes longer than many reads. So all readers of a disk
//! share one handle, and it is kept open for a moment after each request for it, in which the next request of the
//! same client usually comes. Longer would be wrong: a disk that is held keeps its machine from starting and
//! its checkpoints from being merged.
//!
//! | asked for | nobody has it | readers have it | kept, unused | a writer has it | being closed |
//! |---|---|---|---|---|---|
//! | read | opened | shared | shared | busy | waits |
//! | write | opened | busy | closed, opened | busy | waits |
//!
//! A device is closed outside of every lock; who asks for the same disk meanwhile waits for that, because the
//! platform would refuse it.

use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vmtide_block::{BlockDevice, ByteRange, Extent, WritableBlockDevice};

/// How long to wait for a device that is being closed. Detaching takes less than a second; a closing that hangs
/// must not hang everybody who asks for the disk.
const CLOSES_WITHIN: Duration = Duration::from_secs(30);

/// How long a writer waits for readers to end. The last bytes of an answer reach the client a moment before the
/// agent lets go of the disk, and its next request may be to write.
const READERS_END_WITHIN: Duration = Duration::from_secs(1);

/// Why there is no handle.
#[derive(Debug, PartialEq, Eq)]
pub enum HandleError<E> {
    /// Somebody else in this process has the disk; the text says who.
    Busy(&'static str),
    /// It could not be opened.
    Open(E),
}

/// Open devices by name.
pub struct Handles<D: Send + Sync + 'static> {
    inner: Arc<Inner<D>>,
    /// [`READERS_END_WITHIN`], or what a test needs.
    readers_end_within: Duration,
}

struct Inner<D> {
    slots: Mutex<HashMap<String, Arc<Slot<D>>>>,
    keep: Duration,
}

/// What is known of one disk. Stays while it is open or somebody asks for it.
struct Slot<D> {
    state: Mutex<State<D>>,
    closed: Condvar,
}

struct State<D> {
    /// Whether a device is open, or not closed yet.
    open: bool,
    /// Whether it is a writer's.
    writing: bool,
    reader: Weak<Held<D>>,
    /// Keeps the reader's device open until it has not been asked for so long.
    kept: Option<(Arc<Held<D>>, Instant)>,
}

/// A device in use. Closed when the last reference to it is gone.
pub struct Held<D> {
    // Dropped first: only a device that is closed is told to be.
    device: D,
    _claim: Claim<D>,
}

struct Claim<D>(Arc<Slot<D>>);

impl<D> Drop for Claim<D> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.open = false;
        state.writing = false;
        self.0.closed.notify_all();
    }
}

impl<D: Send + Sync + 'static> Handles<D> {
    /// No open devices. Each will be kept for `keep` after it was last asked for.
    pub fn new(keep: Duration) -> Self {
        let inner = Arc::new(Inner { slots: Mutex::default(), keep });
        let watched = Arc::downgrade(&inner);
        // The thread ends with the last owner; without it, devices are kept until they are asked for again.
        let _ = std::thread::Builder::new().name("disk-closer".to_owned()).spawn(move || {
            while let Some(inner) = watched.upgrade() {
                inner.close_unused(Instant::now());
                drop(inner);
                std::thread::sleep(keep / 2);
            }
        });
        Self { inner, readers_end_within: READERS_END_WITHIN }
    }

    /// How many devices are open, or being opened. Does not wait for those.
    pub fn open_count(&self) -> usize {
        let slots: Vec<_> = self.inner.slots.lock().values().cloned().collect();
        slots.iter().filter(|slot| slot.state.try_lock().is_none_or(|state| state.open)).count()
    }

    /// The device `name` for reading: the one that is open, or a new one from `open`.
    ///
    /// # Errors
    /// [`HandleError::Busy`] while somebody writes it; the error of `open`.
    pub fn read<E>(
        &self,
        name: &str,
        open: impl FnOnce() -> Result<D, E>,
    ) -> Result<Arc<Held<D>>, HandleError<E>> {
        let slot = self.inner.slot(name);
        let mut state = slot.state.lock();
        loop {
            if state.writing {
                return Err(HandleError::Busy("it is being written"));
            }
            if let Some(reader) = state.reader.upgrade() {
                // What was kept is the same device, so nothing is closed here, under the lock.
                state.kept = Some((Arc::clone(&reader), Instant::now()));
                return Ok(reader);
            }
            if !state.open {
                break;
            }
            if slot.closed.wait_for(&mut state, CLOSES_WITHIN).timed_out() {
                return Err(HandleError::Busy("it does not close"));
            }
        }
        let device = open().map_err(HandleError::Open)?;
        state.open = true;
        let held = Arc::new(Held { device, _claim: Claim(Arc::clone(&slot)) });
        state.reader = Arc::downgrade(&held);
        state.kept = Some((Arc::clone(&held), Instant::now()));
        Ok(held)
    }

    /// The device `name` from `open` for one writer alone.
    ///
    /// # Errors
    /// [`HandleError::Busy`] while somebody reads or writes it; the error of `open`.
    pub fn write<E>(
        &self,
        name: &str,
        open: impl FnOnce() -> Result<D, E>,
    ) -> Result<Held<D>, HandleError<E>> {
        self.exclusively(name, || {
            let slot = self.inner.slot(name);
            let mut state = slot.state.lock();
            self.wait_until_closed(&slot, &mut state)?;
            let device = open().map_err(HandleError::Open)?;
            (state.open, state.writing) = (true, true);
            Ok(Held { device, _claim: Claim(Arc::clone(&slot)) })
        })
    }

    /// Runs `action` while nobody here has the device `name` open, and nobody can open it.
    ///
    /// # Errors
    /// [`HandleError::Busy`] while somebody reads or writes it; the error of `action`.
    pub fn while_closed<T, E>(
        &self,
        name: &str,
        action: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, HandleError<E>> {
        self.exclusively(name, || {
            let slot = self.inner.slot(name);
            let mut state = slot.state.lock();
            self.wait_until_closed(&slot, &mut state)?;
            action().map_err(HandleError::Open)
        })
    }

    /// Closes what is only kept, then runs `action`.
    fn exclusively<T>(&self, name: &str, action: impl FnOnce() -> T) -> T {
        let kept = self.inner.slot(name).state.lock().kept.take();
        drop(kept);
        action()
    }

    fn wait_until_closed<E>(
        &self,
        slot: &Slot<D>,
        state: &mut parking_lot::MutexGuard<'_, State<D>>,
    ) -> Result<(), HandleError<E>> {
        let readers_until = Instant::now() + self.readers_end_within;
        while state.open {
            if state.writing {
                return Err(HandleError::Busy("it is being written"));
            }
            if state.reader.strong_count() > 0 {
                if slot.closed.wait_until(state, readers_until).timed_out() {
                    return Err(HandleError::Busy("it is being read"));
                }
                continue;
            }
            if slot.closed.wait_for(state, CLOSES_WITHIN).timed_out() {
                return Err(HandleError::Busy("it does not close"));
            }
        }
        Ok(())
    }
}

impl<D> Inner<D> {
    fn slot(&self, name: &str) -> Arc<Slot<D>> {
        let mut slots = self.slots.lock();
        let slot = slots.entry(name.to_owned()).or_insert_with(|| {
            let state = State { open: false, writing: false, reader: Weak::new(), kept: None };
            Arc::new(Slot { state: Mutex::new(state), closed: Condvar::new() })
        });
        Arc::clone(slot)
    }

    /// Stops keeping what was last asked for too long before `now`, and forgets disks that nobody has.
    fn close_unused(&self, now: Instant) {
        let slots: Vec<_> = self.slots.lock().values().cloned().collect();
        for slot in &slots {
            // Whoever holds it is opening the disk, which may take long. The other disks must not wait for that.
            let Some(mut state) = slot.state.try_lock() else {
                continue;
            };
            let expired = |kept: &(_, Instant)| now.saturating_duration_since(kept.1) >= self.keep;
            let closing = state.kept.take_if(|kept| expired(kept));
            drop(state);
            drop(closing);
        }
        drop(slots);
        // A slot that only the map has is in nobody's hands (an open device has it), and cannot get into any while
        // the map is locked.
        self.slots.lock().retain(|_, slot| Arc::strong_count(slot) > 1);
    }
}

impl<D> Deref for Held<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.device
    }
}

impl<D: BlockDevice> BlockDevice for Held<D> {
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
}

impl<D: WritableBlockDevice> WritableBlockDevice for Held<D> {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.device.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.device.write_zeroes(range)
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        self.device.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A device that counts how many of it are open, refuses a second one, and takes a moment to close.
    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            std::thread::sleep(Duration::from_millis(20));
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn open(count: &Arc<AtomicUsize>) -> Result<Counted, &'static str> {
        match count.fetch_add(1, Ordering::SeqCst) {
            0 => Ok(Counted(Arc::clone(count))),
            _ => {
                count.fetch_sub(1, Ordering::SeqCst);
                Err("attached already")
            }
        }
    }

    fn handles() -> (Handles<Counted>, Arc<AtomicUsize>) {
        // Nothing is closed by the clock in these tests but where they say so.
        (Handles::new(Duration::from_secs(3600)), Arc::default())
    }

    #[test]
    fn readers_share_one_device_and_it_is_closed_when_unused() {
        let (handles, count) = handles();
        let first = handles.read("a", || open(&count)).ok().unwrap();
        let second = handles.read("a", || open(&count)).ok().unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(handles.open_count(), 1);
        drop((first, second));
        assert_eq!(count.load(Ordering::SeqCst), 1, "kept for the next request");
        handles.inner.close_unused(Instant::now());
        assert_eq!(count.load(Ordering::SeqCst), 1, "not that soon");
        handles.inner.close_unused(Instant::now() + Duration::from_secs(3601));
        assert_eq!((count.load(Ordering::SeqCst), handles.open_count()), (0, 0));
        assert!(handles.inner.slots.lock().is_empty(), "and forgotten");
    }

    #[test]
    fn a_reader_in_use_outlives_its_time() {
        let (handles, count) = handles();
        let reader = handles.read("a", || open(&count)).ok().unwrap();
        handles.inner.close_unused(Instant::now() + Duration::from_secs(3601));
        assert_eq!(handles.open_count(), 1);
        let again = handles.read("a", || open(&count)).ok().unwrap();
        assert!(Arc::ptr_eq(&reader, &again));
    }

    #[test]
    fn a_writer_is_alone() {
        let (handles, count) = handles();
        let reader = handles.read("a", || open(&count)).ok().unwrap();
        let busy = |r: Result<Held<Counted>, _>| matches!(r, Err(HandleError::<&str>::Busy(_)));
        assert!(busy(handles.write("a", || open(&count))));
        drop(reader);
        let writer = handles.write("a", || open(&count)).ok().unwrap();
        assert!(busy(handles.write("a", || open(&count))));
        assert!(matches!(handles.read("a", || open(&count)), Err(HandleError::Busy(_))));
        let changed = handles.while_closed("a", || Ok::<_, &str>(()));
        assert_eq!(changed, Err(HandleError::Busy("it is being written")));
        assert!(handles.read("b", || open(&Arc::default())).is_ok(), "other disks are free");
        drop(writer);
        assert_eq!(handles.while_closed("a", || Ok::<_, &str>(1)), Ok(1));
        assert!(handles.read("a", || open(&count)).is_ok());
    }

    /// The client has the last byte of an answer before the agent has let go of the disk.
    #[test]
    fn a_writer_waits_for_a_reader_that_ends() {
        let (mut handles, count) = handles();
        // However late the other thread runs.
        handles.readers_end_within = Duration::from_secs(60);
        let reader = handles.read("a", || open(&count)).ok().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                drop(reader);
            });
            assert!(handles.write("a", || open(&count)).is_ok());
        });
    }

    /// A share that does not answer lets one disk hang, not the closing of the others.
    #[test]
    fn disks_are_closed_while_another_one_opens() {
        let (handles, count) = handles();
        drop(handles.read("a", || open(&count)).ok().unwrap());
        let opened = handles.read("b", || {
            handles.inner.close_unused(Instant::now() + Duration::from_secs(3601));
            Err::<Counted, _>(count.load(Ordering::SeqCst))
        });
        assert!(matches!(opened, Err(HandleError::Open(0))), "it was not closed");
    }

    #[test]
    fn errors_of_opening_leave_nothing_behind() {
        let (handles, count) = handles();
        let failed = handles.read("a", || Err::<Counted, _>("no"));
        assert!(matches!(failed, Err(HandleError::Open("no"))));
        assert_eq!(handles.open_count(), 0);
        assert!(handles.write("a", || open(&count)).is_ok());
    }

    /// Closing takes time, in which the platform refuses to open the disk again.
    #[test]
    fn nobody_opens_what_is_being_closed() {
        let (handles, count) = handles();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (handles, count) = (&handles, &count);
                scope.spawn(move || {
                    for round in 0..20 {
                        let refused = if (round + thread) % 3 == 0 {
                            matches!(handles.write("a", || open(count)), Err(HandleError::Open(_)))
                        } else {
                            matches!(handles.read("a", || open(count)), Err(HandleError::Open(_)))
                        };
                        assert!(!refused, "opened twice");
                    }
                });
            }
        });
    }
}
