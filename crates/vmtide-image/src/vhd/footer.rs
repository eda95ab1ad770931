//! The footer (specification, "Hard Disk Footer Format"): the last 512 bytes of every VHD, with a
//! copy at the start of dynamic and differencing ones.
//!
//! It says what kind of disk it is, how large, and where the rest is described. Whichever copy has
//! a right checksum counts, the one at the end first: at the start of a fixed disk stands what the
//! guest wrote there.

use super::geometry::{Geometry, MAX_SECTORS};
use crate::bytes::{be_u16, be_u32, be_u64, length, put};
use std::time::{SystemTime, UNIX_EPOCH};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The size of a footer, and of a sector.
pub(crate) const FOOTER_BYTES: u64 = FOOTER_LEN as u64;

/// The same, for arrays.
const FOOTER_LEN: usize = 512;

/// The size of the footer that Virtual PC wrote before 2004: the last reserved byte is missing.
const OLD_FOOTER_BYTES: u64 = 511;

/// The signature.
const COOKIE: &[u8; 8] = b"conectix";

/// `DataOffset` where there is no dynamic header.
pub(crate) const NO_DATA_OFFSET: u64 = u64::MAX;

/// The seconds from 1970 to 2000, where the time stamps of VHD begin.
const EPOCH_2000: u64 = 946_684_800;

/// The creator that we write. Not our own name: programs decide by it whether the size of the disk
/// is `CurrentSize` or what the geometry says, and QEMU takes the geometry, which is up to a
/// cylinder smaller, from every creator it does not know. `win ` is what Hyper-V writes, and all
/// programs take `CurrentSize` then.
const CREATOR: &[u8; 4] = b"win ";

/// The version that goes with [`CREATOR`]: Windows 10 and Server 2016.
const CREATOR_VERSION: u32 = 0x000a_0000;

/// The creators whose images have the size that the geometry says: Virtual PC and old QEMU.
const SIZED_BY_GEOMETRY: [&[u8; 4]; 2] = [b"vpc ", b"qemu"];

/// Offsets of the fields.
mod field {
    pub(super) const FEATURES: usize = 8;
    pub(super) const VERSION: usize = 12;
    pub(super) const DATA_OFFSET: usize = 16;
    pub(super) const TIME_STAMP: usize = 24;
    pub(super) const CREATOR: usize = 28;
    pub(super) const CREATOR_VERSION: usize = 32;
    pub(super) const CREATOR_HOST: usize = 36;
    pub(super) const ORIGINAL_SIZE: usize = 40;
    pub(super) const CURRENT_SIZE: usize = 48;
    pub(super) const GEOMETRY: usize = 56;
    pub(super) const KIND: usize = 60;
    pub(super) const CHECKSUM: usize = 64;
    pub(super) const UNIQUE_ID: usize = 68;
}

/// The kind of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The bytes of the disk, then the footer.
    Fixed,
    /// Blocks that are allocated when they are written.
    Dynamic,
    /// As dynamic, and what is not there is the parent's.
    Differencing,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }

    const fn code(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

/// A footer. Fields that we do not know are kept as they are.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    bytes: [u8; FOOTER_LEN],
    pub(crate) kind: Kind,
}

impl Footer {
    /// A new footer.
    pub(crate) fn new(kind: Kind, size_bytes: u64, unique_id: [u8; 16]) -> Self {
        let mut footer = Self { bytes: [0; FOOTER_LEN], kind };
        put(&mut footer.bytes, 0, COOKIE);
        // Bit 1 is reserved and always set.
        put(&mut footer.bytes, field::FEATURES, &2u32.to_be_bytes());
        put(&mut footer.bytes, field::VERSION, &0x0001_0000u32.to_be_bytes());
        let data_offset = if kind == Kind::Fixed { NO_DATA_OFFSET } else { FOOTER_BYTES };
        put(&mut footer.bytes, field::DATA_OFFSET, &data_offset.to_be_bytes());
        put(&mut footer.bytes, field::TIME_STAMP, &time_stamp().to_be_bytes());
        put(&mut footer.bytes, field::CREATOR_HOST, b"Wi2k");
        put(&mut footer.bytes, field::ORIGINAL_SIZE, &size_bytes.to_be_bytes());
        put(&mut footer.bytes, field::KIND, &kind.code().to_be_bytes());
        put(&mut footer.bytes, field::UNIQUE_ID, &unique_id);
        footer.set_size(size_bytes);
        footer
    }

    /// Reads a footer out of its bytes (511 of them in old images); the error says what is wrong.
    pub(crate) fn decode(stored: &[u8]) -> Result<Self, String> {
        let mut bytes = [0u8; FOOTER_LEN];
        put(&mut bytes, 0, stored);
        if !bytes.starts_with(COOKIE) {
            return Err(format!(
                "signature {:02x?} instead of \"conectix\"",
                bytes.get(..8).unwrap_or_default()
            ));
        }
        let found = be_u32(&bytes, field::CHECKSUM);
        let right = checksum(&bytes, field::CHECKSUM);
        if found != right {
            return Err(format!("checksum {found:#010x} instead of {right:#010x}"));
        }
        let version = be_u32(&bytes, field::VERSION);
        if version >> 16 != 1 {
            return Err(format!("version {version:#010x}; only 1.x is known"));
        }
        let kind = match be_u32(&bytes, field::KIND) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => {
                return Err(format!(
                    "disk type {other}; known are 2 (fixed), 3 (dynamic), 4 (differencing)"
                ));
            }
        };
        Ok(Self { bytes, kind })
    }

    /// The bytes, with a right checksum.
    pub(crate) fn encode(&self) -> [u8; FOOTER_LEN] {
        let mut bytes = self.bytes;
        put(&mut bytes, field::KIND, &self.kind.code().to_be_bytes());
        let sum = checksum(&bytes, field::CHECKSUM);
        put(&mut bytes, field::CHECKSUM, &sum.to_be_bytes());
        bytes
    }

    /// Where the dynamic header is.
    pub(crate) fn data_offset(&self) -> u64 {
        be_u64(&self.bytes, field::DATA_OFFSET)
    }

    pub(crate) fn set_data_offset(&mut self, offset: u64) {
        put(&mut self.bytes, field::DATA_OFFSET, &offset.to_be_bytes());
    }

    /// What the image calls itself; its children know it by this.
    pub(crate) fn unique_id(&self) -> [u8; 16] {
        array(&self.bytes, field::UNIQUE_ID)
    }

    /// The program that made the image and its version, as they are shown.
    pub(crate) fn creator(&self) -> String {
        let name = self.bytes.get(field::CREATOR..field::CREATOR_VERSION).unwrap_or_default();
        let name: String =
            String::from_utf8_lossy(name).chars().filter(|letter| !letter.is_control()).collect();
        let version = be_u32(&self.bytes, field::CREATOR_VERSION);
        format!("{} {}.{}", name.trim_end(), version >> 16, version & 0xffff)
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            cylinders: be_u16(&self.bytes, field::GEOMETRY),
            heads: self.bytes.get(field::GEOMETRY + 2).copied().unwrap_or(0),
            sectors_per_track: self.bytes.get(field::GEOMETRY + 3).copied().unwrap_or(0),
        }
    }

    /// The size of the disk in bytes, of which the file can hold `capacity_bytes`.
    ///
    /// `CurrentSize`, except where Virtual PC or QEMU (before `force_size`) made the image: those
    /// take the geometry, if it is not the largest one. An image that could not hold what its
    /// geometry says has the other size, because some tool changed one without the other.
    pub(crate) fn size_bytes(&self, capacity_bytes: u64) -> u64 {
        let current = be_u64(&self.bytes, field::CURRENT_SIZE);
        let creator = self.bytes.get(field::CREATOR..field::CREATOR_VERSION).unwrap_or_default();
        let sectors = self.geometry().sectors();
        let by_geometry = SIZED_BY_GEOMETRY.iter().any(|known| creator == &known[..]);
        if !by_geometry || sectors == 0 || sectors == MAX_SECTORS {
            return current;
        }
        match sectors * FOOTER_BYTES {
            bytes if bytes <= capacity_bytes => bytes,
            _ => current,
        }
    }

    /// Sets the size; the creator becomes one whose size is `CurrentSize`.
    pub(crate) fn set_size(&mut self, size_bytes: u64) {
        put(&mut self.bytes, field::CREATOR, CREATOR);
        put(&mut self.bytes, field::CREATOR_VERSION, &CREATOR_VERSION.to_be_bytes());
        put(&mut self.bytes, field::CURRENT_SIZE, &size_bytes.to_be_bytes());
        let geometry = Geometry::for_sectors(size_bytes / FOOTER_BYTES);
        put(&mut self.bytes, field::GEOMETRY, &geometry.cylinders.to_be_bytes());
        let rest = [geometry.heads, geometry.sectors_per_track];
        put(&mut self.bytes, field::GEOMETRY + 2, &rest);
    }
}

/// One's complement of the sum of all bytes but the checksum's own four.
pub(crate) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    let (before, rest) = bytes.split_at(field.min(bytes.len()));
    !sum(before).wrapping_add(sum(rest.get(4..).unwrap_or_default()))
}

/// The sixteen bytes at `at`.
pub(crate) fn array(bytes: &[u8], at: usize) -> [u8; 16] {
    bytes.get(at..at + 16).and_then(|id| id.try_into().ok()).unwrap_or_default()
}

/// An id as a GUID in lower case, in the order of its bytes.
pub(crate) fn id_text(id: [u8; 16]) -> String {
    use std::fmt::Write;
    id.iter().enumerate().fold(String::with_capacity(36), |mut text, (index, byte)| {
        let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(text, "{dash}{byte:02x}");
        text
    })
}

/// The id that [`id_text`] wrote.
pub(crate) fn parse_id(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|letter| !matches!(letter, '-' | '{' | '}'))
        .map(|letter| letter.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> =
        digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    if digits.len() == 32 { bytes.try_into().ok() } else { None }
}

/// A new random id (RFC 9562 version 4).
pub(crate) fn new_id(name: &str) -> Result<[u8; 16]> {
    let mut id = [0u8; 16];
    getrandom::fill(&mut id).map_err(|error| {
        BlockError::io(format!("{name}: make a unique id"), std::io::Error::other(error))
    })?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// The seconds since 2000.
fn time_stamp() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(now.saturating_sub(EPOCH_2000)).unwrap_or(u32::MAX)
}

/// The footer of a file, and which of its copies are right.
pub(crate) struct Located {
    /// The one that counts.
    pub(crate) footer: Footer,
    /// Where the one at the end begins; `None` where there is none with a right checksum.
    pub(crate) trailer: Option<u64>,
    /// What is wrong with the one at the end.
    pub(crate) trailer_problem: Option<String>,
    /// The copy at the start; for fixed disks there is none.
    pub(crate) copy: Option<Result<Footer, String>>,
}

impl Located {
    /// Finds the footer of `file`.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where neither copy is right.
    pub(crate) fn find(file: &dyn BlockDevice) -> Result<Self> {
        let size_bytes = file.size_bytes();
        let (trailer, trailer_problem) = match find_trailer(file, size_bytes)? {
            Ok((offset, footer)) => (Some((offset, footer)), None),
            Err(problem) => (None, Some(problem)),
        };
        if let Some((offset, footer)) = &trailer
            && footer.kind == Kind::Fixed
        {
            let (trailer, footer) = (Some(*offset), footer.clone());
            return Ok(Self { footer, trailer, trailer_problem, copy: None });
        }
        let copy = match read_at(file, 0, FOOTER_BYTES)? {
            Some(bytes) => Footer::decode(&bytes).and_then(|footer| match footer.kind {
                Kind::Fixed => Err("a fixed disk's footer, which has no copy".into()),
                _ => Ok(footer),
            }),
            None => Err(format!("the file has only {size_bytes} bytes")),
        };
        let footer = match (&trailer, &copy) {
            (Some((_, footer)), _) | (None, Ok(footer)) => footer.clone(),
            (None, Err(copy_problem)) => {
                let trailer_problem = trailer_problem.unwrap_or_default();
                return Err(BlockError::damaged(
                    file.name(),
                    format!(
                        "no usable footer: at the end of its {size_bytes} bytes {trailer_problem}; \
                         copy at 0: {copy_problem}"
                    ),
                ));
            }
        };
        let trailer = trailer.map(|(offset, _)| offset);
        Ok(Self { footer, trailer, trailer_problem, copy: Some(copy) })
    }

    /// The bytes before the footer at the end, or before the end where there is none.
    pub(crate) fn body_bytes(&self, file: &dyn BlockDevice) -> u64 {
        self.trailer.unwrap_or_else(|| file.size_bytes())
    }
}

/// The footer at the end, with its offset, or what is wrong with it.
fn find_trailer(file: &dyn BlockDevice, size_bytes: u64) -> Result<Result<(u64, Footer), String>> {
    let mut problem = format!("there is no room for one in {size_bytes} bytes");
    for footer_bytes in [FOOTER_BYTES, OLD_FOOTER_BYTES] {
        let Some(offset) = size_bytes.checked_sub(footer_bytes) else {
            continue;
        };
        let Some(bytes) = read_at(file, offset, footer_bytes)? else {
            continue;
        };
        match Footer::decode(&bytes) {
            Ok(footer) => return Ok(Ok((offset, footer))),
            // The old size is only worth a word where its signature is there.
            Err(found) if footer_bytes == FOOTER_BYTES || bytes.starts_with(COOKIE) => {
                problem = found;
            }
            Err(_) => {}
        }
    }
    Ok(Err(problem))
}

/// So many bytes at `offset`; `None` where the file ends before.
pub(crate) fn read_at(file: &dyn BlockDevice, offset: u64, count: u64) -> Result<Option<Vec<u8>>> {
    if offset.checked_add(count).is_none_or(|end| end > file.size_bytes()) {
        return Ok(None);
    }
    let mut bytes = vec![0u8; length(count)];
    file.read_at(&mut bytes, offset)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn a_footer_survives_encoding_and_a_changed_byte_is_noticed() {
        let footer = Footer::new(Kind::Dynamic, 4 << 20, [7; 16]);
        let bytes = footer.encode();
        let again = Footer::decode(&bytes).unwrap();
        assert_eq!(again.size_bytes(u64::MAX), 4 << 20);
        assert_eq!((again.kind, again.data_offset()), (Kind::Dynamic, 512));
        assert_eq!(again.creator(), "win 10.0");
        for at in 0..bytes.len() {
            let mut changed = bytes;
            changed[at] ^= 0x11;
            assert!(Footer::decode(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn the_size_is_the_geometry_only_where_its_creator_meant_that() {
        let mut footer = Footer::new(Kind::Dynamic, 4 << 20, [0; 16]);
        let geometry = 120 * 4 * 17 * 512;
        for (creator, size) in [
            (b"vpc ", geometry),
            (b"qemu", geometry),
            (b"qem2", 4 << 20),
            (b"win ", 4 << 20),
            (b"d2v ", 4 << 20),
            (b"tap\0", 4 << 20),
            (b"CTXS", 4 << 20),
            (b"vbox", 4 << 20),
        ] {
            put(&mut footer.bytes, field::CREATOR, creator);
            assert_eq!(footer.size_bytes(u64::MAX), size, "{creator:?}");
        }
        put(&mut footer.bytes, field::CREATOR, b"vpc ");
        assert_eq!(footer.size_bytes(geometry - 1), 4 << 20);
        put(&mut footer.bytes, field::GEOMETRY, &[0xff, 0xff, 16, 255]);
        assert_eq!(footer.size_bytes(u64::MAX), 4 << 20);
    }

    #[test]
    fn ids_are_written_as_guids_and_read_back() {
        let id = [0x5f, 0xa2, 0x1a, 0x55, 0xf3, 0x94, 0xaa, 0x4d, 0x99, 0x58, 1, 2, 3, 4, 5, 6];
        assert_eq!(id_text(id), "5fa21a55-f394-aa4d-9958-010203040506");
        assert_eq!(parse_id(&id_text(id)), Some(id));
        assert_eq!(parse_id("{5FA21A55-F394-AA4D-9958-010203040506}"), Some(id));
        assert_eq!(parse_id("5fa21a55"), None);
        assert_eq!(parse_id("zfa21a55-f394-aa4d-9958-010203040506"), None);
    }

    #[test]
    fn the_footer_is_found_at_both_ends_and_with_511_bytes() {
        let footer = Footer::new(Kind::Dynamic, 4 << 20, [7; 16]).encode();
        let fixed = Footer::new(Kind::Fixed, 4 << 20, [8; 16]).encode();
        let find = |bytes: Vec<u8>| Located::find(&MemoryDevice::from_bytes(bytes));
        let body = vec![0u8; 4096];
        let both = find([&footer[..], &body, &footer].concat()).unwrap();
        assert_eq!((both.trailer, both.copy.unwrap().is_ok()), (Some(4608), true));
        let start = find([&footer[..], &body].concat()).unwrap();
        assert_eq!(start.trailer, None);
        let end = find([&body[..], &footer].concat()).unwrap();
        assert!(end.trailer == Some(4096) && end.copy.unwrap().is_err());
        let old = find([&body[..], &fixed[..511]].concat()).unwrap();
        assert_eq!((old.trailer, old.footer.kind), (Some(4096), Kind::Fixed));
        // What the guest of a fixed disk wrote into its first sector is not believed.
        let guest = find([&footer[..], &body, &fixed].concat()).unwrap();
        assert_eq!(guest.footer.unique_id(), [8; 16]);
        // A fixed disk has no copy at its start.
        assert!(find([&fixed[..], &body].concat()).is_err());
        let mut torn = [&footer[..], &body, &footer].concat();
        torn[4608 + 70] ^= 1;
        assert_eq!(find(torn.clone()).unwrap().footer.unique_id(), [7; 16]);
        torn[70] ^= 1;
        let error = find(torn).err().unwrap().to_string();
        assert!(error.contains("checksum") && error.contains("copy at 0"), "{error}");
        assert!(find(vec![0; 100]).is_err());
    }
}
