//! The header and trailer that every binary object has (format §3).

use crate::{ObjectId, RepoError, Result};
use std::collections::BTreeSet;

/// The length of a header.
pub const HEADER_BYTES: usize = 64;

/// The length of a trailer.
pub const TRAILER_BYTES: usize = 64;

/// The format version that this code writes. A reader refuses any other.
pub const VERSION: u16 = 1;

/// The largest directory of a segment a reader takes into memory. A hostile trailer may name
/// anything; a segment over all chunks of the largest repository stays far below.
const MAX_SEGMENT_DIRECTORY_BYTES: u64 = 256 << 20;

/// The largest directory of anything else. That of a pack takes twice its length in memory and many
/// packs are open at once; the fullest pack of this code has one of 5 MiB.
const MAX_PACK_DIRECTORY_BYTES: u64 = 16 << 20;

const TRAILER_MAGIC: &[u8; 8] = b"VMTIDEND";
const FLAG_SEALED: u16 = 1;

/// The kinds of binary objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// Chunks.
    Pack,
    /// A part of a disk map.
    MapSegment,
    /// Chunk ids to places.
    IndexSegment,
    /// A restore point.
    Point,
    /// Where the chunks of a removed pack went.
    Forward,
    /// Why a restore point must stay.
    Hold,
    /// That a hold is over, where it cannot be removed.
    Release,
    /// Which parts of packs were found damaged.
    Damaged,
    /// Where content that was damaged is stored once more.
    Healed,
    /// That somebody works with the repository.
    Lease,
    /// What the holder of a lease has done, at its end.
    LeaseEnd,
    /// What a prune wants to remove.
    Condemned,
    /// The leases that must end before a condemned list is decided on.
    Boundary,
    /// What of a condemned list nothing needs.
    Verdict,
    /// The restore points that a revoked lease had made.
    Judgement,
}

impl ObjectKind {
    /// All kinds.
    pub const ALL: [Self; 15] = [
        Self::Pack,
        Self::MapSegment,
        Self::IndexSegment,
        Self::Point,
        Self::Forward,
        Self::Hold,
        Self::Release,
        Self::Damaged,
        Self::Healed,
        Self::Lease,
        Self::LeaseEnd,
        Self::Condemned,
        Self::Boundary,
        Self::Verdict,
        Self::Judgement,
    ];

    /// The prefixes of all kinds, each once.
    pub fn prefixes() -> BTreeSet<&'static str> {
        Self::ALL.into_iter().map(Self::prefix).collect()
    }

    /// The first eight bytes of the object.
    pub const fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Pack => b"VMTIDEPK",
            Self::MapSegment => b"VMTIDEMP",
            Self::IndexSegment => b"VMTIDEIX",
            Self::Point => b"VMTIDEPT",
            Self::Forward => b"VMTIDEFW",
            Self::Hold => b"VMTIDEHD",
            Self::Release => b"VMTIDEHR",
            Self::Damaged => b"VMTIDEDM",
            Self::Healed => b"VMTIDEHL",
            Self::Lease => b"VMTIDELS",
            Self::LeaseEnd => b"VMTIDELE",
            Self::Condemned => b"VMTIDECD",
            Self::Boundary => b"VMTIDECB",
            Self::Verdict => b"VMTIDECV",
            Self::Judgement => b"VMTIDERJ",
        }
    }

    /// The name in the store (format §2) of an object that belongs to no other.
    pub fn object_name(self, id: ObjectId) -> String {
        self.name_under(NO_OWNER, id)
    }

    /// The name in the store (format §2); `owner` is the object that it belongs to, where its kind
    /// belongs to one: the pack of a forward, the list of a verdict, the lease of a judgement.
    pub fn name_under(self, owner: ObjectId, id: ObjectId) -> String {
        match self {
            Self::Pack => format!("packs/{:02x}/{id}", id.0[0]),
            Self::MapSegment => format!("maps/{id}"),
            Self::IndexSegment => format!("index/{id}"),
            Self::Point => format!("points/{id}"),
            Self::Hold => format!("holds/{id}"),
            Self::Release => format!("released/{id}"),
            Self::Damaged => format!("damaged/{id}"),
            Self::Healed => format!("healed/{id}"),
            Self::Forward => format!("forward/{owner}/{id}"),
            Self::Lease => format!("leases/{id}/begin"),
            Self::LeaseEnd => format!("leases/{id}/end"),
            Self::Condemned => format!("condemned/{id}/list"),
            Self::Boundary => format!("condemned/{owner}/boundary-{id}"),
            Self::Verdict => format!("condemned/{owner}/verdict-{id}"),
            Self::Judgement => format!("revoked/{owner}/judgement-{id}"),
        }
    }

    /// The largest directory a reader takes into memory (format §3).
    pub const fn max_directory_bytes(self) -> u64 {
        match self {
            Self::MapSegment | Self::IndexSegment => MAX_SEGMENT_DIRECTORY_BYTES,
            _ => MAX_PACK_DIRECTORY_BYTES,
        }
    }

    /// The kind and id of the object of this name; none where it is no binary object.
    pub fn of_name(name: &str) -> Option<(Self, ObjectId)> {
        Self::parse_name(name).map(|(kind, _, id)| (kind, id))
    }

    /// The kind, owner and id of the object of this name; none where it is no binary object.
    pub fn parse_name(name: &str) -> Option<(Self, ObjectId, ObjectId)> {
        let (above, last) = name.rsplit_once('/')?;
        let above = above.rsplit('/').next().and_then(|id| id.parse().ok());
        let own = last.rsplit('-').next().and_then(|id| id.parse().ok());
        let candidates =
            [own.map(|id| (NO_OWNER, id)), above.map(|id| (NO_OWNER, id)), above.zip(own)];
        candidates.into_iter().flatten().find_map(|(owner, id)| {
            let fits = |kind: &Self| kind.name_under(owner, id) == name;
            Self::ALL.into_iter().find(fits).map(|kind| (kind, owner, id))
        })
    }

    /// What an object in clear that only says something by being there holds; none for others.
    pub fn marker_content(name: &str) -> Option<&'static [u8]> {
        let (above, last) = name.rsplit_once('/')?;
        let (prefix, _) = above.split_once('/')?;
        match (prefix, last.split_once('-')?.0) {
            ("leases", "renewed") => Some(b"renewed\n"),
            ("revoked", "intent") => Some(b"intent\n"),
            ("condemned", "closing") => Some(b"closing\n"),
            _ => None,
        }
    }

    /// Whether restores need objects of the kind. The index is made anew from the packs.
    pub const fn is_needed_by_restores(self) -> bool {
        matches!(
            self,
            Self::Pack
                | Self::MapSegment
                | Self::Point
                | Self::Forward
                | Self::Damaged
                | Self::Healed
        )
    }

    /// The prefix under which all objects of the kind lie.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Pack => "packs/",
            Self::MapSegment => "maps/",
            Self::IndexSegment => "index/",
            Self::Point => "points/",
            Self::Forward => "forward/",
            Self::Hold => "holds/",
            Self::Release => "released/",
            Self::Damaged => "damaged/",
            Self::Healed => "healed/",
            Self::Lease | Self::LeaseEnd => "leases/",
            Self::Condemned | Self::Boundary | Self::Verdict => "condemned/",
            Self::Judgement => "revoked/",
        }
    }
}

/// The owner of what belongs to nothing.
pub const NO_OWNER: ObjectId = ObjectId([0; 16]);

/// The first 64 bytes of a binary object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: ObjectKind,
    /// Whether its sections are sealed.
    pub sealed: bool,
    /// The chunk size in bytes.
    pub chunk_size_bytes: u32,
    /// Its id.
    pub id: ObjectId,
    /// The repository it belongs to.
    pub repository: ObjectId,
    /// The object that it belongs to; [`NO_OWNER`] for most.
    pub owner: ObjectId,
}

impl Header {
    /// The object's name in the store.
    pub fn object_name(&self) -> String {
        self.kind.name_under(self.owner, self.id)
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(self.kind.magic());
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&if self.sealed { FLAG_SEALED } else { 0 }.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.chunk_size_bytes.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.id.0);
        bytes[32..48].copy_from_slice(&self.repository.0);
        bytes[48..64].copy_from_slice(&self.owner.0);
        bytes
    }

    /// Checks that `bytes` begin with exactly this header, as they must: everything in it is known
    /// from the object's name and the repository's configuration.
    ///
    /// # Errors
    /// [`RepoError::Unsupported`] for another version, [`RepoError::Damaged`] for anything else.
    pub fn verify(&self, bytes: &[u8]) -> Result<()> {
        let Some(found) = bytes.get(..HEADER_BYTES) else {
            return Err(RepoError::damaged(
                self.object_name(),
                format!("only {} bytes long, shorter than a header", bytes.len()),
            ));
        };
        if found[..8] == *self.kind.magic() && found[8..10] != VERSION.to_le_bytes() {
            let version = u16::from_le_bytes([found[8], found[9]]);
            return Err(RepoError::Unsupported {
                object: self.object_name(),
                what: format!("format version {version}"),
            });
        }
        if *found != self.encode() {
            return Err(RepoError::damaged(
                self.object_name(),
                "its header (bytes 0 to 63) is not the one written under this name",
            ));
        }
        Ok(())
    }
}

/// The last 64 bytes of a binary object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Where the directory begins in the object.
    pub directory_offset: u64,
    /// The directory's length in bytes.
    pub directory_length: u64,
    /// What the kind counts first.
    pub first_count: u32,
    /// What the kind counts second.
    pub second_count: u32,
}

impl Trailer {
    /// The bytes, with the hash over header, directory and trailer.
    pub fn encode(&self, header: &Header, directory: &[u8]) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..8].copy_from_slice(TRAILER_MAGIC);
        bytes[8..16].copy_from_slice(&self.directory_offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.directory_length.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.first_count.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.second_count.to_le_bytes());
        let hash = hash_of(&header.encode(), directory, &bytes[..32]);
        bytes[32..].copy_from_slice(hash.as_bytes());
        bytes
    }

    /// Reads the trailer from the last 64 bytes of an object of `object_length` bytes, and checks
    /// that the directory it names lies between header and trailer and is of a size its kind can have. The hash
    /// is checked by [`verify`](Self::verify) once the directory is there.
    ///
    /// # Errors
    /// [`RepoError::Damaged`].
    pub fn decode(
        header: &Header,
        bytes: &[u8; TRAILER_BYTES],
        object_length: u64,
    ) -> Result<Self> {
        let damaged = |detail: String| Err(RepoError::damaged(header.object_name(), detail));
        if bytes[..8] != *TRAILER_MAGIC {
            return damaged(format!(
                "no trailer at byte {}: the object was cut or overwritten",
                object_length.saturating_sub(TRAILER_BYTES as u64)
            ));
        }
        let u64_at = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(field)
        };
        let counts = u64_at(24);
        let trailer = Self {
            directory_offset: u64_at(8),
            directory_length: u64_at(16),
            #[allow(clippy::cast_possible_truncation, reason = "the low half")]
            first_count: counts as u32,
            #[allow(clippy::cast_possible_truncation, reason = "the high half, shifted down")]
            second_count: (counts >> 32) as u32,
        };
        let end = trailer
            .directory_offset
            .checked_add(trailer.directory_length)
            .and_then(|end| end.checked_add(TRAILER_BYTES as u64));
        if trailer.directory_offset < HEADER_BYTES as u64
            || end != Some(object_length)
            || trailer.directory_length > header.kind.max_directory_bytes()
        {
            return damaged(format!(
                "directory at {}+{} does not fit an object of {object_length} bytes",
                trailer.directory_offset, trailer.directory_length
            ));
        }
        Ok(trailer)
    }

    /// Checks the hash over header, directory and this trailer.
    ///
    /// # Errors
    /// [`RepoError::Damaged`].
    pub fn verify(
        &self,
        header: &Header,
        directory: &[u8],
        trailer_bytes: &[u8; TRAILER_BYTES],
    ) -> Result<()> {
        if hash_of(&header.encode(), directory, &trailer_bytes[..32]).as_bytes()[..]
            == trailer_bytes[32..]
        {
            return Ok(());
        }
        Err(RepoError::damaged(
            header.object_name(),
            format!("the hash of its directory at byte {} does not match", self.directory_offset),
        ))
    }
}

fn hash_of(header: &[u8], directory: &[u8], trailer: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(directory).update(trailer);
    hasher.finalize()
}
