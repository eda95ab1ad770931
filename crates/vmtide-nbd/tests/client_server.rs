//! Our client against our server: every style, every operation, against a vector of bytes.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Lab, noise};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, MemoryDevice, RangeSet, Result,
    WritableBlockDevice,
};
use vmtide_nbd::{
    Export, HeaderStyle, NbdDevice, NbdOptions, NbdServer, ServerHandle, ServerOptions, ZeroMode,
    probe_export,
};

/// A memory disk with a size that is a multiple of nothing but `block`.
const SIZE: usize = 300 << 10;

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u64, bool),
    Zero(usize, usize, bool),
    Trim(usize, usize),
    Flush,
}

fn any_step() -> impl Strategy<Value = Step> {
    let range = || (0..SIZE, 0..90_000usize).prop_map(|(at, n)| (at, n.min(SIZE - at)));
    prop_oneof![
        range().prop_map(|(at, n)| Step::Read(at, n)),
        (range(), any::<u64>(), any::<bool>())
            .prop_map(|((at, n), seed, durable)| Step::Write(at, n, seed, durable)),
        (range(), any::<bool>()).prop_map(|((at, n), allocate)| Step::Zero(at, n, allocate)),
        range().prop_map(|(at, n)| Step::Trim(at, n)),
        Just(Step::Flush),
    ]
}

fn any_style() -> impl Strategy<Value = HeaderStyle> {
    prop_oneof![
        Just(HeaderStyle::Simple),
        Just(HeaderStyle::Structured),
        Just(HeaderStyle::Extended),
    ]
}

fn options(style: HeaderStyle) -> NbdOptions {
    NbdOptions {
        structured_replies: style != HeaderStyle::Simple,
        extended_headers: style == HeaderStyle::Extended,
        request_bytes: 16 << 10,
        ..NbdOptions::default()
    }
}

fn apply(disk: &NbdDevice, model: &mut [u8], step: &Step) -> Result<()> {
    let range = |at: usize, n: usize| ByteRange::new(at as u64, n as u64);
    match *step {
        Step::Read(at, n) => {
            let mut got = vec![0xee; n];
            disk.read_at(&mut got, at as u64)?;
            assert!(got == model[at..at + n], "{step:?}");
        }
        Step::Write(at, n, seed, durable) => {
            let data = noise(n, seed);
            disk.write_with(&data, at as u64, durable)?;
            model[at..at + n].copy_from_slice(&data);
        }
        Step::Zero(at, n, allocate) => {
            let mode = ZeroMode { allocate, fast_only: false };
            disk.write_zeroes_with(range(at, n), mode)?;
            model[at..at + n].fill(0);
        }
        Step::Trim(at, n) => {
            disk.trim(range(at, n))?;
            // Anything may be there now; fix it.
            disk.write_zeroes(range(at, n))?;
            model[at..at + n].fill(0);
        }
        Step::Flush => disk.flush()?,
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_disk_behaves_like_a_vector(
        steps in prop::collection::vec(any_step(), 1..40),
        style in any_style(),
        block in prop_oneof![Just(1u32), Just(512), Just(4096)],
    ) {
        let lab = Lab::new();
        let memory = Arc::new(MemoryDevice::new(SIZE));
        let export = Export::writable(memory.clone()).with_minimum_block(block);
        let _server = NbdServer::new().export(export).listen_unix(lab.path("s")).unwrap();
        let disk = NbdDevice::connect(&lab.url(""), &options(style)).unwrap();
        prop_assert_eq!(disk.header_style(), style);
        let mut model = vec![0; SIZE];
        for step in &steps {
            apply(&disk, &mut model, step).unwrap();
        }
        prop_assert!(memory.to_bytes() == model);
        let mut got = vec![1; SIZE];
        disk.read_at(&mut got, 0).unwrap();
        prop_assert!(got == model);
        for extent in vmtide_block::all_extents(&disk).unwrap() {
            let (start, end) = (extent.range.offset as usize, extent.range.end() as usize);
            if extent.kind.reads_as_zero() {
                prop_assert!(model[start..end].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn dirty_ranges_come_back_as_they_went(
        pairs in prop::collection::vec((0..SIZE as u64, 1..5000u64), 0..60),
        style in prop_oneof![Just(HeaderStyle::Structured), Just(HeaderStyle::Extended)],
    ) {
        let lab = Lab::new();
        let changed: RangeSet = pairs.iter().map(|(at, n)| ByteRange::new(*at, *n)).collect();
        let changed = changed.clamp(SIZE as u64);
        let export = Export::read_only(Arc::new(MemoryDevice::new(SIZE)))
            .with_dirty_bitmap("other", RangeSet::full(SIZE as u64))
            .with_dirty_bitmap("b", changed.clone());
        let _server = NbdServer::new().export(export).listen_unix(lab.path("s")).unwrap();
        let options = options(style).with_dirty_bitmap("other").with_dirty_bitmap("b");
        let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
        let whole = ByteRange::new(0, SIZE as u64);
        prop_assert_eq!(disk.dirty_ranges("b", whole, &CancelToken::new()).unwrap(), changed);
    }
}

fn serve(lab: &Lab, export: Export) -> ServerHandle {
    NbdServer::new().export(export).listen_unix(lab.path("s")).unwrap()
}

/// A disk that fails, or takes its time.
struct Odd {
    kind: Option<std::io::ErrorKind>,
    delay_ms: u64,
    /// How often it was asked.
    asked: AtomicUsize,
}

impl Odd {
    fn new(kind: Option<std::io::ErrorKind>, delay_ms: u64) -> Arc<Self> {
        Arc::new(Self { kind, delay_ms, asked: AtomicUsize::new(0) })
    }

    fn act(&self) -> Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(self.delay_ms));
        match self.kind {
            Some(kind) => Err(BlockError::io("odd disk", kind)),
            None => Ok(()),
        }
    }
}

impl BlockDevice for Odd {
    fn name(&self) -> String {
        "odd".to_owned()
    }
    fn size_bytes(&self) -> u64 {
        1 << 20
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        self.act()
    }
    fn extents(&self, _: ByteRange) -> Result<Vec<Extent>> {
        Err(BlockError::io("odd disk", std::io::ErrorKind::Other))
    }
}

impl WritableBlockDevice for Odd {
    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        self.act()
    }
    fn write_zeroes(&self, _: ByteRange) -> Result<()> {
        self.act()
    }
    fn flush(&self) -> Result<()> {
        self.act()
    }
}

#[test]
fn errors_keep_their_kind_and_the_connection() {
    use std::io::ErrorKind::{Other, PermissionDenied, StorageFull};
    for (kind, expected) in [
        (StorageFull, StorageFull),
        (PermissionDenied, PermissionDenied),
        (std::io::ErrorKind::TimedOut, Other),
    ] {
        for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
            let lab = Lab::new();
            let odd = Odd::new(Some(kind), 0);
            let _server = serve(&lab, Export::writable(odd));
            let disk = NbdDevice::connect(&lab.url(""), &options(style)).unwrap();
            for _ in 0..3 {
                let error = disk.write_at(&[1; 600], 3).unwrap_err();
                assert_eq!(error.io_kind(), Some(expected), "{style:?}: {error}");
                let error = disk.read_at(&mut [1; 60_000], 3).unwrap_err();
                assert_eq!(error.io_kind(), Some(expected), "{style:?}: {error}");
            }
            assert!(
                disk.extents(ByteRange::new(0, 512)).is_err() == (style != HeaderStyle::Simple)
            );
        }
    }
}

#[test]
fn a_request_that_takes_too_long_ends_the_connection() {
    let lab = Lab::new();
    let odd = Odd::new(None, 3000);
    let _server = serve(&lab, Export::writable(odd));
    let options = NbdOptions { request_timeout_ms: 200, connections: 1, ..NbdOptions::default() };
    let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let error = disk.read_at(&mut [0; 512], 0).unwrap_err();
                assert!(matches!(error, BlockError::Disconnected { .. }), "{error}");
                assert!(error.to_string().contains("no answer"), "{error}");
            });
        }
    });
    // A flush has more time.
    let disk = NbdDevice::connect(&lab.url(""), &NbdOptions { request_timeout_ms: 500, ..options })
        .unwrap();
    disk.flush().unwrap();
}

#[test]
fn shutting_down_answers_what_is_under_way() {
    let lab = Lab::new();
    let odd = Odd::new(None, 400);
    let server = serve(&lab, Export::writable(odd.clone()));
    let disk = lab.connect("");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_at(&[1; 512], 0));
        while odd.asked.load(Ordering::SeqCst) == 0 && !writer.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        server.shutdown();
        writer.join().unwrap().unwrap();
    });
    let error = disk.write_at(&[1; 512], 0).unwrap_err();
    assert!(matches!(error, BlockError::Disconnected { .. }), "{error}");
    assert!(!lab.path("s").exists());
}

#[test]
fn contexts_are_listed_by_namespace() {
    let lab = Lab::new();
    let export = Export::read_only(Arc::new(MemoryDevice::new(4096)))
        .with_dirty_bitmap("b", RangeSet::new())
        .with_context("x-test:one", Arc::new(|_| Ok(Vec::new())));
    let _server = serve(&lab, export);
    for (query, expected) in [
        (None, vec!["base:allocation", "qemu:dirty-bitmap:b", "x-test:one"]),
        (Some("qemu:"), vec!["qemu:dirty-bitmap:b"]),
        (Some("base:allocation"), vec!["base:allocation"]),
        (Some("none:"), vec![]),
    ] {
        let options = NbdOptions {
            meta_contexts: query.into_iter().map(str::to_owned).collect(),
            ..NbdOptions::default()
        };
        assert_eq!(probe_export(&lab.url(""), &options).unwrap().contexts, expected);
    }
}

#[test]
fn fast_zeroes_are_refused_where_they_are_not_fast() {
    let lab = Lab::new();
    let _server = serve(&lab, Export::writable(Arc::new(MemoryDevice::new(8192))));
    let disk = lab.connect("");
    let fast = ZeroMode { fast_only: true, allocate: false };
    let error = disk.write_zeroes_with(ByteRange::new(0, 4096), fast).unwrap_err();
    assert!(matches!(error, BlockError::Unsupported { .. }), "{error}");
}

#[test]
fn a_server_without_options_still_reads_and_writes() {
    let options = ServerOptions { structured_replies: false, ..ServerOptions::default() };
    let server = NbdServer::new()
        .options(options)
        .export(Export::writable(Arc::new(MemoryDevice::new(SIZE))).named("x"))
        .listen_tcp("127.0.0.1:0")
        .unwrap();
    let disk = NbdDevice::connect(&server.url(), &NbdOptions::default()).unwrap();
    assert_eq!(disk.header_style(), HeaderStyle::Simple);
    assert_eq!(disk.contexts().count(), 0);
    disk.write_at(&[7; 100], 50).unwrap();
    let mut got = [0; 100];
    disk.read_at(&mut got, 50).unwrap();
    assert_eq!(got, [7; 100]);
}
