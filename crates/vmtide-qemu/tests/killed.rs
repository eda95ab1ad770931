//! SIGKILL at every step: the guest runs on, nothing is left after the next job, and the next
//! incremental is right whichever restore point had been committed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use crate::support::agent::{Behaviour, FakeAgent};
use crate::support::proxy::{Proxy, kill};
use crate::support::{LINEAGE, MIB, Store, Vm, ranges_of};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmtide_hypervisor::{Base, Consistency, DiskId, Hypervisor, TrackingId};
use vmtide_qemu::{Address, FreezeMethod, QemuTarget, QemuVm, guardian};

const GUARDIAN: &str = "VMTIDE_TEST_GUARDIAN";
const JOB: &str = "VMTIDE_TEST_JOB";

/// Not a test: the guardian, when this executable is started as one.
#[test]
fn guardian_process() {
    if let Ok(arguments) = std::env::var(GUARDIAN) {
        // The test harness has begun a line.
        println!();
        let arguments = arguments.split(' ').skip(1).map(str::to_owned);
        std::process::exit(guardian::run(arguments));
    }
}

/// Not a test: one whole backup, when this executable is started for it.
#[test]
fn job_process() {
    if let Ok(text) = std::env::var(JOB) {
        let job: Value = serde_json::from_str(&text).unwrap();
        run_job(&job);
        std::process::exit(0);
    }
}

fn run_job(job: &Value) {
    let path = |key: &str| PathBuf::from(job[key].as_str().unwrap());
    let mut target = QemuTarget::new(path("qmp"), path("state"));
    target.agent = Some(Address::Unix(path("agent")));
    target.scratch_directory = Some(path("scratch"));
    target.scratch_reserve_bytes = 0;
    target.guardian = Some(path("guardian"));
    target.method = match job["method"].as_str().unwrap() {
        "Job" => FreezeMethod::Job,
        _ => FreezeMethod::Filter,
    };
    let mut store = load(&path("store"));
    store.lineage = LINEAGE;
    let mut request = store.request();
    request.consistency = Consistency::FileSystem;
    let frozen = QemuVm::new(target).freeze(&request).unwrap();
    if job["hold"] == true {
        println!("\nheld");
        std::thread::sleep(Duration::from_secs(60));
    }
    // The restore point is committed at once or not at all.
    save(&store.read(&*frozen), &path("next"));
    std::fs::rename(path("next"), path("store")).unwrap();
    frozen.commit().unwrap();
}

/// One line of JSON, then the images.
fn save(store: &Store, file: &Path) {
    let disks: Vec<Value> = store
        .bases
        .iter()
        .map(|(id, base)| json!({"id": id, "size": base.size_bytes, "tracking": base.tracking}))
        .collect();
    let mut bytes = json!(disks).to_string().into_bytes();
    bytes.push(b'\n');
    store.images.values().for_each(|image| bytes.extend_from_slice(image));
    std::fs::write(file, bytes).unwrap();
}

fn load(file: &Path) -> Store {
    let mut store = Store::new(LINEAGE);
    let bytes = std::fs::read(file).unwrap();
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap();
    let disks: Value = serde_json::from_slice(&bytes[..end]).unwrap();
    let mut at = end + 1;
    for disk in disks.as_array().unwrap() {
        let id = DiskId(disk["id"].as_str().unwrap().into());
        let tracking = disk["tracking"].as_str().map(|text| TrackingId(text.into()));
        let size_bytes = disk["size"].as_u64().unwrap();
        let next = at + usize::try_from(size_bytes).unwrap();
        store.images.insert(id.clone(), bytes[at..next].to_vec());
        store.bases.insert(id, Base { tracking, size_bytes });
        at = next;
    }
    store
}

/// An executable that is a guardian, whatever the harness makes of its arguments.
fn guardian_script(directory: &Path) -> PathBuf {
    let path = directory.join("guardian.sh");
    let this = std::env::current_exe().unwrap();
    let text = format!(
        "#!/bin/sh\n{GUARDIAN}=\"$*\" exec {} --exact killed::guardian_process --nocapture\n",
        this.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

struct Bench {
    vm: Vm,
    agent: FakeAgent,
    proxy: Proxy,
    target: QemuTarget,
    guardian: PathBuf,
}

impl Bench {
    fn new(method: FreezeMethod) -> Self {
        let vm = Vm::start(&[("qcow2", MIB), ("raw", MIB)]);
        let agent = FakeAgent::start(&vm.path("agent.sock"), Behaviour::Good);
        let proxy = Proxy::start(&vm.path("proxy.qmp"), vm.path("vm.qmp"));
        let guardian = guardian_script(vm.directory.path());
        let mut target = vm.target();
        target.qmp = Address::Unix(vm.path("proxy.qmp"));
        target.method = method;
        Self { vm, agent, proxy, target, guardian }
    }

    fn start_job(&self, hold: bool) -> Child {
        let job = json!({
            "qmp": self.vm.path("proxy.qmp"), "state": self.vm.path("state"),
            "agent": self.vm.path("agent.sock"), "scratch": self.vm.path("scratch"),
            "guardian": self.guardian, "store": self.vm.path("store"),
            "next": self.vm.path("next"), "hold": hold,
            "method": format!("{:?}", self.target.method),
        });
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::job_process", "--nocapture"])
            .env(JOB, job.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// The guest is let go by the guardian alone, without another job of ours.
    fn assert_released(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.vm.monitor.status() != "running" {
            assert!(Instant::now() < deadline, "the guest stayed paused");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(self.agent.wait_until_thawed(Duration::from_secs(60)), "the guest stayed frozen");
    }
}

fn kill_at_every_step(method: FreezeMethod, deliver: &[bool]) {
    let mut bench = Bench::new(method);
    let hypervisor = QemuVm::new(bench.target.clone());
    let mut store = Store::new(LINEAGE);
    store.backup(&hypervisor);
    let (mut kills, mut step) = (0, 0);
    let mut steps = Vec::new();
    'steps: loop {
        for deliver in deliver {
            save(&store, &bench.vm.path("store"));
            let pattern = u8::try_from(kills % 250 + 1).unwrap();
            bench.vm.write(0, 64 * 1024 * (kills % 16), 4096, pattern);
            bench.vm.write(1, 64 * 1024 * ((kills + 7) % 16), 512, pattern);
            let mut job = bench.start_job(false);
            bench.proxy.arm(job.id(), i64::from(step), *deliver);
            let status = job.wait().unwrap();
            bench.proxy.disarm();
            bench.assert_released();
            if status.success() {
                break 'steps;
            }
            assert_eq!(status.signal(), Some(9), "the job failed at step {step}");
            kills += 1;
            steps.push(bench.proxy.fatal_command());
            store = load(&bench.vm.path("store"));
            let changes = store.backup(&hypervisor);
            for disk in &changes {
                ranges_of(disk);
            }
            store.assert_equals(&bench.vm.disks, &bench.vm.models());
            bench.vm.assert_clean();
            let left = bench.vm.tracking();
            assert!(left.iter().all(|names| names.len() == 1), "step {step}: {left:?}");
        }
        step += 1;
    }
    let all = steps.join("\n");
    for command in ["transaction", "nbd-server-start", "block-export-add", "bitmap-remove"] {
        assert!(all.contains(command), "never killed at {command}: {all}");
    }
    let extra = if method == FreezeMethod::Filter { "\"stop\"" } else { "block-job-cancel" };
    assert!(all.contains(extra), "never killed at {extra}: {all}");
}

#[test]
fn a_job_killed_at_any_step_leaves_nothing_filter() {
    kill_at_every_step(FreezeMethod::Filter, &[false, true]);
}

#[test]
fn a_job_killed_at_any_step_leaves_nothing_job() {
    kill_at_every_step(FreezeMethod::Job, &[true]);
}

/// QEMU itself dies at every third command of a job: an error within seconds, and the next job on
/// the restarted VM is right.
#[test]
fn qemu_killed_at_any_step_is_an_error_and_no_hang() {
    let mut bench = Bench::new(FreezeMethod::Filter);
    let hypervisor = QemuVm::new(bench.target.clone());
    let mut store = Store::new(LINEAGE);
    let mut step = 0;
    loop {
        bench.vm.write(0, 64 * 1024 * (step % 16), 512, 7);
        // What a guest did not flush may be lost with QEMU.
        (0..2).for_each(|disk| bench.vm.flush(disk));
        bench.proxy.arm(bench.vm.process(), i64::try_from(step).unwrap(), true);
        let begun = Instant::now();
        let outcome = hypervisor.freeze(&store.request()).and_then(|frozen| {
            bench.proxy.disarm();
            frozen.commit()
        });
        bench.proxy.disarm();
        assert!(begun.elapsed() < Duration::from_secs(60), "step {step}: {:?}", begun.elapsed());
        let Err(error) = outcome else { break };
        let text = error.to_string();
        assert!(!text.contains('\n') && text.len() < 400, "{text}");
        bench.vm.stop(true);
        bench.vm.start_again();
        store.backup(&hypervisor);
        store.assert_equals(&bench.vm.disks, &bench.vm.models());
        bench.vm.assert_clean();
        step += 3;
    }
    assert!(step >= 15, "only {step} steps");
}

#[test]
fn what_a_killed_job_left_is_reaped_without_a_new_job() {
    for journal_lost in [false, true] {
        let mut bench = Bench::new(FreezeMethod::Filter);
        let hypervisor = QemuVm::new(bench.target.clone());
        let mut store = Store::new(LINEAGE);
        store.backup(&hypervisor);
        save(&store, &bench.vm.path("store"));
        let mut job = bench.start_job(true);
        let mut lines = BufReader::new(job.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "held"));
        let busy = hypervisor.reap().unwrap();
        assert_eq!((busy.in_use.len(), busy.removed.len()), (1, 0));
        kill(job.id());
        job.wait().unwrap();
        bench.vm.write(0, 0, 512, 3);
        if journal_lost {
            std::fs::remove_dir_all(bench.vm.path("state")).unwrap();
        }
        let report = hypervisor.reap().unwrap();
        assert!(report.removed.iter().any(|what| what.contains("filter")), "{report:?}");
        assert_eq!(hypervisor.reap().unwrap().removed, Vec::<String>::new());
        if journal_lost {
            // Only the journal knew that the NBD server was ours.
            bench.vm.monitor.run("nbd-server-stop", json!({}));
        }
        bench.vm.assert_clean();
        let changes = store.backup(&hypervisor);
        assert_eq!(ranges_of(&changes[0]).total_bytes(), 64 * 1024);
        store.assert_equals(&bench.vm.disks, &bench.vm.models());
    }
}

/// What the guest wrote to a snapshot's overlay must not vanish when the filter goes.
#[test]
fn an_external_snapshot_taken_before_the_reaping_stays_in_use() {
    let mut bench = Bench::new(FreezeMethod::Filter);
    let hypervisor = QemuVm::new(bench.target.clone());
    let mut store = Store::new(LINEAGE);
    store.backup(&hypervisor);
    save(&store, &bench.vm.path("store"));
    let mut job = bench.start_job(true);
    let mut lines = BufReader::new(job.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "held"));
    kill(job.id());
    job.wait().unwrap();

    let overlay = bench.vm.path("overlay.qcow2");
    let path = overlay.to_str().unwrap();
    crate::support::qemu_img(&["create", "-q", "-f", "qcow2", path, &MIB.to_string()]);
    let node = json!({
        "driver": "qcow2", "node-name": "overlay0", "backing": null,
        "file": {"driver": "file", "filename": path},
    });
    bench.vm.monitor.run("blockdev-add", node);
    bench.vm.monitor.run("blockdev-snapshot", json!({"node": "node0", "overlay": "overlay0"}));
    bench.vm.write(0, 0, 4096, 77);
    hypervisor.reap().unwrap();
    bench.vm.assert_clean();
    let block = bench.vm.monitor.run("query-block", json!({}));
    let nodes = block.as_array().unwrap().iter().map(|entry| &entry["inserted"]["node-name"]);
    assert!(nodes.into_iter().any(|node| node == "overlay0"), "{block}");
    bench.vm.write(0, 65536, 4096, 78);
    store.backup(&hypervisor);
    store.assert_equals(&bench.vm.disks, &bench.vm.models());
    bench.vm.assert_clean();
}

#[test]
fn a_guardian_thaws_when_the_job_takes_too_long_and_says_so() {
    let mut bench = Bench::new(FreezeMethod::Filter);
    let mut child = Command::new(&bench.guardian)
        .arg(guardian::COMMAND)
        .args(["deadline-ms", "300"])
        .args(["qmp-unix", bench.vm.path("vm.qmp").to_str().unwrap()])
        .args(["agent-unix", bench.vm.path("agent.sock").to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    let address = Address::Unix(bench.vm.path("agent.sock"));
    let timeout = Duration::from_secs(5);
    let mut agent = vmtide_qemu::agent::GuestAgent::connect(&address, timeout).unwrap();
    writeln!(input, "frozen").unwrap();
    agent.freeze(timeout).unwrap();
    drop(agent);
    assert!(bench.agent.is_frozen());
    bench.assert_released();
    writeln!(input, "done").unwrap();
    assert!(lines.any(|line| line.unwrap() == "expired"));
    assert!(child.wait().unwrap().success());
}
