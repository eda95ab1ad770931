//! Compressed clusters (qcow2 specification, "compression_type"): raw deflate or one Zstandard
//! frame, followed by whatever the last sector holds. Exactly one cluster comes out, or an error.

use super::header::Compression;
use flate2::{Decompress, FlushDecompress};
use std::io::Read;

/// The largest window a Zstandard frame may ask for, as a power of two: 8 MiB, four times the
/// largest cluster. A larger one would let an image of a few bytes take memory by the gigabyte.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// Fills `cluster` from `compressed`, or says why that cannot be.
pub(crate) fn decompress(
    compression: Compression,
    compressed: &[u8],
    cluster: &mut [u8],
) -> Result<(), String> {
    match compression {
        Compression::Zlib => inflate(compressed, cluster),
        Compression::Zstd => zstd_frame(compressed, cluster),
    }
}

fn inflate(compressed: &[u8], cluster: &mut [u8]) -> Result<(), String> {
    let mut state = Decompress::new(false);
    state
        .decompress(compressed, cluster, FlushDecompress::Finish)
        .map_err(|error| format!("bad deflate data: {error}"))?;
    // Whether the stream has ended does not matter once the cluster is full.
    if state.total_out() == cluster.len() as u64 {
        return Ok(());
    }
    Err(format!("the deflate data ends after {} of {} bytes", state.total_out(), cluster.len()))
}

fn zstd_frame(compressed: &[u8], cluster: &mut [u8]) -> Result<(), String> {
    let mut read = || -> std::io::Result<()> {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed)?.single_frame();
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        decoder.read_exact(cluster)
    };
    read().map_err(|error| format!("bad zstd data: {error}"))
}
