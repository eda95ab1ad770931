//! Whether a file is a descriptor: in every spelling in which one is read.

use super::descriptor::{access, extent_type, lines, split_entry};
use crate::bytes::length;
use vmtide_block::{BlockDevice, Result};

/// How much of a text is looked at: some programs put their licence in front.
const MAX_BYTES: u64 = 64 << 10;

/// The title that VMware and most others write in a comment.
const TITLE: &str = "disk descriptorfile";

/// Whether the file that begins with `head` is a descriptor.
///
/// # Errors
/// Where the file cannot be read.
pub(crate) fn is_descriptor(file: &dyn BlockDevice, head: &[u8]) -> Result<bool> {
    if !is_text(until_zero(head)) {
        return Ok(false);
    }
    let mut bytes = vec![0; length(file.size_bytes().min(MAX_BYTES))];
    file.read_at(&mut bytes, 0)?;
    let text = until_zero(&bytes);
    Ok(is_text(text) && lines(text).any(|(_, line)| tells(line)))
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// Whether these bytes may be text, in any encoding that has ASCII in it.
fn is_text(bytes: &[u8]) -> bool {
    let is_control = |byte: &u8| byte.is_ascii_control() && !byte.is_ascii_whitespace();
    !bytes.is_empty() && !bytes.iter().any(|byte| is_control(byte) && *byte != 0x1a)
}

/// Whether a line is one that only descriptors have.
fn tells(line: &[u8]) -> bool {
    let line = String::from_utf8_lossy(line);
    let text = line.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    if text.starts_with('#') {
        return text.to_ascii_lowercase().contains(TITLE);
    }
    let mut words = text.split_whitespace();
    if words.next().and_then(access).is_some() {
        let sectors = words.next().is_some_and(|word| word.parse::<u64>().is_ok());
        return sectors && words.next().and_then(extent_type).is_some();
    }
    let Some((key, value)) = split_entry(text) else {
        return false;
    };
    let is_hex = || value.chars().all(|c| c.is_ascii_hexdigit());
    match key.as_str() {
        "version" => value.parse::<u32>().is_ok(),
        "cid" | "parentcid" => !value.is_empty() && value.len() <= 8 && is_hex(),
        "createtype" | "parentfilenamehint" => true,
        _ => false,
    }
}
