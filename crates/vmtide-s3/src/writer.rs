//! An object being written to a bucket.

use crate::spool::{MEMORY_BYTES, Spool};
use crate::store::Core;
use crate::upload::{Object, Upload};
use crate::versions;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_repo::{ObjectWriter, RepoError, Result, Retention};

/// How much goes in one PUT where it waits in a file. Above the size of a pack (64 MiB and a last
/// frame), so that one pack is one request; below S3's 5 GiB, so that a retry does not begin anew
/// with hours of upload.
const SPOOLED_PART_BYTES: u64 = 128 << 20;

/// How much goes in one part where there is no file: what every open object may hold in memory.
pub(crate) const PART_BYTES: u64 = 8 << 20;

/// The least that a part but the last may have (S3's limit).
const SMALLEST_PART_BYTES: u64 = 5 << 20;

/// Gathers, and sends in [`finish`](ObjectWriter::finish) what became no part before.
pub(crate) struct S3Writer {
    object: Arc<Object>,
    part: Spool,
    upload: Option<Upload>,
}

impl S3Writer {
    /// Begins the object `name`, whose form is checked.
    pub(crate) fn new(core: Arc<Core>, name: &str, retention: Option<Retention>) -> Result<Self> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| {
            RepoError::io("get random bytes", std::io::Error::other(error.to_string()))
        })?;
        let key = core.key(name);
        let write_id = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let part = Spool::new(retention.is_some());
        let object = Object { core, name: name.to_owned(), key, retention, write_id };
        Ok(Self { object: Arc::new(object), part, upload: None })
    }

    fn uses_spool(&self) -> bool {
        !self.object.core.spool_failed.load(Ordering::Relaxed)
    }

    /// Appends what fits in the part.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if !self.uses_spool() {
            self.part.write_to_memory(bytes);
            return Ok(());
        }
        let core = Arc::clone(&self.object.core);
        let Err(error) = self.part.write(bytes, &core.spool_directory) else { return Ok(()) };
        // Once a store: from here on, all writers hold less and send more often.
        if !core.spool_failed.swap(true, Ordering::Relaxed) {
            let directory = core.spool_directory.display();
            tracing::warn!(%error, %directory, "no room for packs there: sending them in parts");
        }
        self.leave_file()?;
        self.part.write_to_memory(bytes);
        Ok(())
    }

    /// Goes on in memory after the file took no more.
    fn leave_file(&mut self) -> Result<()> {
        if !self.part.is_in_file() {
            return Ok(());
        }
        if self.part.length_bytes() >= SMALLEST_PART_BYTES {
            return self.send_part();
        }
        let with_md5 = self.object.retention.is_some();
        let content = std::mem::replace(&mut self.part, Spool::new(with_md5)).finish();
        let mut offset = 0;
        while offset < content.length_bytes() {
            let bytes = content.read_from(offset).map_err(|error| {
                RepoError::io(format!("read back what waits of {}", self.object.name), error)
            })?;
            offset += bytes.len() as u64;
            self.part.write_to_memory(&bytes);
        }
        Ok(())
    }

    fn send_part(&mut self) -> Result<()> {
        let with_md5 = self.object.retention.is_some();
        let content = std::mem::replace(&mut self.part, Spool::new(with_md5)).finish();
        if self.upload.is_none() {
            self.upload = Some(Upload::begin(Arc::clone(&self.object))?);
        }
        match &mut self.upload {
            Some(upload) => upload.send(content),
            None => Ok(()),
        }
    }
}

impl ObjectWriter for S3Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        // Pieces, so that none is much longer than what memory is meant to hold.
        for piece in bytes.chunks(MEMORY_BYTES) {
            let limit = if self.part.is_in_file() || self.uses_spool() {
                SPOOLED_PART_BYTES
            } else {
                PART_BYTES
            };
            if self.part.length_bytes() + piece.len() as u64 > limit
                && self.part.length_bytes() >= SMALLEST_PART_BYTES
            {
                self.send_part()?;
            }
            self.append(piece)?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let with_md5 = self.object.retention.is_some();
        let content = std::mem::replace(&mut self.part, Spool::new(with_md5)).finish();
        match self.upload.take() {
            None => self.object.put(&content),
            Some(mut upload) => {
                if content.length_bytes() > 0 {
                    upload.send(content)?;
                }
                upload.finish()?;
                // Some servers pass over what the beginning of an upload says of that.
                match &self.object.retention {
                    Some(retention) => {
                        versions::retain(&self.object.core, &self.object.name, retention)
                    }
                    None => Ok(()),
                }
            }
        }
    }
}
