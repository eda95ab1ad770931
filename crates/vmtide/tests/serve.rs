//! `vmtide serve` and exports as sources and targets, with the tools of QEMU at the other end.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::Place;
use common::disks::{
    MIB, Server, must, must_equal, one_clear_line, qemu, qemu_nbd, sparse_disk, wait_for,
};
use serde_json::Value;
use std::process::Command;

#[test]
fn exports_are_converted_from_and_to() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 8 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let (source, url) = qemu_nbd(&place, "disk.qcow2", "qcow2");
    place.run(&["convert", &url, "from.qcow2"]).must_end_with(0);
    drop(source);
    must_equal(&place, ("disk.raw", "raw"), ("from.qcow2", "qcow2"));
    must(&place, "qemu-img", &["create", "-q", "-f", "qcow2", "blank.qcow2", "9M"]);
    let (target, url) = qemu_nbd(&place, "blank.qcow2", "qcow2");
    place.run(&["convert", "disk.qcow2", &url]).must_end_with(0);
    let run = place.run(&["convert", "disk.qcow2", &url]).must_end_with(1);
    one_clear_line(&run, "--overwrite");
    let run = place.run(&["convert", "disk.raw", &url, "--in-place", "--json"]).must_end_with(0);
    assert_eq!(run.summary()["written_bytes"], 0);
    place.run(&["convert", "disk.raw", &url, "--overwrite"]).must_end_with(0);
    place.run(&["compare", "disk.raw", &url]).must_end_with(0);
    place.run(&["convert", "disk.raw", &url, "--to", "qcow2"]).must_end_with(2);
    drop(target);
    must_equal(&place, ("disk.raw", "raw"), ("blank.qcow2", "qcow2"));
}

#[test]
fn images_are_served_and_written_through_the_server() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 8 * MIB);
    place.run(&["convert", "disk.raw", "disk.qcow2"]).must_end_with(0);
    let serve = |arguments: &[&str]| {
        let socket = place.path("vmtide.sock");
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"));
        let address = format!("unix:{}", socket.display());
        command.args(arguments).args(["--json", "--nbd", &address]);
        let child = command
            .current_dir(place.directory.path())
            .env("XDG_CONFIG_HOME", place.path("config"))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Server(child);
        let mut out = std::io::BufReader::new(server.0.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["type"], "listening");
        (server, event["exports"][0]["url"].as_str().unwrap().to_owned())
    };
    let end = |mut server: Server| {
        let pid = rustix::process::Pid::from_child(&server.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(server.0.wait().unwrap().code(), Some(0));
    };
    let (server, url) = serve(&["serve", "disk.qcow2"]);
    must_equal(&place, (&url, "raw"), ("disk.raw", "raw"));
    let denied = qemu(&place, "qemu-io", &["-f", "raw", "-c", "write 0 512", &url]);
    assert!(!denied.status.success());
    end(server);
    assert!(!place.path("vmtide.sock").exists());
    let (server, url) = serve(&["serve", "disk.qcow2", "--writable"]);
    for (file, target) in [("disk.raw", true), (url.as_str(), false)] {
        let command = "write -P 77 3333k 333k";
        assert!(
            qemu(&place, "qemu-io", &["-f", "raw", "-c", command, file]).status.success(),
            "{target}"
        );
    }
    end(server);
    must(&place, "qemu-img", &["check", "-q", "disk.qcow2"]);
    must_equal(&place, ("disk.raw", "raw"), ("disk.qcow2", "qcow2"));
    one_clear_line(&place.run(&["serve", "none.raw", "--nbd", "unix:x.sock"]), "none.raw");
    place.run(&["serve", "disk.raw", "--nbd", "x.sock"]).must_end_with(2);
}

#[test]
fn restore_points_are_served() {
    let place = Place::with_repository();
    place.image("web.raw", 2 * MIB);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    std::fs::rename(place.path("web.raw"), place.path("old.raw")).unwrap();
    let socket = place.path("point.sock");
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"));
    let child = command
        .args(["serve", "web@latest", "--nbd", &format!("unix:{}", socket.display())])
        .current_dir(place.directory.path())
        .env("VMTIDE_PASSWORD", common::PASSWORD)
        .env("VMTIDE_REPOSITORY", place.repository())
        .env("XDG_CONFIG_HOME", place.path("config"))
        .spawn()
        .unwrap();
    let _server = Server(child);
    wait_for(&socket);
    let url = format!("nbd+unix:///?socket={}", socket.display());
    must_equal(&place, (&url, "raw"), ("old.raw", "raw"));
    place.run(&["serve", "web", "--nbd", "unix:x.sock", "--writable"]).must_end_with(2);
    let run = place.run(&["serve", "web", "--nbd", "unix:x.sock", "--disk", "d9"]).must_end_with(6);
    one_clear_line(&run, "d9");
}

/// An authority with certificates for a server and a client, under the names that QEMU gives them.
fn certificates(place: &Place) {
    let script = "set -e; mkdir pki; cd pki
        new='openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
        $new -x509 -days 2 -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem \
            -addext keyUsage=critical,keyCertSign
        for who in server client; do
            printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=%sAuth\nkeyUsage=digitalSignature\n' $who >ext
            $new -subj /CN=$who -keyout $who-key.pem -out request
            openssl x509 -req -days 2 -in request -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
                -extfile ext -out $who-cert.pem
        done";
    must(place, "sh", &["-c", script]);
}

#[test]
fn over_tls_only_clients_with_a_certificate_are_served() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 4 * MIB);
    place.run(&["convert", "disk.raw", "disk.vhdx"]).must_end_with(0);
    certificates(&place);
    let pki = ["--tls-cert", "pki/server-cert.pem", "--tls-key", "pki/server-key.pem"];
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"))
        .args(["serve", "disk.vhdx", "--json", "--nbd", "127.0.0.1:0"])
        .args(pki)
        .args(["--tls-client-ca", "pki/ca-cert.pem"])
        .current_dir(place.directory.path())
        .env("XDG_CONFIG_HOME", place.path("config"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let _server = Server(child);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    let url = event["exports"][0]["url"].as_str().unwrap().to_owned();
    let address = url.strip_prefix("nbds://").unwrap().trim_end_matches('/');
    let pki_path = place.path("pki");
    // libnbd, QEMU and vmtide, each with the client's certificate.
    let with = format!("{url}?tls-certificates={}", pki_path.display());
    let info = must(&place, "nbdinfo", &["--json", &with]);
    assert!(info.contains(&format!("{}", 4 * MIB)), "{info}");
    let (host, port) = address.rsplit_once(':').unwrap();
    let credentials = "tls-creds-x509,id=tls,endpoint=client,dir=pki";
    let source = format!("driver=nbd,host={host},port={port},tls-creds=tls");
    let compare = [
        "compare",
        "--object",
        credentials,
        "--image-opts",
        &source,
        "driver=raw,file.filename=disk.raw",
    ];
    must(&place, "qemu-img", &compare);
    place.run(&["compare", &with, "disk.raw"]).must_end_with(0);
    // Without TLS, and without a certificate, nobody.
    let plain = format!("nbd://{address}");
    assert!(!qemu(&place, "qemu-img", &["info", &plain]).status.success());
    std::fs::remove_file(pki_path.join("client-cert.pem")).unwrap();
    assert_ne!(place.run(&["compare", &with, "disk.raw"]).code, 0);
    let half = ["serve", "disk.raw", "--nbd", "127.0.0.1:0", "--tls-cert", "pki/server-cert.pem"];
    place.run(&half).must_end_with(2);
}
