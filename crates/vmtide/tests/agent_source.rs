//! Disks of the real agent as sources and targets: full and incremental, byte-identical, with faults on the way.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::common;

use common::{Place, Run, finish};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const MIB: usize = 1 << 20;

/// A running agent that serves the directory `disks`, ended with the test.
struct Agent {
    child: Child,
    place: Place,
    address: SocketAddr,
    fingerprint: String,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    fn start() -> Self {
        let place = Place::with_repository();
        std::fs::create_dir(place.path("disks")).unwrap();
        for (name, rights) in [("backup", "read-write"), ("reader", "read-only")] {
            let keys = [
                "--auth-key-file",
                &place.text("keys"),
                "--to",
                &place.text(&format!("{name}.key")),
            ];
            let add = [&["agent", "key", "add", name, "--rights", rights][..], &keys].concat();
            place.run(&add).must_end_with(0);
        }
        let mut child = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"))
            .args(["agent", "--json", "--listen", "127.0.0.1:0", "--root", &place.text("disks")])
            .args([
                "--auth-key-file",
                &place.text("keys"),
                "--state-dir",
                &place.text("agent-state"),
            ])
            .env_remove("VMTIDE_CONFIG")
            .env("XDG_CONFIG_HOME", place.path("config"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listening: Value = loop {
            let line = lines.next().unwrap_or_else(|| panic!("the agent ended")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["type"] == "listening" {
                break event;
            }
        };
        // Whoever does not read on would block it.
        std::thread::spawn(move || lines.for_each(drop));
        let address = listening["address"].as_str().unwrap().parse().unwrap();
        let fingerprint = listening["fingerprint_sha256"].as_str().unwrap().to_owned();
        Self { child, place, address, fingerprint }
    }

    fn url_at(&self, address: SocketAddr, disks: &[&str]) -> String {
        let path = |name: &str| self.place.text(&format!("disks/{name}"));
        let mut url = format!("agent+https://{address}{}", path(disks[0]));
        for (number, disk) in disks.iter().enumerate().skip(1) {
            url.push_str(if number == 1 { "?disk=" } else { "&disk=" });
            url.push_str(&path(disk));
        }
        url
    }

    fn url(&self, disk: &str) -> String {
        self.url_at(self.address, &[disk])
    }

    fn command(&self, words: &[&str]) -> assert_cmd::Command {
        let mut command = self.place.command(words);
        command
            .env("VMTIDE_AGENT_KEY_FILE", self.place.path("backup.key"))
            .env("VMTIDE_AGENT_FINGERPRINT", &self.fingerprint);
        command
    }

    fn run(&self, words: &[&str]) -> Run {
        finish(&mut self.command(words))
    }

    fn disk(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.place.path(&format!("disks/{name}"))).unwrap()
    }

    /// The disk of the newest restore point of `vm`, or one of its disks.
    fn restored(&self, vm: &str, disk: &str) -> Vec<u8> {
        let target = self.place.text("restored.raw");
        self.place
            .run(&["restore", vm, "--disk", disk, "--to", &target, "--force"])
            .must_end_with(0);
        std::fs::read(target).unwrap()
    }

    /// Writes `content` to a disk by way of the agent, only where it differs, so that it is tracked.
    fn write(&self, disk: &str, content: &[u8]) {
        std::fs::write(self.place.path("changed.raw"), content).unwrap();
        self.place.run(&["backup", "changed.raw", "--name", "changed"]).must_end_with(0);
        let run = self.run(&[
            "restore",
            "changed",
            "--to",
            &self.url(disk),
            "--in-place",
            "--format",
            "raw",
        ]);
        run.must_end_with(0);
        assert!(self.disk(disk) == content, "written back, byte for byte");
    }
}

fn disk_of(summary: &Value, number: usize) -> Value {
    summary["disks"][number].clone()
}

#[test]
fn full_incremental_and_back() {
    let agent = Agent::start();
    agent.place.image("disks/web.raw", 12 * MIB);
    let url = agent.url("web.raw");
    let full = agent.run(&["backup", &url, "--track", "--json"]).must_end_with(0).summary();
    assert_eq!(
        (full["vm"].as_str(), full["level"].as_str()),
        (Some("web"), Some("full")),
        "{full}"
    );
    let id = disk_of(&full, 0)["tracking"]["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("rctX:"), "{full}");
    assert!(agent.restored("web", "disk0") == agent.disk("web.raw"));

    let nothing = agent.run(&["backup", &url, "--json"]).must_end_with(0).summary();
    assert_eq!(disk_of(&nothing, 0)["read_bytes"], 0, "{nothing}");

    let mut content = agent.disk("web.raw");
    content[5 * MIB..5 * MIB + 3000].fill(0xa5);
    content[11 * MIB + 7] = 1;
    content[MIB..2 * MIB].fill(0);
    agent.write("web.raw", &content);
    let told =
        agent.run(&["vm", "changes", &url, "--since", &id, "--json"]).must_end_with(0).summary();
    let told: u64 = told["ranges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|range| range["length"].as_u64().unwrap())
        .sum();
    assert!((1 << 20..3 << 20).contains(&told), "{told} bytes changed");

    let next = agent.run(&["backup", &url, "--json"]).must_end_with(0).summary();
    let disk = disk_of(&next, 0);
    assert_eq!(
        (next["level"].as_str(), disk["tracking"]["used"].as_bool()),
        (Some("incremental"), Some(true))
    );
    assert!(disk["read_bytes"].as_u64().unwrap() < 3 << 20, "{next}");
    assert!(agent.restored("web", "disk0") == content);

    // To a disk that is not there yet, in another format.
    agent.run(&["restore", "web", "--to", &agent.url("new.qcow2")]).must_end_with(0);
    agent.place.run(&["compare", "disks/web.raw", "disks/new.qcow2"]).must_end_with(0);
    let run = agent.run(&["restore", "web", "--to", &agent.url("new.qcow2")]).must_end_with(1);
    assert!(run.stderr.contains("holds data already"), "{}", run.stderr);
    let info = agent.run(&["info", &agent.url("new.qcow2"), "--json"]).must_end_with(0).summary();
    assert_eq!(info["disks"][0]["format"], "qcow2");
    assert_eq!(info["disks"][0]["size_bytes"], 12 * MIB);
}

#[test]
fn lost_tracking_means_a_full_pass_with_the_reason() {
    let agent = Agent::start();
    agent.place.image("disks/web.raw", 4 * MIB);
    let url = agent.url("web.raw");
    agent.run(&["backup", &url]).must_end_with(0);
    // Without tracking it is simply read in full, and compared.
    let again = agent.run(&["backup", &url, "--json"]).must_end_with(0).summary();
    assert!(
        disk_of(&again, 0)["tracking"]["reason"].as_str().unwrap().contains("--track"),
        "{again}"
    );
    agent.run(&["backup", &url, "--track"]).must_end_with(0);
    // Somebody writes past the agent.
    let mut content = agent.disk("web.raw");
    content[3 * MIB] ^= 1;
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(agent.place.path("disks/web.raw"), &content).unwrap();
    let lost = agent.run(&["backup", &url, "--json"]).must_end_with(3).summary();
    let tracking = &disk_of(&lost, 0)["tracking"];
    assert_eq!(tracking["used"], false, "{lost}");
    assert!(tracking["reason"].as_str().unwrap().contains("tracking"), "{lost}");
    assert!(agent.restored("web", "disk0") == content);

    let unknown = [
        "vm",
        "changes",
        &url,
        "--since",
        "rctX:00000000:0000:0000:0000:000000000000:00000009",
        "--json",
    ];
    let told = agent.run(&unknown).must_end_with(3).summary();
    assert!(told["ranges"].is_null() && told["reason"].is_string(), "{told}");
}

#[test]
fn all_disks_of_a_vm_at_one_moment() {
    let agent = Agent::start();
    agent.place.image("disks/os.raw", 2 * MIB);
    agent.place.image("disks/data.raw", 3 * MIB);
    let url = agent.url_at(agent.address, &["os.raw", "data.raw"]);
    let run = agent
        .run(&["backup", &url, "--name", "db", "--track", "--json"])
        .must_end_with(0)
        .summary();
    assert_eq!(run["disks"].as_array().unwrap().len(), 2, "{run}");
    assert!(agent.restored("db", "disk0") == agent.disk("os.raw"));
    assert!(agent.restored("db", "disk1") == agent.disk("data.raw"));
    let next = agent.run(&["backup", &url, "--name", "db", "--json"]).must_end_with(0).summary();
    for number in 0..2 {
        assert_eq!(disk_of(&next, number)["tracking"]["used"], true, "{next}");
    }
}

#[test]
fn whoever_may_not_is_told_so_and_nothing_is_made() {
    let agent = Agent::start();
    agent.place.image("disks/web.raw", MIB);
    std::fs::write(agent.place.path("elsewhere.raw"), [1; 4096]).unwrap();
    let url = agent.url("web.raw");
    let with = |name: &str, value: &str, words: &[&str]| {
        let mut command = agent.command(words);
        command.env(name, value);
        finish(&mut command)
    };
    std::fs::write(agent.place.path("wrong.key"), "not-a-key-of-this-agent\n").unwrap();
    let run = with("VMTIDE_AGENT_KEY_FILE", &agent.place.text("wrong.key"), &["backup", &url])
        .must_end_with(4);
    assert!(
        run.stderr.contains("wrong key") && !run.stderr.contains("not-a-key"),
        "{}",
        run.stderr
    );
    let zeros = "00".repeat(32);
    let run = with("VMTIDE_AGENT_FINGERPRINT", &zeros, &["backup", &url]).must_end_with(1);
    assert!(run.stderr.contains("certificate"), "{}", run.stderr);
    let reader = agent.place.text("reader.key");
    with("VMTIDE_AGENT_KEY_FILE", &reader, &["backup", &url]).must_end_with(0);
    let to_agent = ["restore", "web", "--to", &url, "--in-place"];
    with("VMTIDE_AGENT_KEY_FILE", &reader, &["backup", &url, "--track"]).must_end_with(4);
    agent.place.run(&["backup", "elsewhere.raw", "--name", "other"]).must_end_with(0);
    let other = ["restore", "other", "--to", &agent.url("made.raw")];
    with("VMTIDE_AGENT_KEY_FILE", &reader, &other).must_end_with(4);
    assert!(!agent.place.path("disks/made.raw").exists());
    agent.run(&to_agent).must_end_with(0);
    agent.run(&["backup", &agent.url("none.raw")]).must_end_with(6);
    let outside = format!("agent+https://{}{}", agent.address, agent.place.text("elsewhere.raw"));
    agent.run(&["backup", &outside]).must_end_with(6);
    agent.run(&["backup", &agent.url("web.raw").replacen("//", "//key@", 1)]).must_end_with(2);
}

/// Hands connections on to the agent, and cuts each after so many bytes of its answers.
fn cutting_proxy(agent: SocketAddr, cut_after: usize, cuts: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let cuts = Arc::clone(&cuts);
            std::thread::spawn(move || {
                let server = TcpStream::connect(agent).unwrap();
                let (mut from_client, mut to_server) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    // Ends when either side does.
                    let _ = std::io::copy(&mut from_client, &mut to_server);
                    let _ = to_server.shutdown(std::net::Shutdown::Write);
                });
                let (mut from_server, mut to_client) = (server, client);
                let mut left = cut_after;
                let mut buffer = vec![0; 16 << 10];
                while let Ok(read) = from_server.read(&mut buffer)
                    && read > 0
                {
                    let sent = read.min(left);
                    if to_client.write_all(&buffer[..sent]).is_err() {
                        return;
                    }
                    left -= sent;
                    if left == 0 {
                        cuts.fetch_add(1, Ordering::Relaxed);
                        let _ = to_client.shutdown(std::net::Shutdown::Both);
                        return;
                    }
                }
                let _ = to_client.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}

#[test]
fn connections_that_break_do_not_matter() {
    let agent = Agent::start();
    agent.place.image("disks/web.raw", 16 * MIB);
    let cuts = Arc::new(AtomicUsize::new(0));
    let proxy = cutting_proxy(agent.address, 1_300_000, Arc::clone(&cuts));
    let url = agent.url_at(proxy, &["web.raw"]);
    for compress in [false, true] {
        let mut words = vec!["backup", &url, "--level", "full"];
        if compress {
            words.push("--agent-compress");
        }
        agent.run(&words).must_end_with(0);
        assert!(agent.restored("web", "disk0") == agent.disk("web.raw"));
    }
    assert!(cuts.load(Ordering::Relaxed) >= 5, "{cuts:?} connections were cut");
}

/// Hands connections on to the agent, and cuts the first `most` that send more than `cut_after` bytes. The agent
/// learns of it a while after the client, as behind a firewall that resets one side.
fn upload_cutting_proxy(
    agent: SocketAddr,
    cut_after: usize,
    most: usize,
    cuts: Arc<AtomicUsize>,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let cuts = Arc::clone(&cuts);
            std::thread::spawn(move || {
                let mut server = TcpStream::connect(agent).unwrap();
                let (mut from_server, mut to_client) =
                    (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    // Ends when either side does.
                    let _ = std::io::copy(&mut from_server, &mut to_client);
                    let _ = to_client.shutdown(std::net::Shutdown::Both);
                });
                let mut sent = 0;
                let mut buffer = vec![0; 16 << 10];
                while let Ok(read) = client.read(&mut buffer)
                    && read > 0
                    && server.write_all(&buffer[..read]).is_ok()
                {
                    sent += read;
                    if sent > cut_after && cuts.load(Ordering::Relaxed) < most {
                        cuts.fetch_add(1, Ordering::Relaxed);
                        let _ = client.shutdown(std::net::Shutdown::Both);
                        std::thread::sleep(std::time::Duration::from_millis(1500));
                        break;
                    }
                }
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}

#[test]
fn a_restore_whose_writes_are_cut_is_whole() {
    let agent = Agent::start();
    agent.place.image("disks/web.raw", 16 * MIB);
    agent.run(&["backup", &agent.url("web.raw")]).must_end_with(0);
    let cuts = Arc::new(AtomicUsize::new(0));
    let proxy = upload_cutting_proxy(agent.address, 2 * MIB, 2, Arc::clone(&cuts));
    agent.run(&["restore", "web", "--to", &agent.url_at(proxy, &["new.qcow2"])]).must_end_with(0);
    assert_eq!(cuts.load(Ordering::Relaxed), 2);
    agent.place.run(&["compare", "disks/web.raw", "disks/new.qcow2"]).must_end_with(0);
}
