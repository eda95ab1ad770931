//! Chains of every format: listed, rebased and merged.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::{Path, PathBuf};
use support::{Random, path, pattern, read_all};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, OpenMode, Progress, RawDevice};
use vmtide_image::{
    BackingPolicy, CommitOptions, CreateOptions, CreateParent, Format, NewParent, OpenOptions,
    ParentState, RebaseOptions, Repair, check_image, commit_image, create_image, find_children,
    identity, list_chain, open_read_only, rebase_image,
};

/// The formats whose images have parents that are written.
const FORMATS: [Format; 4] = [Format::Vhd, Format::Vhdx, Format::Qcow2, Format::Vmdk];

/// Those whose images can be made independent of their parent in place.
const CAN_BE_INDEPENDENT: [Format; 3] = [Format::Vhd, Format::Qcow2, Format::Vmdk];

fn trusting() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() }
}

fn content(image: &Path) -> Vec<u8> {
    read_all(&*open_read_only(image, &trusting()).unwrap())
}

fn identity_of(image: &Path, format: Format) -> Option<String> {
    identity(&RawDevice::open(image, OpenMode::ReadOnly).unwrap(), format).unwrap()
}

/// An image with random changes over its parent.
fn make(format: Format, image: &Path, below: Option<&Path>, size: u64, seed: u64) {
    let parent = below.map(|below| CreateParent {
        name: below.file_name().unwrap().to_str().unwrap().into(),
        absolute_path: Some(path(below).into()),
        format,
        identity: identity_of(below, format),
        device: open_read_only(below, &trusting()).unwrap(),
    });
    let block_size_bytes = match format {
        Format::Vhdx => 1 << 20,
        _ => 64 << 10,
    };
    let options = CreateOptions {
        parent,
        block_size_bytes: Some(block_size_bytes),
        ..CreateOptions::new(format, size)
    };
    let writer = create_image(image, &options).unwrap();
    let mut random = Random(seed);
    for _ in 0..12 {
        let at = random.below(size - 1);
        let length = (random.below(200_000) + 1).min(size - at);
        if random.below(4) == 0 {
            writer.write_zeroes(ByteRange::new(at, length)).unwrap();
        } else {
            let data = pattern(random.next(), usize::try_from(length).unwrap());
            writer.write_at(&data, at).unwrap();
        }
    }
    writer.finish().unwrap();
}

/// The size of the last child: larger than its parent where that can grow.
fn leaf_bytes(format: Format) -> u64 {
    if format == Format::Vmdk { 3 << 20 } else { 4 << 20 }
}

/// A base, two children of it, and a larger child of the first.
struct Family {
    directory: tempfile::TempDir,
    format: Format,
    base: PathBuf,
    one: PathBuf,
    two: PathBuf,
    leaf: PathBuf,
}

impl Family {
    fn new(format: Format) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(directory.path()).unwrap();
        let [base, one, two, leaf] =
            ["base", "one", "two", "leaf"].map(|name| real.join(format!("{name}.{format}")));
        make(format, &base, None, 3 << 20, 1);
        make(format, &one, Some(&base), 3 << 20, 2);
        make(format, &two, Some(&base), 3 << 20, 3);
        make(format, &leaf, Some(&one), leaf_bytes(format), 4);
        Self { directory, format, base, one, two, leaf }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn clean(image: &Path) {
    if image.extension().is_some_and(|extension| extension == "qcow2") {
        return support::check_clean(image);
    }
    let report = check_image(image, &OpenOptions::default(), Repair::Nothing).unwrap();
    assert!(report.problems.is_empty(), "{}: {report:?}", image.display());
}

fn rebase(image: &Path, parent: Option<&Path>, relink_only: bool) -> vmtide_block::Result<()> {
    let parent =
        parent.map(|path| NewParent { path: path.to_path_buf(), format: None, stored_name: None });
    let options =
        RebaseOptions { open: trusting(), parent, relink_only, ..RebaseOptions::default() };
    rebase_image(image, &options, &Progress::new(), &CancelToken::new()).map(drop)
}

#[test]
fn a_chain_is_listed_whole_broken_and_with_a_wrong_parent() {
    for format in FORMATS {
        let family = Family::new(format);
        let layers = list_chain(&family.leaf, &trusting()).unwrap();
        let names: Vec<&PathBuf> = layers.iter().map(|layer| &layer.path).collect();
        assert_eq!(names, [&family.leaf, &family.one, &family.base]);
        assert_eq!((layers[0].size_bytes, layers[0].format), (leaf_bytes(format), format));
        let parent = layers[0].parent.as_ref().unwrap();
        assert!(parent.name.ends_with(&format!("one.{format}")), "{}", parent.name);
        assert_eq!((parent.state, parent.format), (ParentState::Ok, Some(format)));
        assert_eq!(parent.expected, layers[1].identity.iter().cloned().collect::<Vec<_>>());
        assert_eq!(parent.found, layers[1].identity);
        assert!(layers[2].parent.is_none());
        let children = find_children(&family.base, &[]).unwrap();
        assert_eq!(children, [family.one.clone(), family.two.clone()]);

        let refused = list_chain(&family.leaf, &OpenOptions::default()).unwrap();
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].parent.as_ref().unwrap().state, ParentState::NotLookedFor);

        std::fs::rename(&family.base, family.at("away")).unwrap();
        let layers = list_chain(&family.leaf, &trusting()).unwrap();
        assert_eq!(layers.len(), 2);
        let parent = layers[1].parent.as_ref().unwrap();
        assert_eq!((parent.state, &parent.path), (ParentState::Missing, &None));

        if layers[1].identity.is_some() {
            std::fs::rename(&family.two, &family.base).unwrap();
            let layers = list_chain(&family.leaf, &trusting()).unwrap();
            let parent = layers[1].parent.as_ref().unwrap();
            assert_eq!(parent.state, ParentState::Mismatch);
            assert!(parent.found.is_some() && parent.found.as_ref() != parent.expected.first());
        }
    }
}

#[test]
fn a_rebased_image_reads_the_same() {
    for format in FORMATS {
        let family = Family::new(format);
        let leaf = &family.leaf;
        let expected = content(leaf);
        for parent in [&family.two, &family.base, &family.one, &family.two] {
            rebase(leaf, Some(parent), false).unwrap();
            assert!(content(leaf) == expected, "{format} on {}", parent.display());
            assert_eq!(&list_chain(leaf, &trusting()).unwrap()[1].path, parent);
            clean(leaf);
        }
        // In another directory, by a relative name.
        let below = family.at("below");
        std::fs::create_dir(&below).unwrap();
        let moved = below.join(format!("moved.{format}"));
        std::fs::copy(&family.base, &moved).unwrap();
        rebase(leaf, Some(&moved), false).unwrap();
        assert!(content(leaf) == expected);
        let name = list_chain(leaf, &trusting()).unwrap().remove(0).parent.unwrap().name;
        assert!(name.replace('\\', "/").ends_with(&format!("below/moved.{format}")), "{name}");
        assert!(!name.contains("tmp"), "{name}");
        if CAN_BE_INDEPENDENT.contains(&format) {
            rebase(leaf, None, false).unwrap();
            assert_eq!(list_chain(leaf, &trusting()).unwrap().len(), 1);
            assert!(content(leaf) == expected);
            clean(leaf);
            let raw = support::raw_file(family.directory.path(), "expected.raw", &expected);
            let qemu = if format == Format::Vhd { "vpc" } else { format.name() };
            let compare = ["compare", "-f", "raw", "-F", qemu, path(&raw), path(leaf)];
            assert!(support::qemu_img(&compare).contains("identical"));
        } else {
            rebase(leaf, None, false).unwrap_err();
            assert!(content(leaf) == expected);
        }
    }
}

#[test]
fn only_the_name_is_changed_where_that_is_asked_for() {
    for format in FORMATS {
        let family = Family::new(format);
        let leaf = &family.leaf;
        let moved = family.at(&format!("a-much-longer-name-than-{}.{format}", "it had ".repeat(9)));
        let expected = content(leaf);
        std::fs::rename(&family.one, &moved).unwrap();
        assert!(open_read_only(leaf, &trusting()).is_err());
        rebase(leaf, Some(&moved), true).unwrap();
        assert!(content(leaf) == expected);
        clean(leaf);
        let before = std::fs::metadata(leaf).unwrap().len();
        rebase(leaf, Some(&family.two), true).unwrap();
        assert_eq!(std::fs::metadata(leaf).unwrap().len(), before);
        assert!(content(leaf) != expected);
        // Nothing would be left of what it reads through; its own chain.
        rebase(leaf, None, true).unwrap_err();
        rebase(leaf, Some(leaf), true).unwrap_err();
        rebase(&family.two, Some(leaf), true).unwrap_err();
    }
}

#[test]
fn a_child_is_merged_into_its_parent_which_grows() {
    for format in FORMATS {
        let family = Family::new(format);
        let Family { base, one, two, leaf, .. } = &family;
        let expected = content(leaf);
        let options = CommitOptions { open: trusting(), force: false };
        let (progress, cancel) = (Progress::new(), CancelToken::new());
        let done = commit_image(leaf, &options, &progress, &cancel).unwrap();
        let grown = Some(leaf_bytes(format)).filter(|bytes| *bytes > 3 << 20);
        assert_eq!(done.grown_to_bytes, grown);
        assert!(done.written_bytes > 0 && done.broken_children.is_empty(), "{done:?}");
        assert_eq!(done.parent_identity, identity_of(one, format));
        assert!(content(one) == expected && content(leaf) == expected, "{format}");
        clean(one);
        let snapshot = progress.snapshot();
        assert_eq!(snapshot.done_bytes, snapshot.total_bytes);
        // The base has another child.
        let error = commit_image(one, &options, &progress, &cancel).unwrap_err().to_string();
        assert!(error.contains("two.") && error.contains("--force"), "{error}");
        let options = CommitOptions { force: true, ..options };
        let done = commit_image(one, &options, &progress, &cancel).unwrap();
        assert_eq!(done.broken_children, std::slice::from_ref(two));
        assert!(content(base) == expected && content(one) == expected);
        std::fs::remove_file(two).unwrap();
        let error = commit_image(base, &options, &progress, &cancel).unwrap_err().to_string();
        assert!(error.contains("no parent"), "{error}");
        let disk = open_read_only(base, &OpenOptions::default()).unwrap();
        assert_eq!(disk.size_bytes(), leaf_bytes(format));
    }
}

#[test]
fn a_merge_that_was_stopped_is_run_again() {
    for format in FORMATS {
        let family = Family::new(format);
        let Family { base, one, .. } = &family;
        let expected = content(one);
        let options = CommitOptions { open: trusting(), force: true };
        let stop = CancelToken::new();
        stop.cancel();
        // Stopped before anything was written, and once the parent is another one already.
        assert!(commit_image(one, &options, &Progress::new(), &stop).is_err());
        assert!(content(one) == expected);
        assert_eq!(family.format, format);
        let writer = vmtide_image::open_writable(base, &trusting()).unwrap();
        if let Some(next) = writer.next_identity().unwrap() {
            drop(writer);
            // A change that nobody told the child of: it does not take the parent any more.
            let writer = vmtide_image::open_writable(base, &trusting()).unwrap();
            writer.write_at(&[0; 512], 0).unwrap();
            writer.finish().unwrap();
            assert_ne!(identity_of(base, format), Some(next));
            assert!(open_read_only(one, &trusting()).is_err());
            assert!(commit_image(one, &options, &Progress::new(), &CancelToken::new()).is_err());
            // It can be told by hand.
            rebase(one, Some(base), true).unwrap();
        }
        commit_image(one, &options, &Progress::new(), &CancelToken::new()).unwrap();
        let merged = content(base);
        assert_eq!(merged.len(), expected.len());
        assert!(content(one) == merged);
    }
}
