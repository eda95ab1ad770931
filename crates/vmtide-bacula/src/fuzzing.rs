//! What the fuzzer calls, and the tests with seeds and mutations of them: everything here that reads bytes from
//! volumes, from the pipe, or from a file set.

use crate::command::PluginCommand;
use crate::frame::Header;
use crate::link::{Link, Said};
use crate::object::{PointObject, RestoreOptions};
use crate::stream::Record;
use vmtide_block::CancelToken;

/// Reads `input` as a record of a disk's stream, as a conversation on the pipe, as a plugin line, as a form of
/// options and as a restore object. Must not panic, nor allocate more than a few times the input.
pub fn bacula(input: &[u8]) {
    if let Ok(Some(record)) = Record::parse(input)
        && let Ok(bytes) = record.bytes()
        && !matches!(record, Record::Zeros(ref zeros) if zeros.len() > 1 << 12)
    {
        // What was understood is understood again.
        assert!(matches!(Record::parse(&bytes), Ok(Some(again)) if again == record));
    }
    if let Some(header) = input.first_chunk().and_then(|bytes| Header::parse(*bytes)) {
        assert!(Header::parse(header.bytes()) == Some(header));
    }
    let owned = std::io::Cursor::new(input.to_vec());
    let mut link = Link::new(Box::new(owned), Box::new(std::io::sink()), CancelToken::new());
    while let Ok(said) = link.hear() {
        if said == Said::Data {
            assert!(link.data().len() <= input.len());
        }
    }
    let text = String::from_utf8_lossy(input);
    // Whether it is right does not matter here.
    let _ = PluginCommand::parse(&text);
    let _ = RestoreOptions::parse(&text);
    let _ = PointObject::parse(input);
}

#[cfg(test)]
mod tests {
    use super::bacula;
    use crate::stream::{MomentId, Record, Tally};
    use std::path::Path;
    use vmtide_block::ByteRange;

    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let header = Record::header(1 << 30, MomentId(1, 2), Some(MomentId(3, 4)));
        let zeros = Record::Zeros(vec![ByteRange::new(0, 65_536), ByteRange::new(1 << 20, 512)]);
        vec![
            ("header", header.bytes().unwrap()),
            ("zeros", zeros.bytes().unwrap()),
            ("trailer", Record::Trailer(Tally::default().trailer()).bytes().unwrap()),
            (
                "conversation",
                b"C000004\nNextD000003\n\x01\x02\x03F000000\nC000006\nEnd ok".to_vec(),
            ),
            (
                "line",
                b"vmtide: source=\"/vm/a \\\"b\\\".raw\" consistency=fs disk=a,b timeout_s=60"
                    .to_vec(),
            ),
            ("options", b"to=\"/restored\"\nformat=vhdx\n".to_vec()),
        ]
    }

    /// With `VMTIDE_WRITE_SEEDS=1` the seeds are written into the tree, for the fuzzer.
    #[test]
    fn seeds_and_their_mutations_do_no_harm() {
        let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/bacula");
        for (name, seed) in seeds() {
            if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(&home).unwrap();
                std::fs::write(home.join(name), &seed).unwrap();
            }
            let kept = std::fs::read(home.join(name)).unwrap_or_default();
            assert!(kept == seed, "{name}: another seed is kept; see the top of this test");
            for at in 0..seed.len() {
                bacula(&seed[..at]);
                for bits in [0x01, 0x80, 0xff] {
                    let mut changed = seed.clone();
                    changed[at] ^= bits;
                    bacula(&changed);
                }
            }
            bacula(&seed);
        }
    }
}
