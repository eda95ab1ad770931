//! Bytes that wait to be sent: in memory while they are few, then in a temporary file.
//!
//! A pack is 64 MiB, its length and checksum must be known before its PUT begins, and every worker
//! of a backup has one open. In memory that would be gigabytes; sent in small parts it would be ten
//! requests a pack instead of one, and requests are what S3 charges for.

use bytes::Bytes;
use ring::digest::{Context, SHA256};
use std::fs::File;
use std::io::{Result, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is kept in memory before a file is made. Maps, index segments and restore points stay
/// below; every open pack has one such buffer at most.
pub(crate) const MEMORY_BYTES: usize = 1 << 20;

/// How much is read from a file at once.
pub(crate) const READ_BYTES: usize = 256 << 10;

/// Where packs wait that the user named no place for. `/tmp` is memory on many systems, and a job has
/// a gigabyte of packs open: without `TMPDIR` it is `/var/tmp`, where files can be made there.
pub(crate) fn directory() -> PathBuf {
    let is_named = std::env::var_os("TMPDIR").is_some_and(|name| !name.is_empty());
    match Path::new("/var/tmp") {
        disk if cfg!(unix) && !is_named && tempfile::tempfile_in(disk).is_ok() => disk.into(),
        _ => std::env::temp_dir(),
    }
}

/// Bytes being gathered.
pub(crate) struct Spool {
    buffer: Vec<u8>,
    file: Option<File>,
    length_bytes: u64,
    digest: Context,
    md5: Option<md5::Md5>,
}

/// Bytes gathered. Clones share them.
#[derive(Clone)]
pub(crate) struct Content {
    source: Source,
    length_bytes: u64,
    /// SHA-256, for the signature.
    pub(crate) sha256: [u8; 32],
    /// MD5, where it was asked for.
    pub(crate) md5: Option<[u8; 16]>,
}

#[derive(Clone)]
enum Source {
    Memory(Bytes),
    File(Arc<File>),
}

impl Spool {
    /// Nothing yet. `with_md5` where the content goes with `Content-MD5`.
    pub(crate) fn new(with_md5: bool) -> Self {
        Self {
            buffer: Vec::new(),
            file: None,
            length_bytes: 0,
            digest: Context::new(&SHA256),
            md5: with_md5.then(md5::Digest::new),
        }
    }

    /// How much there is.
    pub(crate) const fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Appends, in memory.
    pub(crate) fn write_to_memory(&mut self, bytes: &[u8]) {
        self.count(bytes);
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether it waits in a file.
    pub(crate) const fn is_in_file(&self) -> bool {
        self.file.is_some()
    }

    /// Appends; to a file in `directory` once they are many.
    ///
    /// # Errors
    /// Those of the file. What was there before stays; a file that failed takes no more.
    pub(crate) fn write(&mut self, bytes: &[u8], directory: &Path) -> Result<()> {
        match &mut self.file {
            Some(file) => file.write_all(bytes)?,
            None if self.buffer.len() + bytes.len() <= MEMORY_BYTES => {
                self.buffer.extend_from_slice(bytes);
            }
            None => {
                let mut file = tempfile::tempfile_in(directory)?;
                file.write_all(&self.buffer)?;
                file.write_all(bytes)?;
                self.buffer = Vec::new();
                self.file = Some(file);
            }
        }
        self.count(bytes);
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        if let Some(md5) = &mut self.md5 {
            md5::Digest::update(md5, bytes);
        }
        self.length_bytes += bytes.len() as u64;
    }

    /// All of it.
    pub(crate) fn finish(self) -> Content {
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(self.digest.finish().as_ref());
        Content {
            source: match self.file {
                Some(file) => Source::File(Arc::new(file)),
                None => Source::Memory(self.buffer.into()),
            },
            length_bytes: self.length_bytes,
            sha256,
            md5: self.md5.map(|md5| md5::Digest::finalize(md5).into()),
        }
    }
}

impl Content {
    /// Bytes in memory.
    pub(crate) fn of(bytes: &[u8], with_md5: bool) -> Self {
        let mut spool = Spool::new(with_md5);
        spool.write_to_memory(bytes);
        spool.finish()
    }

    /// How much there is.
    pub(crate) const fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// The next bytes from `offset`, at most [`READ_BYTES`]; empty at the end.
    ///
    /// # Errors
    /// Those of the file.
    pub(crate) fn read_from(&self, offset: u64) -> Result<Bytes> {
        let left = self.length_bytes.saturating_sub(offset);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(READ_BYTES);
        match &self.source {
            // In pieces, too: what was taken to be sent is how a slow line is told from one that is dead.
            Source::Memory(bytes) => {
                let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                Ok(bytes.slice(offset..offset + length))
            }
            Source::File(file) => {
                let mut buffer = vec![0; length];
                vmtide_block::files::read_exact_at(file, &mut buffer, offset)?;
                Ok(buffer.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(content: &Content) -> Vec<u8> {
        let mut read = Vec::new();
        while (read.len() as u64) < content.length_bytes() {
            read.extend_from_slice(&content.read_from(read.len() as u64).unwrap());
        }
        assert!(content.read_from(read.len() as u64).unwrap().is_empty());
        read
    }

    #[test]
    fn what_is_written_is_read_from_memory_and_from_a_file() {
        let directory = tempfile::tempdir().unwrap();
        for length in [0, 1, MEMORY_BYTES, MEMORY_BYTES + 1, 3 * MEMORY_BYTES + 7] {
            let bytes: Vec<u8> = (0..=250).cycle().take(length).collect();
            let mut spool = Spool::new(true);
            for part in bytes.chunks(300_001) {
                spool.write(part, directory.path()).unwrap();
            }
            assert_eq!(spool.file.is_some(), length > MEMORY_BYTES);
            let content = spool.finish();
            assert_eq!(all(&content), bytes);
            let in_memory = Content::of(&bytes, true);
            assert_eq!((content.sha256, content.md5), (in_memory.sha256, in_memory.md5));
            assert_eq!(content.sha256, *ring::digest::digest(&SHA256, &bytes).as_ref());
        }
    }

    #[test]
    fn where_no_file_can_be_made_nothing_is_lost() {
        let mut spool = Spool::new(false);
        spool.write(&[1; MEMORY_BYTES], Path::new("/nonexistent")).unwrap();
        assert!(spool.write(&[2; 10], Path::new("/nonexistent")).is_err());
        spool.write_to_memory(&[3; 10]);
        let content = spool.finish();
        assert_eq!(content.length_bytes(), MEMORY_BYTES as u64 + 10);
        assert_eq!(all(&content)[MEMORY_BYTES..], [3; 10]);
    }
}
