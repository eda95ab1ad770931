//! The requests on files (MS-SMB2 2.2.13 to 2.2.40), and what their answers say.

use crate::error::{Result, SmbError, status};
use crate::header::{Command, HEADER_BYTES};
use crate::link::{Reply, Request, Ticket};
use crate::session::Session;
use crate::wire::{Reader, Writer, from_utf16, length16, length32, utf16};
use vmtide_block::ByteRange;

/// A file's handle at the server.
pub(crate) type FileId = [u8; 16];

/// What an open is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Reading while nobody writes.
    Read,
    /// Reading and writing, alone.
    Write,
    /// A new file, written alone.
    Create,
    /// A directory, to list it or to ask for its volume.
    Directory,
    /// A new directory; one that is there is taken.
    CreateDirectory,
    /// To remove it.
    Remove,
    /// To remove a directory, which must be empty.
    RemoveDirectory,
}

const READ_DATA: u32 = 1;
const WRITE_DATA: u32 = 2;
const APPEND_DATA: u32 = 4;
const READ_ATTRIBUTES: u32 = 0x80;
const WRITE_ATTRIBUTES: u32 = 0x100;
const DELETE: u32 = 0x1_0000;
const SYNCHRONIZE: u32 = 0x10_0000;
const SHARE_READ: u32 = 1;
const SHARE_ALL: u32 = 7;
const OPEN: u32 = 1;
const CREATE: u32 = 2;
const OPEN_IF: u32 = 3;
const DIRECTORY_FILE: u32 = 1;
const NON_DIRECTORY_FILE: u32 = 0x40;
const DELETE_ON_CLOSE: u32 = 0x1000;
const ATTRIBUTE_DIRECTORY: u32 = 0x10;

/// The number of an information class of a file, and of a file system.
const FILE_INTERNAL: u8 = 6;
const FILE_END_OF_FILE: u8 = 20;
const FILE_DIRECTORY: u8 = 1;
const FS_FULL_SIZE: u8 = 7;
const FSCTL_SET_ZERO_DATA: u32 = 0x0009_80C8;

/// The most bytes that a directory is listed by at once.
const LIST_BYTES: u32 = 64 << 10;
/// The most files of a directory that are listed; a directory of a VM has dozens.
const MAX_LISTED: usize = 100_000;
/// How many answers a listing may have that name no further file.
const MAX_EMPTY_LISTS: usize = 4;

impl Purpose {
    /// Desired access, share access, disposition, options, attributes.
    const fn parameters(self) -> (u32, u32, u32, u32, u32) {
        let write =
            READ_DATA | WRITE_DATA | APPEND_DATA | READ_ATTRIBUTES | WRITE_ATTRIBUTES | SYNCHRONIZE;
        let look = READ_DATA | READ_ATTRIBUTES | SYNCHRONIZE;
        match self {
            Self::Read => (look, SHARE_READ, OPEN, NON_DIRECTORY_FILE, 0),
            Self::Write => (write, 0, OPEN, NON_DIRECTORY_FILE, 0),
            Self::Create => (write, 0, CREATE, NON_DIRECTORY_FILE, 0),
            Self::Directory => (look, SHARE_ALL, OPEN, DIRECTORY_FILE, 0),
            Self::CreateDirectory => {
                (look, SHARE_ALL, OPEN_IF, DIRECTORY_FILE, ATTRIBUTE_DIRECTORY)
            }
            Self::Remove => {
                let options = NON_DIRECTORY_FILE | DELETE_ON_CLOSE;
                (DELETE | READ_ATTRIBUTES | SYNCHRONIZE, SHARE_ALL, OPEN, options, 0)
            }
            Self::RemoveDirectory => {
                let options = DIRECTORY_FILE | DELETE_ON_CLOSE;
                (DELETE | READ_ATTRIBUTES | SYNCHRONIZE, SHARE_ALL, OPEN, options, 0)
            }
        }
    }
}

/// What opening a file tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) id: FileId,
    pub(crate) size_bytes: u64,
    /// In units of 100 ns since 1601.
    pub(crate) written_at: u64,
}

/// A file in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) is_directory: bool,
}

fn expect(reply: &Reply, what: &str) -> Result<()> {
    match reply.header.status {
        status::SUCCESS => Ok(()),
        code => Err(SmbError::from_status(what, code)),
    }
}

impl Session {
    /// Opens or makes a file or directory. `path` is relative to the share; `what` names it in errors.
    pub(crate) fn create(
        &self,
        tree: u32,
        path: &str,
        purpose: Purpose,
        what: &str,
    ) -> Result<Opened> {
        let (access, share, disposition, options, attributes) = purpose.parameters();
        let name = utf16(path);
        let mut body = Writer::default();
        // No oplock; impersonation.
        body.u16(57).u8(0).u8(0).u32(2).u64(0).u64(0).u32(access).u32(attributes).u32(share);
        body.u32(disposition).u32(options).u16(120).u16(length16(&name, "the path")?).u32(0).u32(0);
        body.bytes(&name);
        if name.is_empty() {
            // The share's own directory; the field behind must be there all the same.
            body.u8(0);
        }
        let reply = self.call(Command::Create, tree, &body.0, 0)?;
        expect(&reply, what)?;
        let reader = Reader::new(reply.message(), "answer to CREATE");
        reader.structure(HEADER_BYTES, 89)?;
        Ok(Opened {
            written_at: reader.u64(HEADER_BYTES + 24)?,
            size_bytes: reader.u64(HEADER_BYTES + 48)?,
            id: reader.bytes16(HEADER_BYTES + 64)?,
        })
    }

    /// Closes a handle.
    pub(crate) fn close(&self, tree: u32, id: FileId, what: &str) -> Result<()> {
        let mut body = Writer::default();
        body.u16(24).u16(0).u32(0).bytes(&id);
        expect(&self.call(Command::Close, tree, &body.0, 0)?, what)
    }

    /// Puts what was written on the server's medium.
    pub(crate) fn flush(&self, tree: u32, id: FileId, what: &str) -> Result<()> {
        let mut body = Writer::default();
        body.u16(24).u16(0).u32(0).bytes(&id);
        expect(&self.call(Command::Flush, tree, &body.0, 0)?, what)
    }

    /// Asks for `length` bytes; [`finish_read`](Self::finish_read) fetches them.
    pub(crate) fn begin_read(
        &self,
        tree: u32,
        id: FileId,
        offset: u64,
        length: u32,
    ) -> Result<Ticket> {
        let mut body = Writer::default();
        // Where the data shall be in the answer; no fewer bytes than one.
        body.u16(49).u8(80).u8(0).u32(length).u64(offset).bytes(&id).u32(1).u32(0).u32(0);
        body.u16(0).u16(0).u8(0);
        self.link.send(&Request {
            command: Command::Read,
            tree_id: tree,
            body: &body.0,
            data: &[],
            payload_bytes: length,
        })
    }

    /// Fetches what was asked for; answers with how many bytes came, which may be fewer.
    pub(crate) fn finish_read(
        &self,
        ticket: Ticket,
        buffer: &mut [u8],
        what: &str,
    ) -> Result<usize> {
        let reply = self.link.wait(ticket)?;
        if reply.header.status != status::BUFFER_OVERFLOW {
            expect(&reply, what)?;
        }
        let reader = Reader::new(reply.message(), "answer to READ");
        reader.structure(HEADER_BYTES, 17)?;
        let at = usize::from(reader.u8(HEADER_BYTES + 2)?);
        let length = usize::try_from(reader.u32(HEADER_BYTES + 4)?).unwrap_or(usize::MAX);
        let data = reader.slice(at, length)?;
        let Some(into) = buffer.get_mut(..length) else {
            return Err(SmbError::protocol(format!(
                "{length} bytes where {} were asked for",
                buffer.len()
            )));
        };
        into.copy_from_slice(data);
        self.link.recycle(reply);
        Ok(length)
    }

    /// Sends `data`; [`finish_write`](Self::finish_write) waits until the server has it.
    pub(crate) fn begin_write(
        &self,
        tree: u32,
        id: FileId,
        offset: u64,
        data: &[u8],
    ) -> Result<Ticket> {
        let length = length32(data, "a piece to write")?;
        let mut body = Writer::default();
        body.u16(49).u16(112).u32(length).u64(offset).bytes(&id).u32(0).u32(0).u16(0).u16(0).u32(0);
        self.link.send(&Request {
            command: Command::Write,
            tree_id: tree,
            body: &body.0,
            data,
            payload_bytes: length,
        })
    }

    /// Succeeds when the server has all of a write.
    pub(crate) fn finish_write(&self, ticket: Ticket, length: usize, what: &str) -> Result<()> {
        let reply = self.link.wait(ticket)?;
        expect(&reply, what)?;
        let reader = Reader::new(reply.message(), "answer to WRITE");
        reader.structure(HEADER_BYTES, 17)?;
        let written = reader.u32(HEADER_BYTES + 4)?;
        if usize::try_from(written).is_ok_and(|written| written == length) {
            return Ok(());
        }
        Err(SmbError::protocol(format!("{what}: {written} of {length} bytes were written")))
    }

    /// Changes the size of a file.
    pub(crate) fn set_size(&self, tree: u32, id: FileId, bytes: u64, what: &str) -> Result<()> {
        let mut body = Writer::default();
        body.u16(33).u8(1).u8(FILE_END_OF_FILE).u32(8).u16(96).u16(0).u32(0).bytes(&id).u64(bytes);
        expect(&self.call(Command::SetInfo, tree, &body.0, 0)?, what)
    }

    /// Has the server make a range zero.
    pub(crate) fn zero(&self, tree: u32, id: FileId, range: ByteRange, what: &str) -> Result<()> {
        let mut body = Writer::default();
        body.u16(57).u16(0).u32(FSCTL_SET_ZERO_DATA).bytes(&id).u32(120).u32(16).u32(0);
        body.u32(0).u32(0).u32(0).u32(1).u32(0).u64(range.offset).u64(range.end());
        expect(&self.call(Command::Ioctl, tree, &body.0, 0)?, what)
    }

    fn query(
        &self,
        tree: u32,
        id: FileId,
        kind: (u8, u8),
        bytes: u32,
        what: &str,
    ) -> Result<Vec<u8>> {
        let mut body = Writer::default();
        body.u16(41).u8(kind.0).u8(kind.1).u32(bytes).u16(0).u16(0).u32(0).u32(0).u32(0).bytes(&id);
        let reply = self.call(Command::QueryInfo, tree, &body.0, bytes)?;
        expect(&reply, what)?;
        let reader = Reader::new(reply.message(), "answer to QUERY_INFO");
        reader.structure(HEADER_BYTES, 9)?;
        output(&reader, bytes)
    }

    /// The file's number on its volume, which tells files apart whatever their paths.
    pub(crate) fn file_number(&self, tree: u32, id: FileId, what: &str) -> Result<u64> {
        let found = self.query(tree, id, (1, FILE_INTERNAL), 8, what)?;
        Reader::new(&found, "a file's number").u64(0)
    }

    /// The bytes that this user may still use on the volume.
    pub(crate) fn free_bytes(&self, tree: u32, id: FileId, what: &str) -> Result<u64> {
        let found = self.query(tree, id, (2, FS_FULL_SIZE), 32, what)?;
        let reader = Reader::new(&found, "a volume's size");
        let unit = u64::from(reader.u32(24)?).saturating_mul(u64::from(reader.u32(28)?));
        Ok(reader.u64(8)?.saturating_mul(unit))
    }

    /// What a directory holds, without itself and its parent.
    pub(crate) fn list(&self, tree: u32, id: FileId, what: &str) -> Result<Vec<Listed>> {
        let mut found = Vec::new();
        let mut empty = 0;
        loop {
            let pattern = utf16("*");
            let mut body = Writer::default();
            body.u16(33).u8(FILE_DIRECTORY).u8(0).u32(0).bytes(&id).u16(96);
            body.u16(length16(&pattern, "the pattern")?).u32(LIST_BYTES).bytes(&pattern);
            let reply = self.call(Command::QueryDirectory, tree, &body.0, LIST_BYTES)?;
            if matches!(reply.header.status, status::NO_MORE_FILES | status::NO_SUCH_FILE) {
                return Ok(found);
            }
            expect(&reply, what)?;
            let reader = Reader::new(reply.message(), "answer to QUERY_DIRECTORY");
            reader.structure(HEADER_BYTES, 9)?;
            let before = found.len();
            read_list(&output(&reader, LIST_BYTES)?, &mut found)?;
            if found.len() > MAX_LISTED {
                return Err(SmbError::unsupported(format!(
                    "{what} has more than {MAX_LISTED} files"
                )));
            }
            // `.` and `..` come alone at most once; a server that names nothing for ever is broken.
            empty += usize::from(found.len() == before);
            if empty > MAX_EMPTY_LISTS {
                return Err(SmbError::protocol(format!("{what}: a list that does not end")));
            }
        }
    }
}

/// The buffer of an answer to a query for at most so many bytes.
fn output(reader: &Reader<'_>, asked_bytes: u32) -> Result<Vec<u8>> {
    let at = usize::from(reader.u16(HEADER_BYTES + 2)?);
    let length = reader.u32(HEADER_BYTES + 4)?;
    if length > asked_bytes {
        let text = format!("{length} bytes where at most {asked_bytes} were asked for");
        return Err(SmbError::protocol(text));
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    Ok(reader.slice(at, length)?.to_vec())
}

/// What stands before the name of a file in a list.
const LISTED_BYTES: usize = 64;
/// The longest name of a file in bytes: 255 units of UTF-16, with room for servers that allow as many characters.
const MAX_NAME_BYTES: usize = 1024;

/// Reads a list of `FILE_DIRECTORY_INFORMATION` (MS-FSCC 2.4.10).
pub(crate) fn read_list(list: &[u8], found: &mut Vec<Listed>) -> Result<()> {
    let mut at = 0usize;
    loop {
        let rest = Reader::new(list.get(at..).unwrap_or_default(), "a list of files");
        let next = usize::try_from(rest.u32(0)?).unwrap_or(usize::MAX);
        let name_bytes = usize::try_from(rest.u32(60)?).unwrap_or(usize::MAX);
        if name_bytes > MAX_NAME_BYTES {
            return Err(SmbError::protocol(format!("a list with a name of {name_bytes} bytes")));
        }
        // Names that lie over one another would be more of them than there is room for.
        if next != 0 && next < LISTED_BYTES + name_bytes {
            return Err(SmbError::protocol("a list whose files overlap"));
        }
        // The caller refuses it.
        if found.len() > MAX_LISTED {
            return Ok(());
        }
        let name = from_utf16(rest.slice(LISTED_BYTES, name_bytes)?);
        let is_directory = rest.u32(56)? & ATTRIBUTE_DIRECTORY != 0;
        // A name with a separator would be another file than the one listed.
        let is_name = !name.is_empty() && !name.contains(['\\', '/', '\0']);
        if is_name && name != "." && name != ".." {
            found.push(Listed { name, size_bytes: rest.u64(40)?, is_directory });
        }
        if next == 0 {
            return Ok(());
        }
        at = at.saturating_add(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(next: u32, name: &str, size: u64, attributes: u32) -> Vec<u8> {
        let name = utf16(name);
        let mut writer = Writer::default();
        writer.u32(next).u32(0).zeros(32).u64(size).u64(size).u32(attributes);
        writer.u32(name.len().try_into().unwrap()).bytes(&name);
        writer.0
    }

    #[test]
    fn lists_are_read_and_lies_in_them_end() {
        let mut list = entry(72, "ab", 7, 0);
        list.resize(72, 0);
        list.extend(entry(0, "größe.vhdx", 1 << 40, 0x10));
        let mut found = Vec::new();
        read_list(&list, &mut found).unwrap();
        let listed = |name: &str, size_bytes, is_directory| Listed {
            name: name.into(),
            size_bytes,
            is_directory,
        };
        assert_eq!(found, [listed("ab", 7, false), listed("größe.vhdx", 1 << 40, true)]);
        for name in [".", "..", "a\\b", "a/b", ""] {
            let mut found = Vec::new();
            read_list(&entry(0, name, 1, 0), &mut found).unwrap();
            assert!(found.is_empty(), "{name}");
        }
        for length in 0..list.len() {
            assert!(read_list(&list[..length], &mut Vec::new()).is_err(), "{length}");
        }
        let mut far = entry(u32::MAX, "a", 1, 0);
        assert!(read_list(&far, &mut Vec::new()).is_err());
        far[60..64].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(read_list(&far, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_list_costs_no_more_than_it_says() {
        // Entries that lie over one another, each with the rest of the list for its name.
        let mut list = Vec::new();
        while list.len() < 64 << 10 {
            list.extend(entry(72, "ab", 7, 0));
            list.resize(list.len().next_multiple_of(72), 0);
        }
        for at in (0..list.len()).step_by(72) {
            let rest = u32::try_from(list.len() - at - 64).unwrap();
            list[at + 60..at + 64].copy_from_slice(&rest.to_le_bytes());
        }
        let error = read_list(&list, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("name of"), "{error}");
        let overlapping = [entry(66, "ab", 7, 0), entry(0, "b", 7, 0)].concat();
        assert!(read_list(&overlapping, &mut Vec::new()).is_err());
        // Once there are too many, no more are read.
        let many = Listed { name: "x".into(), size_bytes: 0, is_directory: false };
        let mut found = vec![many; MAX_LISTED + 1];
        read_list(&[entry(72, "ab", 7, 0), vec![0; 4], entry(0, "b", 7, 0)].concat(), &mut found)
            .unwrap();
        assert_eq!(found.len(), MAX_LISTED + 1);
    }

    #[test]
    fn an_answer_is_no_longer_than_was_asked_for() {
        let mut message = vec![0; HEADER_BYTES];
        let mut writer = Writer::default();
        writer.u16(9).u16(72).u32(100).zeros(100);
        message.extend(writer.0);
        let reader = Reader::new(&message, "an answer");
        assert_eq!(output(&reader, 100).unwrap().len(), 100);
        assert!(output(&reader, 99).is_err());
    }
}
