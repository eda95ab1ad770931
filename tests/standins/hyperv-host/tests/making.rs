//! VMs that are made through the management interface: defined, given disks and adapters, imported, realized, removed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

use std::sync::Arc;
use uuid::Uuid;
use vmtide_cim::{
    Cim, CimInstance, CimType, CimValue, MethodOutput, ObjectPath, VIRTUALIZATION_NAMESPACE, xml,
};
use vmtide_hyperv::NewDisk;
use vmtide_standin_hyperv_host::{VmSpec, World, WorldOptions};

const SERVICE: &str = "Msvm_VirtualSystemManagementService";

struct Bench {
    _directory: tempfile::TempDir,
    world: World,
    cim: Arc<dyn Cim>,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let world = World::new(directory.path(), WorldOptions::default());
        let cim = world.cim();
        Self { _directory: directory, world, cim }
    }

    fn query(&self, wql: &str) -> Vec<CimInstance> {
        self.cim.query(VIRTUALIZATION_NAMESPACE, wql).unwrap()
    }

    fn call(&self, method: &str, parameters: &[(&str, CimValue)]) -> MethodOutput {
        let service = self.query(&format!("SELECT * FROM {SERVICE}")).remove(0).path.unwrap();
        self.cim.invoke(&service, method, parameters).unwrap()
    }

    /// Calls a method whose job must end well; what it made.
    fn made(&self, method: &str, parameters: &[(&str, CimValue)]) -> Vec<ObjectPath> {
        let output = self.call(method, parameters);
        assert_eq!(output.return_value, 4096, "{method}: {output:?}");
        let job = output.parameters.optional_reference("Job").unwrap().unwrap();
        self.world.settle();
        let end = self.cim.get(&job).unwrap();
        let state: u16 = end.number("JobState").unwrap();
        assert_eq!(state, 7, "{method}: {:?}", end.text("ErrorDescription"));
        let rows = vmtide_cim::Association {
            class: Some("Msvm_AffectedJobElement".into()),
            ..vmtide_cim::Association::default()
        };
        let rows = self.cim.references(&job, &rows).unwrap();
        rows.iter().map(|row| row.optional_reference("AffectedElement").unwrap().unwrap()).collect()
    }

    fn settings_of(&self, system: &ObjectPath) -> ObjectPath {
        let id = system.key("Name").unwrap();
        ObjectPath::new(
            "Msvm_VirtualSystemSettingData",
            &[("InstanceID", &format!("Microsoft:{id}"))],
        )
    }

    fn add(&self, settings: &ObjectPath, resource: &CimInstance) -> ObjectPath {
        let parameters = [("AffectedConfiguration", settings.into()), texts(&[resource])];
        self.made("AddResourceSettings", &parameters).remove(0)
    }

    fn refused(&self, method: &str, parameters: &[(&str, CimValue)]) -> u32 {
        let output = self.call(method, parameters);
        assert!(output.return_value > 4096, "{method}: {output:?}");
        output.return_value
    }
}

fn texts(instances: &[&CimInstance]) -> (&'static str, CimValue) {
    let texts = instances.iter().map(|instance| xml::to_xml(instance).unwrap().into()).collect();
    ("ResourceSettings", CimValue::Array(CimType::String, texts))
}

fn resource(class: &str, kind: u16, subtype: &str) -> CimInstance {
    CimInstance::new(class)
        .with("ResourceType", CimValue::Uint16(kind))
        .with("ResourceSubType", format!("Microsoft:Hyper-V:{subtype}"))
}

fn device(kind: u16, subtype: &str, parent: Option<&ObjectPath>, place: &str) -> CimInstance {
    let mut device = resource("Msvm_ResourceAllocationSettingData", kind, subtype);
    if let Some(parent) = parent {
        device.set("Parent", parent.to_string());
        device.set("AddressOnParent", place);
    }
    device
}

fn disk(drive: &ObjectPath, path: &str) -> CimInstance {
    resource("Msvm_StorageAllocationSettingData", 31, "Virtual Hard Disk")
        .with("Parent", drive.to_string())
        .with("HostResource", CimValue::strings([path]))
}

fn new_disk() -> NewDisk {
    NewDisk {
        size_bytes: 2 << 20,
        disk_id: Some(Uuid::from_u128(77)),
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
        block_bytes: 1 << 20,
        fixed: false,
    }
}

#[test]
fn a_vm_is_defined_given_a_disk_and_an_adapter_and_started() {
    let bench = Bench::new();
    bench.world.add_switch("External");
    let wanted = CimInstance::new("Msvm_VirtualSystemSettingData")
        .with("ElementName", "restored")
        .with("VirtualSystemSubType", "Microsoft:Hyper-V:SubType:2")
        .with("ConfigurationDataRoot", r"C:\VMs\restored");
    let settings = ("SystemSettings", CimValue::from(xml::to_xml(&wanted).unwrap()));
    let memory = resource("Msvm_MemorySettingData", 4, "Memory")
        .with("VirtualQuantity", CimValue::Uint64(4096));
    let system = bench.made("DefineSystem", &[settings, texts(&[&memory])]).remove(0);
    let settings = bench.settings_of(&system);
    let files = bench.world.files();
    files.create_directory(r"C:\VMs\restored\Virtual Hard Disks").unwrap();
    let path = r"C:\VMs\restored\Virtual Hard Disks\a.vhdx";
    let controller = bench.add(&settings, &device(6, "Synthetic SCSI Controller", None, ""));
    let drive = bench.add(&settings, &device(17, "Synthetic Disk Drive", Some(&controller), "3"));
    // The disk must be there, and the place on the controller must be free.
    let missing = [("AffectedConfiguration", (&settings).into()), texts(&[&disk(&drive, path)])];
    assert_eq!(bench.refused("AddResourceSettings", &missing), 32779);
    let again = device(17, "Synthetic Disk Drive", Some(&controller), "3");
    let taken = [("AffectedConfiguration", (&settings).into()), texts(&[&again])];
    assert_eq!(bench.refused("AddResourceSettings", &taken), 32774);
    let writer = files.create_disk(path, &new_disk()).unwrap();
    writer.write_at(&[5; 512], 1024).unwrap();
    drop(writer);
    let extent = bench.add(&settings, &disk(&drive, path));
    assert!(extent.key("InstanceID").unwrap().ends_with(r"\3\L"), "{extent}");
    let port = resource("Msvm_SyntheticEthernetPortSettingData", 10, "Synthetic Ethernet Port");
    let port = bench.add(&settings, &port);
    let mut connection =
        resource("Msvm_EthernetPortAllocationSettingData", 33, "Ethernet Connection")
            .with("Parent", port.to_string())
            .with("HostResource", CimValue::strings(["Msvm_VirtualEthernetSwitch.Name=\"x\""]));
    let wrong = [("AffectedConfiguration", (&settings).into()), texts(&[&connection])];
    assert_eq!(bench.refused("AddResourceSettings", &wrong), 32773);
    let switch = bench.query("SELECT * FROM Msvm_VirtualEthernetSwitch").remove(0).path.unwrap();
    connection.set("HostResource", CimValue::strings([switch.to_string()]));
    bench.add(&settings, &connection);

    let memory = bench.query("SELECT VirtualQuantity FROM Msvm_MemorySettingData");
    assert_eq!(memory[0].number::<u64>("VirtualQuantity").unwrap(), 4096);
    let vm: Uuid = system.key("Name").unwrap().parse().unwrap();
    assert_eq!(bench.world.content(vm, 0).read(1024, 1), [5]);
    assert_eq!(bench.world.disk_id(vm, 0), Uuid::from_u128(77));
    let start = [("RequestedState", CimValue::Uint16(2))];
    assert_eq!(bench.cim.invoke(&system, "RequestStateChange", &start).unwrap().return_value, 4096);
    bench.world.settle();
    assert_eq!(bench.world.vm_state(vm), Some((false, 2)));
    bench.world.write(vm, 0, 0, &[6; 512]);
    assert!(files.open_disk_writable(path).is_err(), "the VM writes to it");
    let destroy = [("AffectedSystem", CimValue::from(&system))];
    assert_eq!(bench.refused("DestroySystem", &destroy), 32775);
    bench.world.set_running(vm, false);
    bench.made("DestroySystem", &destroy);
    assert_eq!(bench.world.all_files(), [path], "its disk stays");
}

#[test]
fn a_configuration_is_imported_planned_given_its_disks_and_realized() {
    let bench = Bench::new();
    let world = &bench.world;
    let original = world.add_vm(&VmSpec::new("web", &[1 << 20]));
    let files = world.files();
    let id = original.hyphenated().to_string().to_uppercase();
    let stem = format!(r"C:\VMs\web\Virtual Machines\{id}");
    let content = files.read_file(&format!("{stem}.vmcx"), 1 << 20).unwrap().unwrap();
    files.create_directory(r"C:\Restore\Virtual Machines").unwrap();
    let file = format!(r"C:\Restore\Virtual Machines\{id}.vmcx");
    files.write_file(&file, &content).unwrap();
    let import = |anew: bool| {
        [
            ("SystemDefinitionFile", CimValue::from(file.as_str())),
            ("GenerateNewSystemIdentifier", anew.into()),
        ]
    };
    // The same id is taken: the job fails.
    let output = bench.call("ImportSystemDefinition", &import(false));
    let job = output.parameters.optional_reference("Job").unwrap().unwrap();
    world.settle();
    assert_eq!(bench.cim.get(&job).unwrap().number::<u16>("JobState").unwrap(), 10);
    let planned = bench.made("ImportSystemDefinition", &import(true)).remove(0);
    assert_eq!(planned.class, "Msvm_PlannedComputerSystem");
    let realize = [("PlannedSystem", CimValue::from(&planned))];
    let output = bench.call("RealizePlannedSystem", &realize);
    let job = output.parameters.optional_reference("Job").unwrap().unwrap();
    world.settle();
    let failed = bench.cim.get(&job).unwrap();
    assert_eq!(failed.number::<u16>("JobState").unwrap(), 10, "its disk is the original's");

    let prefix = format!("Microsoft:{}", planned.key("Name").unwrap());
    let wql = format!(
        "SELECT * FROM Msvm_StorageAllocationSettingData WHERE InstanceID LIKE {}",
        vmtide_cim::wql::quote_prefix(&prefix)
    );
    let mut extent = bench.query(&wql).remove(0);
    drop(files.create_disk(r"C:\Restore\a.vhdx", &new_disk()).unwrap());
    extent.set("HostResource", CimValue::strings([r"C:\Restore\a.vhdx"]));
    bench.made("ModifyResourceSettings", &[texts(&[&extent])]);
    bench.made("ValidatePlannedSystem", &realize);
    let system = bench.made("RealizePlannedSystem", &realize).remove(0);
    assert_eq!(system.class, "Msvm_ComputerSystem");
    let vm: Uuid = system.key("Name").unwrap().parse().unwrap();
    assert_eq!(world.vm_state(vm), Some((false, 3)));
    assert_eq!(world.disks(vm)[0].1, r"C:\Restore\a.vhdx");
    for name in ["Version", "VirtualSystemSubType", "SecureBootTemplateId", "ElementName"] {
        assert_eq!(world.setting(vm, name), world.setting(original, name), "{name}");
    }
    assert!(bench.query("SELECT * FROM Msvm_PlannedComputerSystem").is_empty());
}

#[test]
fn settings_that_are_not_to_be_written_and_states_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let vm = bench.world.add_vm(&VmSpec::new("web", &[1 << 20]));
    let change = |name: &str, value: CimValue| {
        let id = format!("Microsoft:{}", vm.hyphenated().to_string().to_uppercase());
        let instance = CimInstance::new("Msvm_VirtualSystemSettingData")
            .with("InstanceID", id)
            .with(name, value);
        [("SystemSettings", CimValue::from(xml::to_xml(&instance).unwrap()))]
    };
    assert_eq!(bench.refused("ModifySystemSettings", &change("Version", "5.0".into())), 32773);
    assert_eq!(bench.refused("ModifySystemSettings", &change("ElementName", "".into())), 32773);
    bench.made("ModifySystemSettings", &change("ElementName", "other".into()));
    assert_eq!(bench.world.setting(vm, "ElementName"), Some("other".into()));
    let memory = bench.query("SELECT * FROM Msvm_MemorySettingData").remove(0);
    let more = memory.with("VirtualQuantity", CimValue::Uint64(8192));
    assert_eq!(bench.refused("ModifyResourceSettings", &[texts(&[&more])]), 32775, "it runs");
    bench.world.set_running(vm, false);
    bench.made("ModifyResourceSettings", &[texts(&[&more])]);
    let drive =
        bench.query("SELECT * FROM Msvm_ResourceAllocationSettingData WHERE ResourceType=17");
    let path = CimValue::Reference(drive[0].path.clone().unwrap());
    let remove = [("ResourceSettings", CimValue::Array(CimType::Reference, vec![path]))];
    assert_eq!(bench.refused("RemoveResourceSettings", &remove), 32775, "its disk hangs on it");
}
