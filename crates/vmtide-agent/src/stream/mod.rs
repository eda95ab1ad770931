//! Content and changed ranges as bodies of HTTP messages, for every interface of the agent.
//!
//! ```text
//! RangeList ─► Planner ─► readers (blocking threads) ─► pieces, in order ─► ContentBody ─► TLS
//!   checked      cuts      fill pooled buffers           at most 8 a stream
//! ```
//!
//! A stream of content is cut into **pieces** of at most [`StreamOptions::piece_bytes`]. Readers claim pieces
//! one after the other, read them at the same time, and hand them over in the order of the claims. Every
//! piece lives in one buffer of the stream's own small pool, from the read to the encryption; a buffer comes
//! back when the connection is done with it. So the memory of a stream is `read_ahead` buffers, however many
//! ranges it has and however slow its client is: a client that does not read stops its own readers, and
//! nobody else's.
//!
//! A stream ends in one of two ways: with all of its bytes, or with an error that cuts the connection. A body
//! that is dropped, because the client went away, stops its readers.

mod body;
mod buffers;
mod changes;
mod changes_body;
mod encode;
mod error;
pub mod frame;
mod pipeline;
mod plan;
mod ranges;
mod ranges_json;
mod receive;
mod write;

pub use body::{ContentBody, ContentRequest};
pub use changes::{AskForPage, ChangePager};
pub use changes_body::{ChangesFormat, changes_body};
pub use encode::Encoding;
pub use error::StreamError;
pub use pipeline::StreamOptions;
pub use ranges::{RangeError, RangeList, parse_range_list};
pub use ranges_json::{JsonRangesError, RangesParser};
pub use receive::{
    HeldMemory, RangeMemory, ReceiveError, receive_bytes, receive_json, receive_json_of,
    receive_ranges,
};
pub use write::{WriteError, WriteKind, WriteSummary, write_body};
