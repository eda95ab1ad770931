//! An object of a local store, open for reading.

use crate::store::ObjectReader;
use crate::{RepoError, Result};
use std::fs::File;
use std::io::ErrorKind;
use vmtide_block::files::read_exact_at;

/// A file open for positional reads.
pub(super) struct LocalReader {
    pub(super) file: File,
    pub(super) length_bytes: u64,
    pub(super) name: String,
}

impl LocalReader {
    fn short(&self, buffer: &[u8], offset: u64) -> RepoError {
        RepoError::damaged(
            &self.name,
            format!(
                "{} bytes long, but {} bytes at {offset} are needed: it was cut",
                self.length_bytes,
                buffer.len()
            ),
        )
    }
}

impl ObjectReader for LocalReader {
    fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    fn rereads_cheaply(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.length_bytes) {
            return Err(self.short(buffer, offset));
        }
        read_exact_at(&self.file, buffer, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.short(buffer, offset),
            _ => RepoError::io(
                format!("read {} bytes at {offset} of {}", buffer.len(), self.name),
                error,
            ),
        })
    }
}
