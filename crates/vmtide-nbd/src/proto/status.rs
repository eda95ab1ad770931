//! Status descriptors: the answer of `NBD_CMD_BLOCK_STATUS` in one context.

use super::constants::MAX_STATUS_EXTENTS;
use super::wire::Fields;
use super::{ProtocolError, violation};
use vmtide_block::{ByteRange, ExtentKind};

/// A range of an export and its flags in one metadata context.
///
/// The flags' meaning is the context's: `base:allocation` has 1 for a hole and 2 for "reads as
/// zeros"; `qemu:dirty-bitmap:NAME` has 1 for dirty; `qemu:allocation-depth` is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// The bytes.
    pub range: ByteRange,
    /// The flags; only the low 32 bits without extended headers.
    pub flags: u64,
}

impl StatusExtent {
    /// What an extent of the context `base:allocation` holds. A hole that is not known to read
    /// as zeros must be read like data.
    pub const fn allocation(&self) -> ExtentKind {
        match self.flags & 3 {
            3 => ExtentKind::Unallocated,
            2 => ExtentKind::Zero,
            _ => ExtentKind::Data,
        }
    }
}

/// The flags of the context `base:allocation` for what an extent holds.
pub(crate) const fn allocation_flags(kind: ExtentKind) -> u64 {
    match kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => 2,
        ExtentKind::Unallocated => 3,
    }
}

/// Whether a status chunk may have this many payload bytes.
pub(crate) fn check_chunk_length(extended: bool, length: u64) -> Result<(), ProtocolError> {
    let (head, each) = if extended { (8, 16) } else { (4, 8) };
    let valid = length > head
        && (length - head).is_multiple_of(each)
        && (length - head) / each <= MAX_STATUS_EXTENTS;
    if valid {
        return Ok(());
    }
    Err(ProtocolError::Length {
        what: "a block status chunk",
        found: length,
        rule: "which is no list of 1 to 1048576 descriptors",
    })
}

/// Reads a status chunk's payload that answers a request for `range`.
///
/// Every descriptor must have a length, so that a client always gets further. The last one may
/// pass the range's end and is cut there; so are descriptors after it, which mean nothing.
pub(crate) fn decode_chunk(
    extended: bool,
    payload: &[u8],
    range: ByteRange,
) -> Result<(u32, Vec<StatusExtent>), ProtocolError> {
    check_chunk_length(extended, payload.len() as u64)?;
    let mut fields = Fields::new("a block status chunk", payload);
    let context = fields.u32()?;
    let count = if extended {
        let count = u64::from(fields.u32()?);
        if count * 16 + 8 != payload.len() as u64 {
            return Err(violation(format!(
                "a block status chunk of {} bytes claims {count} descriptors",
                payload.len()
            )));
        }
        count
    } else {
        (payload.len() as u64 - 4) / 8
    };
    let mut extents: Vec<StatusExtent> = Vec::new();
    let mut at = range.offset;
    for _ in 0..count {
        let (length, flags) = if extended {
            (fields.u64()?, fields.u64()?)
        } else {
            (fields.u32()?.into(), fields.u32()?.into())
        };
        if length == 0 {
            return Err(violation(format!("a block status descriptor at byte {at} has no length")));
        }
        let end = at.saturating_add(length).min(range.end());
        let piece = ByteRange::from_bounds(at, end);
        at = end;
        if piece.is_empty() {
            break;
        }
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.range.length += piece.length,
            _ => extents.push(StatusExtent { range: piece, flags }),
        }
    }
    Ok((context, extents))
}

/// Writes a status chunk's payload. Lengths that do not fit 32 bits end a compact list early,
/// which the specification allows after the first descriptor; the first one is cut.
pub(crate) fn encode_chunk(extended: bool, context: u32, extents: &[StatusExtent]) -> Vec<u8> {
    /// The longest compact descriptor: a multiple of every block size below 4 GiB.
    const MAX_COMPACT_BYTES: u64 = (u32::MAX - 0xffff) as u64;
    let mut out = Vec::with_capacity(8 + extents.len() * 16);
    out.extend(context.to_be_bytes());
    if extended {
        let count = u32::try_from(extents.len()).unwrap_or(u32::MAX);
        out.extend(count.to_be_bytes());
        for extent in extents {
            out.extend(extent.range.length.to_be_bytes());
            out.extend(extent.flags.to_be_bytes());
        }
        return out;
    }
    for extent in extents {
        let length = extent.range.length.min(MAX_COMPACT_BYTES);
        // Both fit: the length was cut, and 64-bit contexts are not offered in compact style.
        out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(u32::try_from(extent.flags).unwrap_or(u32::MAX).to_be_bytes());
        if length < extent.range.length {
            break;
        }
    }
    out
}
