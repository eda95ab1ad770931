//! What the handshake tells of an export: size, transmission flags, block size constraints.

use super::constants::{DEFAULT_MAX_PAYLOAD_BYTES, info};
use super::wire::{Fields, string};
use super::{ProtocolError, violation};

/// The transmission flags of an export (`NBD_FLAG_*`): what the server can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransmissionFlags(pub u16);

macro_rules! flags {
    ($($(#[$doc:meta])* $constant:ident $method:ident $bit:literal;)*) => {
        impl TransmissionFlags {
            $(
                $(#[$doc])*
                pub const $constant: u16 = 1 << $bit;
                $(#[$doc])*
                pub const fn $method(self) -> bool {
                    self.0 & Self::$constant != 0
                }
            )*
        }
    };
}

flags! {
    /// The flags field is valid at all.
    HAS_FLAGS has_flags 0;
    /// The export cannot be written.
    READ_ONLY is_read_only 1;
    /// `NBD_CMD_FLUSH` works.
    FLUSH can_flush 2;
    /// `NBD_CMD_FLAG_FUA` works.
    FUA can_fua 3;
    /// The medium is a rotating one.
    ROTATIONAL is_rotational 4;
    /// `NBD_CMD_TRIM` works.
    TRIM can_trim 5;
    /// `NBD_CMD_WRITE_ZEROES` works.
    WRITE_ZEROES can_write_zeroes 6;
    /// `NBD_CMD_FLAG_DF` works.
    DONT_FRAGMENT can_not_fragment 7;
    /// Several connections see one cache: a flush on one covers the writes of all.
    MULTI_CONN can_multi_conn 8;
    /// `NBD_CMD_CACHE` works.
    CACHE can_cache 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` works.
    FAST_ZERO can_fast_zero 11;
    /// `NBD_CMD_BLOCK_STATUS` takes a payload that selects contexts.
    STATUS_PAYLOAD can_filter_status 12;
}

/// Block size constraints (`NBD_INFO_BLOCK_SIZE`), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Every offset and length is a multiple of this power of two, at most 65536.
    pub minimum: u32,
    /// Requests of multiples of this are fast.
    pub preferred: u32,
    /// The most data one request carries.
    pub maximum_payload: u32,
}

impl Default for BlockSizes {
    /// What holds where a server says nothing (`doc/proto.md`, section "Size constraints").
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum_payload: DEFAULT_MAX_PAYLOAD_BYTES }
    }
}

/// An export as the handshake describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// The size in bytes.
    pub size_bytes: u64,
    /// What the server can do.
    pub flags: TransmissionFlags,
    /// The block size constraints.
    pub block_sizes: BlockSizes,
    /// The server's own name of the export, where it said one.
    pub canonical_name: Option<String>,
    /// The server's words about it, where it said some.
    pub description: Option<String>,
}

impl ExportInfo {
    /// Takes in one `NBD_REP_INFO`; returns its type. Unknown types are ignored, as demanded.
    pub(crate) fn apply(&mut self, data: &[u8]) -> Result<u16, ProtocolError> {
        let mut fields = Fields::new("NBD_REP_INFO", data);
        let kind = fields.u16()?;
        match kind {
            info::EXPORT => {
                self.size_bytes = fields.u64()?;
                self.flags = TransmissionFlags(fields.u16()?);
                fields.end()?;
                check_size(self.size_bytes)?;
            }
            info::NAME => {
                self.canonical_name = Some(string("NBD_INFO_NAME", fields.rest())?);
            }
            info::DESCRIPTION => {
                self.description = Some(string("NBD_INFO_DESCRIPTION", fields.rest())?);
            }
            info::BLOCK_SIZE => {
                let sizes = BlockSizes {
                    minimum: fields.u32()?,
                    preferred: fields.u32()?,
                    maximum_payload: fields.u32()?,
                };
                fields.end()?;
                self.block_sizes = check_block_sizes(sizes)?;
            }
            _ => {}
        }
        Ok(kind)
    }

    /// The `NBD_REP_INFO` data of the given types, `NBD_INFO_EXPORT` first.
    pub(crate) fn encode(&self, wanted: &[u16]) -> Vec<Vec<u8>> {
        let start = |kind: u16| kind.to_be_bytes().to_vec();
        let mut export = start(info::EXPORT);
        export.extend(self.size_bytes.to_be_bytes());
        export.extend(self.flags.0.to_be_bytes());
        let mut replies = vec![export];
        if wanted.contains(&info::NAME)
            && let Some(name) = &self.canonical_name
        {
            replies.push([start(info::NAME), name.clone().into_bytes()].concat());
        }
        if wanted.contains(&info::DESCRIPTION)
            && let Some(text) = &self.description
        {
            replies.push([start(info::DESCRIPTION), text.clone().into_bytes()].concat());
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            let sizes = self.block_sizes;
            let mut data = start(info::BLOCK_SIZE);
            for size in [sizes.minimum, sizes.preferred, sizes.maximum_payload] {
                data.extend(size.to_be_bytes());
            }
            replies.push(data);
        }
        replies
    }
}

/// An export's size fits a signed 64-bit number, as offsets of files do.
pub(crate) fn check_size(size_bytes: u64) -> Result<(), ProtocolError> {
    if i64::try_from(size_bytes).is_ok() {
        return Ok(());
    }
    Err(violation(format!("the export claims an impossible size of {size_bytes} bytes")))
}

fn check_block_sizes(sizes: BlockSizes) -> Result<BlockSizes, ProtocolError> {
    let BlockSizes { minimum, preferred, maximum_payload } = sizes;
    let valid = minimum.is_power_of_two()
        && minimum <= 65536
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum_payload >= minimum;
    if valid {
        return Ok(sizes);
    }
    Err(violation(format!(
        "the export's block sizes {minimum}/{preferred}/{maximum_payload} break their rules"
    )))
}
