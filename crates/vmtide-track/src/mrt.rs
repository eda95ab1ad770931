//! `<disk>.mrt`: the regions written since `.rct` was, on the medium before the writes are. See
//! `docs/tracking-format.md` for the bytes.
//!
//! An array of pages of one sector, each with its own checksum and epoch, written in place. A page that is not wholly
//! right (torn, garbled, missing) stands for all of its regions.

use crate::id::Series;
use crate::options::Geometry;

/// A page: what every medium writes whole, or else spoils so that the checksum tells.
pub(crate) const PAGE_BYTES: usize = 512;

/// What each page begins with.
pub(crate) const MAGIC: [u8; 4] = *b"VMRT";
const VERSION: u16 = 1;
const BITS_AT: usize = 48;
const CRC_AT: usize = PAGE_BYTES - 4;
/// The words of marks in a page.
pub(crate) const MARK_WORDS: usize = (CRC_AT - 4 - BITS_AT) / 8;
/// The regions of a page: 57 GiB of disk at 16 MiB.
pub(crate) const PAGE_REGIONS: u64 = MARK_WORDS as u64 * 64;

/// The marks of one page.
pub(crate) type Marks = [u64; MARK_WORDS];

/// What all pages of a file have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub series: Series,
    pub geometry: Geometry,
}

impl Owner {
    /// The pages of the file.
    pub fn pages(&self) -> u64 {
        self.geometry.regions().div_ceil(PAGE_REGIONS)
    }

    /// The bytes of a page.
    pub fn encode(&self, index: u64, epoch: u64, marks: &Marks) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let fields: [&[u8]; 8] = [
            &MAGIC,
            &VERSION.to_le_bytes(),
            &[0; 2],
            &self.series.0,
            &epoch.to_le_bytes(),
            &index.to_le_bytes(),
            &self.geometry.region_bytes.to_le_bytes(),
            &self.geometry.size_bytes.to_le_bytes(),
        ];
        let marks = marks.iter().flat_map(|word| word.to_le_bytes());
        let bytes = fields.into_iter().flatten().copied().chain(marks);
        for (to, byte) in page.iter_mut().zip(bytes) {
            *to = byte;
        }
        let (covered, checksum) = page.split_at_mut(CRC_AT);
        checksum.copy_from_slice(&crc32c::crc32c(covered).to_le_bytes());
        page
    }

    /// The epoch and the marks of a page; none where it is not this file's page, sound.
    pub fn decode(&self, index: u64, page: &[u8]) -> Option<(u64, Marks)> {
        let page: &[u8; PAGE_BYTES] = page.try_into().ok()?;
        let epoch = u64::from_le_bytes(page.get(24..32)?.try_into().ok()?);
        let mut marks = [0; MARK_WORDS];
        for (word, bytes) in marks.iter_mut().zip(page.get(BITS_AT..)?.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        // Everything but the epoch and the marks is known beforehand.
        (self.encode(index, epoch, &marks) == *page).then_some((epoch, marks))
    }

    /// A file without marks.
    pub fn empty_file(&self, epoch: u64) -> Vec<u8> {
        let none = [0; MARK_WORDS];
        (0..self.pages()).flat_map(|index| self.encode(index, epoch, &none)).collect()
    }
}

/// What a file says of a crash.
pub(crate) struct Found {
    /// The regions that may have been written: runs of first and end.
    pub regions: Vec<(u64, u64)>,
    /// The highest epoch of a sound page.
    pub epoch: u64,
    /// All pages are sound, so the file can be used further.
    pub is_sound: bool,
}

/// Looks at a file for the regions written since the `.rct` of `epoch`; none where it is not this disk's at
/// all.
pub(crate) fn read(owner: &Owner, bytes: &[u8], epoch: u64) -> Option<Found> {
    let mut found = Found { regions: Vec::new(), epoch: 0, is_sound: true };
    let mut any = false;
    let total = owner.geometry.regions();
    let mut pages = bytes.chunks(PAGE_BYTES);
    for index in 0..owner.pages() {
        let first = index * PAGE_REGIONS;
        match pages.next().and_then(|page| owner.decode(index, page)) {
            None => {
                found.is_sound = false;
                add_run(&mut found.regions, first, (first + PAGE_REGIONS).min(total));
            }
            Some((of_page, marks)) => {
                any = true;
                found.epoch = found.epoch.max(of_page);
                if of_page >= epoch {
                    add_marks(&mut found.regions, first, total, &marks);
                }
            }
        }
    }
    (any || total == 0).then_some(found)
}

fn add_marks(regions: &mut Vec<(u64, u64)>, first: u64, total: u64, marks: &Marks) {
    for (word, base) in marks.iter().zip((first..).step_by(64)) {
        let mut rest = *word;
        while rest != 0 {
            let region = base + u64::from(rest.trailing_zeros());
            if region < total {
                add_run(regions, region, region + 1);
            }
            rest &= rest - 1;
        }
    }
}

fn add_run(regions: &mut Vec<(u64, u64)>, first: u64, end: u64) {
    match regions.last_mut() {
        Some(last) if last.1 == first => last.1 = end,
        _ => regions.push((first, end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        let size_bytes = (PAGE_REGIONS * 2 + 10) * (1 << 20);
        let geometry = Geometry::new(size_bytes, 65536, 1 << 20).unwrap();
        Owner { series: Series([3; 16]), geometry }
    }

    #[test]
    fn marks_count_from_their_epoch_on() {
        let owner = owner();
        let mut file = owner.empty_file(4);
        assert_eq!(file.len(), 3 * PAGE_BYTES);
        let mut marks = [0; MARK_WORDS];
        marks[1] = 0b111;
        file[PAGE_BYTES..2 * PAGE_BYTES].copy_from_slice(&owner.encode(1, 6, &marks));
        let found = read(&owner, &file, 6).unwrap();
        assert_eq!(found.regions, [(PAGE_REGIONS + 64, PAGE_REGIONS + 67)]);
        assert!(found.is_sound && found.epoch == 6);
        assert!(read(&owner, &file, 7).unwrap().regions.is_empty());
    }

    #[test]
    fn a_page_in_doubt_stands_for_all_of_its_regions() {
        let owner = owner();
        let file = owner.empty_file(1);
        for at in 0..PAGE_BYTES {
            let mut damaged = file.clone();
            damaged[at] ^= 1;
            let found = read(&owner, &damaged, 1).unwrap();
            assert_eq!(found.regions, [(0, PAGE_REGIONS)], "byte {at}");
            assert!(!found.is_sound);
        }
        let found = read(&owner, &file[..PAGE_BYTES + 100], 1).unwrap();
        assert_eq!(found.regions, [(PAGE_REGIONS, PAGE_REGIONS * 2 + 10)]);
        let mut swapped = file.clone();
        swapped.rotate_left(PAGE_BYTES);
        assert!(read(&owner, &swapped, 1).is_none(), "every page is in another's place");
        let other = Owner { series: Series([4; 16]), ..owner };
        assert!(read(&other, &file, 1).is_none());
        assert!(read(&owner, &[], 1).is_none());
    }
}
