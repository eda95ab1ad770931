//! Digests of a disk's blocks, for sources without change tracking: the next job compares, and sends only
//! what differs. Sixteen bytes for 64 KiB: 256 MiB for a terabyte.
//!
//! The file is a head, the digests in the order of the disk, and a checksum over all of it. The checksum is
//! known to be right only at the end, so a list that turns out to be damaged fails the job and is removed,
//! and the next job reads in full.

use crate::{BackendError, Result};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// The bytes of disk that one digest stands for. Smaller finds smaller changes and makes longer lists.
pub const DIGEST_BLOCK_BYTES: u64 = 64 << 10;

/// The digest of a block.
pub type Digest = [u8; 16];

/// What stands for a block of zeros, without computing anything.
pub const ZERO_DIGEST: Digest = [0; 16];

const MAGIC: &[u8; 8] = b"vmtDIG01";

/// The digest of a block that is not all zeros: 128 bits of BLAKE3, because a guest that can make two blocks
/// with one digest could keep a change out of its backup.
pub fn digest(block: &[u8]) -> Digest {
    let mut digest = ZERO_DIGEST;
    digest.copy_from_slice(&blake3::hash(block).as_bytes()[..16]);
    digest
}

/// The number of blocks of a disk.
const fn blocks_of(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(DIGEST_BLOCK_BYTES)
}

/// Creates or empties a file. Digests of a guest's blocks are for nobody else: they tell what it holds.
fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// A list in the making, under a temporary name.
pub struct DigestWriter {
    path: PathBuf,
    file: BufWriter<File>,
    sum: Xxh3,
    left: u64,
}

impl DigestWriter {
    /// Begins the list at `path` for a disk of `size_bytes`.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self> {
        let io = |error| BackendError::io(format!("write {}", path.display()), error);
        let file = create_private(path).map_err(io)?;
        let mut this = Self {
            path: path.to_path_buf(),
            file: BufWriter::with_capacity(256 << 10, file),
            sum: Xxh3::new(),
            left: blocks_of(size_bytes),
        };
        this.put(MAGIC)?;
        this.put(&size_bytes.to_le_bytes())?;
        Ok(this)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.sum.update(bytes);
        self.file
            .write_all(bytes)
            .map_err(|error| BackendError::io(format!("write {}", self.path.display()), error))
    }

    /// Adds the next block's.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn push(&mut self, digest: &Digest) -> Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| {
            BackendError::Refused("there are more digests than blocks of the disk".into())
        })?;
        self.put(digest)
    }

    /// Ends the list; from now on it can be compared with.
    ///
    /// # Errors
    /// Where blocks are missing; as [`create`](Self::create).
    pub fn finish(mut self) -> Result<()> {
        if self.left != 0 {
            return Err(BackendError::Refused(format!("{} blocks have no digest", self.left)));
        }
        let sum = self.sum.digest().to_le_bytes();
        self.put(&sum)?;
        let io = |error| BackendError::io(format!("write {}", self.path.display()), error);
        self.file.flush().map_err(io)?;
        self.file.get_ref().sync_all().map_err(io)
    }
}

/// A list that is compared with, block after block.
pub struct DigestReader {
    path: PathBuf,
    file: BufReader<File>,
    sum: Xxh3,
    left: u64,
}

impl DigestReader {
    /// Opens the list of a disk of `size_bytes`; none where there is none of that size.
    pub fn open(path: &Path, size_bytes: u64) -> Option<Self> {
        let file = File::open(path).ok()?;
        let mut this = Self {
            path: path.to_path_buf(),
            file: BufReader::with_capacity(256 << 10, file),
            sum: Xxh3::new(),
            left: blocks_of(size_bytes),
        };
        let mut head = [0u8; 16];
        this.take(&mut head).ok()?;
        let (magic, size) = head.split_at(8);
        (magic == MAGIC && size == size_bytes.to_le_bytes()).then_some(this)
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact(bytes).map_err(|error| self.damaged(&error.to_string()))?;
        self.sum.update(bytes);
        Ok(())
    }

    /// The next block's.
    ///
    /// # Errors
    /// Where the list is damaged, which removes it.
    pub fn next_digest(&mut self) -> Result<Digest> {
        self.left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| self.damaged("it has fewer blocks than the disk"))?;
        let mut digest = ZERO_DIGEST;
        self.take(&mut digest)?;
        Ok(digest)
    }

    /// Whether everything that was read is what was written. Before this nothing counts.
    ///
    /// # Errors
    /// As [`next_digest`](Self::next_digest).
    pub fn finish(mut self) -> Result<()> {
        let expected = self.sum.digest().to_le_bytes();
        let mut found = [0u8; 8];
        self.take(&mut found)?;
        if self.left != 0 || found != expected {
            return Err(self.damaged("its checksum is wrong"));
        }
        Ok(())
    }

    fn damaged(&self, what: &str) -> BackendError {
        // Where it cannot be removed the next job fails the same way, and says so.
        let _ = std::fs::remove_file(&self.path);
        BackendError::Damaged {
            file: self.path.display().to_string(),
            detail: format!(
                "the list of digests of the previous backup is damaged ({what}) and was removed; run the \
                 job again, which reads the disk in full"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_comes_back_and_damage_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("list");
        let size = 2 * DIGEST_BLOCK_BYTES + 1;
        let digests = [digest(b"a"), ZERO_DIGEST, digest(b"c")];
        let write = || {
            let mut writer = DigestWriter::create(&path, size).unwrap();
            for digest in &digests {
                writer.push(digest).unwrap();
            }
            writer.finish().unwrap();
        };
        let read = || -> Result<()> {
            let mut reader = DigestReader::open(&path, size).unwrap();
            for digest in &digests {
                // A damaged digest only makes a block differ, until the end tells.
                let _ = reader.next_digest()? == *digest;
            }
            reader.finish()
        };
        write();
        read().unwrap();
        assert!(DigestReader::open(&path, size + DIGEST_BLOCK_BYTES).is_none());
        let good = std::fs::read(&path).unwrap();
        for at in 16..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert!(read().is_err(), "{at}");
            assert!(!path.exists());
        }
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(read().is_err());
        let short = DigestWriter::create(&path, size).unwrap();
        short.finish().unwrap_err();
    }
}
