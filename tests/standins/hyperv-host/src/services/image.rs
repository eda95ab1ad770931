//! `Msvm_ImageManagementService`: disk files and their changes.

use super::arguments::Arguments;
use super::{FILE_NOT_FOUND, IN_USE, INVALID_PARAMETER};
use crate::changes::{ChangesAnswer, NoChanges};
use crate::embedded;
use crate::images::NewImage;
use crate::jobs::{Answer, Effect, JobError};
use crate::state::State;
use uuid::Uuid;
use vmtide_block::ByteRange;
use vmtide_cim::{CimInstance, CimType, CimValue};
use vmtide_image::Format;

impl State {
    pub(crate) fn image_service(&mut self, method: &str, arguments: &Arguments) -> Option<Answer> {
        Some(match method {
            "GetVirtualDiskChanges" => self.get_changes(arguments),
            "GetVirtualHardDiskSettingData" => self.get_disk_settings(arguments.text("Path")),
            "GetVirtualHardDiskState" => self.get_disk_state(arguments.text("Path")),
            "CreateVirtualHardDisk" => self.create_disk(arguments),
            "ResizeVirtualHardDisk" => {
                self.resize(arguments.text("Path"), arguments.number("MaxInternalSize"))
            }
            _ => return None,
        })
    }

    fn get_changes(&mut self, arguments: &Arguments) -> Answer {
        // Only a VHD set has targets.
        if !arguments.text("TargetSnapshotId").is_empty() || arguments.text("LimitId").is_empty() {
            return Answer::code(INVALID_PARAMETER);
        }
        let range = ByteRange::new(arguments.number("ByteOffset"), arguments.number("ByteLength"));
        let (path, id) = (arguments.text("Path"), arguments.text("LimitId"));
        match self.changes(path, id, range) {
            Ok(answer) => changes_answer(&answer),
            Err(NoChanges::NotFound) => Answer::code(FILE_NOT_FOUND),
            Err(NoChanges::BadRange) => Answer::code(INVALID_PARAMETER),
            Err(NoChanges::Code(code)) => {
                if !self.faults.changes_by_job {
                    return Answer::code(32768);
                }
                let text = format!("Failed to query the changes of {path}: error 0x{code:08X}.");
                let effect = Effect::Done(Err(JobError::new(32768, text)));
                self.begin("GetVirtualDiskChanges", "Querying changes".into(), effect, None)
            }
        }
    }

    /// What is known of a file: its image, and whether a VM or client holds it.
    fn disk_file(&self, path: &str) -> Result<vmtide_image::ImageInfo, Answer> {
        let local = self.local(path).ok_or(Answer::code(INVALID_PARAMETER))?;
        if !local.is_file() {
            return Err(Answer::code(FILE_NOT_FOUND));
        }
        if self.faults.unopenable.contains(path) {
            return Err(Answer::code(IN_USE));
        }
        vmtide_image::image_info(&local, None).map_err(|_| Answer::code(32768))
    }

    fn get_disk_settings(&mut self, path: &str) -> Answer {
        let info = match self.disk_file(path) {
            Ok(info) => info,
            Err(answer) => return answer,
        };
        let key = self.disk_of(path);
        let parent = key.and_then(|key| self.disks[&key].files.get(path)?.parent.clone());
        let kind = match (parent.is_some(), info.subformat.as_deref()) {
            (true, _) | (_, Some("differencing")) => 4,
            (_, Some("fixed")) => 2,
            _ => 3,
        };
        let format = if info.format == Format::Vhd { 2 } else { 3 };
        let id = info.identifiers.get("virtual_disk_id").cloned().unwrap_or_default();
        let number = |value: Option<u32>| CimValue::Uint32(value.unwrap_or(512));
        let block = info.block_size_bytes.and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(0);
        let settings = CimInstance::new("Msvm_VirtualHardDiskSettingData")
            .with("Caption", "Virtual Hard Disk Setting Data")
            .with("Type", CimValue::Uint16(kind))
            .with("Format", CimValue::Uint16(format))
            .with("Path", path)
            .with("ParentPath", parent.unwrap_or_default())
            .with("MaxInternalSize", CimValue::Uint64(info.size_bytes))
            .with("BlockSize", CimValue::Uint32(block))
            .with("LogicalSectorSize", number(info.logical_sector_bytes))
            .with("PhysicalSectorSize", number(info.physical_sector_bytes))
            .with("VirtualDiskId", id.to_uppercase());
        Answer::code(0).with("SettingData", embedded::write(&settings))
    }

    fn get_disk_state(&mut self, path: &str) -> Answer {
        let info = match self.disk_file(path) {
            Ok(info) => info,
            Err(answer) => return answer,
        };
        let in_use = self.disk_of(path).is_some_and(|key| self.user_of(key).is_some());
        let state = CimInstance::new("Msvm_VirtualHardDiskState")
            .with("FileSize", CimValue::Uint64(info.file_size_bytes))
            .with("InUse", in_use || self.is_open(path))
            .with("MinInternalSize", CimValue::Uint64(info.size_bytes))
            .with("Alignment", CimValue::Uint32(1));
        Answer::code(0).with("State", embedded::write(&state))
    }

    fn create_disk(&mut self, arguments: &Arguments) -> Answer {
        let settings =
            arguments.embedded("VirtualDiskSettingData", "Msvm_VirtualHardDiskSettingData");
        let Ok(Some(settings)) = settings else { return Answer::code(INVALID_PARAMETER) };
        let number = |name: &str| settings.value(name).and_then(CimValue::as_u64).unwrap_or(0);
        let text = |name: &str| settings.value(name).and_then(CimValue::as_str).unwrap_or_default();
        let small = |name: &str, usual: u32| match u32::try_from(number(name)) {
            Ok(0) | Err(_) => usual,
            Ok(value) => value,
        };
        let format = match number("Format") {
            2 => Format::Vhd,
            3 => Format::Vhdx,
            _ => return Answer::code(INVALID_PARAMETER),
        };
        let path = text("Path").to_owned();
        let Some(local) = self.local(&path) else { return Answer::code(INVALID_PARAMETER) };
        // Differencing disks are made by checkpoints alone.
        if !matches!(number("Type"), 2 | 3) || local.exists() || number("MaxInternalSize") == 0 {
            return Answer::code(INVALID_PARAMETER);
        }
        let given: Option<Uuid> = text("VirtualDiskId").parse().ok();
        let new = NewImage {
            format,
            size_bytes: number("MaxInternalSize"),
            block_bytes: small("BlockSize", 0),
            logical_sector_bytes: small("LogicalSectorSize", 512),
            physical_sector_bytes: small("PhysicalSectorSize", 4096),
            fixed: number("Type") == 2,
            disk_id: Some(given.unwrap_or_else(|| self.random.guid())),
        };
        let made = self.new_disk(&path, &new).map(|_| Vec::new());
        let made = made.map_err(|error| JobError::new(32768, error.to_string()));
        let caption = "Creating virtual hard disk".into();
        self.begin("CreateVirtualHardDisk", caption, Effect::Done(made), None)
    }

    fn resize(&mut self, path: &str, size_bytes: u64) -> Answer {
        if let Err(answer) = self.disk_file(path) {
            return answer;
        }
        let Ok(key) = self.adopt_disk(path) else { return Answer::code(INVALID_PARAMETER) };
        if self.disks[&key].live != path || size_bytes < self.disks[&key].content.size_bytes() {
            return Answer::code(IN_USE);
        }
        let done = self.resize_disk(key, size_bytes).map(|()| Vec::new());
        let done = done.map_err(|error| JobError::new(32768, error.to_string()));
        let caption = "Resizing virtual hard disk".into();
        self.begin("ResizeVirtualHardDisk", caption, Effect::Done(done), None)
    }
}

fn changes_answer(answer: &ChangesAnswer) -> Answer {
    let numbers = |values: Vec<u64>| {
        CimValue::Array(CimType::Uint64, values.into_iter().map(CimValue::Uint64).collect())
    };
    let offsets = answer.ranges.iter().map(|range| range.offset).collect();
    let mut lengths: Vec<u64> = answer.ranges.iter().map(|range| range.length).collect();
    if answer.unequal && lengths.pop().is_none() {
        lengths.push(4096);
    }
    Answer::code(0)
        .with("ProcessedByteLength", CimValue::Uint64(answer.processed_bytes))
        .with("ChangedByteOffsets", numbers(offsets))
        .with("ChangedByteLengths", numbers(lengths))
}
