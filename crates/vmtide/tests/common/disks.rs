//! What the tests over disk images share: QEMU's tools as independent judges, and disks.

#![allow(clippy::cast_possible_truncation, reason = "bytes of noise, and lengths of small disks")]

use super::{Place, Run};
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

pub const MIB: usize = 1 << 20;

/// Runs one of QEMU's tools in the place.
pub fn qemu(place: &Place, program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .current_dir(place.directory.path())
        .output()
        .unwrap_or_else(|error| {
            panic!("{program} is needed: install qemu-utils (scripts/test.sh does): {error}")
        })
}

pub fn must(place: &Place, program: &str, arguments: &[&str]) -> String {
    let output = qemu(place, program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether qemu-img finds both to hold the same.
pub fn must_equal(place: &Place, left: (&str, &str), right: (&str, &str)) {
    must(place, "qemu-img", &["compare", "-f", left.1, "-F", right.1, left.0, right.0]);
}

/// A sparse raw disk with data, zeros that are written, and holes.
pub fn sparse_disk(place: &Place, name: &str, size: usize) {
    let mut bytes = vec![0u8; size];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut at = 0;
    while at + MIB / 2 < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let length = (state as usize) % (MIB / 3) + 1;
        for (index, byte) in bytes[at..at + length].iter_mut().enumerate() {
            *byte = (state.rotate_left((index % 64) as u32) as u8) ^ (index >> 8) as u8;
        }
        at += length + (state >> 20) as usize % MIB;
    }
    std::fs::write(place.path(name), bytes).unwrap();
    must(place, "fallocate", &["--dig-holes", name]);
}

/// What is in the place, but for what the program keeps for itself.
pub fn names(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.directory.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !["state", "config"].contains(&name.as_str()));
    names.sort();
    names
}

/// One line that begins with `error:` and holds `word`.
pub fn one_clear_line(run: &Run, word: &str) {
    let errors: Vec<_> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", run.stderr);
    assert!(errors[0].contains(word), "{word}: {}", run.stderr);
}

/// A running server, ended with the test.
pub struct Server(pub Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn wait_for(socket: &Path) {
    let begun = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{} is not served", socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An image served by qemu-nbd, writable, as its own format.
pub fn qemu_nbd(place: &Place, image: &str, format: &str) -> (Server, String) {
    qemu_nbd_with(place, image, format, &[])
}

pub fn qemu_nbd_with(
    place: &Place,
    image: &str,
    format: &str,
    options: &[&str],
) -> (Server, String) {
    let socket = place.path(&format!("{image}.sock"));
    let child = Command::new("qemu-nbd")
        .args(["-t", "-e", "8", "-f", format])
        .args(options)
        .arg("-k")
        .arg(&socket)
        .arg(place.path(image))
        .spawn()
        .unwrap_or_else(|error| panic!("qemu-nbd is needed: install qemu-utils: {error}"));
    let server = Server(child);
    wait_for(&socket);
    (server, format!("nbd+unix:///?socket={}", socket.display()))
}
