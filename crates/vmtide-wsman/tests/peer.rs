//! The client against NTLM of another hand: pyspnego as the host.
//!
//! Needs Python with pyspnego (`tests/wsman/requirements.txt`), named by `VMTIDE_WSMAN_PYTHON`:
//! `VMTIDE_WSMAN_PYTHON=…/python3 cargo test -p vmtide-wsman --test peer -- --ignored`, which `scripts/test.sh wsman` does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use vmtide_cim::CimError;
use vmtide_wsman::{Authentication, Credentials, Scheme, WsmanCim, WsmanOptions};

const WHY: &str =
    "set VMTIDE_WSMAN_PYTHON to a Python that has pyspnego (tests/wsman/requirements.txt)";
const PASSWORD: &str = "Pässw0rd €";

/// The peer's process; ends when it is dropped.
struct Peer {
    child: Child,
    port: u16,
}

impl Peer {
    fn start(arguments: &[&str], fault: &str) -> Self {
        let python = std::env::var("VMTIDE_WSMAN_PYTHON").expect(WHY);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/wsman/ntlm_peer.py");
        let mut child = Command::new(python)
            .arg(script)
            .args(arguments)
            .env("VMTIDE_PEER_FAULT", fault)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect(WHY);
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, port: line.trim().parse().expect(WHY) }
    }

    fn options(&self, user: &str, password: &str) -> WsmanOptions {
        WsmanOptions {
            port: Some(self.port),
            authentication: Authentication::Ntlm,
            credentials: Some(Credentials::new(user, password.to_owned().into()).unwrap()),
            ..WsmanOptions::new("127.0.0.1")
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs pyspnego: see the head of this file"]
fn seals_of_both_hands_fit() {
    for mode in ["ntlm", "negotiate"] {
        let peer = Peer::start(&[mode], "");
        let client = WsmanCim::new(peer.options(r"LAB\operator", PASSWORD)).unwrap();
        for count in 1..=20 {
            let identity = client.identify().unwrap_or_else(|error| panic!("{mode}: {error}"));
            assert_eq!(identity.product_vendor, "pyspnego");
            // The same connection all the time, so that keys and numbers go on.
            assert!(identity.product_version.ends_with(&format!(" {count}")), "{identity:?}");
        }
    }
}

#[test]
#[ignore = "needs pyspnego: see the head of this file"]
fn wrong_passwords_are_refused() {
    let peer = Peer::start(&["ntlm"], "");
    for (user, password) in [(r"LAB\operator", "Guess-1"), (r"LAB\nobody", PASSWORD)] {
        let error = WsmanCim::new(peer.options(user, password)).unwrap().identify().unwrap_err();
        assert!(matches!(error, CimError::Login { .. }), "{error}");
    }
}

#[test]
#[ignore = "needs pyspnego: see the head of this file"]
fn answers_that_were_changed_or_are_not_sealed_are_not_believed() {
    for fault in ["tamper:2", "plain:2"] {
        let peer = Peer::start(&["ntlm"], fault);
        let client = WsmanCim::new(peer.options(r"LAB\operator", PASSWORD)).unwrap();
        client.identify().unwrap();
        let error = client.identify().unwrap_err();
        assert!(matches!(error, CimError::Protocol { .. }), "{fault}: {error}");
        // A new connection has new keys.
        client.identify().unwrap();
    }
}

#[test]
#[ignore = "needs pyspnego: see the head of this file"]
fn logins_are_bound_to_tls() {
    let names = vec!["127.0.0.1".to_owned()];
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(names).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), cert.pem() + &signing_key.serialize_pem()).unwrap();
    let peer = Peer::start(&["--certificate", file.path().to_str().unwrap(), "ntlm"], "");
    let options = WsmanOptions {
        scheme: Scheme::Https,
        ca_file: Some(file.path().to_owned()),
        ..peer.options(r"LAB\operator", PASSWORD)
    };
    for _ in 0..3 {
        WsmanCim::new(options.clone()).unwrap().identify().unwrap();
    }
}
