//! Files that an image names and that lie elsewhere now, or have a name in another case.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use support::{path, qemu_img, read_all};
use vmtide_block::{OpenMode, RawDevice, Result};
use vmtide_image::{
    BackingPolicy, CreateOptions, CreateParent, Format, OpenOptions, ParentState, create_image,
    identity, list_chain, open_read_only,
};

const SIZE: u64 = 1 << 20;

/// Directories for the base, the child, and a copy of both.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        for name in ["base", "child", "other"] {
            std::fs::create_dir(place.at(name)).unwrap();
        }
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        std::fs::canonicalize(self.directory.path()).unwrap().join(name)
    }
}

fn options(backing: BackingPolicy, search: &[PathBuf]) -> OpenOptions {
    OpenOptions { backing, search: search.to_vec(), ..OpenOptions::default() }
}

fn first_byte(image: &Path, options: &OpenOptions) -> Result<u8> {
    Ok(read_all(&*open_read_only(image, options)?)[0])
}

fn base_of(format: Format, path: &Path, byte: u8) {
    let writer = create_image(path, &CreateOptions::new(format, SIZE)).unwrap();
    writer.write_at(&[byte; 4096], 0).unwrap();
    writer.finish().unwrap();
}

fn child_of(format: Format, child: &Path, base: &Path, name: &str) {
    let device = RawDevice::open(base, OpenMode::ReadOnly).unwrap();
    let parent = CreateParent {
        name: name.into(),
        absolute_path: Some(format!(r"C:\VMs\{name}")),
        format,
        identity: identity(&device, format).unwrap(),
        device: open_read_only(base, &OpenOptions::default()).unwrap(),
    };
    let options = CreateOptions { parent: Some(parent), ..CreateOptions::new(format, SIZE) };
    create_image(child, &options).unwrap().finish().unwrap();
}

#[test]
fn a_moved_backing_file_is_found_by_its_name_beside_the_overlay_and_where_the_user_says() {
    let place = Place::new();
    let (base, child) = (place.at("base/b.qcow2"), place.at("child/c.qcow2"));
    base_of(Format::Qcow2, &base, 7);
    let make = ["create", "-f", "qcow2", "-F", "qcow2", "-b", path(&base), path(&child)];
    qemu_img(&make);
    let own = options(BackingPolicy::SameDirectory, &[]);
    // It is there, and the policy forbids it: another file of that name is not what was meant.
    base_of(Format::Qcow2, &place.at("child/b.qcow2"), 8);
    assert!(first_byte(&child, &own).is_err());
    assert_eq!(first_byte(&child, &options(BackingPolicy::Allow, &[])).unwrap(), 7);
    // Moved: beside the overlay, and in the directories that the user names, whatever the policy.
    std::fs::rename(&base, place.at("other/b.qcow2")).unwrap();
    assert_eq!(first_byte(&child, &own).unwrap(), 8);
    assert_eq!(list_chain(&child, &own).unwrap().len(), 2);
    std::fs::remove_file(place.at("child/b.qcow2")).unwrap();
    let error = first_byte(&child, &own).unwrap_err();
    assert_eq!(error.io_kind(), Some(ErrorKind::NotFound), "{error}");
    assert!(error.to_string().contains("--search DIR"), "{error}");
    let layers = list_chain(&child, &own).unwrap();
    assert_eq!(layers[0].parent.as_ref().unwrap().state, ParentState::Missing);
    for policy in [BackingPolicy::Refuse, BackingPolicy::SameDirectory, BackingPolicy::Allow] {
        let search = options(policy, &[place.at("base"), place.at("other")]);
        assert_eq!(first_byte(&child, &search).unwrap(), 7, "{policy:?}");
        assert_eq!(list_chain(&child, &search).unwrap().len(), 2, "{policy:?}");
    }
    // It must be of the format that the overlay says.
    std::fs::write(place.at("other/b.qcow2"), [0; 4096]).unwrap();
    let search = options(BackingPolicy::Refuse, &[place.at("other")]);
    assert!(first_byte(&child, &search).unwrap_err().to_string().contains("b.qcow2"));
}

#[test]
fn what_is_no_path_is_not_looked_for() {
    let place = Place::new();
    let child = place.at("child/c.qcow2");
    std::fs::write(place.at("child/x"), [9; 4096]).unwrap();
    let make =
        ["create", "-u", "-f", "qcow2", "-F", "raw", "-b", "nbd://host/x", path(&child), "1M"];
    qemu_img(&make);
    let search = options(BackingPolicy::SameDirectory, &[place.at("child")]);
    let error = first_byte(&child, &search).unwrap_err().to_string();
    assert!(error.contains("not a plain path"), "{error}");
}

#[test]
fn a_data_file_that_was_moved_is_found() {
    let place = Place::new();
    let (image, data) = (place.at("child/i.qcow2"), place.at("base/data.raw"));
    let option = format!("data_file={},data_file_raw=on", path(&data));
    qemu_img(&["create", "-f", "qcow2", "-o", &option, path(&image), "1M"]);
    support::qemu_io(&image, &["-f", "qcow2"], &["write -P 5 0 4k"]);
    std::fs::rename(&data, place.at("other/data.raw")).unwrap();
    let search = options(BackingPolicy::SameDirectory, &[place.at("other")]);
    assert_eq!(first_byte(&image, &search).unwrap(), 5);
    std::fs::rename(place.at("other/data.raw"), place.at("child/data.raw")).unwrap();
    assert_eq!(first_byte(&image, &options(BackingPolicy::SameDirectory, &[])).unwrap(), 5);
}

#[test]
fn parents_are_found_without_regard_to_case_where_only_one_file_has_the_name() {
    for format in [Format::Vhdx, Format::Vhd, Format::Vmdk, Format::Qcow2] {
        let place = Place::new();
        let base = place.at(&format!("child/Base One.{format}"));
        let child = place.at(&format!("child/c.{format}"));
        base_of(format, &base, 6);
        child_of(format, &child, &base, &format!("BASE one.{format}"));
        let own = options(BackingPolicy::SameDirectory, &[]);
        assert_eq!(first_byte(&child, &own).unwrap(), 6, "{format}");
        std::fs::rename(&base, place.at(&format!("other/base ONE.{format}"))).unwrap();
        assert!(first_byte(&child, &own).is_err(), "{format}");
        let search = options(BackingPolicy::Refuse, &[place.at("other")]);
        assert_eq!(first_byte(&child, &search).unwrap(), 6, "{format}");
        // With two such files nobody knows which is meant.
        std::fs::write(place.at(&format!("other/base one.{format}")), [0; 512]).unwrap();
        let error = first_byte(&child, &search).unwrap_err();
        assert_eq!(error.io_kind(), Some(ErrorKind::NotFound), "{format}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn a_link_in_another_case_is_not_followed() {
    let place = Place::new();
    base_of(Format::Vhdx, &place.at("base/b.vhdx"), 6);
    child_of(Format::Vhdx, &place.at("child/c.vhdx"), &place.at("base/b.vhdx"), "B.VHDX");
    std::os::unix::fs::symlink(place.at("base/b.vhdx"), place.at("child/b.vhdx")).unwrap();
    let own = options(BackingPolicy::SameDirectory, &[]);
    assert!(first_byte(&place.at("child/c.vhdx"), &own).is_err());
}

#[test]
fn extents_are_found_without_regard_to_case_and_in_directories_to_search() {
    let place = Place::new();
    let image = place.at("child/disk.vmdk");
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
                createType=\"monolithicFlat\"\nRW 2 FLAT \"Disk-FLAT.vmdk\" 0\n";
    std::fs::write(&image, text).unwrap();
    let data = place.at("child/disk-flat.vmdk");
    std::fs::write(&data, [4; 1024]).unwrap();
    let own = options(BackingPolicy::SameDirectory, &[]);
    assert_eq!(first_byte(&image, &own).unwrap(), 4);
    assert!(first_byte(&image, &options(BackingPolicy::Refuse, &[])).is_err());
    for name in ["disk-flat.vmdk", "Disk-FLAT.vmdk"] {
        let moved = place.at("other").join(name);
        std::fs::rename(&data, &moved).unwrap();
        assert!(first_byte(&image, &own).is_err());
        let search = options(BackingPolicy::SameDirectory, &[place.at("other")]);
        assert_eq!(first_byte(&image, &search).unwrap(), 4, "{name}");
        std::fs::rename(&moved, &data).unwrap();
    }
}
