//! What the host says about the file of a virtual disk, also while a VM runs on it.

use super::changes::IMAGE_SERVICE;
use super::read;
use crate::Host;
use crate::host::from_cim;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_cim::{CimInstance, xml};
use vmtide_hypervisor::{HypervisorError, Result};

/// `Msvm_VirtualHardDiskSettingData`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualHardDisk {
    /// The file, as the host names it.
    pub path: String,
    /// `vhd`, `vhdx` or `vhds`.
    pub format: String,
    /// `fixed`, `dynamic` or `differencing`.
    pub subtype: String,
    /// The size that the guest sees, in bytes.
    pub size_bytes: u64,
    /// The file it differs from; none for one that stands alone.
    pub parent: Option<String>,
    /// The GUID of the virtual disk; none where the file has none.
    pub disk_id: Option<Uuid>,
    /// The logical sector size, in bytes.
    pub logical_sector_bytes: Option<u32>,
    /// The physical sector size, in bytes.
    pub physical_sector_bytes: Option<u32>,
    /// The block size, in bytes; none where the format has none.
    pub block_bytes: Option<u32>,
}

impl Host {
    /// Asks the host about a virtual disk: `GetVirtualHardDiskSettingData`.
    ///
    /// # Errors
    /// As [`call`](Self::call); [`HypervisorError::Protocol`] where the answer is not what is documented.
    pub fn virtual_hard_disk(&self, path: &str) -> Result<VirtualHardDisk> {
        let service = self.service(IMAGE_SERVICE)?;
        let what = format!("asking about {path}");
        let parameters = [("Path", path.into())];
        let method = "GetVirtualHardDiskSettingData";
        let (output, _) = self.call(&service, method, &parameters, &what, &CancelToken::new())?;
        let text = output.parameters.text("SettingData").map_err(from_cim)?;
        disk(path, &xml::from_xml(text).map_err(from_cim)?)
    }
}

fn disk(path: &str, data: &CimInstance) -> Result<VirtualHardDisk> {
    let odd = |name: &str, number: u16| {
        HypervisorError::protocol(&data.class, format!("{name} of {path} is {number}"))
    };
    let format = match data.number("Format").map_err(from_cim)? {
        2 => "vhd",
        3 => "vhdx",
        4 => "vhds",
        other => return Err(odd("Format", other)),
    };
    let subtype = match data.number("Type").map_err(from_cim)? {
        2 => "fixed",
        3 => "dynamic",
        4 => "differencing",
        other => return Err(odd("Type", other)),
    };
    let text = |name| data.optional_text(name).map_err(from_cim);
    let number = |name| {
        let found: Option<u32> = data.optional_number(name).map_err(from_cim)?;
        Ok::<_, HypervisorError>(found.filter(|number| *number > 0))
    };
    Ok(VirtualHardDisk {
        path: path.into(),
        format: format.into(),
        subtype: subtype.into(),
        size_bytes: data.number("MaxInternalSize").map_err(from_cim)?,
        parent: text("ParentPath")?.filter(|text| !text.is_empty()).map(str::to_owned),
        disk_id: text("VirtualDiskId")?.and_then(read::parse_uuid).filter(|id| !id.is_nil()),
        logical_sector_bytes: number("LogicalSectorSize")?,
        physical_sector_bytes: number("PhysicalSectorSize")?,
        block_bytes: number("BlockSize")?,
    })
}
