//! Chains of VHDs: listed, rebased and merged.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

mod support;

use std::path::{Path, PathBuf};
use support::{Random, path, pattern, read_all};
use vmtide_block::{BlockDevice, CancelToken, OpenMode, Progress, RawDevice};
use vmtide_image::{
    BackingPolicy, CommitOptions, CreateOptions, CreateParent, Format, NewParent, OpenOptions,
    ParentState, RebaseOptions, Repair, check_image, commit_image, create_image, find_children,
    identity, list_chain, open_read_only, rebase_image,
};

fn trusting() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() }
}

fn content(image: &Path) -> Vec<u8> {
    read_all(&*open_read_only(image, &trusting()).unwrap())
}

/// An image with random changes over its parent.
fn make(image: &Path, below: Option<&Path>, size: u64, seed: u64) {
    let parent = below.map(|below| CreateParent {
        name: below.file_name().unwrap().to_str().unwrap().into(),
        absolute_path: Some(path(below).into()),
        format: Format::Vhd,
        identity: identity(&RawDevice::open(below, OpenMode::ReadOnly).unwrap(), Format::Vhd)
            .unwrap(),
        device: open_read_only(below, &trusting()).unwrap(),
    });
    let options = CreateOptions {
        parent,
        block_size_bytes: Some(64 << 10),
        ..CreateOptions::new(Format::Vhd, size)
    };
    let writer = create_image(image, &options).unwrap();
    let mut random = Random(seed);
    for _ in 0..12 {
        let at = random.below(size - 1);
        let length = (random.below(200_000) + 1).min(size - at);
        if random.below(4) == 0 {
            writer.write_zeroes(vmtide_block::ByteRange::new(at, length)).unwrap();
        } else {
            let data = pattern(random.next(), usize::try_from(length).unwrap());
            writer.write_at(&data, at).unwrap();
        }
    }
    writer.finish().unwrap();
}

/// A base, two children of it, and a child of the first.
fn family(directory: &Path) -> [PathBuf; 4] {
    let paths = ["base.vhd", "one.vhd", "two.vhd", "leaf.vhd"].map(|name| directory.join(name));
    make(&paths[0], None, 3 << 20, 1);
    make(&paths[1], Some(&paths[0]), 3 << 20, 2);
    make(&paths[2], Some(&paths[0]), 3 << 20, 3);
    make(&paths[3], Some(&paths[1]), 4 << 20, 4);
    paths
}

fn clean(image: &Path) {
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
    let directory = tempfile::tempdir().unwrap();
    let [base, _one, two, leaf] = family(directory.path());
    let layers = list_chain(&leaf, &trusting()).unwrap();
    let names: Vec<&Path> = layers.iter().map(|layer| layer.path.as_path()).collect();
    let real = std::fs::canonicalize(directory.path()).unwrap();
    assert_eq!(names[0], leaf);
    assert_eq!(names[1..], [real.join("one.vhd"), real.join("base.vhd")]);
    assert_eq!(layers[0].size_bytes, 4 << 20);
    let parent = layers[0].parent.as_ref().unwrap();
    assert_eq!((parent.name.as_str(), parent.state), (".\\one.vhd", ParentState::Ok));
    assert_eq!(parent.expected, [layers[1].identity.clone().unwrap()]);
    assert_eq!(parent.found, layers[1].identity);
    assert!(layers[2].parent.is_none());
    assert_eq!(find_children(&base, &[]).unwrap(), [real.join("one.vhd"), real.join("two.vhd")]);

    let refused = list_chain(&leaf, &OpenOptions::default()).unwrap();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].parent.as_ref().unwrap().state, ParentState::NotLookedFor);

    std::fs::rename(&base, directory.path().join("away")).unwrap();
    let layers = list_chain(&leaf, &trusting()).unwrap();
    assert_eq!(layers.len(), 2);
    let parent = layers[1].parent.as_ref().unwrap();
    assert_eq!((parent.state, &parent.path), (ParentState::Missing, &None));

    std::fs::rename(&two, &base).unwrap();
    let layers = list_chain(&leaf, &trusting()).unwrap();
    let parent = layers[1].parent.as_ref().unwrap();
    assert_eq!(parent.state, ParentState::Mismatch);
    assert!(parent.found.is_some() && parent.found.as_ref() != parent.expected.first());
}

#[test]
fn a_rebased_image_reads_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let [base, one, two, leaf] = family(directory.path());
    let expected = content(&leaf);
    for parent in [&two, &base, &one, &two] {
        rebase(&leaf, Some(parent), false).unwrap();
        assert!(content(&leaf) == expected, "on {}", parent.display());
        let layers = list_chain(&leaf, &trusting()).unwrap();
        assert_eq!(layers[1].path.file_name(), parent.file_name());
        clean(&leaf);
    }
    // In another directory, by a relative name.
    let below = directory.path().join("below");
    std::fs::create_dir(&below).unwrap();
    let moved = below.join("moved.vhd");
    std::fs::copy(&base, &moved).unwrap();
    rebase(&leaf, Some(&moved), false).unwrap();
    assert!(content(&leaf) == expected);
    let layers = list_chain(&leaf, &trusting()).unwrap();
    assert_eq!(layers[0].parent.as_ref().unwrap().name, ".\\below\\moved.vhd");
    // On its own.
    rebase(&leaf, None, false).unwrap();
    assert_eq!(list_chain(&leaf, &trusting()).unwrap().len(), 1);
    assert!(content(&leaf) == expected);
    clean(&leaf);
    let raw = support::raw_file(directory.path(), "expected.raw", &expected);
    let compare = ["compare", "-f", "raw", "-F", "vpc", path(&raw), path(&leaf)];
    assert!(support::qemu_img(&compare).contains("identical"));
}

#[test]
fn only_the_name_is_changed_where_that_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let [base, one, two, leaf] = family(directory.path());
    let moved = directory.path().join("renamed-one.vhd");
    let expected = content(&leaf);
    std::fs::rename(&one, &moved).unwrap();
    assert!(open_read_only(&leaf, &trusting()).is_err());
    rebase(&leaf, Some(&moved), true).unwrap();
    assert!(content(&leaf) == expected);
    clean(&leaf);
    let before = std::fs::metadata(&leaf).unwrap().len();
    rebase(&leaf, Some(&two), true).unwrap();
    assert_eq!(std::fs::metadata(&leaf).unwrap().len(), before);
    assert!(content(&leaf) != expected);
    for (image, parent) in [(&base, Some(&one)), (&leaf, None), (&leaf, Some(&leaf))] {
        let error = rebase(image, parent.map(PathBuf::as_path), true).unwrap_err();
        assert!(!error.to_string().is_empty());
    }
    rebase(&base, Some(&two), true).unwrap_err();
}

#[test]
fn a_child_is_merged_into_its_parent_which_grows() {
    let directory = tempfile::tempdir().unwrap();
    let [base, one, two, leaf] = family(directory.path());
    let expected = content(&leaf);
    let options = CommitOptions { open: trusting(), force: false };
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let done = commit_image(&leaf, &options, &progress, &cancel).unwrap();
    assert_eq!(done.grown_to_bytes, Some(4 << 20));
    assert!(done.written_bytes > 0 && done.broken_children.is_empty(), "{done:?}");
    assert!(content(&one) == expected && content(&leaf) == expected);
    clean(&one);
    let snapshot = progress.snapshot();
    assert_eq!(snapshot.done_bytes, snapshot.total_bytes);
    // The base has another child.
    let error = commit_image(&one, &options, &progress, &cancel).unwrap_err().to_string();
    assert!(error.contains("two.vhd") && error.contains("--force"), "{error}");
    let options = CommitOptions { force: true, ..options };
    let done = commit_image(&one, &options, &progress, &cancel).unwrap();
    assert_eq!(done.broken_children.len(), 1);
    assert!(content(&base) == expected && content(&one) == expected);
    std::fs::remove_file(&two).unwrap();
    let error = commit_image(&base, &options, &progress, &cancel).unwrap_err().to_string();
    assert!(error.contains("no parent"), "{error}");
    let disk = open_read_only(&base, &OpenOptions::default()).unwrap();
    assert_eq!(disk.size_bytes(), 4 << 20);
    let stop = CancelToken::new();
    stop.cancel();
    assert!(commit_image(&leaf, &options, &progress, &stop).is_err());
    assert!(content(&leaf) == expected);
}
