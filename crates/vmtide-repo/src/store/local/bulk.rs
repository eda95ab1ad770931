//! A new file written from front to back, past the page cache once it is long.
//!
//! A backup writes its packs once and does not read them again. Through the page cache every byte is copied
//! into a fresh page by the kernel, which cost a tenth of a backup's processor time, and pushes out a
//! page that another program may want. So whatever fills the buffer goes to the device with `O_DIRECT`
//! (open(2)); short objects and the ends of long ones go through the cache, and everything does on
//! a file system that refuses. See `docs/decisions/0007-writing-past-the-page-cache.md`.

use std::fs::File;
use std::io;
use vmtide_block::AlignedBuffer;
use vmtide_block::files::write_all_at;

/// How much is gathered for one write. Larger ones take memory (each pack being written has one) and gain
/// nothing; smaller ones wait for the device more often.
const BUFFER_BYTES: usize = 1 << 20;

/// A new file, empty when it comes here. Nothing is certain to be in it before [`sync`](Self::sync).
pub(super) struct BulkFile {
    file: File,
    buffer: AlignedBuffer,
    filled: usize,
    /// The bytes before the buffer, a multiple of its length.
    written: u64,
    direct: Direct,
}

/// Whether writes go past the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direct {
    Untried,
    On,
    Refused,
}

impl BulkFile {
    pub(super) fn new(file: File) -> Self {
        let buffer = AlignedBuffer::new(BUFFER_BYTES);
        Self { file, buffer, filled: 0, written: 0, direct: Direct::Untried }
    }

    /// Appends bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - self.filled));
            self.buffer[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == BUFFER_BYTES {
                self.write_buffer()?;
            }
        }
        Ok(())
    }

    /// Writes a full buffer.
    fn write_buffer(&mut self) -> io::Result<()> {
        if self.direct == Direct::Untried {
            let is_on = set_direct(&self.file, true).is_ok();
            self.direct = if is_on { Direct::On } else { Direct::Refused };
        }
        match write_all_at(&self.file, &self.buffer, self.written) {
            // Some file systems take the flag and refuse the write; and a device may want a larger
            // alignment. Where it stopped does not matter: all of it is written again.
            Err(error)
                if self.direct == Direct::On && error.kind() == io::ErrorKind::InvalidInput =>
            {
                set_direct(&self.file, false)?;
                self.direct = Direct::Refused;
                write_all_at(&self.file, &self.buffer, self.written)?;
            }
            outcome => outcome?,
        }
        self.written += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes what is left and makes all of it durable.
    pub(super) fn sync(mut self) -> io::Result<()> {
        if self.direct == Direct::On {
            set_direct(&self.file, false)?;
        }
        write_all_at(&self.file, &self.buffer[..self.filled], self.written)?;
        self.filled = 0;
        self.file.sync_all()
    }
}

/// Switches writing past the cache on or off.
#[cfg(target_os = "linux")]
fn set_direct(file: &File, on: bool) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, on);
    Ok(fcntl_setfl(file, flags)?)
}

#[cfg(not(target_os = "linux"))]
fn set_direct(_file: &File, on: bool) -> io::Result<()> {
    if on { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_any_length_written_in_any_pieces_hold_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        for (number, length) in
            [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES + 4097]
                .into_iter()
                .enumerate()
        {
            let content: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            for piece in [1009, 700_001, 5 << 20] {
                let path = directory.path().join(format!("{number}-{piece}"));
                let mut file = BulkFile::new(File::create_new(&path).unwrap());
                content.chunks(piece).for_each(|bytes| file.write(bytes).unwrap());
                file.sync().unwrap();
                assert!(std::fs::read(&path).unwrap() == content, "{length} bytes in {piece}");
            }
        }
    }
}
