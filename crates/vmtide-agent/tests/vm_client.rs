//! vmtide's own client of VMs and files, against a running agent over a stand-in for a platform.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests: a failed unwrap is a failed test")]

use crate::support::agent::Agent;
use crate::support::hypervisor::{DISK, EchoCim, Script, TestHypervisor, content};
use crate::support::provider::{TestDisk, TestProvider};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmtide_agent::limits::Limits;
use vmtide_agent::vms::VmPlatform;
use vmtide_agent_client::{
    AgentCim, AgentClient, AgentFiles, AgentHypervisor, AgentKey, AgentOptions, HypervUrl,
};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet};
use vmtide_cim::{Cim, CimError, CimValue, ObjectPath};
use vmtide_hyperv::{HostFiles, NewDisk};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FullReason, Hypervisor, HypervisorError,
    JobId, Seal, TrackingId,
};

fn start() -> (Arc<Script>, Agent) {
    let disk = || TestDisk::memory(vec![1; 4096]);
    let provider = TestProvider::new(&[("a.vhdx", disk()), ("b.vhdx", disk())]);
    let hypervisor = TestHypervisor::new(&["a.vhdx".into(), "b.vhdx".into()]);
    let script = Arc::clone(&hypervisor.script);
    let root = Arc::new(Mutex::new(PathBuf::new()));
    let of_paths = Arc::clone(&root);
    let platform = VmPlatform {
        hypervisor: Arc::new(hypervisor),
        cim: Some(Arc::new(EchoCim)),
        host_path: Some(Arc::new(move |path| of_paths.lock().join(path))),
    };
    let agent = Agent::start_with(provider, Limits::default(), Some(platform));
    *root.lock() = agent.directory.path().join("disks");
    (script, agent)
}

fn client(agent: &Agent, key: &str) -> AgentClient {
    let url = HypervUrl::parse(&format!("hyperv://{}/web", agent.address)).unwrap();
    let options = AgentOptions {
        key: Some(AgentKey::new(key).unwrap()),
        ca_file: Some(agent.certificate.clone()),
        retry_time: Duration::from_secs(5),
        ..AgentOptions::default()
    };
    AgentClient::for_vms(&url, &options).unwrap()
}

fn request() -> FreezeRequest {
    let base = Base { tracking: Some(TrackingId("rctX:0".into())), size_bytes: DISK as u64 };
    FreezeRequest {
        vm: "web".into(),
        job: JobId::random(),
        lineage: "0123456789abcdef".into(),
        consistency: Consistency::Application,
        allow_downgrade: false,
        bases: BTreeMap::from([(DiskId("scsi0:0".into()), base)]),
        exclude: Vec::new(),
        cancel: CancelToken::new(),
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} never happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn count(counter: &std::sync::atomic::AtomicUsize) -> usize {
    counter.load(Ordering::SeqCst)
}

#[test]
fn a_vm_of_an_agent_is_a_vm_like_any_other() {
    let (script, agent) = start();
    let hypervisor = AgentHypervisor::new(client(&agent, &agent.keys.reader));
    assert_eq!(hypervisor.list().unwrap()[0].name, "web");
    assert_eq!(hypervisor.select(&"x*,web".parse().unwrap()).unwrap().len(), 1);
    assert!(hypervisor.select(&"x*".parse().unwrap()).unwrap().is_empty());
    assert_eq!(hypervisor.describe("web").unwrap().disks.len(), 2);
    assert!(matches!(hypervisor.describe("db"), Err(HypervisorError::NotFound { .. })));
    // What it removes is gone for good.
    assert!(matches!(hypervisor.reap(), Err(HypervisorError::Denied { .. })));
    let writer = AgentHypervisor::new(client(&agent, &agent.keys.writer));
    assert_eq!(writer.reap().unwrap().removed, ["a checkpoint"]);
    assert_eq!(writer.reap_orphans().unwrap().removed, ["an orphan"]);

    let mut frozen = hypervisor.freeze(&request()).unwrap();
    assert_eq!(
        (frozen.consistency(), frozen.warnings()),
        (Consistency::Application, &["a warning".to_owned()][..])
    );
    assert_eq!(frozen.config().name, "web");
    let ranges = RangeSet::from(vec![ByteRange::new(4096, 512), ByteRange::new(65536, 1024)]);
    assert_eq!(frozen.disks()[0].changes, Changes::Ranges(ranges));
    assert_eq!(frozen.disks()[1].changes, Changes::Everything(FullReason::FirstBackup));
    assert_eq!(frozen.disks()[1].tracking, Some(TrackingId("rctX:1".into())));
    for (number, disk) in frozen.disks().iter().enumerate() {
        let mut buffer = vec![0; DISK];
        disk.device.read_at(&mut buffer, 0).unwrap();
        assert!(buffer == content(number), "{}", disk.id);
    }
    frozen.check().unwrap();
    let seal = frozen.seal().unwrap();
    assert_eq!(seal.tracking[&DiskId("scsi0:0".into())], TrackingId("rctX:sealed".into()));
    assert_eq!(seal.warnings, ["disk 1 has no name"]);
    assert!(frozen.disks()[0].device.read_at(&mut [0; 512], 0).is_err(), "sealed is closed");
    assert_eq!(frozen.commit().unwrap(), ["an AVHDX that still merges"]);
    assert_eq!((count(&script.seals), count(&script.commits), count(&script.aborts)), (1, 1, 0));

    *script.late_consistency.lock() = Seal {
        consistency: Some(Consistency::Crash),
        downgrade_reason: Some("the point\nsays so".into()),
        ..Seal::default()
    };
    let mut frozen = hypervisor.freeze(&request()).unwrap();
    frozen.seal().unwrap();
    let reached = (frozen.consistency(), frozen.downgrade_reason());
    assert_eq!(reached, (Consistency::Crash, Some("the point says so")));
    frozen.commit().unwrap();

    script.lost.store(true, Ordering::SeqCst);
    let frozen = hypervisor.freeze(&request()).unwrap();
    let lost = frozen.check().unwrap_err().to_string();
    assert!(lost.contains("somebody removed it"), "{lost}");
    frozen.abort().unwrap();
    assert_eq!(count(&script.aborts), 1);
    // Dropped is given up.
    drop(hypervisor.freeze(&request()).unwrap());
    until("the end of what was dropped", || count(&script.aborts) == 2);
    assert_eq!((count(&script.handles), count(&script.handles_at_end)), (0, 0));
}

#[test]
fn errors_of_the_platform_arrive_in_their_class() {
    let (script, agent) = start();
    let hypervisor = AgentHypervisor::new(client(&agent, &agent.keys.reader));
    script.fail_freeze.store(true, Ordering::SeqCst);
    let failed = hypervisor.freeze(&request()).err().unwrap();
    assert!(matches!(failed, HypervisorError::ConsistencyNotReached { .. }), "{failed}");
    script.fail_freeze.store(false, Ordering::SeqCst);
    script.fail_seal.store(true, Ordering::SeqCst);
    let mut frozen = hypervisor.freeze(&request()).unwrap();
    let failed = frozen.seal().unwrap_err().to_string();
    assert!(failed.contains("no reference point"), "{failed}");
    frozen.abort().unwrap();
    script.fail_commit.store(true, Ordering::SeqCst);
    let failed = hypervisor.freeze(&request()).unwrap().commit().unwrap_err().to_string();
    assert!(failed.contains("32775"), "{failed}");

    // Interrupted while the platform is at it: nothing stays.
    script.hold_freeze.store(true, Ordering::SeqCst);
    let (request, freezes) = (request(), count(&script.freezes));
    let cancel = request.cancel.clone();
    let seen = Arc::clone(&script);
    let waiting = std::thread::spawn(move || hypervisor.freeze(&request).err());
    until("the freeze", || count(&seen.freezes) > freezes);
    cancel.cancel();
    let error = waiting.join().unwrap().unwrap();
    assert!(
        matches!(error, HypervisorError::Block(vmtide_block::BlockError::Cancelled)),
        "{error}"
    );
    until("the end at the agent", || {
        let freezes = agent.reader().get("/v1/vms/freezes").json();
        freezes["freezes"].as_array().unwrap().iter().all(|freeze| freeze["expires_at"].is_null())
    });

    let strange = AgentHypervisor::new(client(&agent, "not-a-key-of-this-agent"));
    assert!(matches!(strange.list(), Err(HypervisorError::Denied { .. })));
}

#[test]
fn management_objects_are_those_of_the_host() {
    let (_, agent) = start();
    let reader = AgentCim::new(client(&agent, &agent.keys.reader));
    let found = reader.query(vmtide_cim::VIRTUALIZATION_NAMESPACE, "SELECT * FROM X").unwrap();
    assert_eq!(found[0].text("Text").unwrap(), "SELECT * FROM X");
    let path = ObjectPath::new("Msvm_X", &[("Name", "vmms")]);
    assert_eq!(reader.get(&path).unwrap().text("Text").unwrap(), path.to_string());
    let missing = reader.references(&path, &vmtide_cim::Association::default());
    assert!(matches!(missing, Err(CimError::NotFound { .. })));
    let start = |cim: &AgentCim| cim.invoke(&path, "Start", &[("State", CimValue::Uint16(2))]);
    let refused = start(&reader).unwrap_err();
    assert!(matches!(refused, CimError::Denied { .. }) && refused.was_not_run(), "{refused}");
    let output = start(&AgentCim::new(client(&agent, &agent.keys.writer))).unwrap();
    assert_eq!((output.return_value, output.parameters.number::<u16>("State").unwrap()), (4096, 2));
    let strange = AgentCim::new(client(&agent, "not-a-key-of-this-agent"));
    assert!(matches!(strange.get(&path), Err(CimError::Login { .. } | CimError::Denied { .. })));
    let other = reader.query(r"root\subscription", "SELECT * FROM X").unwrap_err();
    assert!(matches!(other, CimError::Fault { .. }), "{other}");
}

#[test]
fn files_of_a_host_are_read_and_made_through_its_agent() {
    let (_, agent) = start();
    let files = AgentFiles::new(client(&agent, &agent.keys.writer), CancelToken::new());
    let at = |name: &str| agent.path(name);
    assert!(files.list(&at("vm")).unwrap().is_none());
    files.create_directory(&at("vm/disks")).unwrap();
    files.write_file(&at("vm/web.vmcx"), b"configuration").unwrap();
    assert!(files.write_file(&at("vm/web.vmcx"), b"other").is_err());
    assert_eq!(files.read_file(&at("vm/web.vmcx"), 100).unwrap().unwrap(), b"configuration");
    assert!(files.read_file(&at("vm/web.vmcx"), 5).is_err());
    assert!(files.read_file(&at("vm/none"), 100).unwrap().is_none());
    let list = files.list(&at("vm")).unwrap().unwrap();
    assert_eq!((list[0].name.as_str(), list[0].size_bytes), ("web.vmcx", 13));
    assert!(files.free_bytes(&at("vm")).unwrap().unwrap() > 0);

    let frozen = files.open_disk(&at("a.vhdx")).unwrap();
    assert_eq!((frozen.format.as_str(), frozen.device.size_bytes()), ("vhdx", 4096));
    let new = NewDisk {
        size_bytes: 1 << 20,
        disk_id: None,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
        block_bytes: 0,
        fixed: false,
    };
    let disk = files.create_disk(&at("new.vhdx"), &new).unwrap();
    disk.write_at(&[7; 4096], 8192).unwrap();
    disk.flush().unwrap();
    let mut read = [0; 4096];
    files.open_disk(&at("new.vhdx")).unwrap().device.read_at(&mut read, 8192).unwrap();
    assert_eq!(read, [7; 4096]);
    assert!(files.create_disk(&at("new.vhdx"), &new).is_err());

    files.remove_directory(&at("vm")).unwrap();
    assert!(files.read_file(&at("vm/web.vmcx"), 100).unwrap().is_some(), "it was not empty");
    files.remove_file(&at("vm/web.vmcx")).unwrap();
    files.remove_file(&at("vm/web.vmcx")).unwrap();
    files.remove_directory(&at("vm/disks")).unwrap();
    files.remove_directory(&at("vm")).unwrap();
    assert!(files.list(&at("vm")).unwrap().is_none());
    assert!(matches!(files.open_disk("/etc/passwd"), Err(HypervisorError::NotFound { .. })));
}
