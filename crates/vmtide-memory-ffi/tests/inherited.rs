//! Memory as it is handed over by another process, here the same one.
#![cfg(target_os = "linux")]
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_getfd};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;
use vmtide_memory_ffi::Memory;

const SLOT_BYTES: usize = 10_000;

fn memory(length: usize, seals: SealFlags) -> OwnedFd {
    let memory = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memory, length as u64).unwrap();
    fcntl_add_seals(&memory, seals).unwrap();
    memory
}

fn sealed(length: usize) -> OwnedFd {
    memory(length, SealFlags::SHRINK | SealFlags::GROW)
}

#[test]
fn what_is_written_into_a_slot_is_in_the_memory_at_its_offset() {
    let file = File::from(sealed(SLOT_BYTES * 3 + 1));
    let memory = Memory::inherited(file.as_raw_fd(), SLOT_BYTES * 3 + 1, SLOT_BYTES).unwrap();
    assert_eq!(memory.slots(), 3);
    let mut slots: Vec<_> = (0..3).map(|_| memory.wait()).collect();
    for (number, slot) in (1u8..).zip(&mut slots) {
        assert_eq!(slot.len(), SLOT_BYTES);
        slot.fill(number);
        slot.set_length(usize::MAX);
        assert_eq!(slot.len(), SLOT_BYTES);
        slot.set_length(5);
        slot.fill(number + 100);
    }
    for (number, slot) in (1u8..).zip(&slots) {
        let mut found = vec![0; SLOT_BYTES];
        file.read_exact_at(&mut found, slot.offset() as u64).unwrap();
        assert!(found[..5].iter().all(|byte| *byte == number + 100));
        assert!(found[5..].iter().all(|byte| *byte == number));
    }
    // Nobody else writes to it any more, and nobody inherits it.
    file.write_all_at(b"x", 0).unwrap_err();
    assert!(fcntl_getfd(&file).unwrap().contains(FdFlags::CLOEXEC));
}

#[test]
fn a_slot_has_one_owner_at_a_time() {
    let file = sealed(SLOT_BYTES * 2);
    let memory = Memory::inherited(file.as_raw_fd(), SLOT_BYTES * 2, SLOT_BYTES).unwrap();
    thread::scope(|scope| {
        for number in 0..8u8 {
            let memory = &memory;
            scope.spawn(move || {
                for _ in 0..500 {
                    let mut slot = memory.wait();
                    slot.fill(number);
                    assert!(slot.iter().all(|byte| *byte == number));
                }
            });
        }
    });
    let (one, other) = (memory.wait(), memory.wait());
    assert_ne!(one.offset(), other.offset());
}

#[test]
fn slots_outlive_the_value_they_are_of() {
    let file = sealed(SLOT_BYTES);
    let memory = Memory::inherited(file.as_raw_fd(), SLOT_BYTES, SLOT_BYTES).unwrap();
    let mut slot = memory.wait();
    drop(memory);
    slot.fill(7);
    assert_eq!(slot[SLOT_BYTES - 1], 7);
}

#[test]
fn what_could_be_taken_away_again_is_refused() {
    let refused = |file: &OwnedFd, length| {
        assert!(Memory::inherited(file.as_raw_fd(), length, SLOT_BYTES).is_err());
    };
    refused(&memory(SLOT_BYTES, SealFlags::GROW), SLOT_BYTES);
    refused(&sealed(SLOT_BYTES - 1), SLOT_BYTES);
    refused(&sealed(SLOT_BYTES), SLOT_BYTES - 1);
    refused(&OwnedFd::from(tempfile()), SLOT_BYTES);
    assert!(Memory::inherited(-1, SLOT_BYTES, SLOT_BYTES).is_err());
    assert!(Memory::inherited(sealed(SLOT_BYTES).as_raw_fd(), SLOT_BYTES, 0).is_err());
}

/// An ordinary file of more than a slot, with a name that nobody has.
fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("vmtide-memory-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(SLOT_BYTES as u64 * 2).unwrap();
    file
}
