//! Writing a delta: header, frames in order, index, trailer.

use crate::format::{DeltaTotals, HEAD_BYTES, Ledger};
use crate::frame::EncodedFrame;
use crate::{DeltaError, DeltaHeader, Result};
use serde::Serialize;
use std::io::Write;

/// What a finished delta is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeltaSummary {
    /// What it says of itself.
    #[serde(flatten)]
    pub header: DeltaHeader,
    /// How much it holds.
    #[serde(flatten)]
    pub totals: DeltaTotals,
    /// The size of the stream in bytes.
    pub stream_bytes: u64,
    /// The digest of the whole, in hexadecimal: equal for equal deltas.
    pub digest: String,
}

pub(crate) fn to_hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}

/// Writes to anything that takes bytes: a file, a pipe, a socket. Never seeks.
pub(crate) struct StreamWriter<'a> {
    out: &'a mut dyn Write,
    header: DeltaHeader,
    ledger: Ledger,
    name: String,
}

impl<'a> StreamWriter<'a> {
    /// Begins a delta by writing its header.
    pub fn begin(out: &'a mut dyn Write, header: DeltaHeader, name: &str) -> Result<Self> {
        let bytes = header.to_bytes()?;
        let ledger = Ledger::new(&header, &bytes);
        let mut writer = Self { out, header, ledger, name: name.to_owned() };
        writer.write(&bytes)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .map_err(|error| DeltaError::io(format!("write {}", self.name), error))
    }

    /// Appends a frame.
    pub fn append(&mut self, frame: &EncodedFrame) -> Result<()> {
        let head = frame.head.to_bytes();
        self.add(&frame.head, &head)?;
        self.ledger.add_extents(&frame.extents, frame.head.stored_bytes);
        self.write(&head)?;
        self.write(&frame.body)
    }

    fn add(&mut self, head: &crate::format::RecordHead, bytes: &[u8; HEAD_BYTES]) -> Result<()> {
        self.ledger
            .add_head(head, bytes)
            .map_err(|detail| DeltaError::damaged(&self.name, format!("a new frame has {detail}")))
    }

    /// Ends the delta with its index and trailer.
    pub fn finish(mut self) -> Result<DeltaSummary> {
        let index = self.ledger.index_bytes();
        let end_position = self.ledger.position();
        let head = self.ledger.end_head(&index);
        let head_bytes = head.to_bytes();
        self.add(&head, &head_bytes)?;
        let trailer = self.ledger.trailer(end_position);
        let trailer_bytes = trailer.to_bytes();
        let stream_bytes = self.ledger.position() + trailer_bytes.len() as u64;
        for part in [&head_bytes[..], &index, &trailer_bytes] {
            self.write(part)?;
        }
        self.out.flush().map_err(|error| DeltaError::io(format!("write {}", self.name), error))?;
        Ok(DeltaSummary {
            header: self.header,
            totals: trailer.totals,
            stream_bytes,
            digest: to_hex(&trailer.digest),
        })
    }
}
