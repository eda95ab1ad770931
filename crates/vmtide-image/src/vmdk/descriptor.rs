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
    /// What is not as it should be and was not needed, one line each.
    pub(super) oddities: Vec<String>,
}

/// Why a descriptor cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It breaks the rules.
    Damaged(String),
    /// It has a word that is not known, which may be a kind of extent that a newer program writes.
    Unknown(String),
}

impl From<String> for Fault {
    fn from(detail: String) -> Self {
        Self::Damaged(detail)
    }
}

impl Fault {
    fn in_line(self, name: &str, offset: u64, line: usize) -> BlockError {
        let place = match line {
            0 => String::new(),
            line => format!(", line {line}"),
        };
        let (is_damage, detail) = match self {
            Self::Damaged(detail) => (true, detail),
            Self::Unknown(detail) => (false, detail),
        };
        let detail = format!("VMDK descriptor at {offset:#x}{place}: {detail}");
        if is_damage {
            BlockError::damaged(name, detail)
        } else {
            BlockError::unsupported(name, detail)
        }
    }
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
        Self::parse(&bytes).map_err(|(line, fault)| fault.in_line(&file.name(), offset, line))
    }

    /// Parses a descriptor, or says in which line it breaks; 0 for the whole.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, (usize, Fault)> {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let mut descriptor = Self::default();
        let encoding = encoding_of(&bytes[..end]);
        for (number, (at, raw)) in lines(&bytes[..end]).enumerate() {
            let line = decode(raw, encoding);
            descriptor.line(&line, at).map_err(|fault| (number + 1, fault))?;
        }
        descriptor.check_parent_id().map_err(|detail| (0, detail.into()))?;
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
            _ => Err((0, "the extents together are larger than any disk".to_owned().into())),
        }
    }

    /// Whether nothing is in it that tells of a disk.
    pub(super) fn says_nothing(&self) -> bool {
        self.cid.is_none()
            && !self.entries.contains_key("parentcid")
            && self.create_type.is_none()
            && self.extents.is_empty()
    }

    /// The size of the disk by the extents, in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.extents.iter().map(|extent| extent.sectors).sum()
    }

    /// A child without a readable content id of its parent could be read through any file.
    fn check_parent_id(&mut self) -> Result<(), String> {
        let Some(text) = self.entries.get("parentcid") else {
            return Ok(());
        };
        match (content_id(text), &self.parent_hint) {
            (Err(detail), Some(parent)) => {
                Err(format!("parentCID of the parent {parent:?}: {detail}"))
            }
            (Err(detail), None) => {
                self.oddities.push(format!("parentCID: {detail}; it names no parent"));
                Ok(())
            }
            (Ok(_), _) => Ok(()),
        }
    }

    fn line(&mut self, line: &str, at: usize) -> Result<(), Fault> {
        let text = line.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
        if text.is_empty() || text.starts_with('#') {
            return Ok(());
        }
        let first = text.split_whitespace().next().unwrap_or_default();
        if let Some(access) = access(first) {
            if self.extents.len() >= MAX_EXTENTS {
                return Err(format!("more than {MAX_EXTENTS} extents").into());
            }
            let extent = extent_line(access, text[first.len()..].trim_start())?;
            self.extents.push(extent);
            return Ok(());
        }
        if let Some((key, value)) = split_entry(text) {
            self.remember_place(&key, value, line, at);
            self.entry(key, value);
            return Ok(());
        }
        // Without it the disk would be shorter, and what follows in another place.
        let mut after = text.split_whitespace().skip(1);
        let is_count = after.next().is_some_and(|count| count.parse::<u64>().is_ok());
        if is_count && after.next().and_then(extent_type).is_some() {
            return Err(Fault::Unknown(format!(
                "extent access {first:?} is unknown; known are RW, RDONLY and NOACCESS"
            )));
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
        // A writer puts in as many digits as there are.
        let is_usable = line.is_ascii() && (key != CID || content_id(value).is_ok());
        if let (Some(known), Some(found), true) = (known, found, is_usable) {
            self.places.entry(known).or_insert((at + found, value.len()));
        }
    }

    fn entry(&mut self, key: String, value: &str) {
        match key.as_str() {
            // Only children ask for it.
            "cid" if self.cid.is_none() => match content_id(value) {
                Ok(cid) => self.cid = Some(cid),
                Err(detail) => {
                    self.oddities.push(format!("CID: {detail}; it can have no children"))
                }
            },
            "parentcid" if !self.entries.contains_key("parentcid") => {
                self.parent_cid = content_id(value).ok().filter(|cid| *cid != NO_PARENT);
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
    }
}

/// The lines of a descriptor, each with where it begins. They end with LF, CR LF, or CR alone.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut next = Some(0);
    std::iter::from_fn(move || {
        let at = next?;
        let rest = text.get(at..)?;
        let count = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
        next = count.map(|count| match rest[count..] {
            [b'\r', b'\n', ..] => at + count + 2,
            _ => at + count + 1,
        });
        Some((at, &rest[..count.unwrap_or(rest.len())]))
    })
}

/// The key of an entry in lower case, and its value without quotation marks.
pub(super) fn split_entry(line: &str) -> Option<(String, &str)> {
    let (key, value) = line.split_once('=')?;
    Some((key.trim().to_ascii_lowercase(), unquote(value)))
}

pub(super) fn access(word: &str) -> Option<Access> {
    match word.to_ascii_uppercase().as_str() {
        "RW" => Some(Access::ReadWrite),
        "RDONLY" => Some(Access::ReadOnly),
        "NOACCESS" => Some(Access::None),
        _ => None,
    }
}

pub(super) fn extent_type(word: &str) -> Option<ExtentType> {
    match word.to_ascii_uppercase().as_str() {
        "FLAT" | "VMFS" => Some(ExtentType::Flat),
        "SPARSE" | "VMFSSPARSE" | "SESPARSE" => Some(ExtentType::Sparse),
        "ZERO" => Some(ExtentType::Zero),
        "VMFSRDM" | "VMFSRAW" | "VMFSRDMP" => Some(ExtentType::RawDevice),
        _ => None,
    }
}

/// Parses what follows the access: `<sectors> <type> ["<file>" [<offset> …]]`.
fn extent_line(access: Access, rest: &str) -> Result<ExtentLine, Fault> {
    let mut words = rest.splitn(3, char::is_whitespace);
    let count = words.next().unwrap_or_default();
    let sectors = count
        .parse()
        .map_err(|_| format!("an extent of {count:?} sectors; a decimal number was expected"))?;
    // More than one blank between the words leaves blanks in front of the rest.
    let rest = rest[count.len()..].trim_start();
    let word = rest.split_whitespace().next().unwrap_or_default();
    let kind = extent_type(word).ok_or_else(|| {
        Fault::Unknown(format!(
            "extent type {word:?} is unknown; known are FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE, \
             SESPARSE, VMFSRDM and VMFSRAW"
        ))
    })?;
    let (file, after) = file_name(rest[word.len()..].trim_start());
    if file.is_empty() && kind != ExtentType::Zero {
        return Err(format!("an extent of type {word} without a file name").into());
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
    let said = lines(bytes).find_map(|(_, line)| {
        let (key, value) = split_entry(std::str::from_utf8(line).ok()?)?;
        (key == "encoding").then_some(value)
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
    fn lines_end_as_every_system_ends_them() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["version=1", "CID=7e5b80a7", "", "RW 8 FLAT \"a\" 0", ""].join(end);
            let found = Descriptor::parse(text.as_bytes()).unwrap();
            assert_eq!((found.cid, found.extents.len()), (Some(0x7e5b_80a7), 1), "{end:?}");
            let (at, count) = found.places[CID];
            assert_eq!(&text.as_bytes()[at..at + count], b"7e5b80a7", "{end:?}");
            let text = ["version=1", "", "CID=1", "RW many FLAT \"a\" 0"].join(end);
            assert_eq!(Descriptor::parse(text.as_bytes()).unwrap_err().0, 4, "{end:?}");
        }
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
            ("RW 1 VSANSPARSE \"a\"", 1, "VSANSPARSE"),
            ("RW 1 ZERO\nRX 1 FLAT \"a\" 0", 2, "RX"),
            ("CID=1\nparentCID=xyz\nparentFileNameHint=\"a\"", 0, "xyz"),
            ("RW 18446744073709551615 ZERO\nRW 2 ZERO", 0, "larger"),
        ] {
            let (found, fault) = Descriptor::parse(text.as_bytes()).unwrap_err();
            assert_eq!(found, line, "{text}");
            let is_unknown = matches!(fault, Fault::Unknown(_));
            assert_eq!(is_unknown, ["SPORES", "VSANSPARSE", "RX"].contains(&word), "{text}");
            let error = fault.in_line("a.vmdk", 512, line).to_string();
            assert!(error.contains(word) && error.contains("0x200"), "{error}");
        }
    }

    #[test]
    fn ids_are_only_wanted_where_somebody_asks_for_them() {
        let odd = |text: &str| {
            let found = Descriptor::parse(text.as_bytes()).unwrap();
            assert_eq!((found.parent_cid, found.extents.len()), (None, 1), "{text}");
            assert!(!found.places.contains_key(CID), "{text}");
            (found.cid, found.oddities)
        };
        let (cid, oddities) = odd("CID=xyz\nRW 1 ZERO");
        assert!(
            cid.is_none() && oddities.len() == 1 && oddities[0].contains("xyz"),
            "{oddities:?}"
        );
        assert_eq!(odd("CID=\nRW 1 ZERO").1.len(), 1);
        assert_eq!(odd("CID=123456789\nRW 1 ZERO").1.len(), 1);
        assert_eq!(odd("parentCID=none\nRW 1 ZERO").1.len(), 1);
        assert_eq!(odd("RW 1 ZERO").1.len(), 0);
    }
}
