use super::*;
use crate::ObjectId;
use crate::envelope::{Header, ObjectKind};
use proptest::prelude::*;

const ID: ObjectId = ObjectId([1; 16]);

fn header() -> Header {
    Header {
        kind: ObjectKind::Pack,
        sealed: true,
        chunk_size_bytes: 65536,
        id: ID,
        repository: ObjectId([2; 16]),
        owner: crate::envelope::NO_OWNER,
    }
}

fn subkeys(byte: u8) -> Subkeys {
    MasterKey::from_bytes([byte; 32]).subkeys()
}

fn cipher(header: &Header) -> ObjectCipher {
    ObjectCipher::new(&subkeys(7), header).unwrap()
}

fn sealed(section: u64, associated: &[u8], content: &[u8]) -> Vec<u8> {
    let mut data = content.to_vec();
    cipher(&header()).seal(section, associated, &mut data).unwrap();
    assert_eq!(data.len(), content.len() + TAG_BYTES);
    data
}

/// The subkeys of the document, computed as it says, independently of the code under test.
#[test]
fn keys_are_derived_as_the_format_says() {
    let master = [9; 32];
    let subkeys = MasterKey::from_bytes(master).subkeys();
    let chunk_key = blake3::derive_key("vmtide v1 chunk id", &master);
    assert_eq!(subkeys.chunk_id(b"x").0, *blake3::keyed_hash(&chunk_key, b"x").as_bytes());
    let root = blake3::derive_key("vmtide v1 object key", &master);
    let name = [b"VMTIDEPK".as_slice(), &ID.0].concat();
    let expected = blake3::keyed_hash(&root, &name);
    assert_eq!(subkeys.object_key(ObjectKind::Pack, ID), *expected.as_bytes());
}

/// A section opened with the library alone, by what the document says of nonce and associated data.
#[test]
fn a_section_is_sealed_as_the_format_says() {
    use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let section = 0x0102_0304_0506_0708_u64;
    let mut stored = sealed(section, b"more", b"content");
    let key = subkeys(7).object_key(ObjectKind::Pack, ID);
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap());
    let nonce = Nonce::assume_unique_for_key([8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0]);
    let associated = [&header().encode()[..], &section.to_le_bytes(), b"more"].concat();
    let opened = key.open_in_place(nonce, Aad::from(associated), &mut stored).unwrap();
    assert_eq!(opened, b"content");
}

#[test]
fn nothing_opens_in_another_place_or_with_another_key() {
    let content = b"sixteen chunks";
    let stored = sealed(3, b"aa", content);
    let opens = |subkeys: &Subkeys, header: &Header, section: u64, associated: &[u8]| {
        let cipher = ObjectCipher::new(subkeys, header).unwrap();
        let mut copy = stored.clone();
        match cipher.open(section, associated, &mut copy) {
            Ok(opened) => {
                assert_eq!(opened, content);
                true
            }
            Err(error) => {
                assert!(error.is_damage(), "{error}");
                false
            }
        }
    };
    let own = header();
    let keys = subkeys(7);
    assert!(opens(&keys, &own, 3, b"aa"));
    assert!(!opens(&subkeys(8), &own, 3, b"aa"), "another master key");
    assert!(!opens(&keys, &own, 4, b"aa"), "another section");
    assert!(!opens(&keys, &own, u64::MAX, b"aa"), "the directory's section");
    for associated in [&b""[..], b"a", b"aaa", b"ab"] {
        assert!(!opens(&keys, &own, 3, associated), "other associated data");
    }
    for other in [
        Header { id: ObjectId([3; 16]), ..own },
        Header { repository: ObjectId([3; 16]), ..own },
        Header { owner: ObjectId([3; 16]), ..own },
        Header { kind: ObjectKind::MapSegment, ..own },
        Header { chunk_size_bytes: 32768, ..own },
    ] {
        assert!(!opens(&keys, &other, 3, b"aa"), "{other:?}");
    }
}

#[test]
fn without_encryption_nothing_is_added_and_nothing_hidden() {
    let cipher = cipher(&Header { sealed: false, ..header() });
    let mut data = b"content".to_vec();
    cipher.seal(0, b"", &mut data).unwrap();
    assert_eq!((data.as_slice(), cipher.overhead_bytes()), (&b"content"[..], 0));
    assert_eq!(cipher.open(0, b"", &mut data).unwrap(), b"content");
}

#[test]
fn keys_are_not_shown() {
    let shown =
        format!("{:?} {:?} {:?}", MasterKey::from_bytes([7; 32]), subkeys(7), cipher(&header()));
    assert!(shown.starts_with("MasterKey(secret) Subkeys(secret)"), "{shown}");
    let key = subkeys(7).object_key(ObjectKind::Pack, ID);
    assert!(!shown.contains(&format!("{key:?}")), "{shown}");
}

#[test]
fn a_checksum_is_the_beginning_of_blake3() {
    // The hash of nothing, from the BLAKE3 specification's test vectors.
    assert_eq!(crate::id::to_hex(&checksum(b"")), "af1349b9f5f9a1a6a0404dea36dcc949");
}

proptest! {
    #[test]
    fn what_is_sealed_opens(
        content in proptest::collection::vec(any::<u8>(), 0..5000),
        section in any::<u64>(),
        associated in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut stored = sealed(section, &associated, &content);
        let opened = cipher(&header()).open(section, &associated, &mut stored).unwrap().to_vec();
        prop_assert_eq!(opened, content);
    }

    #[test]
    fn no_flipped_bit_and_no_cut_opens(
        content in proptest::collection::vec(any::<u8>(), 0..300),
        at in any::<prop::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let stored = sealed(1, b"", &content);
        let mut flipped = stored.clone();
        flipped[at.index(stored.len())] ^= 1 << bit;
        prop_assert!(cipher(&header()).open(1, b"", &mut flipped).is_err());
        let mut cut = stored[..at.index(stored.len())].to_vec();
        prop_assert!(cipher(&header()).open(1, b"", &mut cut).is_err());
    }
}
