//! VMs to restore, and restoring them.

use crate::fake::{Content, FakeHost, File, System, SystemBuilder, guid};
use base64::Engine;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{BlockDevice, CancelToken, MemoryDevice};
use vmtide_hyperv::{HypervRestorer, NewDisk};
use vmtide_hypervisor::{
    DiskContent, DiskToRestore, JobId, NativeFile, NetworkPlan, NewVmRequest, RestoreRoute,
    RestoredVm, Result, VmConfig, VmIdentity, VmRestorer,
};

/// The id of the VM that most tests restore.
pub const WEB: Uuid = Uuid::from_u128(0x77EB);

/// A generation 2 VM with two controllers, three disks, a DVD and two adapters.
pub fn web() -> System {
    let mut system = SystemBuilder::new(WEB, "web", 2)
        .scsi(0xC1)
        .scsi(0xC2)
        .drive(&format!(r"{}\0", guid(0xC1)), 0, 17, Some(r"C:\VMs\web.vhdx"))
        .drive(&format!(r"{}\0", guid(0xC1)), 3, 17, Some(r"C:\VMs\web_CAFE.avhdx"))
        .drive(&format!(r"{}\0", guid(0xC2)), 0, 17, Some(r"D:\data\web.vhdx"))
        .drive(&format!(r"{}\0", guid(0xC2)), 1, 16, Some(r"C:\ISO\setup.iso"))
        .adapter(0xE1, "Front", "00155D000001", true, Some("LAN"))
        .adapter(0xE2, "Back", "00155D000002", false, None)
        .build();
    system.settings.set("Notes", vmtide_cim::CimValue::strings(["the web server"]));
    system.settings.set("SecureBootEnabled", true);
    system.settings.set("SecureBootTemplateId", "272e7447-90a4-4563-a4b9-8e4ab00526ce");
    system.settings.set("BIOSSerialNumber", "1234-5678");
    // The disk of the second controller boots first.
    let mut order: Vec<_> = system
        .settings
        .texts("BootSourceOrder")
        .unwrap()
        .iter()
        .map(|text| (*text).to_owned())
        .collect();
    order.swap(0, 2);
    system.settings.set("BootSourceOrder", vmtide_cim::CimValue::strings(order));
    system
}

/// A host on which `system` runs, with its disks.
pub fn origin(system: &System) -> FakeHost {
    let fake = FakeHost::new();
    fake.change(|state| state.systems.push(system.clone()));
    fake
}

/// What a restore point of `system` holds, as its host describes it.
pub fn config_of(system: &System, fake: &FakeHost) -> VmConfig {
    let host = fake.host();
    let vm = host.vm(system.id).unwrap();
    let mut config = host.configuration(&vm, &vm.settings).unwrap().config;
    for (index, disk) in config.disks.iter_mut().enumerate() {
        disk.size_bytes = (index as u64 + 1) << 20;
        disk.image_id = Some(Uuid::from_u128(0xD15C + index as u128).to_string());
        disk.logical_sector_bytes = Some(if index == 1 { 4096 } else { 512 });
        disk.physical_sector_bytes = Some(4096);
        disk.fixed = Some(index == 2);
    }
    let vmcx = base64::engine::general_purpose::STANDARD.encode("vmcx 0");
    config.native.push(NativeFile { name: "web.vmcx.base64".into(), content: vmcx });
    config
}

/// A host to restore to, that can import what `system` was.
pub fn target(system: &System) -> FakeHost {
    let fake = FakeHost::new();
    fake.change(|state| state.exports.push(system.clone()));
    fake
}

pub fn restorer(fake: &FakeHost, state: &Path) -> HypervRestorer {
    HypervRestorer::new(fake.host(), Arc::new(fake.clone()), state)
}

pub fn request(config: &VmConfig, name: &str, route: RestoreRoute) -> NewVmRequest {
    NewVmRequest {
        config: config.clone(),
        name: name.into(),
        job: JobId::random(),
        disks: disks(config),
        identity: VmIdentity::Auto,
        route,
        directory: None,
        networks: NetworkPlan::default(),
        firmware: None,
        cancel: CancelToken::new(),
    }
}

pub fn disks(config: &VmConfig) -> Vec<DiskToRestore> {
    let disk = |disk: &vmtide_hypervisor::DiskConfig| DiskToRestore {
        id: disk.id.clone(),
        size_bytes: disk.size_bytes,
        data_bytes: Some(8192),
        tracking: None,
    };
    config.disks.iter().map(disk).collect()
}

/// What a disk of the restore point holds at its beginning and at its end.
pub fn pattern(id: &str) -> Vec<u8> {
    id.bytes().cycle().take(4096).collect()
}

/// Writes what the restore point holds, and makes the VM.
pub fn restore(restorer: &HypervRestorer, request: &NewVmRequest) -> Result<RestoredVm> {
    let vm = restorer.begin(request)?;
    for disk in vm.disks() {
        assert_eq!(disk.content, DiskContent::Zeros);
        let bytes = pattern(&disk.id.0);
        let written = disk
            .device
            .write_at(&bytes, 0)
            .and_then(|()| disk.device.write_at(&bytes, disk.device.size_bytes() - 4096))
            .and_then(|()| disk.device.flush());
        if let Err(error) = written {
            // What could not be undone is found by the next look.
            let _ = vm.abort();
            return Err(error.into());
        }
    }
    vm.finish(false)
}

/// The disk file at `path`.
pub fn disk_at(fake: &FakeHost, path: &str) -> (Arc<MemoryDevice>, NewDisk) {
    let state = fake.0.lock();
    match &state.files.get(&path.to_lowercase()).unwrap_or_else(|| panic!("no {path}")).content {
        Content::Disk { device, new, .. } => (device.clone(), new.clone()),
        Content::Bytes(_) => panic!("{path} is no disk"),
    }
}

/// Puts a disk on a host.
pub fn put_disk(fake: &FakeHost, path: &str, bytes: Vec<u8>, id: Option<Uuid>) {
    let size_bytes = bytes.len() as u64;
    let new = NewDisk {
        size_bytes,
        disk_id: id,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
        block_bytes: 0,
        fixed: false,
    };
    let content = Content::Disk {
        device: Arc::new(MemoryDevice::from_bytes(bytes)),
        new,
        open: Arc::new(()),
    };
    fake.change(|state| {
        let directory = path.rsplit_once('\\').unwrap().0.to_lowercase();
        state.directories.insert(directory);
        state.files.insert(path.to_lowercase(), File { path: path.into(), content });
    });
}

/// All disks of a VM on the host hold what the restore point holds, in the places it says.
pub fn assert_disks(fake: &FakeHost, config: &VmConfig, vm: Uuid) {
    let host = fake.host();
    let vm = host.vm(vm).unwrap();
    let attached = host.disks(&vm.settings).unwrap();
    assert_eq!(attached.len(), config.disks.len());
    for disk in &config.disks {
        let found = attached.iter().find(|one| one.location.to_string() == disk.id.0);
        let found = found.unwrap_or_else(|| panic!("{} is not attached", disk.id));
        let (device, new) = disk_at(fake, &found.host_resource);
        assert_eq!(new.size_bytes, disk.size_bytes);
        let mut expected = vec![0; usize::try_from(disk.size_bytes).unwrap()];
        expected[..4096].copy_from_slice(&pattern(&disk.id.0));
        let end = expected.len() - 4096;
        expected[end..].copy_from_slice(&pattern(&disk.id.0));
        assert!(device.to_bytes() == expected, "disk {}", disk.id);
    }
}
