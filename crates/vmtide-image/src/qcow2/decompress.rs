//! Compressed clusters (qcow2 specification, "compression_type"): raw deflate or one Zstandard
//! frame, followed by whatever the last sector holds. Exactly one cluster comes out, or an error.

use crate::Compression;
use crate::deflate::Inflater;
use flate2::{Decompress, FlushDecompress};
use std::io::Read;
use zstd::zstd_safe;

/// The largest window a Zstandard frame may ask for, as a power of two: 8 MiB, four times the
/// largest cluster. A larger one would let an image of a few bytes take memory by the gigabyte.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// What decompressing needs, made once for all clusters of one read.
#[derive(Default)]
pub(crate) struct Decompressor {
    deflate: Option<Inflater>,
    zstd: Option<zstd_safe::DCtx<'static>>,
}

impl Decompressor {
    /// Fills `cluster` from `compressed`, or says why that cannot be.
    pub(crate) fn decompress(
        &mut self,
        compression: Compression,
        compressed: &[u8],
        cluster: &mut [u8],
    ) -> Result<(), String> {
        match compression {
            Compression::Zlib => {
                let decoder = self.deflate.get_or_insert_with(Inflater::new);
                match decoder.raw(compressed, cluster) {
                    Ok(bytes) if bytes == cluster.len() => Ok(()),
                    // What is not one whole stream: the tolerant decoder decides, or says why not.
                    _ => inflate(compressed, cluster),
                }
            }
            Compression::Zstd => {
                let decoder = self.zstd.get_or_insert_with(zstd_safe::DCtx::create);
                let frame = zstd_safe::find_frame_compressed_size(compressed)
                    .ok()
                    .and_then(|bytes| compressed.get(..bytes));
                match frame.map(|frame| decoder.decompress(&mut *cluster, frame)) {
                    Some(Ok(bytes)) if bytes == cluster.len() => Ok(()),
                    _ => zstd_frames(compressed, cluster),
                }
            }
        }
    }
}

/// As QEMU reads it: whether the stream has ended does not matter once the cluster is full.
fn inflate(compressed: &[u8], cluster: &mut [u8]) -> Result<(), String> {
    let mut state = Decompress::new(false);
    state
        .decompress(compressed, cluster, FlushDecompress::Finish)
        .map_err(|error| format!("bad deflate data: {error}"))?;
    if state.total_out() == cluster.len() as u64 {
        return Ok(());
    }
    Err(format!("the deflate data ends after {} of {} bytes", state.total_out(), cluster.len()))
}

/// As QEMU reads it: frame after frame until the cluster is full.
fn zstd_frames(compressed: &[u8], cluster: &mut [u8]) -> Result<(), String> {
    let mut read = || -> std::io::Result<()> {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        decoder.read_exact(cluster)
    };
    read().map_err(|error| format!("bad zstd data: {error}"))
}
