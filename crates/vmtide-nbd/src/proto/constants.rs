//! The numbers of the specification (`doc/proto.md`, section "Values"), and our limits beside it.

/// The first eight bytes of every server: `NBDMAGIC`.
pub(crate) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// What follows in newstyle negotiation, and starts every option request: `IHAVEOPT`.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What follows in oldstyle negotiation, which we refuse.
pub(crate) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Starts every reply to an option.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts a compact request.
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts an extended request.
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Starts a simple reply.
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts a structured reply chunk.
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Starts an extended reply chunk.
pub(crate) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag of both sides: fixed newstyle.
pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag of both sides: no 124 zeroes after `NBD_OPT_EXPORT_NAME`.
pub(crate) const FLAG_NO_ZEROES: u16 = 2;

/// `NBD_OPT_*`.
pub(crate) mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// `NBD_REP_*`.
pub(crate) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub(crate) const ERROR_BIT: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERROR_BIT + 1;
    pub(crate) const ERR_POLICY: u32 = ERROR_BIT + 2;
    pub(crate) const ERR_INVALID: u32 = ERROR_BIT + 3;
    pub(crate) const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    pub(crate) const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    pub(crate) const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    pub(crate) const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;
}

/// `NBD_INFO_*`.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// `NBD_CMD_*`.
pub(crate) mod cmd {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// `NBD_CMD_FLAG_*`.
pub(crate) mod cmd_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// `NBD_REPLY_TYPE_*`.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error chunk.
    pub(crate) const ERROR_BIT: u16 = 1 << 15;
    pub(crate) const ERROR: u16 = ERROR_BIT + 1;
}

/// `NBD_REPLY_FLAG_DONE`: the last chunk of a reply.
pub(crate) const REPLY_FLAG_DONE: u16 = 1;

/// The longest string the specification allows (names, queries, error messages).
pub(crate) const MAX_STRING_BYTES: usize = 4096;

/// The most data one option or option reply may bring before we hang up. Large enough for a
/// `NBD_OPT_SET_META_CONTEXT` with a dozen strings of full length; larger only feeds an attacker.
pub(crate) const MAX_OPTION_BYTES: u32 = 64 << 10;

/// The most replies to one option (exports of a list) a client takes before it hangs up.
pub(crate) const MAX_OPTION_REPLIES: usize = 16 << 10;
/// And the most bytes of them together.
pub(crate) const MAX_OPTION_REPLIES_BYTES: usize = 8 << 20;

/// The payload every peer must be able to take where no other limit was agreed: 32 MiB
/// (`doc/proto.md`, section "Size constraints"). Beyond it a peer may hang up.
pub(crate) const DEFAULT_MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// The most extents one status chunk should hold (`NBD_REPLY_TYPE_BLOCK_STATUS`).
pub(crate) const MAX_STATUS_EXTENTS: u64 = 1 << 20;

/// The context of allocation: bit 0 hole, bit 1 reads as zero.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// The prefix of QEMU's dirty bitmaps: bit 0 dirty.
pub(crate) const CONTEXT_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
