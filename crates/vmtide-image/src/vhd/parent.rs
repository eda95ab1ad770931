//! Who the parent of a differencing VHD is: names in several spellings, and the id that decides.

use super::footer::{Kind, Located, id_text, read_at};
use super::header::{Header, Locator, decode_utf16};
use super::image::Opened;
use crate::{Format, ParentLink};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The longest text of a locator that is read. Windows' longest path has 32767 units.
const MAX_TEXT_BYTES: u32 = 64 << 10;

/// The spellings in the order in which they are tried: relative ones first, because whole chains
/// are moved together. `MacX` is a URL, relative in what XenServer writes.
const CODES: [&[u8; 4]; 5] = [b"W2ru", b"W2ku", b"MacX", b"Wi2r", b"Wi2k"];

/// How the image names its parent; `None` where it has none.
pub(crate) fn parent_link(file: &dyn BlockDevice) -> Result<Option<ParentLink>> {
    let footer = Located::find(file)?.footer;
    if footer.kind != Kind::Differencing {
        return Ok(None);
    }
    let header = Header::read(file, &footer)?;
    Ok(Some(link_of(file, &header)?))
}

pub(super) fn link_of(file: &dyn BlockDevice, header: &Header) -> Result<ParentLink> {
    let locators = header.locators();
    let mut names = Vec::new();
    for code in CODES {
        for (_, locator) in locators.iter().filter(|(_, locator)| &locator.code == code) {
            names.extend(locator_text(file, locator)?);
        }
    }
    names.push(header.parent_name());
    names.retain(|name| !name.is_empty());
    let mut seen = Vec::new();
    names.retain(|name| {
        let is_new = !seen.contains(name);
        seen.push(name.clone());
        is_new
    });
    Ok(ParentLink {
        names,
        format: Some(Format::Vhd),
        identities: vec![id_text(header.parent_id())],
    })
}

/// The text of a locator; none where it is not in the file. One bad locator does not hide the
/// others: what counts in the end is the parent's id.
fn locator_text(file: &dyn BlockDevice, locator: &Locator) -> Result<Option<String>> {
    let text_bytes = locator.text_bytes.min(MAX_TEXT_BYTES);
    let Some(bytes) = read_at(file, locator.offset, u64::from(text_bytes))? else {
        return Ok(None);
    };
    Ok(Some(match &locator.code {
        b"W2ru" | b"W2ku" => {
            // Little-endian by the specification. Path names begin with ASCII, so where that is
            // in the second byte a tool wrote the other order.
            let is_big_endian = matches!(bytes.get(..2), Some([0, second]) if *second != 0);
            let unit = if is_big_endian { u16::from_be_bytes } else { u16::from_le_bytes };
            decode_utf16(&bytes, unit)
        }
        code => {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
            let is_url = code == b"MacX";
            text.strip_prefix("file://").filter(|_| is_url).unwrap_or(&text).to_owned()
        }
    }))
}

/// The error for a differencing image whose parent was not given.
pub(super) fn refuse_without_parent(file: &dyn BlockDevice, opened: &Opened) -> BlockError {
    let link = opened.header.as_ref().map(|header| link_of(file, header));
    let link = match link {
        Some(Ok(link)) => link,
        Some(Err(error)) => return error,
        None => ParentLink::default(),
    };
    BlockError::unsupported(
        file.name(),
        format!(
            "depends on the parent {:?} (unique id {}), which was not opened; allow it (backing \
             policy) if you trust the image",
            link.names.first().map_or("(not named)", String::as_str),
            link.identities.first().map_or("unknown", String::as_str),
        ),
    )
}
