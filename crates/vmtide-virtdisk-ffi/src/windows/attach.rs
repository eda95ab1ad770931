//! An attached disk as a block device.
//!
//! Preferred: attached without a disk device ([`ReadRoute::Handle`]), read and written through the handle of the
//! virtual disk itself. Nothing appears on the host, no volume is mounted, no disk signature collides. The flag
//! for it is documented only as reserved, and products rely on it, so whether it works is tried with a read
//! of the first sector. Where it does not, the disk is attached as a device without drive letters
//! ([`ReadRoute::PhysicalDrive`]), which is taken offline before it is written.

use super::disk::{DiskAccess, VirtualDisk, check};
use super::overlapped::OverlappedFile;
use super::{physical_drive, privilege};
use crate::{ErrorKind, Result, SectorDevice, SectorIo, VirtdiskError, error};
use std::ptr;
use std::sync::Arc;
use vmtide_block::{AlignedBuffer, BlockDevice, BlockError, ByteRange, WritableBlockDevice};
use windows_sys::Win32::Foundation::{ERROR_INVALID_FUNCTION, ERROR_NOT_SUPPORTED};
use windows_sys::Win32::Storage::Vhd;

/// How the content of an attached disk is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadRoute {
    /// Through the handle of the virtual disk.
    Handle,
    /// Through a disk device.
    PhysicalDrive,
}

/// Detaches when it is dropped. Closing the handle would do it too; an explicit end also works where somebody
/// else has a copy of the handle.
#[derive(Debug)]
struct Attachment(VirtualDisk);

impl Drop for Attachment {
    fn drop(&mut self) {
        self.0.detach();
    }
}

/// A virtual disk whose content can be read, and written where it was opened for that. Detached and closed
/// when it is dropped. Any number of threads may use it at once, and all their requests are in flight together.
#[derive(Debug)]
pub struct AttachedDisk {
    // Dropped first: the device is closed before the disk is detached.
    device: SectorDevice<OverlappedFile>,
    attachment: Attachment,
    route: ReadRoute,
}

impl VirtualDisk {
    /// Attaches the disk. It must have been opened for its content.
    ///
    /// # Errors
    /// What Windows says: [`ErrorKind::InUse`] where somebody has attached it, [`ErrorKind::Denied`] without
    /// the right to perform volume maintenance tasks.
    pub fn attach(self) -> Result<AttachedDisk> {
        if self.access() == DiskAccess::Info {
            return Err(VirtdiskError::Request {
                path: self.path().to_owned(),
                problem: "opened for information only".to_owned(),
                kind: ErrorKind::Invalid,
            });
        }
        let size = self.size()?;
        match self.attach_with(Vhd::ATTACH_VIRTUAL_DISK_FLAG_NO_LOCAL_HOST) {
            Ok(()) => {
                let name = self.path().to_owned();
                let io = OverlappedFile::new(Arc::clone(self.handle()), name, size.sector_bytes);
                if can_be_read(&io, size.virtual_bytes, size.sector_bytes) {
                    return AttachedDisk::new(io, Attachment(self), ReadRoute::Handle);
                }
                self.detach();
            }
            Err(error) if may_work_as_device(&error) => {}
            Err(error) => return Err(error),
        }
        self.attach_with(Vhd::ATTACH_VIRTUAL_DISK_FLAG_NO_DRIVE_LETTER)?;
        let attachment = Attachment(self);
        let writable = attachment.0.access() == DiskAccess::ReadWrite;
        let io = physical_drive::open(&attachment.0, writable, size.sector_bytes)?;
        if writable {
            physical_drive::take_offline(&attachment.0, &io)?;
        }
        AttachedDisk::new(io, attachment, ReadRoute::PhysicalDrive)
    }

    /// Without success the handle ends the attachment when it is closed.
    fn detach(&self) {
        // SAFETY: the handle is open; no provider takes flags.
        unsafe { Vhd::DetachVirtualDisk(self.raw(), Vhd::DETACH_VIRTUAL_DISK_FLAG_NONE, 0) };
    }

    fn attach_with(&self, flags: i32) -> Result<()> {
        const WHAT: &str = "attach";
        let flags = match self.access() {
            DiskAccess::ReadWrite => flags,
            _ => flags | Vhd::ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY,
        };
        let parameters = Vhd::ATTACH_VIRTUAL_DISK_PARAMETERS {
            Version: Vhd::ATTACH_VIRTUAL_DISK_VERSION_1,
            ..Default::default()
        };
        let attach = || {
            // SAFETY: the handle is open, the parameters live through the call, which waits until it is done.
            unsafe {
                Vhd::AttachVirtualDisk(
                    self.raw(),
                    ptr::null_mut(),
                    flags,
                    0,
                    &raw const parameters,
                    ptr::null(),
                )
            }
        };
        let code = match attach() {
            error::ERROR_PRIVILEGE_NOT_HELD if privilege::enable_manage_volume() => attach(),
            code => code,
        };
        check(WHAT, self.path(), code)
    }
}

/// Whether a disk attached without a device can be read through its handle.
fn can_be_read(io: &OverlappedFile, size_bytes: u64, sector_bytes: u32) -> bool {
    let mut sector = AlignedBuffer::new(sector_bytes as usize);
    size_bytes == 0 || io.read_sectors(&mut sector, 0).is_ok()
}

/// Errors that say something of the flag, and not of the disk.
fn may_work_as_device(error: &VirtdiskError) -> bool {
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Invalid | ErrorKind::Other)
}

impl AttachedDisk {
    fn new(io: OverlappedFile, attachment: Attachment, route: ReadRoute) -> Result<Self> {
        let size = attachment.0.size()?;
        let path = attachment.0.path();
        let device = SectorDevice::new(io, path, size.virtual_bytes, size.sector_bytes);
        let device = device.map_err(|error| VirtdiskError::Answer {
            operation: "attach",
            path: path.to_owned(),
            problem: error.to_string(),
            kind: ErrorKind::Unsupported,
        })?;
        Ok(Self { device, attachment, route })
    }

    /// The disk: information and changes can be asked for while it is attached.
    pub fn disk(&self) -> &VirtualDisk {
        &self.attachment.0
    }

    /// How its content is reached.
    pub fn route(&self) -> ReadRoute {
        self.route
    }
}

impl BlockDevice for AttachedDisk {
    fn name(&self) -> String {
        self.disk().path().to_owned()
    }

    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn block_size_bytes(&self) -> u32 {
        self.device.sector_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.device.read(buffer, offset)
    }
}

impl WritableBlockDevice for AttachedDisk {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, data.len() as u64))?;
        if self.disk().access() != DiskAccess::ReadWrite {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        self.device.write(data, offset)
    }

    /// Writes zeros where there are none yet: see [`zeros`](crate::zeros).
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.check_range(range)?;
        crate::zeros::write_zeroes(
            range,
            |buffer, offset| self.device.read(buffer, offset),
            |data, offset| self.write_at(data, offset),
        )
    }

    /// A handle that does not take the request is written through already: virtual disks are opened without
    /// the flags for cached input and output and for writing without hardening.
    fn flush(&self) -> vmtide_block::Result<()> {
        match self.device.io().flush() {
            Ok(()) | Err(ERROR_INVALID_FUNCTION | ERROR_NOT_SUPPORTED) => Ok(()),
            Err(code) => Err(BlockError::io(
                format!("flush {}", self.name()),
                std::io::Error::from_raw_os_error(code.cast_signed()),
            )),
        }
    }
}
