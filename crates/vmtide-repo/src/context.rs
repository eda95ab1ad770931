//! What every part of a repository needs: the store, the keys, the facts of the configuration;
//! and the two halves that all binary objects share, opening one and writing one (format §3).

use crate::crypto::{ObjectCipher, Subkeys, checksum};
use crate::envelope::{HEADER_BYTES, Header, NO_OWNER, ObjectKind, TRAILER_BYTES, Trailer};
use crate::point_list::PointCache;
use crate::store::{ObjectReader, ObjectStore, ObjectWriter, Retention};
use crate::{ObjectId, RepoError, Result};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The section number of the sealed part of a directory, which no other section can reach.
pub(crate) const DIRECTORY_SECTION: u64 = u64::MAX;

/// How much of an object's end is read at once when it is opened. The directory of a 64 MiB pack of
/// 64 KiB chunks is 34 KiB: one read gets it. Smaller costs a second request, larger wastes reads.
const TAIL_BYTES: u64 = 64 << 10;

/// How many threads restore from a store that is [distant](ObjectStore::is_distant). Each fetches up to 5 MiB at once and then
/// decodes it: with a tenth of a second to a server's first byte, sixteen get 0.6 GB/s. Each costs up to 13 MiB of memory, most
/// in place, where what stands there is read as well: nineteen come to the 256 MiB that a job may take.
pub(crate) const DISTANT_READERS: usize = 16;

/// How many threads check a store that is distant. Each costs some 15 MiB: sixteen would pass what a job may take.
pub(crate) const DISTANT_CHECKERS: usize = 12;

/// An open repository as its parts see it. Shared by threads.
pub(crate) struct RepoContext {
    /// Where the objects are.
    pub store: Arc<dyn ObjectStore>,
    /// The keys that work with data.
    pub subkeys: Subkeys,
    /// The repository's id.
    pub repository: ObjectId,
    /// The size of a chunk in bytes.
    pub chunk_size_bytes: u32,
    /// Whether objects are encrypted.
    pub sealed: bool,
    /// Until when what restores need is kept, of what is written.
    pub retention: Option<Retention>,
    /// What readers found damaged since somebody last took note of it.
    pub damage: DamageLog,
    /// Restore points read before.
    pub points: PointCache,
}

/// Damage in packs, noted where it is met and put on record by the job that met it: see
/// [`Repository::quarantine_found`](crate::Repository::quarantine_found). Clones share one list;
/// shared by threads.
#[derive(Clone, Debug, Default)]
pub(crate) struct DamageLog(Arc<Mutex<Noted>>);

/// What is wrong with each frame, or with a whole pack.
type Noted = BTreeMap<(ObjectId, Option<u32>), String>;

/// The most damaged frames noted at once: more are found again by the next reader.
const MAX_NOTED: usize = 64 << 10;

impl DamageLog {
    /// Notes that a frame of a pack, or the whole pack where `frame` is none, cannot be read.
    pub fn note(&self, pack: ObjectId, frame: Option<u32>, detail: impl Into<String>) {
        let mut noted = self.0.lock();
        if noted.len() < MAX_NOTED {
            noted.entry((pack, frame)).or_insert_with(|| detail.into());
        }
    }

    /// What was noted.
    pub fn noted(&self) -> Vec<(ObjectId, Option<u32>)> {
        self.0.lock().keys().copied().collect()
    }

    /// Strikes off what somebody took care of.
    pub fn forget(&self, noted: &[(ObjectId, Option<u32>)]) {
        let mut list = self.0.lock();
        for key in noted {
            list.remove(key);
        }
    }
}

impl std::fmt::Debug for RepoContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RepoContext").field(&self.repository).finish()
    }
}

impl RepoContext {
    /// How many threads a job that reads much should have: `for_disk`, or at least `distant`.
    pub fn readers(&self, for_disk: usize, distant: usize) -> usize {
        if self.store.is_distant() { for_disk.max(distant) } else { for_disk }
    }

    /// The same repository for a job whose point is to be kept: with that retention, and without what
    /// others noted.
    pub fn keeping(&self, retention: Retention) -> Self {
        Self {
            store: Arc::clone(&self.store),
            subkeys: self.subkeys.clone(),
            repository: self.repository,
            chunk_size_bytes: self.chunk_size_bytes,
            sealed: self.sealed,
            retention: Some(retention),
            damage: DamageLog::default(),
            points: PointCache::default(),
        }
    }

    /// The header of an object of this repository.
    pub fn header(&self, kind: ObjectKind, id: ObjectId) -> Header {
        self.header_under(kind, NO_OWNER, id)
    }

    /// The header of an object of this repository that belongs to another.
    pub fn header_under(&self, kind: ObjectKind, owner: ObjectId, id: ObjectId) -> Header {
        Header {
            kind,
            sealed: self.sealed,
            chunk_size_bytes: self.chunk_size_bytes,
            id,
            repository: self.repository,
            owner,
        }
    }

    /// The cipher of the object with this header.
    ///
    /// # Errors
    /// Those of [`ObjectCipher::new`].
    pub fn cipher(&self, header: &Header) -> Result<ObjectCipher> {
        ObjectCipher::new(&self.subkeys, header)
    }

    /// Opens an object that something refers to, and verifies its header, trailer and the hash of
    /// its directory. Two reads: the header, and the tail, which mostly has the whole directory.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where it is missing or not what was written;
    /// [`RepoError::Unsupported`] for another version; `Io`, `Denied`.
    pub fn open_object(&self, kind: ObjectKind, id: ObjectId) -> Result<OpenObject> {
        self.try_open_object(kind, id)?
            .ok_or_else(|| RepoError::damaged(kind.object_name(id), "missing"))
    }

    /// As [`open_object`](Self::open_object), `None` where there is no such object.
    ///
    /// # Errors
    /// The same, but for the missing object.
    pub fn try_open_object(&self, kind: ObjectKind, id: ObjectId) -> Result<Option<OpenObject>> {
        self.try_open(self.header(kind, id))
    }

    /// As [`try_open_object`](Self::try_open_object), of the object with this header.
    ///
    /// # Errors
    /// The same.
    pub fn try_open(&self, header: Header) -> Result<Option<OpenObject>> {
        match self.store.open(&header.object_name()) {
            Err(RepoError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(reader) => match OpenObject::from_reader(reader, header, self.cipher(&header)?) {
                // It went away between two requests.
                Err(RepoError::NotFound { .. }) => Ok(None),
                opened => opened.map(Some),
            },
        }
    }

    /// Begins an object and writes its header.
    ///
    /// # Errors
    /// Those of the store.
    pub fn create_object(&self, kind: ObjectKind, id: ObjectId) -> Result<NewObject> {
        self.create(self.header(kind, id))
    }

    /// As [`create_object`](Self::create_object), of the object with this header.
    ///
    /// # Errors
    /// Those of the store.
    pub fn create(&self, header: Header) -> Result<NewObject> {
        let name = header.object_name();
        let mut writer = match &self.retention {
            Some(retention) if header.kind.is_needed_by_restores() => {
                self.store.create_retained(&name, retention)?
            }
            _ => self.store.create(&name)?,
        };
        writer.write(&header.encode())?;
        Ok(NewObject { writer, cipher: self.cipher(&header)?, header, offset: HEADER_BYTES as u64 })
    }
}

/// A section that an object's directory names in clear, with the checksum of its stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredSection {
    /// Where it begins in the object.
    pub offset: u64,
    /// Its stored length in bytes.
    pub stored_bytes: u64,
    /// The checksum.
    pub checksum: [u8; 16],
}

/// An object whose envelope was verified. Shared by threads.
pub(crate) struct OpenObject {
    /// The bytes.
    pub reader: Box<dyn ObjectReader>,
    /// Its header, as it must be.
    pub header: Header,
    /// Opens its sections.
    pub cipher: ObjectCipher,
    /// Its trailer.
    pub trailer: Trailer,
    /// Its directory, verified against the trailer's hash. Users take it out when they parsed it.
    pub directory: Vec<u8>,
}

impl OpenObject {
    /// As [`RepoContext::open_object`], of bytes that are open already.
    ///
    /// # Errors
    /// The same.
    pub fn from_reader(
        reader: Box<dyn ObjectReader>,
        header: Header,
        cipher: ObjectCipher,
    ) -> Result<Self> {
        let length = reader.length_bytes();
        if length < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            let detail = format!("only {length} bytes long, shorter than header and trailer");
            return Err(RepoError::damaged(header.object_name(), detail));
        }
        let mut found = [0; HEADER_BYTES];
        reader.read_at(&mut found, 0)?;
        header.verify(&found)?;
        let tail_offset = length.saturating_sub(TAIL_BYTES).max(HEADER_BYTES as u64);
        let mut tail = vec![0; size(length - tail_offset, &header)?];
        reader.read_at(&mut tail, tail_offset)?;
        let mut trailer_bytes = [0; TRAILER_BYTES];
        trailer_bytes.copy_from_slice(&tail[tail.len() - TRAILER_BYTES..]);
        let trailer = Trailer::decode(&header, &trailer_bytes, length)?;
        tail.truncate(tail.len() - TRAILER_BYTES);
        let directory = if trailer.directory_offset >= tail_offset {
            tail.split_off(size(trailer.directory_offset - tail_offset, &header)?)
        } else {
            let mut directory = vec![0; size(trailer.directory_length, &header)?];
            let before = size(tail_offset - trailer.directory_offset, &header)?;
            reader.read_at(&mut directory[..before], trailer.directory_offset)?;
            directory[before..].copy_from_slice(&tail);
            directory
        };
        trailer.verify(&header, &directory, &trailer_bytes)?;
        Ok(Self { reader, header, cipher, trailer, directory })
    }

    /// Reads the section stored at `offset` and answers with its content, verified: by its tag
    /// where the object is sealed, by `checksum` where it is not. The caller has checked that the
    /// section lies in the object.
    ///
    /// # Errors
    /// [`RepoError::Damaged`], `Io`.
    pub fn read_section(
        &self,
        section: u64,
        associated: &[u8],
        offset: u64,
        stored_bytes: u64,
        checksum: &[u8; 16],
    ) -> Result<Vec<u8>> {
        let mut stored = vec![0; size(stored_bytes, &self.header)?];
        self.reader.read_at(&mut stored, offset)?;
        self.open_section(section, associated, stored, offset, checksum)
    }

    /// The second half of [`read_section`](Self::read_section): verifies and opens stored bytes.
    ///
    /// # Errors
    /// [`RepoError::Damaged`].
    pub fn open_section(
        &self,
        section: u64,
        associated: &[u8],
        mut stored: Vec<u8>,
        offset: u64,
        expected: &[u8; 16],
    ) -> Result<Vec<u8>> {
        if self.cipher.overhead_bytes() == 0 && checksum(&stored) != *expected {
            return Err(self.damaged(format!(
                "section {section} at byte {offset} does not match its checksum"
            )));
        }
        let length = self.cipher.open(section, associated, &mut stored)?.len();
        stored.truncate(length);
        Ok(stored)
    }

    /// A [`RepoError::Damaged`] that names this object.
    pub fn damaged(&self, detail: impl Into<String>) -> RepoError {
        RepoError::damaged(self.header.object_name(), detail)
    }
}

impl std::fmt::Debug for OpenObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OpenObject").field(&self.header.object_name()).finish()
    }
}

/// An object being written; dropped before [`finish`](Self::finish) it never was.
pub(crate) struct NewObject {
    writer: Box<dyn ObjectWriter>,
    /// Its header.
    pub header: Header,
    /// Seals its sections.
    pub cipher: ObjectCipher,
    /// How many bytes are written: where the next section will be.
    pub offset: u64,
}

impl NewObject {
    /// Seals `content` as section `section` and appends it. Answers with the stored bytes' checksum;
    /// afterwards `content` holds those stored bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_section(
        &mut self,
        section: u64,
        associated: &[u8],
        content: &mut Vec<u8>,
    ) -> Result<[u8; 16]> {
        self.cipher.seal(section, associated, content)?;
        self.writer.write(content)?;
        self.offset += content.len() as u64;
        Ok(checksum(content))
    }

    /// Appends directory and trailer and makes the object visible and durable.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for a directory no reader would take; those of the store.
    pub fn finish(mut self, directory: &[u8], first_count: u32, second_count: u32) -> Result<()> {
        let directory_length = directory.len() as u64;
        let limit = self.header.kind.max_directory_bytes();
        if directory_length > limit {
            return Err(RepoError::Invalid(format!(
                "{} would need a directory of {directory_length} bytes; the limit is {limit}",
                self.header.object_name(),
            )));
        }
        let trailer =
            Trailer { directory_offset: self.offset, directory_length, first_count, second_count };
        self.writer.write(directory)?;
        self.writer.write(&trailer.encode(&self.header, directory))?;
        self.writer.finish()
    }
}

fn size(bytes: u64, header: &Header) -> Result<usize> {
    usize::try_from(bytes).map_err(|_| {
        RepoError::damaged(
            header.object_name(),
            format!("a part of {bytes} bytes does not fit in memory"),
        )
    })
}
