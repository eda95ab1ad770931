//! Writing compressed clusters (qcow2 specification, "Compressed Clusters Descriptor").
//!
//! Any number of threads compress; one at a time appends. Compressed clusters are packed byte after
//! byte, as QEMU does, so they share clusters of the file, whose reference counts say how many lie
//! in them at least in part. They are data like any other for the order in which a flush writes:
//! bytes and counts first, then the L2 entries that lead to them.

use super::header::{COMPRESSED, OFFSET_MASK};
use super::write::clusters_of;
use super::writer::Qcow2Writer;
use crate::bytes::length;
use crate::{CompressedCluster, CompressedWriter, Compression};
use flate2::{Compress, FlushCompress, Status};
use parking_lot::Mutex;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// The deflate window as a power of two. QEMU inflates with one of this size and fails on
/// references that reach farther back.
const WINDOW_BITS: u8 = 12;

/// zlib-rs' level 5 makes clusters as small as its level 6 within a thousandth and as zlib's own
/// level 6 (QEMU's) within 4 %, at 2.4 times the speed of the latter; levels below lose more than
/// they gain.
const DEFLATE_LEVEL: u32 = 5;

/// Zstandard's own default, which is QEMU's.
const ZSTD_LEVEL: i32 = 3;

/// Compresses clusters.
pub(super) struct Compressor {
    method: Compression,
    /// Compressors that wait for the next cluster: making one costs a tenth of using it.
    idle: Mutex<Vec<State>>,
}

enum State {
    Zlib(Box<Compress>),
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Compressor {
    pub(super) const fn new(method: Compression) -> Self {
        Self { method, idle: Mutex::new(Vec::new()) }
    }

    fn state(&self) -> std::io::Result<State> {
        if let Some(state) = self.idle.lock().pop() {
            return Ok(state);
        }
        Ok(match self.method {
            Compression::Zlib => {
                let level = flate2::Compression::new(DEFLATE_LEVEL);
                let state = Compress::new_with_window_bits(level, false, WINDOW_BITS);
                State::Zlib(Box::new(state))
            }
            Compression::Zstd => State::Zstd(Box::new(zstd::bulk::Compressor::new(ZSTD_LEVEL)?)),
        })
    }

    /// The compressed bytes; none where they would not be fewer.
    fn compress(&self, cluster: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        let mut state = self.state()?;
        let out = match &mut state {
            State::Zlib(state) => {
                state.reset();
                // Room for the most that noise grows: a stream that cannot end would be left in a
                // state from which zlib-rs (0.6.8) does not come back.
                let mut out = vec![0u8; cluster.len() + cluster.len() / 8 + 64];
                let status = state.compress(cluster, &mut out, FlushCompress::Finish)?;
                if status != Status::StreamEnd {
                    return Ok(None);
                }
                out.truncate(length(state.total_out()));
                out
            }
            State::Zstd(state) => state.compress(cluster)?,
        };
        self.idle.lock().push(state);
        Ok((out.len() < cluster.len()).then_some(out))
    }
}

impl CompressedWriter for Qcow2Writer {
    fn cluster_bytes(&self) -> u64 {
        self.cluster_size_bytes()
    }

    fn compress(&self, data: &[u8]) -> Result<CompressedCluster> {
        let refuse = |detail: String| BlockError::unsupported(&self.layers.name, detail);
        let compressor = self
            .compressor
            .as_ref()
            .ok_or_else(|| refuse("was not created for compressed clusters".into()))?;
        let cluster_bytes = length(self.cluster_size_bytes());
        if data.len() > cluster_bytes {
            return Err(refuse(format!(
                "{} bytes do not fit a cluster of {cluster_bytes}",
                data.len()
            )));
        }
        let padded;
        let cluster = if data.len() == cluster_bytes {
            data
        } else {
            let mut whole = data.to_vec();
            whole.resize(cluster_bytes, 0);
            padded = whole;
            &padded
        };
        let packed =
            compressor.compress(cluster).map_err(|error| refuse(format!("compress: {error}")))?;
        Ok(match packed {
            Some(bytes) => CompressedCluster::Compressed(bytes),
            None => CompressedCluster::Plain(data.to_vec()),
        })
    }

    fn append(&self, offset: u64, cluster: CompressedCluster) -> Result<()> {
        let bytes = match cluster {
            CompressedCluster::Plain(data) => return self.write_at(&data, offset),
            CompressedCluster::Compressed(bytes) => bytes,
        };
        let cluster_bytes = self.cluster_size_bytes();
        if !offset.is_multiple_of(cluster_bytes)
            || bytes.is_empty()
            || bytes.len() as u64 >= cluster_bytes
        {
            return Err(BlockError::unsupported(
                &self.layers.name,
                format!(
                    "{} compressed bytes for the disk at {offset:#x} are no compressed cluster of \
                     {cluster_bytes} bytes",
                    bytes.len()
                ),
            ));
        }
        let end = offset.saturating_add(cluster_bytes).min(self.size_bytes());
        self.check_write(ByteRange::new(offset, end.saturating_sub(offset).max(1)))?;
        let _gate = self.gate.read();
        let number = offset / cluster_bytes;
        let _hold = self.hold(number..number + 1);
        let (place, claimed) = self.place(bytes.len() as u64)?;
        let result = self.file.write_at(&bytes, place);
        let result = result.and_then(|()| self.enter_compressed(number, place, bytes.len() as u64));
        if result.is_err() {
            self.metadata.write().refcounts.pending_frees.extend(claimed);
        }
        result
    }
}

impl Qcow2Writer {
    /// Claims a place for this many compressed bytes: behind the last ones where there is room, else
    /// in a new cluster. Also returns the clusters of the file that a reference was taken to.
    fn place(&self, bytes: u64) -> Result<(u64, std::ops::Range<u64>)> {
        let cluster_bits = self.geometry().cluster_bits;
        let mut metadata = self.metadata.write();
        let end = metadata.packed_end;
        let last = end >> cluster_bits;
        let room = end.next_multiple_of(1 << cluster_bits) - end;
        let mut place = None;
        if room >= bytes && metadata.refcounts.retain(&*self.file, last)? {
            place = Some((end, last..last + 1));
        }
        if place.is_none() {
            let first = metadata.refcounts.claim(&*self.file, 1)?.first;
            let follows = room > 0 && first == last + 1;
            place = if follows && metadata.refcounts.retain(&*self.file, last)? {
                Some((end, last..first + 1))
            } else {
                Some((first << cluster_bits, first..first + 1))
            };
        }
        let (at, clusters) = place.unwrap_or_default();
        metadata.packed_end = at + bytes;
        self.grow_file(&metadata)?;
        Ok((at, clusters))
    }

    /// Points the L2 entry of a cluster of the disk to compressed bytes.
    fn enter_compressed(&self, cluster: u64, place: u64, bytes: u64) -> Result<()> {
        let geometry = *self.geometry();
        let (l1_index, index) = geometry.indices(cluster << geometry.cluster_bits);
        let shift = 62 - (geometry.cluster_bits - 8);
        if place >> shift != 0 || place > OFFSET_MASK {
            return Err(BlockError::unsupported(
                &self.layers.name,
                format!("compressed data at {place:#x} is past what an L2 entry can point to"),
            ));
        }
        let more_sectors = ((place + bytes - 1) >> 9) - (place >> 9);
        let entry = COMPRESSED | more_sectors << shift | place;
        let mut metadata = self.metadata.write();
        metadata.own_table(&*self.file, l1_index)?;
        self.grow_file(&metadata)?;
        let mut freed = 0..0;
        metadata.change(&self.layers.name, l1_index, |geometry, table| {
            let (old, _) = table.entry(geometry, index);
            freed = clusters_of(geometry.cluster_bits, old);
            table.set_entry(geometry, index, entry, 0);
        })?;
        metadata.refcounts.pending_frees.extend(freed);
        Ok(())
    }
}
