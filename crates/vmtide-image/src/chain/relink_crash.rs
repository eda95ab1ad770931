//! Whatever cuts off the naming of another parent, an image names the old one or the new one, and
//! holds what it held.

use super::link::{LinkTarget, link_of};
use crate::qcow2::{Companions, CreateBacking, Qcow2CreateOptions, Qcow2Image, Qcow2Writer};
use crate::vhd::{VhdCreateOptions, VhdImage, VhdKind, VhdParent, VhdWriter};
use crate::vhdx::{VhdxCreateOptions, VhdxImage, VhdxParent, VhdxWriter};
use crate::vmdk::{ExtentFiles, VmdkCreateOptions, VmdkImage, VmdkParent, VmdkWriter};
use crate::{Format, ImageWriter, qcow2, vhd, vhdx, vmdk};
use parking_lot::Mutex;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, MemoryDevice, Result, WritableBlockDevice};

const OLD: &str = "5fa21a55-f394-4a4d-9958-1951a67d5540";
const NEW: &str = "11111111-2222-4333-8444-555555555555";
const SIZE: u64 = 1 << 20;

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
    Flush,
}

/// A file in memory that remembers what was done to it.
struct Recorded {
    memory: MemoryDevice,
    changes: Mutex<Vec<Change>>,
}

impl BlockDevice for Recorded {
    fn name(&self) -> String {
        "recorded".into()
    }
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.memory.read_at(buffer, offset)
    }
}

impl WritableBlockDevice for Recorded {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.memory.write_at(data, offset)?;
        let at = usize::try_from(offset).unwrap();
        self.changes.lock().push(Change::Write(at, data.to_vec()));
        Ok(())
    }
    fn write_zeroes(&self, range: vmtide_block::ByteRange) -> Result<()> {
        self.write_at(&vec![0; usize::try_from(range.length).unwrap()], range.offset)
    }
    fn flush(&self) -> Result<()> {
        self.changes.lock().push(Change::Flush);
        Ok(())
    }
    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.memory.resize(size_bytes)?;
        self.changes.lock().push(Change::Resize(usize::try_from(size_bytes).unwrap()));
        Ok(())
    }
}

/// Applies a change; of a write only the sectors whose bit is set.
fn apply(bytes: &mut Vec<u8>, change: &Change, sectors: u64) {
    match change {
        Change::Resize(size) => bytes.resize(*size, 0),
        Change::Flush => {}
        Change::Write(at, data) => {
            for (index, piece) in data.chunks(512).enumerate() {
                if sectors >> (index % 64) & 1 == 1 {
                    let start = at + index * 512;
                    if bytes.len() < start + piece.len() {
                        bytes.resize(start + piece.len(), 0);
                    }
                    bytes[start..start + piece.len()].copy_from_slice(piece);
                }
            }
        }
    }
}

fn parent() -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::from_bytes(vec![9; 1 << 20]))
}

struct NoFiles;

impl ExtentFiles for NoFiles {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Err(BlockError::io(name, std::io::ErrorKind::NotFound))
    }
    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Err(BlockError::io(name, std::io::ErrorKind::NotFound))
    }
}

fn identity(format: Format, guid: &str) -> Option<String> {
    match format {
        Format::Vmdk => Some(guid[..8].to_owned()),
        Format::Qcow2 | Format::Raw => None,
        Format::Vhd | Format::Vhdx => Some(guid.to_owned()),
    }
}

/// A child with something of its own.
fn child(format: Format) -> Vec<u8> {
    let memory = Arc::new(MemoryDevice::new(0));
    let (name, device) = ("old.img".to_owned(), parent());
    let identity = identity(format, OLD).unwrap_or_default();
    let writer: Arc<dyn ImageWriter> = match format {
        Format::Vhd => {
            let parent = VhdParent { name, absolute_path: None, identity, device };
            let kind = VhdKind::Differencing(parent);
            let options =
                VhdCreateOptions { kind, block_size_bytes: 4096, ..VhdCreateOptions::new(SIZE) };
            Arc::new(VhdWriter::create_device(memory.clone(), &options).unwrap())
        }
        Format::Vhdx => {
            let parent = VhdxParent {
                identity,
                disk_id: None,
                relative_path: Some(name),
                volume_path: None,
                absolute_path: None,
                device,
            };
            let options = VhdxCreateOptions {
                parent: Some(parent),
                block_size_bytes: Some(1 << 20),
                ..VhdxCreateOptions::new(SIZE)
            };
            Arc::new(VhdxWriter::create_device(memory.clone(), &options).unwrap())
        }
        Format::Vmdk => {
            let parent = VmdkParent { hint: name, content_id: identity, device };
            let options =
                VmdkCreateOptions { parent: Some(parent), ..VmdkCreateOptions::new(SIZE) };
            let mut create = |_: &str| Ok(memory.clone() as Arc<dyn WritableBlockDevice>);
            Arc::new(VmdkWriter::create_files("x.vmdk", &options, &mut create).unwrap())
        }
        Format::Qcow2 | Format::Raw => {
            let backing = CreateBacking { name, format: Format::Qcow2, device };
            let options =
                Qcow2CreateOptions { backing: Some(backing), ..Qcow2CreateOptions::new(SIZE) };
            Arc::new(Qcow2Writer::create_device(memory.clone(), &options).unwrap())
        }
    };
    writer.write_at(&[3; 5000], 700).unwrap();
    writer.finish().unwrap();
    memory.to_bytes()
}

fn read(format: Format, bytes: &[u8]) -> Result<Vec<u8>> {
    let file = Arc::new(MemoryDevice::from_bytes(bytes.to_vec()));
    let parent = Some(parent());
    let image: Arc<dyn BlockDevice> = match format {
        Format::Vhd => Arc::new(VhdImage::open_device(file, parent)?),
        Format::Vhdx => Arc::new(VhdxImage::open_device(file, parent)?),
        Format::Vmdk => Arc::new(VmdkImage::open_device(file, &NoFiles, parent)?),
        Format::Qcow2 | Format::Raw => {
            let companions = Companions { backing: parent, data_file: None };
            Arc::new(Qcow2Image::open_device(file, companions)?)
        }
    };
    let mut disk = vec![0; usize::try_from(image.size_bytes()).unwrap()];
    image.read_at(&mut disk, 0)?;
    Ok(disk)
}

fn relink(format: Format, file: &Recorded, target: &LinkTarget) {
    match format {
        Format::Vhd => vhd::set_parent(file, Some(target)).unwrap(),
        Format::Vhdx => vhdx::set_parent(file, Some(target)).unwrap(),
        Format::Vmdk => {
            assert!(vmdk::change_parent_in(file, Some(target), false).unwrap().is_none())
        }
        Format::Qcow2 | Format::Raw => qcow2::set_parent(file, Some(target)).unwrap(),
    }
}

/// What the image says of its parent: the first name and the identities.
fn named(format: Format, bytes: &[u8]) -> Result<(String, Vec<String>)> {
    let link = link_of(&MemoryDevice::from_bytes(bytes.to_vec()), format)?.unwrap();
    Ok((link.names[0].replace(".\\", "").replace('\\', "/"), link.identities))
}

fn enumerate(format: Format, name: &str, next: bool) {
    let start = child(format);
    let content = read(format, &start).unwrap();
    let target = LinkTarget {
        name: name.into(),
        absolute_path: format!("/disks/{name}"),
        format,
        identity: identity(format, NEW),
        next_identity: identity(format, OLD).filter(|_| next),
    };
    let file = Recorded {
        memory: MemoryDevice::from_bytes(start.clone()),
        changes: Mutex::new(Vec::new()),
    };
    relink(format, &file, &target);
    let old = named(format, &start).unwrap();
    let new = named(format, &file.memory.to_bytes()).unwrap();
    assert!(old != new && new.0 == name, "{old:?} {new:?}");
    let is_vhd = format == Format::Vhd;
    assert!(next && !is_vhd || new.1 == identity(format, NEW).into_iter().collect::<Vec<_>>());
    let changes = file.changes.lock().clone();
    assert!(matches!(changes.last(), Some(Change::Flush)), "{format}: the end is not durable");
    let (mut durable, mut window, mut random) = (start, Vec::new(), 12345u64);
    for change in &changes {
        if matches!(change, Change::Flush) {
            for change in window.drain(..) {
                apply(&mut durable, change, u64::MAX);
            }
        } else {
            window.push(change);
        }
        for round in 0..24 {
            let mut bytes = durable.clone();
            for change in &window {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let fate = match (round, random >> 60 & 3) {
                    (0, _) | (_, 0) => u64::MAX,
                    (_, 1) => 0,
                    _ => random.rotate_left(17),
                };
                let is_lost = fate == 0 && matches!(change, Change::Resize(_));
                if !is_lost {
                    apply(&mut bytes, change, fate);
                }
            }
            let now = named(format, &bytes).unwrap();
            assert!(now == old || now == new, "{format}: {now:?}");
            assert!(read(format, &bytes).unwrap() == content, "{format}: the disk changed");
        }
    }
}

#[test]
fn a_parent_is_named_as_a_whole_or_not_at_all() {
    for format in [Format::Vhd, Format::Vhdx, Format::Qcow2, Format::Vmdk] {
        enumerate(format, "new.img", false);
        enumerate(format, "elsewhere/with a longer name than it had before.img", true);
    }
}

#[test]
fn names_that_do_not_fit_beside_each_other_go_where_there_is_room() {
    let long = format!("elsewhere/{}.img", "n".repeat(200));
    for format in [Format::Vhd, Format::Vhdx, Format::Qcow2] {
        enumerate(format, &long, true);
    }
}
