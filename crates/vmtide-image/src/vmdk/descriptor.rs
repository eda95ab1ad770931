//! The descriptor: the text that says what the disk is and where its extents are (Virtual Disk
//! Format 5.0, "The Descriptor File").
//!
//! It is a file of its own or a few sectors inside the one sparse extent. Many programs write it,
//! with blanks, comments, line ends and keys of their own, so it is read liberally: what is not
//! understood is skipped, what is needed and broken is an error.

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};
use std::collections::BTreeMap;
use vmtide_block::{BlockDevice, BlockError, Result};

/// The longest descriptor. Real ones have a kilobyte, and sixty bytes for each extent; without a
/// limit a flat extent given by mistake would be read into memory.
pub(super) const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;

/// The most extents of one disk: 8 TiB in files of 2 GiB. Each is an open file.
const MAX_EXTENTS: usize = 4096;

/// What `parentCID` is where there is no parent (Virtual Disk Format 5.0, "The Header").
pub(super) const NO_PARENT: u32 = u32::MAX;

/// The content ids, in the short and in the long form; both change with the first write.
pub(super) const CID: &str = "cid";
pub(super) const LONG_CONTENT_ID: &str = "ddb.longcontentid";

/// The file of changed blocks, which a writer that does not keep it must take out.
pub(super) const CHANGE_TRACK_PATH: &str = "changetrackpath";

const CHANGED_IN_PLACE: [&str; 3] = [CID, LONG_CONTENT_ID, CHANGE_TRACK_PATH];

/// What a descriptor says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// The content id: changes with the first write after an open.
    pub(super) cid: Option<u32>,
    /// Where values that a writer changes in place stand in the descriptor: offset and length.
    pub(super) places: BTreeMap<&'static str, (usize, usize)>,
    /// The parent's content id when this child was made; none where there is no parent.
    pub(super) parent_cid: Option<u32>,
    /// The parent's path as its writer knew it.
    pub(super) parent_hint: Option<String>,
    /// The kind of disk, in the writer's spelling.
    pub(super) create_type: Option<String>,
    /// The extents in the order of the disk.
    pub(super) extents: Vec<ExtentLine>,
    /// All other entries, keys in lower case; the first of a kind counts.
    pub(super) entries: BTreeMap<String, String>,
}

/// Whether an extent may be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
    /// The bytes are nobody's business: a partition of a physical disk that the guest must not see.
    None,
}

/// What lies in an extent's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentType {
    /// The bytes as they are (FLAT, VMFS).
    Flat,
    /// Grains behind tables; the file's own signature says which kind (SPARSE, VMFSSPARSE,
    /// SESPARSE).
    Sparse,
    /// Nothing: zeros, without a file.
    Zero,
    /// A disk of a storage network that the file only points at (VMFSRDM, VMFSRAW).
    RawDevice,
}

/// One line that describes an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) access: Access,
    pub(super) sectors: u64,
    pub(super) kind: ExtentType,
    /// The name of the file; empty for zeros.
    pub(super) file: String,
    /// Where a flat extent begins in its file, in sectors.
    pub(super) offset_sectors: u64,
}

impl Descriptor {
    /// Reads a descriptor that is a file of its own.
    pub(super) fn read_file(file: &dyn BlockDevice) -> Result<Self> {
        let size_bytes = file.size_bytes();
        if size_bytes > MAX_DESCRIPTOR_BYTES {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "VMDK descriptor: the file has {size_bytes} bytes, a descriptor has at most \
                     {MAX_DESCRIPTOR_BYTES}; this may be a flat extent, give its descriptor"
                ),
            ));
        }
        Self::read(file, 0, size_bytes)
    }

    /// Reads the descriptor in these bytes of a file; the caller has bounded the length.
    pub(super) fn read(file: &dyn BlockDevice, offset: u64, length_bytes: u64) -> Result<Self> {
        let mut bytes = vec![0; crate::bytes::length(length_bytes)];
        file.read_at(&mut bytes, offset)?;
        Self::parse(&bytes).map_err(|(line, detail)| {
            BlockError::damaged(
                file.name(),
                format!("VMDK descriptor at {offset:#x}, line {line}: {detail}"),
            )
        })
    }

    /// Parses a descriptor, or says in which line it breaks.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, (usize, String)> {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let mut descriptor = Self::default();
        let encoding = encoding_of(&bytes[..end]);
        let mut at = 0;
        for (number, raw) in bytes[..end].split(|byte| *byte == b'\n').enumerate() {
            let line = decode(raw, encoding);
            descriptor.line(&line, at).map_err(|detail| (number + 1, detail))?;
            at += raw.len() + 1;
        }
        // Some writers have 0 for no parent; a child says where its parent is.
        if descriptor.parent_cid == Some(0) && descriptor.parent_hint.is_none() {
            descriptor.parent_cid = None;
        }
        let mut total = Some(0u64);
        for extent in &descriptor.extents {
            total = total.and_then(|sum| sum.checked_add(extent.sectors));
        }
        match total {
            Some(sectors) if sectors <= super::MAX_SECTORS => Ok(descriptor),
            _ => Err((0, "the extents together are larger than any disk".into())),
        }
    }

    /// The size of the disk by the extents, in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.extents.iter().map(|extent| extent.sectors).sum()
    }

    fn line(&mut self, line: &str, at: usize) -> Result<(), String> {
        let text = line.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
        if text.is_empty() || text.starts_with('#') {
            return Ok(());
        }
        let first = text.split_whitespace().next().unwrap_or_default();
        if let Some(access) = access(first) {
            if self.extents.len() >= MAX_EXTENTS {
                return Err(format!("more than {MAX_EXTENTS} extents"));
            }
            let extent = extent_line(access, text[first.len()..].trim_start())?;
            self.extents.push(extent);
            return Ok(());
        }
        if let Some((key, value)) = text.split_once('=') {
            let key = key.trim().to_ascii_lowercase();
            self.remember_place(&key, unquote(value), line, at);
            self.entry(key, unquote(value))?;
        }
        Ok(())
    }

    /// Remembers where a value is that a writer changes. Bytes are characters only in ASCII, and
    /// these values are nothing else.
    fn remember_place(&mut self, key: &str, value: &str, line: &str, at: usize) {
        let known = CHANGED_IN_PLACE.into_iter().find(|known| *known == key);
        let found = line
            .split_once('=')
            .and_then(|(before, after)| after.find(value).map(|inside| before.len() + 1 + inside));
        if let (Some(known), Some(found), true) = (known, found, line.is_ascii()) {
            self.places.entry(known).or_insert((at + found, value.len()));
        }
    }

    fn entry(&mut self, key: String, value: &str) -> Result<(), String> {
        match key.as_str() {
            "cid" if self.cid.is_none() => {
                self.cid = Some(content_id(value)?);
            }
            "parentcid" if !self.entries.contains_key("parentcid") => {
                self.parent_cid = Some(content_id(value)?).filter(|cid| *cid != NO_PARENT);
                self.entries.insert(key, value.to_owned());
            }
            "parentfilenamehint" if self.parent_hint.is_none() => {
                self.parent_hint = Some(value.to_owned());
            }
            "createtype" if self.create_type.is_none() => {
                self.create_type = Some(value.to_owned());
            }
            "cid" | "parentfilenamehint" | "createtype" | "parentcid" => {}
            _ => {
                self.entries.entry(key).or_insert_with(|| value.to_owned());
            }
        }
        Ok(())
    }
}

fn access(word: &str) -> Option<Access> {
    match word.to_ascii_uppercase().as_str() {
        "RW" => Some(Access::ReadWrite),
        "RDONLY" => Some(Access::ReadOnly),
        "NOACCESS" => Some(Access::None),
        _ => None,
    }
}

/// Parses what follows the access: `<sectors> <type> ["<file>" [<offset> …]]`.
fn extent_line(access: Access, rest: &str) -> Result<ExtentLine, String> {
    let mut words = rest.splitn(3, char::is_whitespace);
    let count = words.next().unwrap_or_default();
    let sectors = count
        .parse()
        .map_err(|_| format!("an extent of {count:?} sectors; a decimal number was expected"))?;
    // More than one blank between the words leaves blanks in front of the rest.
    let rest = rest[count.len()..].trim_start();
    let word = rest.split_whitespace().next().unwrap_or_default();
    let kind = match word.to_ascii_uppercase().as_str() {
        "FLAT" | "VMFS" => ExtentType::Flat,
        "SPARSE" | "VMFSSPARSE" | "SESPARSE" => ExtentType::Sparse,
        "ZERO" => ExtentType::Zero,
        "VMFSRDM" | "VMFSRAW" | "VMFSRDMP" => ExtentType::RawDevice,
        _ => {
            return Err(format!(
                "extent type {word:?} is unknown; known are FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE, \
                 SESPARSE, VMFSRDM and VMFSRAW"
            ));
        }
    };
    let (file, after) = file_name(rest[word.len()..].trim_start());
    if file.is_empty() && kind != ExtentType::Zero {
        return Err(format!("an extent of type {word} without a file name"));
    }
    let offset = after.split_whitespace().next().unwrap_or("0");
    let offset_sectors = match kind {
        ExtentType::Flat => offset.parse().map_err(|_| {
            format!("a flat extent at {offset:?}; a number of sectors was expected")
        })?,
        _ => 0,
    };
    Ok(ExtentLine { access, sectors, kind, file: file.to_owned(), offset_sectors })
}

/// The file name at the start of `text`, in quotation marks or up to a blank, and what follows.
fn file_name(text: &str) -> (&str, &str) {
    match text.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"').unwrap_or((quoted.trim_end(), "")),
        None => text.split_once(char::is_whitespace).unwrap_or((text, "")),
    }
}

fn unquote(value: &str) -> &str {
    let value = value.trim();
    let inner = value.strip_prefix('"').unwrap_or(value);
    inner.strip_suffix('"').unwrap_or(inner)
}

fn content_id(value: &str) -> Result<u32, String> {
    let digits = value.trim_start_matches("0x");
    u32::from_str_radix(digits, 16)
        .map_err(|_| format!("content id {value:?}; eight hexadecimal digits were expected"))
}

/// The encoding that a descriptor says it is in (`encoding="GBK"`): VMware writes that of the system
/// it runs on. One that is not said or not known counts as that of western Europe.
fn encoding_of(bytes: &[u8]) -> &'static Encoding {
    let said = bytes.split(|byte| *byte == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        let (key, value) = line.split_once('=')?;
        key.trim().eq_ignore_ascii_case("encoding").then(|| unquote(value))
    });
    said.and_then(|label| Encoding::for_label(label.as_bytes()))
        .filter(|encoding| *encoding != UTF_8)
        .unwrap_or(WINDOWS_1252)
}

/// The text of a line. Older writers lie about their encoding: what is UTF-8 is taken as that.
fn decode(bytes: &[u8], encoding: &'static Encoding) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => encoding.decode_without_bom_handling(bytes).0.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_real_programs_write_is_understood() {
        let text = "\u{feff}# Description file created by VMDK stream converter\r\nversion=1\r\n\
            # Believe this is random\r\nCID = 7e5b80a7  \r\nparentCID=ffffffff \r\n\
            createType=\"streamOptimized\"   \r\n\r\n  RDONLY  2048   SPARSE  \"call-me-stream.vmdk\" \
            \r\nRW 63 FLAT \"a b.vmdk\" 77\r\nrw 4 zero\r\nNOACCESS 1 VMFS plain.vmdk\r\n\
            changeTrackPath=\"x-ctk.vmdk\"\r\nddb.adapterType = \"lsilogic\"\r\nstray words\r\n\
            ddb.last = \"11\"";
        let mut bytes = text.as_bytes().to_vec();
        bytes.extend([0; 40]);
        bytes.extend(b"RW 1 NONSENSE");
        let found = Descriptor::parse(&bytes).unwrap();
        assert_eq!(found.cid, Some(0x7e5b_80a7));
        let (at, count) = found.places[CID];
        assert_eq!(&bytes[at..at + count], b"7e5b80a7");
        assert_eq!(found.parent_cid, None);
        assert_eq!(found.create_type.as_deref(), Some("streamOptimized"));
        assert_eq!(found.entries["changetrackpath"], "x-ctk.vmdk");
        assert_eq!(found.entries["ddb.last"], "11");
        let lines: Vec<_> = found
            .extents
            .iter()
            .map(|e| (e.access, e.sectors, e.kind, e.file.as_str(), e.offset_sectors))
            .collect();
        assert_eq!(
            lines,
            [
                (Access::ReadOnly, 2048, ExtentType::Sparse, "call-me-stream.vmdk", 0),
                (Access::ReadWrite, 63, ExtentType::Flat, "a b.vmdk", 77),
                (Access::ReadWrite, 4, ExtentType::Zero, "", 0),
                (Access::None, 1, ExtentType::Flat, "plain.vmdk", 0),
            ]
        );
    }

    #[test]
    fn names_in_old_encodings_do_not_stop_the_reading() {
        let found =
            Descriptor::parse(b"encoding=\"windows-1252\"\nCID=1\nRW 1 FLAT \"Gr\xfcn.vmdk\" 0");
        assert_eq!(found.unwrap().extents[0].file, "Gr\u{fc}n.vmdk");
        for (encoding, name, bytes) in [
            ("GBK", "新建.vmdk", &b"\xd0\xc2\xbd\xa8.vmdk"[..]),
            ("Shift_JIS", "ディ.vmdk", b"\x83\x66\x83\x42.vmdk"),
            ("windows-1251", "Диск.vmdk", b"\xc4\xe8\xf1\xea.vmdk"),
            ("UTF-8", "Grün.vmdk", b"Gr\xc3\xbcn.vmdk"),
            ("UTF-8", "Grün.vmdk", b"Gr\xfcn.vmdk"),
            ("no such thing", "Grün.vmdk", b"Gr\xfcn.vmdk"),
        ] {
            let text = format!("version=1\nencoding=\"{encoding}\"\nCID=1\nRW 1 FLAT \"");
            let found = Descriptor::parse(&[text.as_bytes(), bytes, b"\" 0\n"].concat()).unwrap();
            assert_eq!(found.extents[0].file, name, "{encoding}");
        }
    }

    #[test]
    fn a_parent_of_zero_without_a_name_is_none() {
        let parse = |text: &str| Descriptor::parse(text.as_bytes()).unwrap().parent_cid;
        assert_eq!(parse("CID=1\nparentCID=0\nRW 1 ZERO"), None);
        let child = "CID=1\nparentCID=0\nparentFileNameHint=\"a.vmdk\"\nRW 1 ZERO";
        assert_eq!(parse(child), Some(0));
    }

    #[test]
    fn broken_lines_are_named() {
        for (text, line, word) in [
            ("version=1\nRW many FLAT \"a\" 0", 2, "many"),
            ("RW 1 SPORES \"a\"", 1, "SPORES"),
            ("RW 1 FLAT", 1, "file name"),
            ("RW 1 FLAT \"a\" -1", 1, "-1"),
            ("CID=xyz", 1, "xyz"),
            ("RW 18446744073709551615 ZERO\nRW 2 ZERO", 0, "larger"),
        ] {
            let (found, detail) = Descriptor::parse(text.as_bytes()).unwrap_err();
            assert_eq!(found, line, "{text}");
            assert!(detail.contains(word), "{detail}");
        }
    }
}
