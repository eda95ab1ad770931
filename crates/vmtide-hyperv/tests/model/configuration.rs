//! The configuration of a VM, portable, native and as files.

use crate::support::{Fake, OLD, SHAPES, Shape, WEB};
use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::{ByteRange, WritableBlockDevice};
use vmtide_cim::CimValue;
use vmtide_hyperv::{
    ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk, capture_files,
    configuration_files, native_settings,
};
use vmtide_hypervisor::{DiskBus, Firmware, HypervisorError, Result, VmConfig};

#[test]
fn a_generation_2_vm_is_described_whole() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        let host = fake.host();
        let web = host.find("web").unwrap();
        let mut configuration = host.configuration(&web, &web.settings).unwrap();
        host.describe_disks(&mut configuration);
        let config = &configuration.config;
        assert_eq!((config.name.as_str(), config.platform.as_str()), ("web", "hyper-v"));
        assert_eq!(config.id.as_deref().map(str::to_uppercase).as_deref(), Some(WEB));
        assert_eq!(config.platform_version.as_deref(), Some("10.0.20348"));
        assert_eq!(config.machine.as_deref(), Some("generation 2"));
        assert_eq!((config.processors, config.memory_bytes), (Some(4), Some(4 << 30)));
        let memory = config.dynamic_memory.unwrap();
        assert_eq!((memory.minimum_bytes, memory.maximum_bytes), (512 << 20, 1 << 40));
        assert_eq!(memory.buffer_percent, Some(20));
        assert_eq!((config.firmware, config.secure_boot), (Some(Firmware::Uefi), Some(true)));
        assert!(config.secure_boot_template.as_deref().unwrap().starts_with("1734C6E8"));
        assert_eq!((config.tpm, config.notes.as_deref()), (Some(true), Some("the shop")));
        assert!(configuration.warnings.iter().any(|warning| warning.contains("TPM")));
        let controllers: Vec<_> =
            config.controllers.iter().map(|one| (one.bus, one.number)).collect();
        assert_eq!(controllers, [(DiskBus::Scsi, 0), (DiskBus::Scsi, 1)]);
        let disks: Vec<_> = config
            .disks
            .iter()
            .map(|disk| (disk.id.0.as_str(), disk.boot_index, disk.size_bytes, disk.fixed))
            .collect();
        assert_eq!(
            disks,
            [
                ("scsi0:3", Some(0), 64 << 30, Some(false)),
                ("scsi1:0", Some(2), 64 << 30, Some(false))
            ]
        );
        assert_eq!(config.disks[0].format.as_deref(), Some("vhdx"));
        assert_eq!(config.disks[0].physical_sector_bytes, Some(4096));
        assert!(config.disks[0].image_id.as_deref().unwrap().starts_with("f0000000"));
        let [adapter] = config.network_adapters.as_slice() else { panic!("{config:?}") };
        assert_eq!(adapter.mac.as_deref(), Some("00:15:5d:01:af:45"));
        assert_eq!((adapter.network.as_deref(), adapter.vlan), (Some("production"), Some(42)));
        assert_eq!((adapter.static_mac, adapter.boot_index), (Some(true), Some(1)));
        assert_eq!(adapter.model.as_deref(), Some("synthetic"));
        // It survives being kept.
        let text = serde_json::to_string(config).unwrap();
        assert_eq!(&serde_json::from_str::<VmConfig>(&text).unwrap(), config);
    }
}

#[test]
fn a_generation_1_vm_is_described_whole() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        let host = fake.host();
        let old = host.find(OLD).unwrap();
        let mut configuration = host.configuration(&old, &old.settings).unwrap();
        host.describe_disks(&mut configuration);
        let config = &configuration.config;
        assert_eq!((config.firmware, config.secure_boot), (Some(Firmware::Bios), None));
        assert_eq!(config.secure_boot_template, None);
        let [disk] = config.disks.as_slice() else { panic!("{config:?}") };
        assert_eq!((disk.id.0.as_str(), disk.boot_index), ("ide0:0", Some(1)));
        assert_eq!(disk.format.as_deref(), Some("vhd"));
        assert_eq!(configuration.disks.len(), 2);
        assert!(configuration.disks[1].pass_through);
        assert!(configuration.warnings.is_empty());
    }
}

#[test]
fn all_settings_are_kept_with_their_types() {
    let kept: Vec<_> = SHAPES
        .into_iter()
        .map(|shape| {
            let fake = Fake::new(shape);
            let host = fake.host();
            let web = host.find("web").unwrap();
            let configuration = host.configuration(&web, &web.settings).unwrap();
            native_settings(&configuration.config).unwrap().unwrap()
        })
        .collect();
    // Whatever way they came.
    assert_eq!(kept[0], kept[1]);
    let (system, resources) = &kept[0];
    assert_eq!(system.text("ElementName").unwrap(), "web");
    assert_eq!(system.value("SecureBootEnabled"), Some(&CimValue::Boolean(true)));
    let classes: Vec<_> = resources.iter().map(|one| one.class.as_str()).collect();
    for class in [
        "Msvm_ProcessorSettingData",
        "Msvm_MemorySettingData",
        "Msvm_StorageAllocationSettingData",
        "Msvm_EthernetSwitchPortVlanSettingData",
        "Msvm_BootSourceSettingData",
    ] {
        assert!(classes.contains(&class), "{class}");
    }
    // Those of another VM are not among them.
    assert!(resources.iter().all(|one| one.text("InstanceID").unwrap().contains(WEB)));
}

#[test]
fn a_class_that_the_host_does_not_know_is_left_out() {
    let fake = Fake::new(Shape::Typed);
    let host = fake.host();
    let web = host.find("web").unwrap();
    fake.forget(r"root\virtualization\v2", "Msvm_SecuritySettingData");
    fake.forget(r"root\virtualization\v2", "Msvm_VirtualEthernetSwitch");
    fake.forget(r"root\cimv2", "Win32_OperatingSystem");
    let config = host.configuration(&web, &web.settings).unwrap().config;
    assert_eq!((config.tpm, config.platform_version), (None, None));
    assert_eq!(config.network_adapters[0].network.as_deref(), Some("an older name"));
}

/// Files of a host in memory: only what the capture of a configuration asks.
struct Files(BTreeMap<String, Vec<u8>>);

fn refuse<T>() -> Result<T> {
    Err(HypervisorError::Unsupported { what: "this".into(), detail: "not in this test".into() })
}

impl HostFiles for Files {
    fn open_disk(&self, _: &str) -> Result<FrozenFile> {
        refuse()
    }
    fn changes(&self, _: &str, _: &str, _: ByteRange) -> Result<ChangePage, ChangesError> {
        Err(ChangesError::Failed("not in this test".into()))
    }
    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        let Some(content) = self.0.get(path) else { return Ok(None) };
        if content.len() as u64 > limit_bytes || content.starts_with(b"denied") {
            return Err(HypervisorError::failed("read", "denied"));
        }
        Ok(Some(content.clone()))
    }
    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        let inside = |(path, content): (&String, &Vec<u8>)| {
            let (parent, name) = path.rsplit_once('\\').unwrap();
            (parent == directory)
                .then(|| FileEntry { name: name.into(), size_bytes: content.len() as u64 })
        };
        let found: Vec<_> = self.0.iter().filter_map(inside).collect();
        Ok((!found.is_empty()).then_some(found))
    }
    fn free_bytes(&self, _: &str) -> Result<Option<u64>> {
        Ok(Some(5 << 30))
    }
    fn create_directory(&self, _: &str) -> Result<()> {
        refuse()
    }
    fn write_file(&self, _: &str, _: &[u8]) -> Result<()> {
        refuse()
    }
    fn create_disk(&self, _: &str, _: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        refuse()
    }
    fn open_disk_writable(&self, _: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        refuse()
    }
    fn remove_file(&self, _: &str) -> Result<()> {
        refuse()
    }
}

fn files(entries: &[(&str, &[u8])]) -> Files {
    let path = |name: &str| format!(r"C:\VMs\web\Virtual Machines\{name}");
    Files(entries.iter().map(|(name, content)| (path(name), content.to_vec())).collect())
}

#[test]
fn configuration_files_are_kept_and_come_back() {
    let fake = Fake::new(Shape::Typed);
    let web = fake.host().find("web").unwrap();
    let (vmcx, vmrs, vmgs) = (format!("{WEB}.vmcx"), format!("{WEB}.VMRS"), format!("{WEB}.vmgs"));
    let state = vec![0; 4 << 20];
    let files = files(&[
        (&vmcx, b"definition"),
        (&vmrs, b"runtime"),
        (&vmgs, &state),
        (&format!("{OLD}.vmcx"), b"another VM"),
        (&format!("{WEB}.txt"), b"something else"),
    ]);
    let captured = capture_files(&files, &web.settings);
    assert!(captured.warnings.is_empty(), "{:?}", captured.warnings);
    let config = VmConfig { native: captured.files, ..VmConfig::default() };
    let mut kept = configuration_files(&config).unwrap();
    kept.sort();
    let mut expected =
        vec![(vmcx, b"definition".to_vec()), (vmrs, b"runtime".to_vec()), (vmgs, state)];
    expected.sort();
    assert_eq!(kept, expected);
    assert!(serde_json::to_string(&config).unwrap().len() < 64 << 10);
}

#[test]
fn what_cannot_be_kept_is_said() {
    let fake = Fake::new(Shape::Typed);
    let web = fake.host().find("web").unwrap();
    let (vmcx, vmrs) = (format!("{WEB}.vmcx"), format!("{WEB}.vmrs"));
    // A state that does not pack: xorshift's bytes.
    let mut state = 1_u64;
    let noise: Vec<u8> = (0..5 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect();
    let captured = capture_files(&files(&[(&vmcx, b"definition"), (&vmrs, &noise)]), &web.settings);
    assert_eq!(captured.files.len(), 1);
    assert!(captured.warnings[0].contains("saved state"), "{:?}", captured.warnings);
    let captured = capture_files(&files(&[(&vmcx, b"denied"), (&vmrs, b"x")]), &web.settings);
    assert_eq!(captured.warnings.len(), 2, "{:?}", captured.warnings);
    let captured = capture_files(&files(&[]), &web.settings);
    assert!(captured.files.is_empty() && captured.warnings[0].contains(".vmcx"));
    let mut unknown = web.settings;
    unknown.configuration_file = None;
    assert_eq!(capture_files(&files(&[]), &unknown).warnings.len(), 1);
}

pub fn some_files() -> impl HostFiles {
    files(&[])
}
