//! The files of a restore, told to the backend.

use crate::abi::{RestorePacket, create};
use crate::backend::{Backend, Failed, Frame, Result};
use crate::core::Core;
use crate::job::{Object, text_of};

/// Sends the objects of earlier backups, and has the backend begin.
pub fn send_objects(backend: &mut Backend, core: Core, objects: &[Object]) -> Result<()> {
    for object in objects {
        let word = if object.is_options { "Options" } else { "Object" };
        let name = object.name.replace('\n', " ");
        backend.command(&format!("{word} {} {name}", object.job_id))?;
        backend.send_data(&object.bytes)?;
        backend.end()?;
    }
    backend.command("Begin")?;
    match backend.frame(core)? {
        Frame::End => Ok(()),
        other => {
            Err(Failed(format!("the backend answers {other:?} to the beginning of a restore")))
        }
    }
}

/// Tells the backend of a file; answers what becomes of it (see [`create`]).
pub fn create(backend: &mut Backend, core: Core, packet: &RestorePacket) -> Result<i32> {
    let name = text_of(packet.output_name);
    if name.contains('\n') {
        return Err(Failed(format!("a file name has a line feed: {name:?}")));
    }
    let attributes = &packet.attributes;
    let lines = [
        format!("File {name}"),
        format!("Size {}", attributes.size.max(0)),
        format!("Time {}", attributes.times[1][0]),
        format!("Moment {:016x}{:016x}", attributes.inode, attributes.special_device),
        format!("Base {:016x}", attributes.device),
        format!("Sequence {}", packet.delta_sequence),
    ];
    for line in &lines {
        backend.command(line)?;
    }
    backend.end()?;
    match backend.frame(core)? {
        Frame::Command(line) if line == "Extract" => Ok(create::EXTRACT),
        Frame::Command(line) if line == "Skip" => Ok(create::SKIP),
        other => Err(Failed(format!("the backend answers {other:?} to a file to restore"))),
    }
}

/// The offset in `At OFFSET`.
pub fn parse_offset(line: &str) -> Result<u64> {
    line.strip_prefix("At ")
        .and_then(|offset| offset.parse().ok())
        .filter(|offset| *offset <= i64::MAX.unsigned_abs())
        .ok_or_else(|| Failed(format!("the backend sends {line:?} between data")))
}
