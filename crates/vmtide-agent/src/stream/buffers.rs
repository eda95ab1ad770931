//! The few buffers of one stream, which go from a reader to the connection and come back.

use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use vmtide_block::AlignedBuffer;

/// At most `most` buffers of one length; made when they are first needed.
#[derive(Debug)]
pub(super) struct Buffers {
    length: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug)]
struct State {
    free: Vec<AlignedBuffer>,
    /// How many more may be made.
    unmade: usize,
    closed: bool,
}

impl Buffers {
    pub(super) fn new(most: usize, length: usize) -> Arc<Self> {
        let state = State { free: Vec::with_capacity(most), unmade: most, closed: false };
        Arc::new(Self { length, state: Mutex::new(state), returned: Condvar::new() })
    }

    /// A buffer, as soon as there is one; none once the stream is over. Its content is anything.
    pub(super) fn take(self: &Arc<Self>) -> Option<FilledBuffer> {
        let mut state = self.state.lock();
        let memory = loop {
            if state.closed {
                return None;
            }
            if let Some(memory) = state.free.pop() {
                break memory;
            }
            if state.unmade > 0 {
                state.unmade -= 1;
                drop(state);
                break AlignedBuffer::new(self.length);
            }
            self.returned.wait(&mut state);
        };
        Some(FilledBuffer { memory: Some(memory), filled: 0, home: Arc::clone(self) })
    }

    /// Ends all waits, and lets go of the memory.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.free = Vec::new();
        drop(state);
        self.returned.notify_all();
    }

    fn give_back(&self, memory: AlignedBuffer) {
        let mut state = self.state.lock();
        if !state.closed {
            state.free.push(memory);
            drop(state);
            self.returned.notify_one();
        }
    }
}

/// A buffer and how much of it means something; goes home when it is dropped.
#[derive(Debug)]
pub(super) struct FilledBuffer {
    memory: Option<AlignedBuffer>,
    filled: usize,
    home: Arc<Buffers>,
}

impl FilledBuffer {
    /// All of the buffer, for filling.
    pub(super) fn space(&mut self) -> &mut [u8] {
        self.memory.as_deref_mut().unwrap_or_default()
    }

    /// Says how much was filled.
    pub(super) fn set_filled(&mut self, filled: usize) {
        self.filled = filled;
    }
}

impl AsRef<[u8]> for FilledBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_deref().and_then(|memory| memory.get(..self.filled)).unwrap_or_default()
    }
}

impl Drop for FilledBuffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.home.give_back(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_are_used_again() {
        let buffers = Buffers::new(2, 4096);
        let mut first = buffers.take().unwrap();
        first.space()[..3].copy_from_slice(b"abc");
        first.set_filled(3);
        let second = buffers.take().unwrap();
        let bytes = bytes::Bytes::from_owner(first);
        assert_eq!(&bytes[..], b"abc");
        let waiting = std::thread::spawn({
            let buffers = Arc::clone(&buffers);
            move || buffers.take().is_some()
        });
        drop(bytes);
        assert!(waiting.join().unwrap());
        drop(second);
        assert_eq!(buffers.state.lock().unmade, 0);
        assert_eq!(buffers.state.lock().free.len(), 2);
    }

    #[test]
    fn a_closed_stream_waits_for_nothing() {
        let buffers = Buffers::new(1, 4096);
        let taken = buffers.take();
        let waiting = std::thread::spawn({
            let buffers = Arc::clone(&buffers);
            move || buffers.take().is_none()
        });
        buffers.close();
        assert!(waiting.join().unwrap());
        drop(taken);
        assert!(buffers.state.lock().free.is_empty());
    }
}
