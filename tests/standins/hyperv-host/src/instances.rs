//! The management objects, put together from the state when somebody asks.

mod associations;
mod settings;

use crate::schema::{Class, Schema};
use crate::state::{State, Vm, guid};
use vmtide_cim::{CimInstance, CimType, CimValue, ObjectPath};

/// A property by name.
pub(crate) type Named = (&'static str, CimValue);

/// `OperationalStatus`: the disks of the VM are being merged.
const MERGING: u16 = 32772;

/// The services: class and name.
const SERVICES: [(&str, &str); 5] = [
    ("Msvm_VirtualSystemSnapshotService", "vssnapsvc"),
    ("Msvm_VirtualSystemReferencePointService", "vsrefsvc"),
    ("Msvm_ImageManagementService", "vhdsvc"),
    ("Msvm_VirtualSystemManagementService", "vmms"),
    ("Msvm_SecurityService", "securitysvc"),
];

pub(crate) fn number16(value: u16) -> CimValue {
    CimValue::Uint16(value)
}

pub(crate) fn numbers16(values: &[u16]) -> CimValue {
    CimValue::Array(CimType::Uint16, values.iter().copied().map(CimValue::Uint16).collect())
}

impl State {
    /// All instances of exactly this class.
    pub(crate) fn instances(&self, class: &'static Class) -> Vec<CimInstance> {
        let shaped = |list: Vec<Vec<Named>>| {
            list.into_iter().map(|values| self.shape(class, values)).collect()
        };
        match class.name {
            "Msvm_ComputerSystem" => {
                let host = std::iter::once(self.host_values());
                let vms = self.vms.values().filter(|vm| !vm.planned).map(|vm| self.vm_values(vm));
                shaped(host.chain(vms).collect())
            }
            "Msvm_PlannedComputerSystem" => {
                let vms = self.vms.values().filter(|vm| vm.planned);
                shaped(vms.map(|vm| self.vm_values(vm)).collect())
            }
            "Msvm_VirtualSystemReferencePoint" => {
                shaped(self.points.values().map(|point| self.point_values(point)).collect())
            }
            "Msvm_ConcreteJob" => {
                shaped(self.jobs.values().map(|job| self.job_values(job)).collect())
            }
            "Msvm_VirtualEthernetSwitch" => {
                let switches = self.switches.iter();
                shaped(switches.map(|(id, name)| switch_values(&guid(*id), name)).collect())
            }
            "Msvm_VssComponent" | "Msvm_HeartbeatComponent" => {
                let running = self.vms.values().filter(|vm| vm.state == 2 && !vm.planned);
                shaped(running.filter_map(|vm| component_values(vm, class.name)).collect())
            }
            "Msvm_DiskDrive" => shaped(self.drive_values()),
            "Win32_OperatingSystem" => shaped(vec![self.system_values()]),
            "Win32_Service" => shaped(vec![service_values()]),
            "Win32_LogicalDisk" => shaped(self.volume_values()),
            "MSFT_MpPreference" => shaped(vec![self.defender_values()]),
            name => {
                if let Some((_, id)) = SERVICES.iter().find(|(class, _)| *class == name) {
                    return shaped(vec![self.service_keys(class.name, id)]);
                }
                let mut found = self.setting_instances(class);
                found.extend(self.association_instances(class));
                found
            }
        }
    }

    /// The instances of a class and of those that derive from it.
    pub(crate) fn family(&self, class: &str) -> Vec<CimInstance> {
        Schema::get().family(class).into_iter().flat_map(|class| self.instances(class)).collect()
    }

    /// The instance at a path.
    pub(crate) fn instance_at(&self, path: &ObjectPath) -> Option<CimInstance> {
        let class = Schema::get().class(&path.class)?;
        // Keys are compared without regard to case, as WMI compares text.
        let same = |instance: &CimInstance| {
            class.keys.iter().all(|key| {
                let found = instance.value(key).map(crate::embedded::plain).unwrap_or_default();
                path.key(key).is_some_and(|wanted| wanted.eq_ignore_ascii_case(&found))
            })
        };
        self.instances(class).into_iter().find(same)
    }

    /// A whole instance: every property of the class, those that are not given null, and its path.
    pub(crate) fn shape(&self, class: &'static Class, values: Vec<Named>) -> CimInstance {
        for (name, value) in &values {
            let property = class.property(name);
            let property = property.unwrap_or_else(|| panic!("{} has no {name}", class.name));
            let fits = *value == CimValue::Null
                || value.cim_type() == Some(property.kind)
                    && matches!(value, CimValue::Array(..)) == property.is_array;
            assert!(fits, "{}.{name} is no {:?}", class.name, value.cim_type());
        }
        let mut instance = CimInstance::new(class.name);
        for property in &class.properties {
            let value = values.iter().find(|(name, _)| *name == property.name);
            let value = value.map_or(CimValue::Null, |(_, value)| value.clone());
            instance.properties.push((property.name.to_owned(), value));
        }
        let key = |name: &&'static str| {
            let value = instance.value(name).map(crate::embedded::plain).unwrap_or_default();
            ((*name).to_owned(), value)
        };
        let keys = class.keys.iter().map(key).collect();
        instance.path = Some(ObjectPath {
            host: Some(self.options.host_name.clone()),
            namespace: class.namespace.into(),
            class: class.name.into(),
            keys,
        });
        instance
    }

    fn host_values(&self) -> Vec<Named> {
        vec![
            ("Caption", "Hosting Computer System".into()),
            ("Description", "Microsoft Hosting Computer System".into()),
            ("ElementName", self.options.host_name.as_str().into()),
            ("CreationClassName", "Msvm_ComputerSystem".into()),
            ("Name", self.options.host_name.as_str().into()),
            ("EnabledState", number16(2)),
            ("OperationalStatus", numbers16(&[2])),
        ]
    }

    fn vm_values(&self, vm: &Vm) -> Vec<Named> {
        let class = if vm.planned { "Msvm_PlannedComputerSystem" } else { "Msvm_ComputerSystem" };
        let caption = if vm.planned { "Planned Virtual Machine" } else { "Virtual Machine" };
        let status = if self.is_merging(vm.id) { vec![2, MERGING] } else { vec![2] };
        vec![
            ("Caption", caption.into()),
            ("Description", "Microsoft Virtual Machine".into()),
            ("ElementName", vm.configuration.text("ElementName").into()),
            ("CreationClassName", class.into()),
            ("Name", guid(vm.id).into()),
            ("EnabledState", number16(vm.state)),
            ("RequestedState", number16(12)),
            ("HealthState", number16(5)),
            ("OperationalStatus", numbers16(&status)),
            ("OnTimeInMilliseconds", CimValue::Uint64(if vm.state == 2 { self.now_ms } else { 0 })),
        ]
    }

    fn point_values(&self, point: &crate::state::Point) -> Vec<Named> {
        let disks = point.disks.iter().map(|(_, identifier, _)| identifier.clone()).collect();
        vec![
            ("InstanceID", self.id_of_point(point).into()),
            ("ElementName", "Reference Point".into()),
            ("ReferencePointType", number16(point.kind)),
            ("ConsistencyLevel", number16(point.consistency.into())),
            ("VirtualSystemIdentifier", guid(point.vm).into()),
            ("HasAssociatedData", false.into()),
            ("VirtualDiskIdentifiers", crate::services::system::strings(disks)),
            (
                "ResilientChangeTrackingIdentifiers",
                crate::services::system::strings(point.shown_ids.clone()),
            ),
        ]
    }

    fn job_values(&self, job: &crate::state::Job) -> Vec<Named> {
        let state = job.state(self.now_ms);
        let error = job.end.as_ref().and_then(|end| end.error.as_ref());
        let description = error.map_or("", |error| error.description.as_str());
        let at = |ms: u64| timestamp(self.begun_unix_s + ms / 1000);
        vec![
            ("TimeSubmitted", at(job.begun_ms)),
            ("StartTime", at(job.begun_ms)),
            ("TimeOfLastStateChange", at(job.end.as_ref().map_or(job.begun_ms, |end| end.at_ms))),
            ("JobType", number16(job.kind())),
            ("InstanceID", guid(job.id).into()),
            ("Caption", job.caption.as_str().into()),
            ("ElementName", job.caption.as_str().into()),
            ("Name", job.method.as_str().into()),
            ("JobState", number16(state)),
            ("JobStatus", if job.end.is_some() { "Job is completed." } else { "" }.into()),
            ("PercentComplete", number16(job.percent(self.now_ms))),
            ("ErrorCode", number16(error.map_or(0, |error| error.code))),
            ("ErrorDescription", description.into()),
            ("ErrorSummaryDescription", description.into()),
            ("ElapsedTime", interval(self.now_ms.saturating_sub(job.begun_ms))),
            ("TimeBeforeRemoval", interval(5 * 60 * 1000)),
            ("DeleteOnCompletion", false.into()),
            ("Cancellable", true.into()),
            ("OperationalStatus", numbers16(&[2])),
        ]
    }

    fn service_keys(&self, class: &'static str, id: &'static str) -> Vec<Named> {
        vec![
            ("CreationClassName", class.into()),
            ("Name", id.into()),
            ("SystemCreationClassName", "Msvm_ComputerSystem".into()),
            ("SystemName", self.options.host_name.as_str().into()),
        ]
    }

    /// The physical disks of the host that VMs have.
    fn drive_values(&self) -> Vec<Vec<Named>> {
        let drive = |number: u64| {
            let id = format!(r"Microsoft:{}\{number}", self.options.host_name);
            vec![
                ("ElementName", format!("Physical disk {number}").into()),
                ("CreationClassName", "Msvm_DiskDrive".into()),
                ("DeviceID", id.into()),
                ("SystemCreationClassName", "Msvm_ComputerSystem".into()),
                ("SystemName", self.options.host_name.as_str().into()),
            ]
        };
        (0..self.options.physical_disks).map(drive).collect()
    }

    fn system_values(&self) -> Vec<Named> {
        vec![
            ("Name", "Microsoft Windows Server|C:\\Windows|".into()),
            ("Caption", self.options.os_caption.as_str().into()),
            ("Version", self.options.os_version.as_str().into()),
            ("BuildNumber", self.options.os_version.rsplit('.').next().unwrap_or_default().into()),
            ("CSName", self.options.host_name.as_str().into()),
            ("ProductType", CimValue::Uint32(3)),
            ("LocalDateTime", timestamp(self.unix_s())),
        ]
    }

    /// The volumes: the directories of drives that are there.
    fn volume_values(&self) -> Vec<Vec<Named>> {
        let letters = ('C'..='Z').filter(|letter| self.root.join(letter.to_string()).is_dir());
        let volume = |letter: char| {
            vec![
                ("DeviceID", format!("{letter}:").into()),
                ("FileSystem", "NTFS".into()),
                ("DriveType", CimValue::Uint32(3)),
                ("Size", CimValue::Uint64(1 << 40)),
                ("FreeSpace", CimValue::Uint64(self.options.free_bytes)),
            ]
        };
        letters.map(volume).collect()
    }

    fn defender_values(&self) -> Vec<Named> {
        vec![
            ("ComputerID", self.options.host_name.as_str().into()),
            ("ExclusionPath", CimValue::strings(self.options.av_exclusions.clone())),
            ("ExclusionExtension", CimValue::strings(["vhdx", "avhdx", "rct", "mrt"])),
            ("DisableRealtimeMonitoring", false.into()),
        ]
    }
}

fn switch_values(id: &str, name: &str) -> Vec<Named> {
    vec![
        ("ElementName", name.into()),
        ("CreationClassName", "Msvm_VirtualEthernetSwitch".into()),
        ("Name", id.into()),
        ("EnabledState", number16(5)),
    ]
}

/// An integration service of a running guest; none where the guest does not have it.
fn component_values(vm: &Vm, class: &'static str) -> Option<Vec<Named>> {
    let (works, fails) = match class {
        "Msvm_VssComponent" => (vm.vss != crate::Vss::Missing, vm.vss == crate::Vss::Fails),
        _ => (vm.kvp, false),
    };
    if !works {
        return None;
    }
    let status = if fails { 3 } else { 2 };
    Some(vec![
        ("CreationClassName", class.into()),
        ("DeviceID", format!(r"Microsoft:{}\{class}", guid(vm.id)).into()),
        ("SystemCreationClassName", "Msvm_ComputerSystem".into()),
        ("SystemName", guid(vm.id).into()),
        ("EnabledState", number16(2)),
        ("OperationalStatus", numbers16(&[status])),
    ])
}

fn service_values() -> Vec<Named> {
    vec![
        ("Name", "vmms".into()),
        ("DisplayName", "Hyper-V Virtual Machine Management".into()),
        ("State", "Running".into()),
        ("Status", "OK".into()),
        ("StartMode", "Auto".into()),
        ("StartName", "LocalSystem".into()),
        ("Started", true.into()),
    ]
}

/// An interval in the form of DSP0004.
pub(crate) fn interval(ms: u64) -> CimValue {
    let seconds = ms / 1000;
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    CimValue::DateTime(format!(
        "{days:08}{hours:02}{minutes:02}{rest:02}.{:06}:000",
        ms % 1000 * 1000
    ))
}

/// A point in time in the form of DSP0004, in UTC.
pub(crate) fn timestamp(unix_s: u64) -> CimValue {
    let [year, month, day, hour, minute, second] = civil(unix_s);
    CimValue::DateTime(format!(
        "{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}.000000+000"
    ))
}

/// Year, month, day, hour, minute and second of a time in seconds since 1970.
fn civil(unix_s: u64) -> [u64; 6] {
    let (days, rest) = (unix_s / 86_400, unix_s % 86_400);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    [year, month, day + 1, rest / 3600, rest / 60 % 60, rest % 60]
}

/// A datetime of DSP0004 as WS-Management writes it: `2026-11-21T11:30:00Z`, or `P0DT0H5M0S` for an interval.
pub(crate) fn iso(text: &str) -> String {
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
    if text.get(21..22) == Some(":") {
        let number = |from, to| part(from, to).trim_start_matches('0').parse().unwrap_or(0_u64);
        let (days, hours) = (number(0, 8), number(8, 10));
        return format!("P{days}DT{hours}H{}M{}S", number(10, 12), number(12, 14));
    }
    format!(
        "{}-{}-{}T{}:{}:{}Z",
        part(0, 4),
        part(4, 6),
        part(6, 8),
        part(8, 10),
        part(10, 12),
        part(12, 14)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_both_forms() {
        let text = |value: CimValue| value.as_str().unwrap().to_owned();
        let moment = text(timestamp(1_795_260_600));
        assert_eq!(moment, "20261121113000.000000+000");
        assert_eq!(iso(&moment), "2026-11-21T11:30:00Z");
        assert_eq!(text(timestamp(951_782_400)), "20000229000000.000000+000");
        assert_eq!(iso(&text(interval(5 * 60 * 1000))), "P0DT0H5M0S");
    }
}
