//! The parent locator (MS-VHDX 2.6.2.6): how a differencing image names its parent.
//!
//! A table of key and value texts. `parent_linkage` is the parent's DataWriteGuid and the only
//! thing that makes a file the parent; the paths say where it was when the child was written.

use super::guid::Guid;
use crate::bytes::{le_u16, le_u32, put};
use crate::{Format, ParentLink};

/// The only type of locator there is.
pub(crate) const LOCATOR_TYPE: Guid =
    Guid::new(0xb04a_efb7, 0xd19e, 0x4a81, [0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13]);
/// The parent's DataWriteGuid, in braces.
pub(crate) const PARENT_LINKAGE: &str = "parent_linkage";
/// A second DataWriteGuid that the parent may have, written while one is being merged or backed up;
/// nil means none.
pub(crate) const PARENT_LINKAGE_2: &str = "parent_linkage2";
/// The parent's path from the child's directory.
pub(crate) const RELATIVE_PATH: &str = "relative_path";
/// The parent's path on its volume, by the volume's GUID.
pub(crate) const VOLUME_PATH: &str = "volume_path";
/// The parent's absolute path with its drive.
pub(crate) const ABSOLUTE_WIN32_PATH: &str = "absolute_win32_path";

/// The most bytes that all keys and values take. They may share bytes in the file, so the length of
/// the item alone would allow gigabytes.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// A parent locator: its texts in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ParentLocator {
    /// Keys and values.
    pub(crate) entries: Vec<(String, String)>,
}

impl ParentLocator {
    /// Decodes the item; `Err` says what is wrong with it, to follow "parent locator at OFFSET: ".
    /// Text that is not UTF-16 gets replacement characters, and is then found nowhere.
    pub(crate) fn decode(item: &[u8]) -> Result<Self, String> {
        if item.len() < 20 {
            return Err(format!("{} bytes, a locator has at least 20", item.len()));
        }
        let kind = Guid::at(item, 0);
        if kind != LOCATOR_TYPE {
            return Err(format!("the type is {kind}, only {LOCATOR_TYPE} (VHDX) is known"));
        }
        let count = usize::from(le_u16(item, 18));
        let table = item[20..].chunks_exact(12).take(count);
        if table.len() < count {
            return Err(format!("{count} entries do not fit its {} bytes", item.len()));
        }
        let mut budget = MAX_TEXT_BYTES;
        let mut entries = Vec::with_capacity(count);
        for (index, entry) in table.enumerate() {
            let mut text = |what: &str, offset: u32, bytes: u16| {
                let (start, length) = (offset as usize, usize::from(bytes));
                let units = start.checked_add(length).and_then(|end| item.get(start..end));
                match (units, budget.checked_sub(length)) {
                    (Some(units), Some(rest)) if length > 0 && length.is_multiple_of(2) => {
                        budget = rest;
                        Ok(utf16(units))
                    }
                    _ => Err(format!(
                        "the {what} of entry {index}, {length} bytes at {offset:#x}, must be \
                         UTF-16 inside the item of {} bytes, {MAX_TEXT_BYTES} bytes in all",
                        item.len()
                    )),
                }
            };
            let key = text("key", le_u32(entry, 0), le_u16(entry, 8))?;
            let value = text("value", le_u32(entry, 4), le_u16(entry, 10))?;
            entries.push((key, value));
        }
        Ok(Self { entries })
    }

    /// The item's bytes; `Err` where a text is longer than a `u16` says or there are too many.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        let count = u16::try_from(self.entries.len())
            .map_err(|_| format!("{} parent locator entries are too many", self.entries.len()))?;
        let mut item = vec![0; 20 + self.entries.len() * 12];
        put(&mut item, 0, &LOCATOR_TYPE.to_bytes());
        put(&mut item, 18, &count.to_le_bytes());
        for (index, (key, value)) in self.entries.iter().enumerate() {
            for (text, offset_at, length_at) in [(key, 0, 8), (value, 4, 10)] {
                let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let (Ok(length), Ok(offset)) =
                    (u16::try_from(units.len()), u32::try_from(item.len()))
                else {
                    return Err(format!(
                        "the text of {} bytes for {key:?} is too long for a parent locator",
                        units.len()
                    ));
                };
                let entry = 20 + index * 12;
                put(&mut item, entry + offset_at, &offset.to_le_bytes());
                put(&mut item, entry + length_at, &length.to_le_bytes());
                item.extend_from_slice(&units);
            }
        }
        Ok(item)
    }

    /// The value of a key, in any case of its letters.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let found = self.entries.iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
        found.map(|(_, value)| value.as_str())
    }

    /// The DataWriteGuids that the parent may have; nil ones and what is no GUID left out.
    pub(crate) fn linkages(&self) -> Vec<Guid> {
        let mut linkages: Vec<Guid> = Vec::new();
        for key in [PARENT_LINKAGE, PARENT_LINKAGE_2] {
            if let Some(Ok(guid)) = self.get(key).map(str::parse::<Guid>)
                && !guid.is_nil()
                && !linkages.contains(&guid)
            {
                linkages.push(guid);
            }
        }
        linkages
    }

    /// What to look for, and where, in the order of the specification.
    pub(crate) fn link(&self) -> ParentLink {
        let names = [RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_WIN32_PATH];
        ParentLink {
            names: names.into_iter().filter_map(|key| self.get(key)).map(str::to_owned).collect(),
            format: Some(Format::Vhdx),
            identities: self.linkages().iter().map(Guid::to_string).collect(),
        }
    }
}

fn utf16(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes.chunks_exact(2).map(|unit| le_u16(unit, 0)).collect();
    // The specification stores no terminator; some tools do.
    String::from_utf16_lossy(&units).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUID: &str = "{5C39B92D-1D5A-4CC6-A8C5-3D9A7C1F9B10}";

    fn locator(entries: &[(&str, &str)]) -> ParentLocator {
        let entries = entries.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        ParentLocator { entries: entries.collect() }
    }

    #[test]
    fn locators_come_back() {
        let locator = locator(&[
            (PARENT_LINKAGE, GUID),
            (ABSOLUTE_WIN32_PATH, r"C:\disks\größe 😀.vhdx"),
            (RELATIVE_PATH, r".\größe.vhdx"),
            (PARENT_LINKAGE_2, "{00000000-0000-0000-0000-000000000000}"),
        ]);
        let item = locator.encode().unwrap();
        assert_eq!(ParentLocator::decode(&item), Ok(locator.clone()));
        let link = locator.link();
        assert_eq!(link.names, [r".\größe.vhdx", r"C:\disks\größe 😀.vhdx"]);
        assert_eq!(link.identities, ["5c39b92d-1d5a-4cc6-a8c5-3d9a7c1f9b10"]);
        assert_eq!(link.format, Some(Format::Vhdx));
    }

    #[test]
    fn a_second_linkage_counts_and_nonsense_does_not() {
        let both = locator(&[
            (PARENT_LINKAGE_2, "{00000000-0000-0000-0000-000000000001}"),
            (PARENT_LINKAGE, GUID),
        ]);
        assert_eq!(both.linkages().len(), 2);
        assert_eq!(both.linkages()[0], GUID.parse().unwrap());
        assert!(locator(&[(PARENT_LINKAGE, "yes")]).linkages().is_empty());
    }

    #[test]
    fn broken_ones_are_refused() {
        let good = locator(&[(PARENT_LINKAGE, GUID)]).encode().unwrap();
        let with = |at: usize, value: u8| {
            let mut item = good.clone();
            item[at] = value;
            ParentLocator::decode(&item).unwrap_err()
        };
        assert!(with(0, 0).contains("type"));
        assert!(with(18, 200).contains("200 entries"));
        assert!(with(20, 0xff).contains("key of entry 0"));
        assert!(with(27, 0xff).contains("value of entry 0"));
        assert!(with(28, 1).contains("key of entry 0, 1 bytes"));
        assert!(with(30, 0).contains("value of entry 0, 0 bytes"));
        assert!(ParentLocator::decode(&good[..19]).is_err());
        // 65535 entries that all share one text of 65534 bytes would take gigabytes.
        let mut shared = vec![0x41; 1 << 20];
        shared[..16].copy_from_slice(&LOCATOR_TYPE.to_bytes());
        shared[18..20].copy_from_slice(&u16::MAX.to_le_bytes());
        for entry in shared[20..].chunks_exact_mut(12).take(65535) {
            entry.copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0xff, 0xfe, 0xff]);
        }
        assert!(ParentLocator::decode(&shared).unwrap_err().contains("in all"));
        assert!(locator(&[("k", &"x".repeat(40_000))]).encode().is_err());
    }
}
