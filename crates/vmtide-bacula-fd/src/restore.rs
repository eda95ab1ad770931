//! The files of a restore, told to the backend.

use crate::abi::{RestorePacket, create};
use crate::backend::{Backend, Failed, Frame, Result};
use crate::core::Core;
use crate::job::{Object, text_of};
use std::collections::BTreeSet;

/// Sends the objects of earlier backups and the options of the plugin line `command`, and has the backend begin.
pub fn send_objects(
    backend: &mut Backend,
    core: Core,
    objects: &[Object],
    command: &str,
) -> Result<()> {
    for object in meant_for(objects, command)? {
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

/// The objects that the backend of a plugin line may see: all that describe a backup, because it knows its own;
/// and of the forms of options those of its line alone. A form says where a VM is restored to, and another VM
/// that took it would be written over what the user never named.
fn meant_for<'a>(objects: &'a [Object], command: &str) -> Result<Vec<&'a Object>> {
    let command = command.trim();
    let lines: BTreeSet<&str> = objects
        .iter()
        .filter(|object| !object.is_options)
        .map(|object| object.line.as_str())
        .collect();
    let mut meant = Vec::new();
    for object in objects {
        if !object.is_options || object.line == command || lines.len() <= 1 {
            meant.push(object);
        } else if !(lines.contains(command) && lines.contains(object.line.as_str())) {
            return Err(Failed(
                "the restore has several VMs, and the daemon does not say whose the plugin options are: \
                 restore one VM at a time, or without plugin options"
                    .into(),
            ));
        }
    }
    Ok(meant)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn object(line: &str, is_options: bool) -> Object {
        let name = String::new();
        Object { job_id: 1, name, line: line.into(), is_options, bytes: Vec::new() }
    }

    fn lines_of(objects: &[Object], command: &str) -> Option<Vec<(String, bool)>> {
        let meant = meant_for(objects, command).ok()?;
        Some(meant.iter().map(|object| (object.line.clone(), object.is_options)).collect())
    }

    #[test]
    fn the_options_of_one_vm_are_not_those_of_another() {
        let (a, b) = ("vmtide: source=/a", "vmtide: source=/b");
        let objects = [object(a, false), object(b, false), object(a, true)];
        let described = [(a.to_owned(), false), (b.to_owned(), false)];
        assert_eq!(lines_of(&objects, b).unwrap(), described);
        let with_form = [&described[..], &[(a.to_owned(), true)]].concat();
        assert_eq!(lines_of(&objects, a).unwrap(), with_form);
    }

    #[test]
    fn options_of_nobody_are_refused_where_there_are_several_vms() {
        let (a, b) = ("vmtide: source=/a", "vmtide: source=/b");
        let several = [object(a, false), object(b, false), object("vmtide:", true)];
        assert_eq!(lines_of(&several, a), None);
        // A line that no object is of: nothing tells whether the form of `a` is its own.
        assert_eq!(lines_of(&[object(a, false), object(b, false), object(a, true)], "c"), None);
        let one = [object(a, false), object(a, false), object("vmtide:", true)];
        assert_eq!(lines_of(&one, a).unwrap().len(), 3);
    }
}
