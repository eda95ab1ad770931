//! A disk with content in memory, and waiting for what has to happen.

use super::agent::Agent;
use super::provider::{TestDisk, TestProvider};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_agent::limits::Limits;
use vmtide_agent::stream::frame::{self, FrameHeader, FrameKind};
use vmtide_block::ByteRange;

pub const DISK: usize = 3 << 20;

/// Content without a pattern, with 1 MiB of zeros in the middle.
pub fn content() -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes: Vec<u8> = (0..DISK)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .collect();
    bytes[1 << 20..2 << 20].fill(0);
    bytes
}

pub fn one_disk() -> (Arc<TestDisk>, Agent) {
    let disk = TestDisk::memory(content());
    let provider = TestProvider::new(&[("a.vhdx", Arc::clone(&disk))]);
    (disk, Agent::start(provider, Limits::default()))
}

/// Waits for it.
pub fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} never happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A framed stream that writes these frames.
pub fn framed(frames: &[(u64, &[u8])], zeros: &[ByteRange]) -> Vec<u8> {
    let mut stream = frame::head().to_vec();
    let mut position = 0;
    let mut add = |kind, offset, length: u64, payload: &[u8], checksum| {
        let payload_bytes = u32::try_from(payload.len()).unwrap();
        stream.extend(FrameHeader { kind, payload_bytes, offset, length, checksum }.to_bytes());
        stream.extend(payload);
    };
    for (offset, content) in frames {
        let (length, checksum) = (content.len() as u64, crc32c::crc32c(content));
        add(FrameKind::Data, *offset, length, content, checksum);
        position += length;
    }
    for range in zeros {
        add(FrameKind::Zero, range.offset, range.length, &[], 0);
        position += range.length;
    }
    add(FrameKind::End, 0, position, &[], 0);
    stream
}
