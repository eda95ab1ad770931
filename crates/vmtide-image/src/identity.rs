//! What an image says of itself so that its children know it again.

use crate::{Format, vhd, vhdx, vmdk};
use vmtide_block::{BlockDevice, Result};

/// What the image says of itself for its children: VHDX's DataWriteGuid and VHD's unique id in
/// lower case without braces, VMDK's CID as eight hexadecimal digits; none for raw and qcow2, whose
/// children know their parent by its path alone.
///
/// # Errors
/// Where the image's header cannot be read or is damaged.
pub fn identity(file: &dyn BlockDevice, format: Format) -> Result<Option<String>> {
    match format {
        Format::Raw | Format::Qcow2 => Ok(None),
        Format::Vhdx => vhdx::identity(file).map(Some),
        Format::Vhd => vhd::identity(file).map(Some),
        Format::Vmdk => vmdk::identity(file).map(Some),
    }
}
