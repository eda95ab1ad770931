//! VHDX (MS-VHDX).
//!
//! One noun of the specification per file: `guid`, `checksum`, `header` (file identifier and
//! the two headers), `log_entry`, `log` and `replay` (changes that may not have reached their
//! place), `region` (what is where), `metadata` and `locator` (what the disk is and who its
//! parent is), `bat` and `bits` (where its blocks and sectors are). `tables` is all of it
//! that an open image holds; [`VhdxImage`] reads, by its `walk`, [`VhdxWriter`] writes.

pub(crate) mod bat;
pub(crate) mod checksum;
pub(crate) mod guid;
pub(crate) mod header;
pub(crate) mod locator;
pub(crate) mod log;
pub(crate) mod log_entry;
pub(crate) mod metadata;
pub(crate) mod region;
pub(crate) mod replay;
pub(crate) mod tables;

mod allocate;
mod bits;
mod check;
mod create;
mod flush;
mod image;
mod info;
mod log_write;
mod mapping;
mod pages;
mod repair;
mod resize;
mod scan;
mod set_parent;
mod walk;
mod write;
mod writer;
mod writer_open;
mod zero;

pub(crate) use check::check;
pub use create::{VhdxCreateOptions, VhdxKind, VhdxParent};
pub use image::VhdxImage;
pub(crate) use info::info;
pub(crate) use repair::repair;
pub(crate) use set_parent::set_parent;
pub use writer::VhdxWriter;

use crate::ParentLink;
use vmtide_block::{BlockDevice, Result};

/// How a differencing image names its parent; `None` for an image without one.
///
/// # Errors
/// As [`VhdxImage::open_device`].
pub(crate) fn parent_link(file: &dyn BlockDevice) -> Result<Option<ParentLink>> {
    header::read_creator(file)?;
    let (tables, _) = tables::Tables::replayed(file)?;
    Ok(tables.parent_link().map(|mut link| {
        if link.identities.is_empty() {
            // A path alone makes no file the parent: none will say this of itself.
            link.identities.push("named by a parent_linkage, which the locator lacks".into());
        }
        link
    }))
}

/// The DataWriteGuid, by which children know their parent: lower case without braces.
///
/// # Errors
/// Where neither header is valid.
pub(crate) fn identity(file: &dyn BlockDevice) -> Result<String> {
    header::read_creator(file)?;
    Ok(header::Headers::read(file)?.current.data_write_guid.to_string())
}
