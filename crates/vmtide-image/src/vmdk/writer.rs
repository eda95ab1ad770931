//! A VMDK that is open for writing.

use super::ExtentFiles;
use super::create::random_ids;
use super::descriptor::{Access, CHANGE_TRACK_PATH, CID, Descriptor, LONG_CONTENT_ID};
use super::disk::{Disk, Handle, Part};
use super::info::content_id;
use super::map::Mapping;
use super::stream::StreamWriter;
use super::tables::check_sound;
use crate::{CompressedWriter, ImageWriter};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result, WritableBlockDevice};

/// A VMDK that is open for writing.
///
/// Writes of several threads to ranges that do not overlap run at once, and no lock is held while
/// data is written, except where two of them meet in one grain that is not there yet. Nothing else
/// may have the files open.
///
/// The first write changes the **content id** (children of this image no longer fit), marks sparse
/// extents as being written, and takes a `changeTrackPath` out of the descriptor, because the file
/// of changed blocks does not learn of what is written here.
///
/// A crash leaves a valid image with everything that was flushed; see `tables.rs` for the order.
/// `streamOptimized` is written once from front to back, and is an image only when finished.
pub struct VmdkWriter {
    inner: Inner,
}

enum Inner {
    Disk(Box<OpenDisk>),
    Stream(Box<StreamWriter>),
}

struct OpenDisk {
    disk: Disk,
    main: Arc<dyn WritableBlockDevice>,
    /// Whether the content id is that of a disk that was written.
    changed: AtomicBool,
    /// The ids of the disk once it is written, where somebody asked for them; locked while they
    /// are brought to the file.
    next_ids: Mutex<Option<(u32, [u8; 28])>>,
    /// A flush failed: what is in the files is not known.
    poisoned: AtomicBool,
}

impl VmdkWriter {
    /// Opens an image by its descriptor, or by the extent that has the descriptor inside.
    ///
    /// # Errors
    /// As [`super::VmdkImage::open_device`]; [`BlockError::Unsupported`] for the kinds that are only
    /// read: streamOptimized, vmfsSparse, seSparse, and sparse extents of version 3.
    pub fn open_device(
        file: Arc<dyn WritableBlockDevice>,
        files: &dyn ExtentFiles,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Self::open(file, files, parent, false)
    }

    /// Opens what was just made: its content id is new.
    pub(super) fn open_created(
        file: Arc<dyn WritableBlockDevice>,
        files: &dyn ExtentFiles,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Self::open(file, files, parent, true)
    }

    pub(super) fn streaming(stream: StreamWriter) -> Self {
        Self { inner: Inner::Stream(Box::new(stream)) }
    }

    fn open(
        file: Arc<dyn WritableBlockDevice>,
        files: &dyn ExtentFiles,
        parent: Option<Arc<dyn BlockDevice>>,
        is_new: bool,
    ) -> Result<Self> {
        let disk = Disk::open(Handle::writing(file.clone()), files, parent)?;
        let writable = |part: &Part| part.access == Access::ReadWrite && part.file.is_some();
        if !disk.parts.is_empty() && !disk.parts.iter().any(writable) {
            return Err(BlockError::unsupported(
                &disk.name,
                "has no extent that may be written (RDONLY); convert it to write",
            ));
        }
        Ok(Self {
            inner: Inner::Disk(Box::new(OpenDisk {
                disk,
                main: file,
                changed: AtomicBool::new(is_new),
                next_ids: Mutex::new(None),
                poisoned: AtomicBool::new(false),
            })),
        })
    }
}

impl OpenDisk {
    /// Changes what the image says of itself before its first byte is changed.
    fn begin(&self) -> Result<()> {
        check_sound(&self.disk.name, &self.poisoned)?;
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut next_ids = self.next_ids.lock();
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Some((descriptor, start)) = &self.disk.descriptor {
            let (cid, random) = self.choose_ids(descriptor, &mut next_ids)?;
            self.change_ids(descriptor, *start, cid, &random)?;
            if let Some((at, _)) = descriptor.places.get(CHANGE_TRACK_PATH) {
                self.comment_out(*start, *at)?;
            }
            self.main.flush().inspect_err(|_| self.poisoned.store(true, Ordering::Release))?;
        }
        self.changed.store(true, Ordering::Release);
        Ok(())
    }

    /// The ids that the disk gets with its first change; always the same.
    fn choose_ids(
        &self,
        descriptor: &Descriptor,
        chosen: &mut Option<(u32, [u8; 28])>,
    ) -> Result<(u32, [u8; 28])> {
        if let Some(chosen) = *chosen {
            return Ok(chosen);
        }
        let (mut cid, random) = random_ids(&self.disk.name)?;
        if let Some((_, digits)) = descriptor.places.get(CID) {
            let bits = 4 * u32::try_from(*digits).unwrap_or(8).min(8);
            cid &= u32::MAX.checked_shr(32 - bits).unwrap_or(0);
            if descriptor.cid == Some(cid) {
                cid ^= 1;
            }
        }
        *chosen = Some((cid, random));
        Ok((cid, random))
    }

    /// The content id that the disk gets with its first change, where it has one to change.
    fn next_content_id(&self) -> Result<Option<String>> {
        match &self.disk.descriptor {
            Some((descriptor, _))
                if descriptor.places.contains_key(CID) && !self.changed.load(Ordering::Acquire) =>
            {
                let (cid, _) = self.choose_ids(descriptor, &mut self.next_ids.lock())?;
                Ok(Some(content_id(cid)))
            }
            _ => Ok(None),
        }
    }

    /// Writes new content ids over the old ones, in as many digits as there are.
    fn change_ids(
        &self,
        descriptor: &Descriptor,
        start: u64,
        cid: u32,
        random: &[u8],
    ) -> Result<()> {
        if let Some((at, digits)) = descriptor.places.get(CID) {
            let text = format!("{cid:0width$x}", width = *digits);
            self.main.write_at(text.as_bytes(), start + *at as u64)?;
        }
        match descriptor.places.get(LONG_CONTENT_ID) {
            // 24 digits of its own, and the short one.
            Some((at, 32)) => {
                let own: String =
                    random.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
                self.main.write_at(format!("{own}{cid:08x}").as_bytes(), start + *at as u64)
            }
            _ => Ok(()),
        }
    }

    /// Makes the line that holds byte `at` of the descriptor a comment.
    fn comment_out(&self, start: u64, at: usize) -> Result<()> {
        let mut before = vec![0; at];
        self.main.read_at(&mut before, start)?;
        let line =
            before.iter().rposition(|byte| matches!(byte, b'\n' | b'\r')).map_or(0, |end| end + 1);
        self.main.write_at(b"#", start + line as u64)
    }

    /// Gives `visit` every extent's part of `range`, in its own bytes.
    fn each_part(
        &self,
        range: ByteRange,
        mut visit: impl FnMut(&Part, ByteRange) -> Result<()>,
    ) -> Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            let part = self.disk.part(at)?;
            let end = range.end().min(part.range.end());
            visit(part, ByteRange::from_bounds(at - part.range.offset, end - part.range.offset))?;
            at = end;
        }
        Ok(())
    }

    /// Where a flat part's bytes go; an error where it may not be written.
    fn flat_place<'a>(
        &self,
        part: &'a Part,
        inside: ByteRange,
    ) -> Result<(&'a dyn WritableBlockDevice, u64)> {
        let file = part.file.as_ref().and_then(|file| file.writer.as_deref());
        match (file, part.map.run(inside.offset, inside.length)?.mapping) {
            (Some(file), Mapping::Data(place)) if part.access == Access::ReadWrite => {
                Ok((file, place))
            }
            _ => Err(BlockError::ReadOnly {
                device: format!("{} at byte {}", self.disk.name, part.range.offset + inside.offset),
            }),
        }
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.begin()?;
        let mut rest = data;
        self.each_part(ByteRange::new(offset, data.len() as u64), |part, inside| {
            let (piece, after) = rest.split_at(crate::bytes::length(inside.length));
            rest = after;
            if let Some(sparse) = &part.sparse_writer {
                return sparse.write(piece, inside.offset);
            }
            let (file, place) = self.flat_place(part, inside)?;
            file.write_at(piece, place)
        })
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.begin()?;
        self.each_part(range, |part, inside| {
            if let Some(sparse) = &part.sparse_writer {
                return sparse.write_zeroes(inside);
            }
            if part.map.run(inside.offset, inside.length)?.mapping == Mapping::Zero {
                return Ok(());
            }
            let (file, place) = self.flat_place(part, inside)?;
            file.write_zeroes(ByteRange::new(place, inside.length))
        })
    }

    fn expect_bulk_writes(&self) {
        for part in &self.disk.parts {
            if let Some(file) = part.file.as_ref().and_then(|file| file.writer.as_ref()) {
                file.expect_bulk_writes();
            }
            if let Some(sparse) = &part.sparse_writer {
                sparse.expect_bulk_writes();
            }
        }
    }

    /// Flushes, or finishes, all extents; where that fails nothing more is written.
    fn each_writer(&self, finish: bool) -> Result<()> {
        check_sound(&self.disk.name, &self.poisoned)?;
        let result = self.each_writer_or_fail(finish);
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    fn each_writer_or_fail(&self, finish: bool) -> Result<()> {
        for part in &self.disk.parts {
            match (&part.sparse_writer, part.file.as_ref().and_then(|file| file.writer.as_ref())) {
                (Some(sparse), _) if finish => sparse.finish()?,
                (Some(sparse), _) => sparse.flush()?,
                (None, Some(file)) => file.flush()?,
                (None, None) => {}
            }
        }
        Ok(())
    }
}

impl BlockDevice for VmdkWriter {
    fn name(&self) -> String {
        match &self.inner {
            Inner::Disk(open) => open.disk.name.clone(),
            Inner::Stream(stream) => stream.name(),
        }
    }

    fn size_bytes(&self) -> u64 {
        match &self.inner {
            Inner::Disk(open) => open.disk.size_bytes,
            Inner::Stream(stream) => stream.size_bytes(),
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        match &self.inner {
            Inner::Disk(open) => open.disk.read(buffer, offset),
            Inner::Stream(stream) => stream.image()?.read_at(buffer, offset),
        }
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        match &self.inner {
            Inner::Disk(open) => open.disk.extents(range),
            Inner::Stream(stream) => stream.image()?.extents(range),
        }
    }
}

impl WritableBlockDevice for VmdkWriter {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, data.len() as u64))?;
        match &self.inner {
            _ if data.is_empty() => Ok(()),
            Inner::Disk(open) => open.write(data, offset),
            Inner::Stream(stream) => stream.write(data, offset),
        }
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_range(range)?;
        match &self.inner {
            _ if range.is_empty() => Ok(()),
            Inner::Disk(open) => open.write_zeroes(range),
            Inner::Stream(stream) => stream.write_zeroes(range),
        }
    }

    fn expect_bulk_writes(&self) {
        if let Inner::Disk(open) = &self.inner {
            open.expect_bulk_writes();
        }
    }

    fn flush(&self) -> Result<()> {
        match &self.inner {
            Inner::Disk(open) => open.each_writer(false),
            Inner::Stream(stream) => stream.flush(),
        }
    }
}

impl ImageWriter for VmdkWriter {
    fn next_identity(&self) -> Result<Option<String>> {
        match &self.inner {
            Inner::Disk(open) => open.next_content_id(),
            Inner::Stream(_) => Ok(None),
        }
    }

    fn finish(&self) -> Result<()> {
        match &self.inner {
            Inner::Disk(open) => open.each_writer(true),
            Inner::Stream(stream) => stream.finish(),
        }
    }

    fn compressed(&self) -> Option<&dyn CompressedWriter> {
        match &self.inner {
            Inner::Disk(_) => None,
            Inner::Stream(stream) => Some(&**stream),
        }
    }
}
