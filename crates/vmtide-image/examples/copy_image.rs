//! Copies a disk image: `copy_image IN OUT.qcow2|OUT.raw`, and prints the seconds it took.
//! Follows no backing files. For measuring the readers and writers by themselves.

use std::path::Path;
use std::time::Instant;
use vmtide_block::{
    CancelToken, CopyOptions, OpenMode, Progress, RawDevice, WritableBlockDevice, copy_device,
};
use vmtide_image::qcow2::{Qcow2CreateOptions, Qcow2Writer};
use vmtide_image::{OpenOptions, open_read_only};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(input), Some(output)) = (arguments.next(), arguments.next()) else {
        return Err("usage: copy_image IN OUT.qcow2|OUT.raw".into());
    };
    let begun = Instant::now();
    let source = open_read_only(&input, &OpenOptions::default())?;
    let size_bytes = source.size_bytes();
    let target: Box<dyn WritableBlockDevice> =
        if Path::new(&output).extension().is_some_and(|e| e == "qcow2") {
            let options = Qcow2CreateOptions::new(size_bytes);
            Box::new(Qcow2Writer::create(&output, &options)?)
        } else {
            Box::new(RawDevice::open(&output, OpenMode::CreateNew { size_bytes })?)
        };
    let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let done = copy_device(&*source, &*target, &options, &progress, &cancel)?;
    println!("{:.2} s, {done:?}", begun.elapsed().as_secs_f64());
    Ok(())
}
