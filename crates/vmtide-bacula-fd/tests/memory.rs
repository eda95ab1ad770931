//! What the plugin makes of a backend's memory, with backends that are a few lines of a shell each: some are right,
//! some lie, some die.
#![cfg(target_os = "linux")]
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmtide_fd::backend::{Backend, Frame};
use vmtide_fd::core::Core;

/// What every backend begins with: it finds the memory, and greets. What it hears is kept beside it.
const BEGIN: &str = r#"#!/bin/sh
for file in /proc/$$/fd/*; do
    case $(readlink "$file") in *memfd:vmtide-bacula*) memory=$file ;; esac
done
frame() { printf '%s%06d\n%s' "$1" "${#2}" "$2"; }
put() { printf '%s' "$2" | dd of="$memory" bs=1 seek="$1" conv=notrunc 2>/dev/null; }
frame C 'Hello vmtide-bacula 2 test'
"#;

const HEAR: &str = "\nframe F ''\ncat >\"$0.heard\"\n";

/// One at a time: a program that is being written by one thread cannot be started by another.
static ALONE: Mutex<()> = Mutex::new(());

struct Script {
    directory: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Script {
    fn new(name: &str, text: &str) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let directory =
            std::env::temp_dir().join(format!("vmtide-fd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let program = directory.join("vmtide");
        std::fs::write(&program, format!("{BEGIN}{text}")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self { directory, _alone: alone }
    }

    fn start(&self, share: bool) -> Backend {
        let directory = self.directory.to_str().unwrap();
        Backend::start(core(), directory, directory, Arc::default(), share).unwrap()
    }

    fn heard(&self) -> String {
        std::fs::read_to_string(self.directory.join("vmtide.heard")).unwrap()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn core() -> Core {
    Core::new(std::ptr::null_mut())
}

#[test]
fn data_come_from_the_memory_and_it_is_said_when_they_were_taken() {
    let text = format!("put 3 hello\nframe M '3 5'\nframe D piped\nframe M '4 2'{HEAR}");
    let script = Script::new("right", &text);
    let mut backend = script.start(true);
    assert!(backend.memory_line().unwrap().starts_with("Memory="));
    let mut buffer = [0; 16];
    assert_eq!(backend.frame(core()).unwrap(), Frame::Data(5));
    assert_eq!(backend.data(&mut buffer[..2]).unwrap(), 2);
    assert!(backend.has_pending());
    assert_eq!(backend.data(&mut buffer[2..]).unwrap(), 3);
    assert_eq!(&buffer[..5], b"hello");
    assert!(!backend.has_pending());
    assert_eq!(backend.frame(core()).unwrap(), Frame::Data(5));
    assert_eq!(backend.data(&mut buffer).unwrap(), 5);
    assert_eq!(&buffer[..5], b"piped");
    assert_eq!(backend.frame(core()).unwrap(), Frame::Data(2));
    assert_eq!(backend.data(&mut buffer).unwrap(), 2);
    assert_eq!(&buffer[..2], b"el");
    backend.finish(core(), true).unwrap();
    let heard = script.heard();
    assert!(heard.starts_with("C"), "{heard:?}");
    // Once for each place, and not for what came on the pipe.
    assert_eq!(heard.matches("R000000\n").count(), 2, "{heard:?}");
}

#[test]
fn a_backend_that_lies_about_places_is_given_up() {
    let size = {
        let script = Script::new("size", HEAR);
        let backend = script.start(true);
        let line = backend.memory_line().unwrap();
        line.split_once(' ').unwrap().1.parse::<usize>().unwrap()
    };
    let lies = [
        format!("{size} 1"),
        format!("{} 2", size - 1),
        format!("0 {}", size + 1),
        format!("{} 2", u64::MAX),
        format!("1 {}", u64::MAX),
        "99999999999999999999 1".into(),
        "0 0".into(),
        "-1 5".into(),
        "+1 5".into(),
        "5".into(),
        String::new(),
        "1 2 3".into(),
        " 1 2".into(),
        "a b".into(),
        "0".repeat(41) + " 1",
    ];
    for lie in lies {
        let script = Script::new("lies", &format!("frame M '{lie}'{HEAR}"));
        let error = script.start(true).frame(core()).unwrap_err();
        assert!(error.0.contains("memory") || error.0.contains("place"), "{lie:?}: {error:?}");
    }
    // The last byte is inside.
    let script = Script::new("lies", &format!("frame M '{} 1'{HEAR}", size - 1));
    assert_eq!(script.start(true).frame(core()).unwrap(), Frame::Data(1));
}

#[test]
fn a_backend_that_was_given_no_memory_has_none() {
    let script = Script::new("none", &format!("frame M '0 1'{HEAR}"));
    let mut backend = script.start(false);
    assert_eq!(backend.memory_line(), None);
    assert!(backend.frame(core()).unwrap_err().0.contains("memory"));
}

#[test]
fn a_backend_that_plays_the_plugin_is_given_up() {
    let script = Script::new("plays", &format!("frame R ''{HEAR}"));
    script.start(true).frame(core()).unwrap_err();
}

#[test]
fn a_backend_that_dies_with_data_in_the_memory_fails_the_job_and_nothing_else() {
    let script = Script::new("dies", "put 0 abc\nframe M '0 3'\nframe M '0 3'\nexit 7");
    let mut backend = script.start(true);
    let mut read = || {
        let mut all = Vec::new();
        for _ in 0..3 {
            backend.frame(core())?;
            let mut buffer = [0; 8];
            let count = backend.data(&mut buffer)?;
            all.extend_from_slice(&buffer[..count]);
        }
        Ok::<_, vmtide_fd::backend::Failed>(all)
    };
    let error = read().unwrap_err();
    assert!(error.0.contains("ended before its work was done"), "{error:?}");
}

#[test]
fn a_job_that_fails_with_data_half_taken_ends_at_once() {
    // What follows data in the memory is no data on the pipe: the end is understood, and not waited for.
    let text =
        "trap 'frame W bye; exit 0' TERM\nput 0 abcdef\nframe M '0 6'\ncat >/dev/null\nframe F ''";
    let script = Script::new("half", text);
    let mut backend = script.start(true);
    assert_eq!(backend.frame(core()).unwrap(), Frame::Data(6));
    assert_eq!(backend.data(&mut [0; 2]).unwrap(), 2);
    backend.finish(core(), false).unwrap();
}
