//! The files and objects of a backup, as the backend describes them and the daemon wants them.

use crate::abi::{SavePacket, Stat, file_type, option};
use crate::backend::{Backend, Failed, Frame, Result};
use crate::core::Core;
use std::ffi::{CStr, CString, c_char};

/// The most bytes of one restore object.
const MAX_OBJECT_BYTES: usize = 16 << 20;

/// The most bytes that a disk can have here: half of what an offset can say, because the other half is for
/// what is not disk content.
const MAX_SIZE: u64 = 1 << 62;

/// A regular file that its owner may read and write.
const MODE: u32 = 0o100_600;

/// One file or object. The daemon is given pointers into it, so it is kept until the next one is asked for.
#[derive(Default)]
pub struct Entry {
    kind: EntryKind,
    name: CString,
    object: Vec<u8>,
    texts: [CString; 6],
    size: u64,
    time: i64,
    moment: (u64, u64),
    base: u64,
    delta: bool,
    offsets: bool,
    status: u8,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum EntryKind {
    #[default]
    File,
    Object,
    Options,
    CatalogueRow,
}

impl Entry {
    /// Asks the backend for the next one; none where there are no more.
    pub fn next(backend: &mut Backend, core: Core) -> Result<Option<Self>> {
        backend.command("Next")?;
        let mut entry = Self::default();
        let mut begun = false;
        loop {
            match backend.frame(core)? {
                Frame::End if begun => return Ok(Some(entry)),
                Frame::End => return Ok(None),
                Frame::Data(length) => entry.take_object(backend, length)?,
                Frame::Command(line) => match line.strip_prefix("Previous ") {
                    Some(name) => answer_previous(backend, core, name)?,
                    None => {
                        entry.take_line(&line)?;
                        begun = true;
                    }
                },
            }
        }
    }

    fn take_object(&mut self, backend: &mut Backend, length: usize) -> Result<()> {
        let before = self.object.len();
        if before.saturating_add(length) > MAX_OBJECT_BYTES {
            return Err(Failed("the backend sends a restore object of more than 16 MiB".into()));
        }
        self.object.resize(before + length, 0);
        let mut filled = before;
        while filled < self.object.len() {
            filled += backend.data(&mut self.object[filled..])?;
        }
        Ok(())
    }

    fn take_line(&mut self, line: &str) -> Result<()> {
        let (word, value) = line.split_once(' ').unwrap_or((line, ""));
        let wrong = || Failed(format!("the backend describes a file by {line:?}"));
        let number = || value.parse::<u64>().map_err(|_| wrong());
        match word {
            "File" => self.begin(EntryKind::File, value)?,
            "Object" => self.begin(EntryKind::Object, value)?,
            "Options" => self.begin(EntryKind::Options, value)?,
            "Row" => self.begin(EntryKind::CatalogueRow, value)?,
            "Size" => {
                self.size = number().ok().filter(|size| *size <= MAX_SIZE).ok_or_else(wrong)?
            }
            "Time" => self.time = value.parse().map_err(|_| wrong())?,
            "Moment" => self.moment = parse_moment(value).ok_or_else(wrong)?,
            "Base" => self.base = u64::from_str_radix(value, 16).map_err(|_| wrong())?,
            "Kind" => {
                (self.offsets, self.delta) = match value {
                    "plain" => (false, false),
                    "full" => (true, false),
                    "delta" => (true, true),
                    _ => return Err(wrong()),
                }
            }
            "Category" => self.texts[0] = text(value)?,
            "Type" => self.texts[1] = text(value)?,
            "Name" => self.texts[2] = text(value)?,
            "Source" => self.texts[3] = text(value)?,
            "Uuid" => self.texts[4] = text(value)?,
            "Status" => self.status = value.bytes().next().ok_or_else(wrong)?,
            _ => return Err(wrong()),
        }
        Ok(())
    }

    fn begin(&mut self, kind: EntryKind, name: &str) -> Result<()> {
        self.kind = kind;
        self.name = text(name)?;
        self.texts[5] = text("vmtide")?;
        Ok(())
    }

    /// Its name in the catalogue's tree of files; none where it is something else.
    pub fn file_name(&self) -> Option<&CStr> {
        (self.kind == EntryKind::File).then_some(self.name.as_c_str())
    }

    /// Whether it holds only what differs from the previous version.
    pub const fn is_delta(&self) -> bool {
        self.delta
    }

    /// Describes it to the daemon.
    pub fn fill(&mut self, packet: &mut SavePacket) {
        let name = self.name.as_ptr().cast_mut();
        // An estimate looks every entry up by its name, also those that are no files.
        packet.file_name = name;
        packet.link = name;
        packet.attributes = self.attributes();
        packet.portable = 1;
        packet.no_read = 0;
        match self.kind {
            EntryKind::File => {
                packet.kind = file_type::REGULAR;
                if self.offsets {
                    packet.flags |= option::OFFSETS;
                }
            }
            EntryKind::Object | EntryKind::Options => {
                packet.kind = match self.kind {
                    EntryKind::Object => file_type::RESTORE_FIRST,
                    _ => file_type::PLUGIN_CONFIG,
                };
                packet.no_read = 1;
                let length = i32::try_from(self.object.len()).unwrap_or(0);
                // The daemon may look for the end of a string.
                self.object.push(0);
                packet.restore_object.name = name;
                packet.restore_object.object = self.object.as_mut_ptr().cast::<c_char>();
                packet.restore_object.length = length;
                packet.restore_object.index = 1;
            }
            EntryKind::CatalogueRow => {
                packet.kind = file_type::PLUGIN_OBJECT;
                packet.no_read = 1;
                let [category, kind, label, source, uuid, plugin] =
                    self.texts.each_ref().map(|text| text.as_ptr().cast_mut());
                let object = &mut packet.plugin_object;
                object.path = name;
                object.plugin_name = plugin;
                object.category = category;
                object.kind = kind;
                object.name = label;
                object.source = source;
                object.uuid = uuid;
                object.size = self.size;
                object.status = i32::from(self.status);
                object.count = 1;
            }
        }
    }

    fn attributes(&self) -> Stat {
        let size = i64::try_from(self.size).unwrap_or(i64::MAX);
        Stat {
            device: self.base,
            inode: self.moment.0,
            links: 1,
            mode: MODE,
            special_device: self.moment.1,
            size,
            block_size: 4096,
            blocks: size / 512,
            times: [[self.time, 0]; 3],
            ..Stat::zeroed()
        }
    }
}

#[cfg(test)]
impl Entry {
    /// A file of which no more is known than its name.
    pub fn of_file(name: &str) -> Result<Self> {
        Ok(Self { kind: EntryKind::File, name: text(name)?, ..Self::default() })
    }

    /// A form of options.
    pub fn of_form(name: &str) -> Result<Self> {
        Ok(Self { kind: EntryKind::Options, name: text(name)?, ..Self::default() })
    }
}

/// Tells the backend what the previous job knew of a file.
fn answer_previous(backend: &mut Backend, core: Core, name: &str) -> Result<()> {
    let answer = match core.previous(&text(name)?) {
        Some(previous) => format!(
            "Previous {:016x}{:016x} {} {}",
            previous.moment.0, previous.moment.1, previous.size, previous.sequence
        ),
        None => "Previous none".to_owned(),
    };
    backend.command(&answer)
}

/// A moment: 32 hexadecimal digits.
fn parse_moment(text: &str) -> Option<(u64, u64)> {
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    let (first, second) = text.split_at(16);
    Some((u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(second, 16).ok()?))
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Failed("the backend sends a name with a zero".into()))
}
