//! Memory that another process gave to be filled and reads alone, cut into slots of one size.
//!
//! [`Memory::inherited`] takes the memory that was handed over when this process was started, and
//! [`Memory::wait`] a slot of it, which is an ordinary buffer with one owner until it is dropped. No pointer
//! leaves this crate. On systems other than Linux there is no such memory, and taking it fails.

mod mapping;

use mapping::Mapping;
use std::io::{Error, ErrorKind, Result};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Shared memory in slots. Clones are the same memory.
#[derive(Clone)]
pub struct Memory {
    shared: Arc<Shared>,
}

struct Shared {
    mapping: Mapping,
    slot_bytes: usize,
    slots: usize,
    /// The slots that nobody has; the last one that was freed is the next one to be given, because the
    /// processor still has it in its cache.
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    /// Takes the memory of `length_bytes` behind the file descriptor `number`, which this process inherited, and cuts
    /// it into slots of `slot_bytes`. Processes that this one starts do not inherit it.
    ///
    /// # Errors
    /// Where the descriptor is none of memory, where whoever gave it could still make it shorter than that, or
    /// where the system does not map it.
    pub fn inherited(number: i32, length_bytes: usize, slot_bytes: usize) -> Result<Self> {
        let slots = length_bytes.checked_div(slot_bytes).unwrap_or(0);
        if slots == 0 {
            return Err(Error::new(ErrorKind::InvalidInput, "the memory has no room for a slot"));
        }
        let shared = Shared {
            mapping: Mapping::inherited(number, length_bytes)?,
            slot_bytes,
            slots,
            free: Mutex::new((0..slots).rev().collect()),
            freed: Condvar::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.shared.slots
    }

    /// A free slot, in its full length; waits until there is one.
    pub fn wait(&self) -> Slot {
        let mut free = self.shared.free();
        loop {
            if let Some(index) = free.pop() {
                let length = self.shared.slot_bytes;
                return Slot { shared: Arc::clone(&self.shared), index, length };
            }
            free = self.shared.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A part of the memory, with one owner until it is dropped.
pub struct Slot {
    shared: Arc<Shared>,
    index: usize,
    length: usize,
}

impl Slot {
    /// Where it begins in the memory.
    pub fn offset(&self) -> usize {
        self.index * self.shared.slot_bytes
    }

    /// Has it show only so many bytes, or as many as a slot has.
    pub fn set_length(&mut self, length: usize) {
        self.length = length.min(self.shared.slot_bytes);
    }
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping, by `slots` and `set_length`, and nobody else has this slot.
        unsafe { self.shared.mapping.slice(self.offset(), self.length) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: inside the mapping, by `slots` and `set_length`, and nobody else has this slot.
        unsafe { self.shared.mapping.slice_mut(self.offset(), self.length) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.free().push(self.index);
        self.shared.freed.notify_one();
    }
}
