//! Merging deltas that follow each other into one: of every byte the newest word counts.
//!
//! All deltas are read once, from beginning to end, with one frame of each in memory. Where one of
//! them made the disk smaller and a later one larger again, what was cut off is zero.

use crate::format::ShortDigest;
use crate::frame::{Decoder, EncodedFrame, Encoder, Frame};
use crate::pipeline::run_in_order;
use crate::writer::StreamWriter;
use crate::{CreateOptions, DeltaError, DeltaHeader, DeltaReader, DeltaSummary, Result};
use std::io::{Read, Write};
use vmtide_block::{ByteRange, CancelToken, Extent, ExtentKind, Progress};

/// The most deltas merged at once. Each takes a file and a frame; whoever has more merges in rounds.
pub const MAX_MERGED: usize = 256;

/// Merges `deltas`, the oldest first, and writes the result to `out`. Progress counts bytes of disk of
/// the result. The deltas' own ids must follow each other where they have any, and the sizes always.
/// Of `options` the level and the workers count.
///
/// A frame of the result keeps the digest of the base where that is known of all its data: where it
/// is a whole frame of one delta, that no older delta speaks of.
///
/// # Errors
/// [`DeltaError::BrokenChain`] where one does not follow the other; those of reading and writing. What
/// was written by then is no delta: it has no trailer.
pub fn merge_deltas<R: Read + Send>(
    deltas: &mut [DeltaReader<R>],
    options: &CreateOptions,
    out: &mut dyn Write,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<DeltaSummary> {
    let header = merged_header(deltas)?;
    let frame_bytes = u64::from(header.max_frame_bytes);
    let mut merger = Merger::new(deltas, &header)?;
    let mut writer = StreamWriter::begin(out, header, "the merged delta")?;
    Encoder::new(options.level)?;
    run_in_order(
        options.workers,
        cancel,
        || merger.next_frame(frame_bytes),
        || Encoder::new(options.level),
        |encoder, frame: Frame| {
            let encoder = encoder.as_mut().map_err(|_| {
                DeltaError::unsupported("a delta", "zstd cannot be prepared: too little memory")
            })?;
            encoder.encode(&frame)
        },
        |frame: EncodedFrame| {
            progress.add_done(frame.extents.iter().map(|extent| extent.range.length).sum());
            writer.append(&frame)
        },
    )?;
    writer.finish()
}

/// The header of the result: the base of the first, the end of the last.
fn merged_header<R: Read>(deltas: &[DeltaReader<R>]) -> Result<DeltaHeader> {
    let (Some(first), Some(last)) = (deltas.first(), deltas.last()) else {
        return Err(DeltaError::unsupported("a merge", "there are no deltas to merge"));
    };
    if deltas.len() > MAX_MERGED {
        return Err(DeltaError::unsupported(
            "a merge",
            format!("of {} deltas; at most {MAX_MERGED} at once", deltas.len()),
        ));
    }
    for pair in deltas.windows(2) {
        let [older, newer] = pair else { continue };
        let (before, after) = (older.header(), newer.header());
        let broken = |detail: String| DeltaError::BrokenChain {
            older: older.name().to_owned(),
            newer: newer.name().to_owned(),
            detail,
        };
        if before.new_id != after.base_id {
            return Err(broken(format!(
                "it begins at {:?}, and the other leads to {:?}",
                after.base_id, before.new_id
            )));
        }
        if before.size_bytes != after.base_size_bytes {
            return Err(broken(format!(
                "it is for a disk of {} bytes, and the other leads to one of {}",
                after.base_size_bytes, before.size_bytes
            )));
        }
    }
    let (oldest, newest) = (first.header(), last.header());
    let least = |value: fn(&DeltaHeader) -> u32| {
        deltas.iter().map(|delta| value(delta.header())).min().unwrap_or(4096)
    };
    Ok(DeltaHeader {
        base_size_bytes: oldest.base_size_bytes,
        base_id: oldest.base_id.clone(),
        base_fingerprint: oldest.base_fingerprint,
        granularity_bytes: least(|header| header.granularity_bytes),
        // The largest, so that a frame which is taken over as it is fits.
        max_frame_bytes: deltas
            .iter()
            .map(|delta| delta.header().max_frame_bytes)
            .max()
            .unwrap_or(newest.max_frame_bytes),
        ..newest.clone()
    })
}

/// One source of extents: a delta, or the zeros of what a smaller disk lost.
enum Source<'a, R> {
    Delta {
        reader: &'a mut DeltaReader<R>,
        decoder: Decoder,
        frame: Frame,
        next: usize,
        data_at: usize,
    },
    Zeros(Option<ByteRange>),
}

/// What a source says next.
#[derive(Clone, Copy)]
struct Piece {
    extent: Extent,
    /// Where its data is in the source's frame.
    data_at: usize,
    /// Whether it begins the frame, and is all of it that is left: a frame of one piece after another
    /// is followed from its first to its last.
    frame_start: bool,
    frame_end: bool,
    base_digest: Option<ShortDigest>,
}

struct Cursor<'a, R> {
    source: Source<'a, R>,
    /// None at the end.
    piece: Option<Piece>,
}

struct Merger<'a, R> {
    /// The oldest first.
    cursors: Vec<Cursor<'a, R>>,
    size_bytes: u64,
}

impl<'a, R: Read> Merger<'a, R> {
    fn new(deltas: &'a mut [DeltaReader<R>], header: &DeltaHeader) -> Result<Self> {
        let size_bytes = header.size_bytes;
        let mut cursors = Vec::with_capacity(deltas.len() * 2);
        for reader in deltas {
            let (before, after) = (reader.header().base_size_bytes, reader.header().size_bytes);
            let source = Source::Delta {
                reader,
                decoder: Decoder::new()?,
                frame: Frame::default(),
                next: 0,
                data_at: 0,
            };
            cursors.push(Cursor { source, piece: None });
            if after < before {
                let lost = ByteRange::from_bounds(after, before.min(size_bytes));
                let zeros = Source::Zeros((!lost.is_empty()).then_some(lost));
                cursors.push(Cursor { source: zeros, piece: None });
            }
        }
        let mut merger = Self { cursors, size_bytes };
        for cursor in &mut merger.cursors {
            cursor.advance(merger.size_bytes)?;
        }
        Ok(merger)
    }

    /// The next frame of the result, none at the end.
    fn next_frame(&mut self, frame_bytes: u64) -> Result<Option<Frame>> {
        let mut frame = Frame::default();
        // The digest of the base is kept where the frame is exactly one frame of one delta.
        let mut whole: Option<(usize, ShortDigest)> = None;
        let mut is_whole = true;
        while let Some((winner, run)) = self.next_run(frame_bytes) {
            let Some(piece) = self.cursors.get(winner).and_then(|cursor| cursor.piece) else {
                break;
            };
            let length = if piece.extent.kind == ExtentKind::Data { run.length } else { 0 };
            let full = frame.data.len() as u64 + length > frame_bytes;
            // A frame of the source begins a frame of the result, so that it can be kept whole.
            let starts = piece.frame_start && piece.base_digest.is_some();
            if !frame.extents.is_empty()
                && (full
                    || starts
                    || frame.extents.len() >= crate::format::MAX_EXTENTS as usize - 1)
            {
                break;
            }
            if frame.extents.is_empty() {
                is_whole = piece.frame_start;
                whole = piece.base_digest.map(|digest| (winner, digest));
            }
            let older_speaks = self.cursors[..winner]
                .iter()
                .filter_map(|cursor| cursor.piece)
                .any(|older| !older.extent.range.intersect(&run).is_empty());
            is_whole = is_whole
                && whole.is_some_and(|(index, _)| index == winner)
                && !older_speaks
                && run == piece.extent.range;
            self.take(winner, run, &piece, &mut frame);
            let ends = piece.frame_end && run.end() == piece.extent.range.end();
            self.pass(run.end())?;
            if ends && is_whole {
                frame.base_digest = whole.map(|(_, digest)| digest);
                break;
            }
        }
        Ok((!frame.extents.is_empty()).then_some(frame))
    }

    /// The next range that one source has the last word on, at most as long as a frame, and which.
    fn next_run(&self, frame_bytes: u64) -> Option<(usize, ByteRange)> {
        let start = self
            .cursors
            .iter()
            .filter_map(|cursor| cursor.piece)
            .map(|piece| piece.extent.range.offset)
            .min()?;
        let covers = |piece: &Piece| piece.extent.range.contains(start);
        let winner =
            self.cursors.iter().rposition(|cursor| cursor.piece.as_ref().is_some_and(covers))?;
        let piece = self.cursors[winner].piece?;
        let mut end = piece.extent.range.end();
        for newer in self.cursors[winner + 1..].iter().filter_map(|cursor| cursor.piece) {
            end = end.min(newer.extent.range.offset);
        }
        if piece.extent.kind == ExtentKind::Data {
            end = end.min(start.saturating_add(frame_bytes));
        }
        Some((winner, ByteRange::from_bounds(start, end)))
    }

    /// Appends `run` of the winner's piece to the frame.
    fn take(&self, winner: usize, run: ByteRange, piece: &Piece, frame: &mut Frame) {
        if piece.extent.kind != ExtentKind::Data {
            frame.push_empty(run, piece.extent.kind);
            return;
        }
        let skipped = usize::try_from(run.offset - piece.extent.range.offset).unwrap_or(usize::MAX);
        let from = piece.data_at.saturating_add(skipped);
        let length = usize::try_from(run.length).unwrap_or(usize::MAX);
        if let Some(Cursor { source: Source::Delta { frame: held, .. }, .. }) =
            self.cursors.get(winner)
            && let Some(data) = held.data.get(from..from.saturating_add(length))
        {
            frame.push_data(run.offset, data);
        }
    }

    /// Passes everything before `until`.
    fn pass(&mut self, until: u64) -> Result<()> {
        for cursor in &mut self.cursors {
            while let Some(piece) = &mut cursor.piece {
                let range = piece.extent.range;
                if range.offset >= until {
                    break;
                }
                if range.end() > until {
                    let skipped = until - range.offset;
                    if piece.extent.kind == ExtentKind::Data {
                        piece.data_at += usize::try_from(skipped).unwrap_or(usize::MAX);
                    }
                    piece.extent.range = ByteRange::from_bounds(until, range.end());
                    // What is left is no whole frame any more.
                    piece.frame_start = false;
                    break;
                }
                cursor.advance(self.size_bytes)?;
            }
        }
        Ok(())
    }
}

impl<R: Read> Cursor<'_, R> {
    /// Goes to the next piece inside a disk of `size_bytes`.
    fn advance(&mut self, size_bytes: u64) -> Result<()> {
        self.piece = None;
        match &mut self.source {
            Source::Zeros(range) => {
                self.piece = range.take().map(|range| Piece {
                    extent: Extent { range, kind: ExtentKind::Zero },
                    data_at: 0,
                    frame_start: true,
                    frame_end: true,
                    base_digest: None,
                });
            }
            Source::Delta { reader, decoder, frame, next, data_at } => loop {
                if let Some(extent) = frame.extents.get(*next).copied() {
                    let (first, at) = (*next == 0, *data_at);
                    *next += 1;
                    if extent.kind == ExtentKind::Data {
                        *data_at += usize::try_from(extent.range.length).unwrap_or(usize::MAX);
                    }
                    let range = ByteRange::from_bounds(
                        extent.range.offset,
                        extent.range.end().min(size_bytes),
                    );
                    if range.is_empty() {
                        // All that follows lies past the end as well; it is read to be checked.
                        continue;
                    }
                    let cut = range != extent.range;
                    self.piece = Some(Piece {
                        extent: Extent { range, kind: extent.kind },
                        data_at: at,
                        frame_start: first && !cut,
                        frame_end: *next == frame.extents.len() && !cut,
                        base_digest: frame.base_digest,
                    });
                    return Ok(());
                }
                let Some(encoded) = reader.next_frame()? else {
                    return Ok(());
                };
                decoder.decode(&encoded.head, encoded.extents, &encoded.body, frame).map_err(
                    |detail| DeltaError::damaged(reader.name(), format!("a frame has {detail}")),
                )?;
                (*next, *data_at) = (0, 0);
            },
        }
        Ok(())
    }
}
