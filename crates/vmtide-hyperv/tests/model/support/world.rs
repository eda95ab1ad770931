//! The VMs of the fake host: `web`, generation 2, and `old`, generation 1 with everything that is in the way.

use crate::support::{Fake, OLD, WEB, done};
use vmtide_cim::{CimInstance, CimType, CimValue, MethodOutput, ObjectPath, xml};

/// Controllers of `web`; the second one's id is the smaller.
const FIRST: &str = "C0000000-0000-0000-0000-00000000000A";
const SECOND: &str = "C0000000-0000-0000-0000-000000000001";
const NIC: &str = "D0000000-0000-0000-0000-000000000001";
const SWITCH: &str = "E0000000-0000-0000-0000-000000000001";

pub fn fill(fake: &Fake) {
    for class in [
        "Msvm_VirtualSystemReferencePoint",
        "Msvm_StorageAllocationSettingData",
        "Msvm_ResourceAllocationSettingData",
        "Msvm_ConcreteJob",
        "Msvm_VssComponent",
    ] {
        fake.know(class);
    }
    for class in [
        "Msvm_VirtualSystemManagementService",
        "Msvm_VirtualSystemSnapshotService",
        "Msvm_VirtualSystemReferencePointService",
        "Msvm_ImageManagementService",
    ] {
        let keys = [
            ("CreationClassName", class),
            ("Name", "vmms"),
            ("SystemCreationClassName", "Msvm_ComputerSystem"),
            ("SystemName", "HV1"),
        ];
        let mut service = CimInstance::new(class);
        for (name, value) in keys {
            service.set(name, value);
        }
        fake.add_at(r"root\virtualization\v2", service, Some(ObjectPath::new(class, &keys)));
    }
    let host = CimInstance::new("Msvm_ComputerSystem")
        .with("CreationClassName", "Msvm_ComputerSystem")
        .with("Name", "HV1")
        .with("ElementName", "HV1")
        .with("EnabledState", CimValue::Uint16(2));
    fake.add_at(r"root\virtualization\v2", host, None);
    web(fake);
    old(fake);
    system(fake);
    disk_settings(fake);
}

fn vm(fake: &Fake, id: &str, name: &str, state: u16) {
    let path = ObjectPath::new(
        "Msvm_ComputerSystem",
        &[("CreationClassName", "Msvm_ComputerSystem"), ("Name", id)],
    );
    let system = CimInstance::new("Msvm_ComputerSystem")
        .with("CreationClassName", "Msvm_ComputerSystem")
        .with("Name", id)
        .with("ElementName", name)
        .with("EnabledState", CimValue::Uint16(state));
    fake.add_at(r"root\virtualization\v2", system, Some(path));
}

pub fn settings(instance_id: &str, vm: &str, kind: &str, name: &str) -> CimInstance {
    CimInstance::new("Msvm_VirtualSystemSettingData")
        .with("InstanceID", format!("Microsoft:{instance_id}"))
        .with("ElementName", name)
        .with("VirtualSystemIdentifier", vm)
        .with("VirtualSystemType", format!("Microsoft:Hyper-V:{kind}"))
        .with("VirtualSystemSubType", "Microsoft:Hyper-V:SubType:2")
        .with("Version", "9.0")
        .with("ConfigurationDataRoot", r"C:\VMs\web")
        .with("ConfigurationFile", format!(r"Virtual Machines\{instance_id}.vmcx"))
        .with("GuestStateDataRoot", r"C:\VMs\web")
        .with("GuestStateFile", format!(r"Virtual Machines\{instance_id}.vmgs"))
        .with("SnapshotDataRoot", r"C:\VMs\web")
        .with("SecureBootEnabled", true)
        .with("SecureBootTemplateId", "1734C6E8-3154-4DDA-BA5F-A874CC483422")
        .with("Notes", CimValue::strings(["the shop"]))
}

fn web(fake: &Fake) {
    vm(fake, WEB, "web", 2);
    let owner = format!("Microsoft:{WEB}");
    let source = |number: u8| {
        let id = format!(r"{owner}\boot\{number}");
        ObjectPath::new("Msvm_BootSourceSettingData", &[("InstanceID", &id)]).to_string()
    };
    fake.add(
        settings(WEB, WEB, "System:Realized", "web")
            .with("BootSourceOrder", CimValue::strings([source(1), source(2), source(3)])),
    );
    // A controller of the firmware is named by the bytes of its GUID.
    let bytes = "000000c00000000000000000000000 01".replace(' ', "");
    for (number, path) in [
        (1, format!(r"\VenHw(9b17e5a2,{bytes})\Scsi(0,3)")),
        (2, r"\VenHw(1)\MAC(00155D01AF45,0)".into()),
        (3, format!(r"\VenHw(9b17e5a2,{})\Scsi(0,0)", FIRST.replace('-', ""))),
    ] {
        fake.add(
            CimInstance::new("Msvm_BootSourceSettingData")
                .with("InstanceID", format!(r"{owner}\boot\{number}"))
                .with("FirmwareDevicePath", path),
        );
    }
    for controller in [FIRST, SECOND] {
        device(fake, &format!(r"{owner}\{controller}\0"), 6, "Synthetic SCSI Controller", None);
    }
    disk(fake, &owner, FIRST, 0, r"C:\VMs\web\system.vhdx");
    disk(fake, &owner, SECOND, 3, r"D:\VMs\web\data.avhdx");
    // An empty drive, and one with a DVD.
    let parent = resource(&format!(r"{owner}\{FIRST}\0"));
    device(
        fake,
        &format!(r"{owner}\{FIRST}\0\5\D"),
        17,
        "Synthetic Disk Drive",
        Some((&parent, 5)),
    );
    device(fake, &format!(r"{owner}\{FIRST}\0\6\D"), 16, "Synthetic DVD Drive", Some((&parent, 6)));
    let dvd = resource(&format!(r"{owner}\{FIRST}\0\6\D"));
    extent(fake, &format!(r"{owner}\{FIRST}\0\6\L"), &dvd, r"C:\iso\a.iso", "Virtual CD/DVD Disk");
    fake.add(
        CimInstance::new("Msvm_ProcessorSettingData")
            .with("InstanceID", format!(r"{owner}\cpu"))
            .with("VirtualQuantity", CimValue::Uint64(4)),
    );
    fake.add(
        CimInstance::new("Msvm_MemorySettingData")
            .with("InstanceID", format!(r"{owner}\memory"))
            .with("VirtualQuantity", CimValue::Uint64(4096))
            .with("Reservation", CimValue::Uint64(512))
            .with("Limit", CimValue::Uint64(1_048_576))
            .with("TargetMemoryBuffer", CimValue::Uint32(20))
            .with("DynamicMemoryEnabled", true),
    );
    fake.add(
        CimInstance::new("Msvm_SecuritySettingData")
            .with("InstanceID", format!(r"{owner}\security"))
            .with("TpmEnabled", true),
    );
    network(fake, &owner);
    fake.add_at(
        r"root\virtualization\v2",
        CimInstance::new("Msvm_VssComponent")
            .with("SystemName", WEB)
            .with("EnabledState", CimValue::Uint16(2))
            .with("OperationalStatus", words(&[2])),
        None,
    );
}

fn network(fake: &Fake, owner: &str) {
    let port = format!(r"{owner}\{NIC}");
    fake.add(
        CimInstance::new("Msvm_SyntheticEthernetPortSettingData")
            .with("InstanceID", port.as_str())
            .with("ElementName", "LAN")
            .with("Address", "00155D01AF45")
            .with("StaticMacAddress", true),
    );
    let switch_keys = [("CreationClassName", "Msvm_VirtualEthernetSwitch"), ("Name", SWITCH)];
    let switch = ObjectPath::new("Msvm_VirtualEthernetSwitch", &switch_keys);
    let parent = ObjectPath::new("Msvm_SyntheticEthernetPortSettingData", &[("InstanceID", &port)]);
    fake.add(
        CimInstance::new("Msvm_EthernetPortAllocationSettingData")
            .with("InstanceID", format!(r"{port}\C"))
            .with("Parent", parent.to_string())
            .with("EnabledState", CimValue::Uint16(2))
            .with("LastKnownSwitchName", "an older name")
            .with("HostResource", CimValue::strings([switch.to_string()])),
    );
    fake.add(
        CimInstance::new("Msvm_EthernetSwitchPortVlanSettingData")
            .with("InstanceID", format!(r"{port}\C\vlan"))
            .with("OperationMode", CimValue::Uint32(1))
            .with("AccessVlanId", CimValue::Uint16(42)),
    );
    let named = CimInstance::new("Msvm_VirtualEthernetSwitch")
        .with("Name", SWITCH)
        .with("ElementName", "production");
    fake.add_at(r"root\virtualization\v2", named, Some(switch));
}

fn old(fake: &Fake) {
    vm(fake, OLD, "old", 3);
    let mut system = settings(OLD, OLD, "System:Realized", "old");
    system.set("VirtualSystemSubType", "Microsoft:Hyper-V:SubType:1");
    system.set("Version", "5.0");
    system.set("SecureBootEnabled", CimValue::Null);
    system.set("BootOrder", words(&[1, 2, 3, 0]));
    fake.add(system);
    let owner = format!("Microsoft:{OLD}");
    let ide = format!(r"{owner}\83F8638B-8DCA-4152-9EDA-2CA8B33039B4");
    for number in ["1", "0"] {
        let id = format!(r"{ide}\{number}");
        let mut controller = instance_of(&id, 5, "Emulated IDE Controller", None);
        controller.set("Address", number);
        fake.add(controller);
    }
    let parent = resource(&format!(r"{ide}\0"));
    device(fake, &format!(r"{ide}\0\0\D"), 17, "Synthetic Disk Drive", Some((&parent, 0)));
    extent(
        fake,
        &format!(r"{ide}\0\0\L"),
        &resource(&format!(r"{ide}\0\0\D")),
        r"C:\VMs\old.vhd",
        "Virtual Hard Disk",
    );
    let second = resource(&format!(r"{ide}\1"));
    let mut physical =
        instance_of(&format!(r"{ide}\1\1\D"), 17, "Physical Disk Drive", Some((&second, 1)));
    physical.set(
        "HostResource",
        CimValue::strings([r#"\\HV1\root\virtualization\v2:Msvm_DiskDrive.DeviceID="1""#]),
    );
    fake.add(physical);
}

fn system(fake: &Fake) {
    let cimv2 = r"root\cimv2";
    fake.add_at(
        cimv2,
        CimInstance::new("Win32_OperatingSystem")
            .with("Caption", "Microsoft Windows Server 2022 Standard")
            .with("Version", "10.0.20348")
            .with("BuildNumber", "20348")
            .with("ProductType", CimValue::Uint32(3)),
        None,
    );
    fake.add_at(
        cimv2,
        CimInstance::new("Win32_Service").with("Name", "vmms").with("State", "Running"),
        None,
    );
    for (drive, free) in [("C:", 500_u64 << 30), ("D:", 1 << 30)] {
        fake.add_at(
            cimv2,
            CimInstance::new("Win32_LogicalDisk")
                .with("DeviceID", drive)
                .with("FreeSpace", CimValue::Uint64(free)),
            None,
        );
    }
    fake.add_at(
        r"root\Microsoft\Windows\Defender",
        CimInstance::new("MSFT_MpPreference")
            .with("DisableRealtimeMonitoring", false)
            .with("DisableAutoExclusions", true)
            .with("ExclusionExtension", CimValue::strings([".vhdx", "avhdx"])),
        None,
    );
}

/// What the host says of disks: by their names, VHDX of 64 GiB or VHD of 20 GiB.
fn disk_settings(fake: &Fake) {
    fake.on("GetVirtualHardDiskSettingData", |_, parameters| {
        let path = parameters[0].1.as_str().unwrap();
        let vhd = path.ends_with(".vhd");
        let leaf = path.ends_with(".avhdx");
        let mut data = CimInstance::new("Msvm_VirtualHardDiskSettingData")
            .with("Path", path)
            .with("Format", CimValue::Uint16(if vhd { 2 } else { 3 }))
            .with("Type", CimValue::Uint16(if leaf { 4 } else { 3 }))
            .with("MaxInternalSize", CimValue::Uint64(if vhd { 20 << 30 } else { 64 << 30 }))
            .with("LogicalSectorSize", CimValue::Uint32(512))
            .with("PhysicalSectorSize", CimValue::Uint32(4096))
            .with("BlockSize", CimValue::Uint32(32 << 20));
        if !vhd {
            data.set("VirtualDiskId", "F0000000-0000-0000-0000-000000000001");
        }
        let text = xml::to_xml(&data).unwrap();
        let parameters = CimInstance::default().with("SettingData", text);
        Ok(MethodOutput { parameters, ..done() })
    });
}

pub fn words(numbers: &[u16]) -> CimValue {
    CimValue::Array(CimType::Uint16, numbers.iter().map(|n| CimValue::Uint16(*n)).collect())
}

fn resource(id: &str) -> String {
    ObjectPath::new("Msvm_ResourceAllocationSettingData", &[("InstanceID", id)]).to_string()
}

fn instance_of(id: &str, kind: u16, subtype: &str, place: Option<(&str, u32)>) -> CimInstance {
    let instance = CimInstance::new("Msvm_ResourceAllocationSettingData")
        .with("InstanceID", id)
        .with("ResourceType", CimValue::Uint16(kind))
        .with("ResourceSubType", format!("Microsoft:Hyper-V:{subtype}"));
    match place {
        Some((parent, location)) => {
            instance.with("Parent", parent).with("AddressOnParent", location.to_string())
        }
        None => instance,
    }
}

fn device(fake: &Fake, id: &str, kind: u16, subtype: &str, place: Option<(&str, u32)>) {
    fake.add(instance_of(id, kind, subtype, place));
}

fn extent(fake: &Fake, id: &str, drive: &str, file: &str, subtype: &str) {
    fake.add(
        CimInstance::new("Msvm_StorageAllocationSettingData")
            .with("InstanceID", id)
            .with("ResourceType", CimValue::Uint16(31))
            .with("ResourceSubType", format!("Microsoft:Hyper-V:{subtype}"))
            .with("Parent", drive)
            .with("HostResource", CimValue::strings([file]))
            .with("PersistentReservationsSupported", false),
    );
}

fn disk(fake: &Fake, owner: &str, controller: &str, location: u32, file: &str) {
    let base = format!(r"{owner}\{controller}\0\{location}");
    let parent = resource(&format!(r"{owner}\{controller}\0"));
    device(fake, &format!(r"{base}\D"), 17, "Synthetic Disk Drive", Some((&parent, location)));
    extent(
        fake,
        &format!(r"{base}\L"),
        &resource(&format!(r"{base}\D")),
        file,
        "Virtual Hard Disk",
    );
}
