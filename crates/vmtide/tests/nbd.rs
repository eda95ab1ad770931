//! NBD exports as sources and targets, served by QEMU.

#![allow(clippy::panic, reason = "helpers of tests say what is missing")]

use crate::common;

use common::Place;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// A running `qemu-nbd`, ended with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(place: &Place, image: &str) -> (Server, String) {
    let socket = place.path(&format!("{image}.sock"));
    let child = Command::new("qemu-nbd")
        .args(["-t", "-f", "raw", "-x", "disk", "-k"])
        .arg(&socket)
        .arg(place.path(image))
        .spawn();
    let Ok(child) = child else {
        panic!("qemu-nbd is needed: install qemu-utils (scripts/test.sh does)");
    };
    let server = Server(child);
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    (server, format!("nbd+unix:///disk?socket={}", socket.display()))
}

#[test]
fn an_export_is_backed_up_and_restored_to() {
    let place = Place::with_repository();
    place.image("web.raw", 4 * MIB);
    let (source, url) = serve(&place, "web.raw");
    let run = place.run(&["backup", &url, "--json"]).must_end_with(0);
    assert_eq!(run.summary()["vm"], "disk");
    drop(source);

    std::fs::write(place.path("blank.raw"), vec![0; 5 * MIB]).unwrap();
    let (_target, url) = serve(&place, "blank.raw");
    place.run(&["restore", "disk", "--to", &url]).must_end_with(0);
    let expected = std::fs::read(place.path("web.raw")).unwrap();
    assert_eq!(std::fs::read(place.path("blank.raw")).unwrap()[..4 * MIB], expected);

    // It holds data now: only with a word of how, and in place nothing has to be written.
    let run = place.run(&["restore", "disk", "--to", &url]).must_end_with(1);
    assert!(run.stderr.contains("--in-place"), "{}", run.stderr);
    let run = place.run(&["restore", "disk", "--to", &url, "--in-place", "--json"]);
    assert_eq!(run.must_end_with(0).summary()["disks"][0]["written_bytes"], 0);

    std::fs::write(place.path("small.raw"), vec![0; MIB]).unwrap();
    let (_small, url) = serve(&place, "small.raw");
    let run = place.run(&["restore", "disk", "--to", &url]).must_end_with(1);
    assert!(run.stderr.contains("larger one is needed"), "{}", run.stderr);
    place.run(&["restore", "disk", "--to", &url, "--format", "qcow2"]).must_end_with(2);
}

#[test]
fn a_server_that_is_not_there_is_one_clear_line() {
    let place = Place::with_repository();
    let url = format!("nbd+unix:///disk?socket={}", place.text("nobody.sock"));
    let run = place.run(&["backup", &url]);
    assert!([1, 6].contains(&run.code), "{}: {}", run.code, run.stderr);
    assert!(
        run.stderr.starts_with("error: ") && run.stderr.contains("nobody.sock"),
        "{}",
        run.stderr
    );
}
