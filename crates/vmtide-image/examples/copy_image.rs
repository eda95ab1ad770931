//! Copies a disk image: `copy_image [--compress zlib|zstd] IN OUT.qcow2|OUT.vhdx|…|OUT.raw`, and
//! prints the seconds it took. Follows no backing files. For measuring the readers and writers by
//! themselves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Instant;
use vmtide_block::{
    BlockDevice, ByteRange, CancelToken, CopyOptions, Progress, copy_device, is_zero,
};
use vmtide_image::{
    CompressedWriter, Compression, CreateOptions, Format, OpenOptions, create_image, open_read_only,
};

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut compression = None;
    if arguments.first().is_some_and(|first| first == "--compress") && arguments.len() > 1 {
        compression = Some(arguments.remove(1).parse::<Compression>()?);
        arguments.remove(0);
    }
    let [input, output] = arguments.as_slice() else {
        return Err("usage: copy_image [--compress zlib|zstd] IN OUT.qcow2|OUT.raw".into());
    };
    let begun = Instant::now();
    let source = open_read_only(input, &OpenOptions::default())?;
    let format = output.rsplit('.').next().unwrap_or_default().parse().unwrap_or(Format::Raw);
    let options = CreateOptions {
        compress: compression.is_some(),
        compression,
        ..CreateOptions::new(format, source.size_bytes())
    };
    let target = create_image(output, &options)?;
    if let Some(compressed) = target.compressed() {
        copy_compressed(&*source, compressed)?;
    } else {
        let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
        copy_device(&*source, &*target, &options, &Progress::new(), &CancelToken::new())?;
    }
    target.finish()?;
    println!("{:.2} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Workers compress spans of 2 MiB and take turns to append them.
fn copy_compressed(
    source: &dyn BlockDevice,
    target: &dyn CompressedWriter,
) -> Result<(), AnyError> {
    const SPAN_BYTES: u64 = 2 << 20;
    let (next, turn, turned) = (AtomicU64::new(0), Mutex::new(0u64), Condvar::new());
    let cluster = usize::try_from(target.cluster_bytes())?;
    let work = || -> Result<(), vmtide_block::BlockError> {
        let mut buffer = vec![0; usize::try_from(SPAN_BYTES).unwrap_or(0)];
        loop {
            let span = next.fetch_add(1, Ordering::Relaxed);
            let start = span * SPAN_BYTES;
            if start >= source.size_bytes() {
                return Ok(());
            }
            let range =
                ByteRange::from_bounds(start, (start + SPAN_BYTES).min(source.size_bytes()));
            let data = &mut buffer[..usize::try_from(range.length).unwrap_or(0)];
            let extents = source.extents(range)?;
            let mut clusters = Vec::new();
            if extents.iter().any(|extent| !extent.kind.reads_as_zero()) {
                source.read_at(data, start)?;
                for (index, piece) in data.chunks(cluster).enumerate() {
                    if !is_zero(piece) {
                        let at = start + (index * cluster) as u64;
                        clusters.push((at, target.compress(piece)?));
                    }
                }
            }
            let lock = turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let mut lock = turned
                .wait_while(lock, |turn| *turn != span)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for (at, piece) in clusters {
                target.append(at, piece)?;
            }
            *lock += 1;
            turned.notify_all();
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result.map_err(AnyError::from),
            Err(_) => Err("a worker ended abnormally".into()),
        })
    })
}
