//! The repository: restore points of virtual disks, deduplicated, compressed, encrypted.
//!
//! The format is `docs/repository-format.md`, to the byte. In short: a disk is cut into chunks;
//! new chunks are compressed in frames, sealed and appended to packs; a disk map, kept as a few immutable
//! segments, says where each chunk of the disk is; a restore point names the maps and is the
//! commit. An index segment answers "is this content known?" and nothing else.

mod config;
mod context;
mod crypto;
mod document;
mod envelope;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod index;
mod keys;
mod leb128;
mod map;
mod page_cache;
mod password;
mod store;

pub use config::{Encryption, RepositoryConfig};
pub use error::{RepoError, Result};
pub use id::{ChunkId, Location, ObjectId};
pub use keys::{KdfParameters, KeySlotInfo};
pub use password::Password;
pub use store::{
    Corruption, Fault, FaultyStore, LocalStore, MemoryStore, ObjectEntry, ObjectReader,
    ObjectStore, ObjectWriter, Step, StepCounts, StoreLock, read_small,
};
