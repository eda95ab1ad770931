//! Whole VMs of a Hyper-V host through an agent: client, HTTPS, agent, the backup cycle, and a stand-in for the host.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests: a failed unwrap is a failed test")]

use crate::support::agent::Agent;
use crate::support::provider::{TestDisk, TestProvider};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use vmtide_agent::limits::Limits;
use vmtide_agent::vms::VmPlatform;
use vmtide_agent_client::{AgentClient, AgentHypervisor, AgentKey, AgentOptions, HypervUrl};
use vmtide_block::CancelToken;
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenVm, Hypervisor, HypervisorError,
    JobId, Seal, TrackingId,
};
use vmtide_standin_hyperv_host::{VmSpec, World, WorldOptions};

const SIZES: [u64; 2] = [4 << 20, 2 << 20];

/// The host's own time: waiting lets it go on.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
}

struct Bench {
    world: World,
    vm: Uuid,
    agent: Agent,
    client: AgentHypervisor,
    _state: tempfile::TempDir,
}

/// Where the stand-in keeps what the host calls `C:\…`.
fn below(root: &Path, path: &str) -> PathBuf {
    path.split('\\').fold(root.to_path_buf(), |at, part| at.join(part.trim_end_matches(':')))
}

fn bench() -> Bench {
    let provider = TestProvider::new(&[("a.vhdx", TestDisk::memory(vec![1; 4096]))]);
    let (state, volumes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let world = World::new(volumes.path(), WorldOptions::default());
    let vm = world.add_vm(&VmSpec::new("web", &SIZES));
    let clock = Arc::new(WorldClock(world.clone()));
    let host = Host::new(world.cim(), HostOptions { clock, ..HostOptions::default() });
    let hypervisor = HypervHypervisor::new(host, world.files(), HypervOptions::new(state.path()));
    let root = volumes.path().to_path_buf();
    let platform = VmPlatform {
        hypervisor: Arc::new(hypervisor),
        cim: Some(world.cim()),
        host_path: Some(Arc::new(move |path| below(&root, path))),
    };
    let agent = Agent::start_in(volumes, provider, Limits::default(), Some(platform));
    let url = HypervUrl::parse(&format!("hyperv://{}/web", agent.address)).unwrap();
    let options = AgentOptions {
        key: Some(AgentKey::new(&agent.keys.reader).unwrap()),
        ca_file: Some(agent.certificate.clone()),
        retry_time: Duration::from_secs(5),
        ..AgentOptions::default()
    };
    let client = AgentHypervisor::new(AgentClient::for_vms(&url, &options).unwrap());
    Bench { world, vm, agent, client, _state: state }
}

impl Bench {
    fn freeze(&self, bases: &BTreeMap<DiskId, Base>) -> Box<dyn FrozenVm> {
        self.try_freeze(bases).unwrap()
    }

    fn try_freeze(
        &self,
        bases: &BTreeMap<DiskId, Base>,
    ) -> Result<Box<dyn FrozenVm>, HypervisorError> {
        let request = FreezeRequest {
            vm: "web".into(),
            job: JobId::random(),
            lineage: "0123456789abcdef".into(),
            consistency: Consistency::Application,
            allow_downgrade: false,
            bases: bases.clone(),
            exclude: Vec::new(),
            cancel: CancelToken::new(),
        };
        self.client.freeze(&request)
    }

    /// Reads all disks while the guest writes on, and holds them against the moment. Answers with the changed bytes.
    fn read(&self, frozen: &dyn FrozenVm) -> Vec<Option<u64>> {
        let moment = self.world.frozen_at(self.vm);
        let mut changed = Vec::new();
        for (number, disk) in frozen.disks().iter().enumerate() {
            self.world.write(self.vm, number, 512 * 1024, &[0xEE; 8192]);
            let mut bytes = vec![0; usize::try_from(disk.device.size_bytes()).unwrap()];
            disk.device.read_at(&mut bytes, 0).unwrap();
            let number = u32::try_from(number).unwrap();
            assert!(bytes == moment[&number].read(0, bytes.len()), "{}", disk.id);
            changed.push(match &disk.changes {
                Changes::Everything(_) => None,
                Changes::Ranges(ranges) => Some(ranges.total_bytes()),
            });
        }
        changed
    }
}

fn bases(seal: &Seal) -> BTreeMap<DiskId, Base> {
    let base = |(number, (id, tracking)): (usize, (&DiskId, &TrackingId))| {
        (id.clone(), Base { tracking: Some(tracking.clone()), size_bytes: SIZES[number] })
    };
    seal.tracking.iter().enumerate().map(base).collect()
}

#[test]
fn a_chain_of_backups_of_a_vm_through_its_hosts_agent() {
    let bench = bench();
    assert_eq!(bench.client.list().unwrap()[0].name, "web");
    for disk in 0..2 {
        bench.world.write(bench.vm, disk, 4096, &[7; 300_000]);
    }
    let mut frozen = bench.freeze(&BTreeMap::new());
    assert_eq!(frozen.consistency(), Consistency::Application);
    assert_eq!(bench.read(&*frozen), [None, None]);
    frozen.check().unwrap();
    let mut seal = frozen.seal().unwrap();
    assert_eq!((seal.tracking.len(), &seal.warnings[..]), (2, &[][..]));
    frozen.commit().unwrap();

    for round in 1..4_u8 {
        bench.world.write(bench.vm, 0, 1 << 20, &[round; 8192]);
        let mut frozen = bench.freeze(&bases(&seal));
        let changed = bench.read(&*frozen);
        // What the guest wrote, and what it wrote while the last one was read.
        assert!(
            changed.iter().all(|bytes| bytes.is_some_and(|bytes| bytes <= 64 << 10)),
            "{changed:?}"
        );
        seal = frozen.seal().unwrap();
        frozen.commit().unwrap();
    }
    // One that is given up takes nothing with it.
    drop(bench.freeze(&bases(&seal)));
    let began = std::time::Instant::now();
    while !bench.world.leftovers().recovery_snapshots.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", bench.world.leftovers());
        std::thread::sleep(Duration::from_millis(20));
        bench.world.advance(100);
    }
    // Its job ends somewhat later than its checkpoint.
    let frozen = loop {
        match bench.try_freeze(&bases(&seal)) {
            Err(HypervisorError::Busy { .. }) if began.elapsed() < Duration::from_secs(60) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            outcome => break outcome.unwrap(),
        }
    };
    assert!(bench.read(&*frozen).iter().all(Option::is_some), "the base is still there");
    frozen.abort().unwrap();
    bench.world.settle();
    let left = bench.world.leftovers();
    assert!(left.recovery_snapshots.is_empty() && left.unmerged_files.is_empty(), "{left:?}");
    assert_eq!((left.reference_points.len(), left.open_files.len()), (1, 0), "{left:?}");
    drop(bench.agent);
}
