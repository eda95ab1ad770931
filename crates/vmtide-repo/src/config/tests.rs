use super::*;
use crate::store::MemoryStore;
use serde_json::{Value, json};

fn master() -> MasterKey {
    MasterKey::from_bytes([0x5a; 32])
}

fn valid(encryption: Encryption) -> RepositoryConfig {
    RepositoryConfig::new(65536, encryption, &master()).unwrap()
}

/// A valid configuration's members, changed, as a document with a checksum that fits.
fn with(encryption: Encryption, change: impl Fn(&mut Value)) -> Vec<u8> {
    let bytes = valid(encryption).encode().unwrap();
    let mut value: Value = serde_json::from_slice(&bytes).unwrap();
    value.as_object_mut().unwrap().remove("checksum");
    change(&mut value);
    document::encode(&value).unwrap()
}

#[test]
fn what_is_written_is_read() {
    for encryption in [Encryption::None, Encryption::Aes256Gcm] {
        for chunk_size in [16 << 10, 64 << 10, 1 << 20] {
            let config = RepositoryConfig::new(chunk_size, encryption, &master()).unwrap();
            let read = RepositoryConfig::decode(&config.encode().unwrap()).unwrap();
            assert_eq!(read.id, config.id);
            assert_eq!(read.created, config.created);
            assert_eq!(read.chunk_size_bytes, chunk_size);
            assert_eq!(read.encryption, encryption);
            let key = read.master_key().map(|key| *key.as_bytes());
            let in_clear = encryption == Encryption::None;
            assert_eq!(key, in_clear.then_some([0x5a; 32]));
        }
    }
}

#[test]
fn the_key_is_in_the_bytes_only_without_encryption_and_never_shown() {
    let digits = "5a".repeat(32);
    let contains = |encryption| {
        let config = valid(encryption);
        assert!(!format!("{config:?}").contains("5a5a"));
        assert!(!format!("{config:?}").contains("90, 90"));
        String::from_utf8(config.encode().unwrap()).unwrap().contains(&digits)
    };
    assert!(contains(Encryption::None));
    assert!(!contains(Encryption::Aes256Gcm));
}

#[test]
fn chunk_sizes_that_cannot_be_are_refused() {
    for size in [0, 1, 8192, 65535, 65537, 3 << 15, 2 << 20, u32::MAX] {
        let made = RepositoryConfig::new(size, Encryption::None, &master());
        assert!(matches!(made, Err(RepoError::Invalid(_))), "{size}");
        let bytes = with(Encryption::None, |value| value["chunk_size_bytes"] = json!(size));
        assert!(RepositoryConfig::decode(&bytes).unwrap_err().is_damage(), "{size}");
    }
}

#[test]
fn malformed_members_are_damage_also_under_a_checksum_that_fits() {
    use Encryption::{Aes256Gcm, None as Clear};
    let set =
        |encryption, name: &str, to: Value| with(encryption, |value| value[name] = to.clone());
    let without = |name: &str| {
        with(Aes256Gcm, |value| {
            value.as_object_mut().unwrap().remove(name);
        })
    };
    let mut cases = vec![
        ("another format", set(Aes256Gcm, "format", json!("other"))),
        ("version as text", set(Aes256Gcm, "version", json!("1"))),
        ("short id", set(Aes256Gcm, "id", json!("00"))),
        ("id of no digits", set(Aes256Gcm, "id", json!("z".repeat(32)))),
        ("id as number", set(Aes256Gcm, "id", json!(5))),
        ("no time", set(Aes256Gcm, "created", json!("yesterday"))),
        ("negative size", set(Aes256Gcm, "chunk_size_bytes", json!(-65536))),
        ("fractional size", set(Aes256Gcm, "chunk_size_bytes", json!(65536.5))),
        ("large size", set(Aes256Gcm, "chunk_size_bytes", json!(1_u64 << 32))),
        ("unknown member", set(Aes256Gcm, "more", json!(1))),
        ("key in clear", set(Aes256Gcm, "master_key", json!("5a".repeat(32)))),
        ("no key", set(Clear, "master_key", json!(null))),
        ("short key", set(Clear, "master_key", json!("5a".repeat(31)))),
        ("key of no digits", set(Clear, "master_key", json!("zz".repeat(32)))),
        ("an array", document::encode(&json!([1])).unwrap()),
        ("empty", Vec::new()),
        ("not UTF-8", vec![0xff; 300]),
        ("zeros", vec![0; 300]),
        ("deep", "[".repeat(60_000).into_bytes()),
    ];
    for name in
        ["format", "version", "id", "created", "chunk_size_bytes", "encryption", "master_key"]
    {
        cases.push((name, without(name)));
    }
    for (what, bytes) in cases {
        let error = RepositoryConfig::decode(&bytes).unwrap_err();
        assert!(error.is_damage(), "{what}: {error}");
        assert!(error.to_string().contains("vmtide.repo"), "{what}: {error}");
    }
}

#[test]
fn what_is_newer_is_unsupported() {
    for (name, to) in
        [("version", json!(2)), ("version", json!(0)), ("encryption", json!("xchacha20-poly1305"))]
    {
        let bytes = with(Encryption::Aes256Gcm, |value| value[name] = to.clone());
        let error = RepositoryConfig::decode(&bytes).unwrap_err();
        assert!(matches!(error, RepoError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn one_that_is_absent_or_too_long_is_said_to_be() {
    let store = MemoryStore::new();
    let error = read(&store).unwrap_err();
    assert!(matches!(error, RepoError::NotFound { .. }), "{error}");
    store.replace(OBJECT_NAME, &vec![b' '; 65_537]);
    assert!(read(&store).unwrap_err().is_damage());
}

#[test]
fn encryption_is_named_as_in_the_format() {
    for encryption in [Encryption::None, Encryption::Aes256Gcm] {
        assert_eq!(encryption.to_string().parse::<Encryption>().unwrap(), encryption);
    }
    assert!("AES".parse::<Encryption>().is_err());
}
