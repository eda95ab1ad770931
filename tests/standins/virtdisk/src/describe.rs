//! `GetVirtualDiskInformation`: the answers, as bytes of the structure.

use crate::content::{code_of, image_options};
use crate::faults::Faults;
use crate::registry::Opened;
use crate::tracking;
use std::path::Path;
use vmtide_image::{Format, ImageInfo, image_info, open_chain};
use windows_sys::Win32::Foundation::{
    ERROR_INVALID_PARAMETER, ERROR_VHD_FORMAT_UNKNOWN, ERROR_VHD_INVALID_TYPE,
};
use windows_sys::Win32::Storage::Vhd;

/// What the image is; only VHD and VHDX are disks to this interface.
pub fn info(image: &Path) -> Result<ImageInfo, u32> {
    let info = image_info(image, None).map_err(|error| code_of(&error))?;
    match info.format {
        Format::Vhd | Format::Vhdx => Ok(info),
        _ => Err(ERROR_VHD_FORMAT_UNKNOWN),
    }
}

/// What follows the version and its padding.
pub fn payload(disk: &Opened, version: i32, faults: &Faults) -> Result<Vec<u8>, u32> {
    let image = &disk.image;
    let info = info(image)?;
    let u32s = |values: &[u32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(match version {
        Vhd::GET_VIRTUAL_DISK_INFO_SIZE => {
            let block = info.block_size_bytes.and_then(|bytes| u32::try_from(bytes).ok());
            let sector = faults.value("info.sector").and_then(|bytes| u32::try_from(bytes).ok());
            let sector = sector.or(info.logical_sector_bytes).unwrap_or(512);
            let sizes = [info.size_bytes, info.file_size_bytes].map(u64::to_le_bytes).concat();
            [sizes, u32s(&[block.unwrap_or(0), sector])].concat()
        }
        Vhd::GET_VIRTUAL_DISK_INFO_IDENTIFIER => guid(&info, &["data_write_guid", "unique_id"])?,
        Vhd::GET_VIRTUAL_DISK_INFO_PARENT_LOCATION => parent(disk, &info)?,
        Vhd::GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE => {
            let device = if info.format == Format::Vhd { 2 } else { 3 };
            let vendor = memory(Vhd::VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT.data4);
            [u32s(&[device, 0xec98_4aec, 0x47e9_a0f9]), vendor].concat()
        }
        Vhd::GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE => {
            let subtype = match info.subformat.as_deref() {
                Some("fixed") => 2,
                Some("differencing") => 4,
                _ => 3,
            };
            u32s(&[subtype])
        }
        Vhd::GET_VIRTUAL_DISK_INFO_IS_4K_ALIGNED => u32s(&[1]),
        Vhd::GET_VIRTUAL_DISK_INFO_PHYSICAL_DISK => u32s(&[512, 4096, 0]),
        Vhd::GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE => {
            u32s(&[info.physical_sector_bytes.unwrap_or(512)])
        }
        Vhd::GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID => {
            guid(&info, &["virtual_disk_id", "unique_id"])?
        }
        Vhd::GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE => tracking_state(image, &info, faults)?,
        _ => return Err(ERROR_INVALID_PARAMETER),
    })
}

fn memory(bytes: [u8; 8]) -> Vec<u8> {
    bytes.to_vec()
}

fn guid(info: &ImageInfo, names: &[&str]) -> Result<Vec<u8>, u32> {
    let text =
        names.iter().find_map(|name| info.identifiers.get(*name)).ok_or(ERROR_VHD_INVALID_TYPE)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let value = u128::from_str_radix(&digits, 16).map_err(|_| ERROR_VHD_INVALID_TYPE)?;
    let mut bytes = value.to_be_bytes();
    // The first three fields lie in memory with their least byte first.
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    Ok(bytes.to_vec())
}

fn wide(text: &str) -> impl Iterator<Item = u8> + '_ {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes)
}

/// The path at which the parent was found, where it was looked for, else the names the child gives it.
fn parent(disk: &Opened, info: &ImageInfo) -> Result<Vec<u8>, u32> {
    let backing = info.backing.as_ref().ok_or(ERROR_VHD_INVALID_TYPE)?;
    let chain = disk.with_parents.then(|| open_chain(&disk.image, &image_options()).ok());
    let found = chain.flatten().and_then(|layers| {
        let path = &layers.get(1)?.path;
        Some(std::path::absolute(path).ok()?.display().to_string())
    });
    Ok(match found {
        Some(path) => 1_u32.to_le_bytes().into_iter().chain(wide(&path)).collect(),
        None => {
            let names = [&backing.name].into_iter().chain(&backing.other_names);
            let list = names.flat_map(|name| wide(name));
            0_u32.to_le_bytes().into_iter().chain(list).chain([0, 0]).collect()
        }
    })
}

fn tracking_state(image: &Path, info: &ImageInfo, faults: &Faults) -> Result<Vec<u8>, u32> {
    if info.format != Format::Vhdx {
        return Err(ERROR_VHD_INVALID_TYPE);
    }
    let state = tracking::state(image)?;
    let id = tracking::padded(state.most_recent_id, faults);
    let flags = [u32::from(state.enabled), u32::from(state.newer_changes)];
    Ok(flags.into_iter().flat_map(u32::to_le_bytes).chain(wide(&id)).collect())
}
