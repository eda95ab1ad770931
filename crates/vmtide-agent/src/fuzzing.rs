//! Entry points of the fuzz targets: the parsers of what clients send before anything is known of them, and of the
//! file of keys.

use crate::auth::keys;
use crate::contract;
use crate::roots::{unix_names, windows_names};
use crate::stream::RangesParser;
use crate::stream::frame::{Frame, FrameReader};
use vmtide_block::CancelToken;
use vmtide_cim::remote::Call;
use vmtide_hypervisor::remote::FreezeDocument;

/// The path of a request with its query, and the name of a disk.
///
/// # Panics
/// Where what was found good is not found good again: a path that was made plain must stay as it is.
pub fn agent_request(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let disk = contract::parse_for_fuzzing(path, query);
    for name in [Some(text), disk.as_deref()].into_iter().flatten() {
        if let Ok(plain) = windows_names::check(name) {
            assert_eq!(windows_names::check(&plain).as_deref(), Ok(plain.as_str()), "{name:?}");
            assert!(!plain.split('\\').any(|part| part == ".."), "{name:?}");
        }
        if let Ok(plain) = unix_names::check(name) {
            assert_eq!(unix_names::check(&plain).as_deref(), Ok(plain.as_str()), "{name:?}");
            assert!(!plain.split('/').any(|part| part == ".."), "{name:?}");
        }
    }
}

/// The bodies about VMs.
///
/// # Panics
/// Where what was found good is not what it promises: names that become parts of files, namespaces that are served.
pub fn agent_vm_calls(input: &[u8]) {
    if let Ok(document) = serde_json::from_slice::<FreezeDocument>(input)
        && let Ok(request) = document.request(CancelToken::new())
    {
        let is_plain = |text: &str| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        assert!(is_plain(request.job.as_str()) && is_plain(&request.lineage));
        assert_eq!(request.bases.len(), document.bases.len());
    }
    if let Ok(call) = serde_json::from_slice::<Call>(input)
        && call.check().is_ok()
    {
        // What is sent on says the same.
        let text = serde_json::to_string(&call).unwrap_or_default();
        assert!(serde_json::from_str::<Call>(&text).is_ok_and(|again| again.check().is_ok()));
        assert!(!call.changes() || text.to_ascii_lowercase().contains("virtualization"));
    }
}

/// A file of keys.
pub fn agent_keys(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input)
        && let Ok(set) = keys::parse(text)
    {
        // An empty key must never be good.
        assert!(set.find(b"").is_none());
    }
}

/// A framed stream as it is written to a disk. Its checksums are made right, too, so that what stands
/// behind them is reached.
///
/// # Panics
/// Where a frame breaks a rule that the reader promises to hold.
pub fn agent_frames(input: &[u8]) {
    read_frames(input);
    let mut mended = crate::stream::frame::head().to_vec();
    let mut rest = input.get(mended.len()..).unwrap_or_default();
    while let Some((header, more)) = rest.split_first_chunk::<32>() {
        let mut header = *header;
        let [_, _, _, _, a, b, c, d, ..] = header;
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let (payload, more) = more.split_at(length.min(more.len()));
        if header[0] == 0 {
            header[24..28].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        }
        let checksum = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&checksum.to_le_bytes());
        mended.extend(header);
        mended.extend(payload);
        rest = more;
    }
    read_frames(&mended);
}

fn read_frames(stream: &[u8]) {
    let Ok(mut frames) = FrameReader::new(stream, 0) else { return };
    let mut position = 0u64;
    loop {
        match frames.next_frame() {
            Ok(Frame::Data { offset, content }) => {
                assert!(!content.is_empty() && offset.checked_add(content.len() as u64).is_some());
                position += content.len() as u64;
            }
            Ok(Frame::Zero(range)) => {
                assert!(!range.is_empty() && range.checked_end().is_some());
                position += range.length;
            }
            Ok(Frame::End(at)) => {
                assert_eq!(at, position);
                drop(frames.expect_nothing_more());
                return;
            }
            Err(_) => return,
        }
    }
}

/// A list of ranges in JSON; its first byte says where it is cut in two.
///
/// # Panics
/// Where it is read another way than serde reads it.
pub fn agent_ranges(input: &[u8]) {
    #[derive(serde::Deserialize)]
    struct Loose {
        offset: u64,
        length: u64,
    }
    let Some((cut, text)) = input.split_first() else { return };
    let (first, second) = text.split_at(usize::from(*cut).min(text.len()));
    let mut parser = RangesParser::new(1 << 10);
    if parser.feed(first).and_then(|()| parser.feed(second)).is_err() {
        return;
    }
    // What is no UTF-8 may stand in members that nobody reads.
    if let (Ok(ranges), Ok(text)) = (parser.finish(), std::str::from_utf8(text)) {
        let loose: Result<Vec<Loose>, _> = serde_json::from_str(text);
        let loose =
            loose.map(|list| list.iter().map(|range| (range.offset, range.length)).collect());
        let ranges: Vec<_> = ranges.iter().map(|range| (range.offset, range.length)).collect();
        assert_eq!(loose.ok(), Some(ranges));
    }
}
