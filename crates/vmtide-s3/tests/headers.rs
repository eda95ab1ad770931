//! What is sent with objects, and to which host.

#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::format_push_string,
    reason = "a test: what fails here fails the test; not every test uses all of the server"
)]

#[path = "support/faulty.rs"]
mod faulty;

use faulty::{FaultyServer, Seen};
use vmtide_repo::{ObjectStore, read_small};
use vmtide_s3::{S3Options, S3Store, StaticCredentials};

fn options(server: &FaultyServer) -> S3Options {
    let mut options = S3Options::parse("s3://bucket/x").unwrap();
    options.endpoint = Some(server.endpoint.clone());
    options.credentials = Some(StaticCredentials {
        key_id: "AKIA".into(),
        secret_key: "secret".to_owned().into(),
        token: None,
    });
    options
}

/// Stores an object whole and one in parts; the requests that begin objects, which are two.
fn written(change: impl Fn(&mut S3Options)) -> Vec<Seen> {
    let server = FaultyServer::start(true);
    let mut options = options(&server);
    change(&mut options);
    S3Store::connect(&options).unwrap().put("points/p", b"small").unwrap();
    // Without room for files, large ones go in parts.
    options.spool_directory = Some("/nonexistent".into());
    let store = S3Store::connect(&options).unwrap();
    let content: Vec<u8> = (0..=250_u8).cycle().take(20_000_000).collect();
    let mut writer = store.create("packs/ab/large").unwrap();
    writer.write(&content).unwrap();
    writer.finish().unwrap();
    assert!(read_small(&store, "packs/ab/large", content.len()).unwrap() == content);
    let all = server.requests();
    let parts = all.iter().filter(|seen| seen.target.contains("partNumber="));
    assert_eq!(parts.clone().count(), 3);
    // What holds for the object is said where it begins, and not again.
    for part in parts {
        for name in ["x-amz-server-side-encryption", "x-amz-storage-class"] {
            assert_eq!(part.header(name), None, "{part:?}");
        }
    }
    let begins = |seen: &Seen| match seen.method.as_str() {
        "PUT" => !seen.target.contains('?'),
        "POST" => seen.target.contains("uploads"),
        _ => false,
    };
    let begun: Vec<Seen> = all.into_iter().filter(begins).collect();
    let methods: Vec<_> = begun.iter().map(|seen| seen.method.as_str()).collect();
    assert_eq!(methods, ["PUT", "POST"]);
    begun
}

/// Whether a header is part of what is signed.
fn is_signed(seen: &Seen, name: &str) -> bool {
    let authorization = seen.header("authorization").unwrap();
    let signed = authorization.split("SignedHeaders=").nth(1).unwrap();
    signed.split(',').next().unwrap().split(';').any(|signed| signed == name)
}

const SSE: &str = "x-amz-server-side-encryption";
const SSE_KEY: &str = "x-amz-server-side-encryption-aws-kms-key-id";
const CLASS: &str = "x-amz-storage-class";

#[test]
fn encryption_by_the_server_is_asked_for_whole_and_in_parts() {
    let key = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd";
    for (text, sse, key) in [
        ("AES256", "AES256", None),
        ("aws:kms", "aws:kms", None),
        (&*format!("aws:kms:{key}"), "aws:kms", Some(key)),
    ] {
        for seen in written(|options| options.encryption = Some(text.parse().unwrap())) {
            assert_eq!(seen.header(SSE), Some(sse), "{text}: {seen:?}");
            assert_eq!(seen.header(SSE_KEY), key, "{text}: {seen:?}");
            assert_eq!(seen.header(CLASS), None, "{text}: {seen:?}");
            assert!(is_signed(&seen, SSE), "{text}: {seen:?}");
        }
    }
}

#[test]
fn the_storage_class_is_asked_for_whole_and_in_parts() {
    for seen in written(|options| options.storage_class = Some("STANDARD_IA".into())) {
        assert_eq!(seen.header(CLASS), Some("STANDARD_IA"), "{seen:?}");
        assert_eq!(seen.header(SSE), None, "{seen:?}");
        assert!(is_signed(&seen, CLASS), "{seen:?}");
    }
}

#[test]
fn without_options_nothing_is_asked_for() {
    for seen in written(|_| {}) {
        for name in [SSE, SSE_KEY, CLASS] {
            assert_eq!(seen.header(name), None, "{seen:?}");
        }
        assert!(seen.header("host").unwrap().starts_with("127.0.0.1:"), "{seen:?}");
        assert!(seen.target.starts_with("/bucket/x/"), "{seen:?}");
    }
}
