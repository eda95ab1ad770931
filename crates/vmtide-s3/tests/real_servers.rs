//! The store on real servers: what every store promises, and what is S3's own.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: what fails here fails the test"
)]

#[path = "../../vmtide-repo/tests/support/conformance.rs"]
mod conformance;
#[path = "support/servers.rs"]
mod servers;

use conformance::{Promises, Subject};
use servers::{KEY_ID, SECRET_KEY, Server, moto, s3s_fs};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vmtide_repo::{ObjectStore, RepoError, Retention, RetentionMode, read_small};
use vmtide_s3::{
    Guarantee, ObjectLockState, ProbeDepth, S3Options, S3Store, StaticCredentials, Versioning,
};

fn options(server: &Server, bucket: &str) -> S3Options {
    let mut options = S3Options::parse(&format!("s3://{bucket}/some/pre fix")).unwrap();
    options.endpoint = Some(server.endpoint.clone());
    options.region = Some("us-east-1".into());
    options.credentials = Some(StaticCredentials {
        key_id: KEY_ID.into(),
        secret_key: SECRET_KEY.to_owned().into(),
        token: None,
    });
    options
}

fn store(server: &Server) -> S3Store {
    S3Store::create(&options(server, &server.bucket(false))).unwrap()
}

fn subjects() -> Vec<Subject> {
    // Neither server lets exactly one of several simultaneous writers win in every round: no
    // protocol of vmtide needs that.
    let promises = Promises { one_winner: false, no_replacement: true, locks: false };
    let mut subjects: Vec<_> = [s3s_fs(), moto()]
        .into_iter()
        .map(|server| Subject { store: Arc::new(store(server)), promises, guard: None })
        .collect();
    subjects.extend(named_server());
    subjects
}

/// The server of `VMTIDE_TEST_S3` (`s3://BUCKET/PREFIX`, with keys and endpoint by `AWS_*`): any other,
/// such as Garage, Ceph, MinIO or AWS. What it leaves under the prefix is the user's to remove.
fn named_server() -> Option<Subject> {
    let store = S3Store::create(&named("VMTIDE_TEST_S3")?).unwrap();
    let found = store.require(ProbeDepth::Full).unwrap();
    let promises = Promises {
        one_winner: false,
        no_replacement: found.conditional_write == Guarantee::Yes,
        locks: false,
    };
    Some(Subject { store: Arc::new(store), promises, guard: None })
}

/// The place that a variable names, with a prefix of its own for each call.
fn named(variable: &str) -> Option<S3Options> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let url = std::env::var(variable).ok()?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Some(S3Options::parse(&format!("{url}/{}-{number}", std::process::id())).unwrap())
}

conformance_tests!(subjects);

fn bytes(length: usize) -> Vec<u8> {
    (0..=250_u8).cycle().take(length).collect()
}

#[test]
fn large_objects_go_whole_from_a_file_and_in_parts_without_one() {
    for server in [s3s_fs(), moto()] {
        let content = bytes(21_000_000);
        for spool in [None, Some(PathBuf::from("/nonexistent"))] {
            let mut options = options(server, &server.bucket(false));
            options.spool_directory.clone_from(&spool);
            let store = S3Store::connect(&options).unwrap();
            let mut writer = store.create("packs/ab/large").unwrap();
            for part in content.chunks(3_000_001) {
                writer.write(part).unwrap();
            }
            writer.finish().unwrap();
            // One PUT; or three parts between a beginning and an end.
            assert_eq!(store.requests().put, if spool.is_none() { 1 } else { 5 });
            assert_eq!(read_small(&store, "packs/ab/large", content.len()).unwrap(), content);
            let error = store.put("packs/ab/large", &content[..9_000_000]).unwrap_err();
            assert!(matches!(error, RepoError::AlreadyExists { .. }), "{error}");
        }
    }
}

#[test]
fn an_upload_that_is_dropped_leaves_nothing() {
    let server = moto();
    let bucket = server.bucket(false);
    let mut options = options(server, &bucket);
    options.spool_directory = Some("/nonexistent".into());
    let store = S3Store::connect(&options).unwrap();
    let mut writer = store.create("packs/ab/large").unwrap();
    writer.write(&bytes(20_000_000)).unwrap();
    drop(writer);
    let uploads = server.ask("GET", &format!("{bucket}?uploads="), "", "");
    assert!(uploads.contains("ListMultipartUploadsResult"), "{uploads}");
    assert!(!uploads.contains("<UploadId>"), "{uploads}");
}

#[test]
fn small_steps_forward_cost_few_requests() {
    let store = store(s3s_fs());
    let content = bytes(4_000_000);
    store.put("maps/m", &content).unwrap();
    let reader = store.open("maps/m").unwrap();
    let before = store.requests().get;
    let mut read = vec![0; content.len()];
    for (number, step) in read.chunks_mut(10_000).enumerate() {
        reader.read_at(step, number as u64 * 10_000).unwrap();
    }
    assert_eq!(read, content);
    let requests = store.requests().get - before;
    assert!(requests <= 6, "{requests} requests for 4 MB in steps of 10 KB");
}

#[test]
fn listings_of_many_pages_are_whole() {
    let store = store(moto());
    let mut names = Vec::new();
    for number in 0..1100 {
        names.push(format!("forward/{number:05}"));
    }
    std::thread::scope(|scope| {
        for names in names.chunks(140) {
            let store = &store;
            scope.spawn(move || names.iter().for_each(|name| store.put(name, b"x").unwrap()));
        }
    });
    let mut found = Vec::new();
    store
        .list("forward/", &mut |entry| {
            found.push(entry.name);
            Ok(())
        })
        .unwrap();
    found.sort();
    assert_eq!(found, names);
}

#[test]
fn the_probe_tells_what_each_server_does() {
    for server in [s3s_fs(), moto()] {
        let store = store(server);
        let found = store.require(ProbeDepth::Full).unwrap();
        for (guarantee, what) in [
            (found.write, "write"),
            (found.read_after_write, "read"),
            (found.ranged_read, "range"),
            (found.list_after_write, "list"),
            (found.list_in_pages, "pages"),
            (found.list_after_delete, "delete"),
            (found.conditional_write, "condition"),
            (found.delete, "delete"),
        ] {
            assert_eq!(guarantee, Guarantee::Yes, "{what}: {found:?}");
        }
        let mut left = 0;
        store
            .list("probe/", &mut |_| {
                left += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(left, 0);
        store.put("vmtide.repo", &bytes(300)).unwrap();
        let reading = store.require(ProbeDepth::Reading).unwrap();
        assert_eq!(reading.ranged_read, Guarantee::Yes);
        assert_eq!(reading.list_after_write, Guarantee::Yes);
        assert!(matches!(
            S3Store::create(&options(server, "vmtide-none")),
            Err(RepoError::NotFound { .. })
        ));
    }
}

#[test]
fn wrong_keys_are_denied_and_never_shown() {
    let server = s3s_fs();
    let mut wrong = options(server, &server.bucket(false));
    wrong.credentials = Some(StaticCredentials {
        key_id: KEY_ID.into(),
        secret_key: "ganz-geheim".to_owned().into(),
        token: None,
    });
    let error = S3Store::create(&wrong).unwrap_err();
    assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    assert!(!format!("{error} {error:?} {wrong:?}").contains("geheim"), "{error}");
}

#[test]
fn what_is_removed_from_a_bucket_with_versions_is_gone() {
    let server = moto();
    let bucket = server.bucket(false);
    server.keep_versions(&bucket);
    let store = S3Store::connect(&options(server, &bucket)).unwrap();
    assert_eq!(store.versioning().unwrap(), Versioning::On);
    store.put("points/p", b"one").unwrap();
    store.put("points/pq", b"other").unwrap();
    // Somebody hides it, as a plain DELETE does.
    server.raw("DELETE", &format!("{bucket}/some/pre%20fix/points/p"), "", "");
    store.remove("points/p").unwrap();
    let versions = server.ask("GET", &format!("{bucket}?versions="), "", "");
    assert!(versions.contains("points/pq</Key>"), "{versions}");
    assert!(!versions.contains("points/p</Key>"), "{versions}");
}

fn in_seconds(seconds: i64) -> jiff::Timestamp {
    jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds)
}

/// Buckets with object lock: moto's, and that of `VMTIDE_TEST_S3_LOCKED` (as `VMTIDE_TEST_S3`), where what the test
/// writes stays for twenty minutes, because nobody can remove it before.
fn locked() -> Vec<S3Options> {
    let server = moto();
    let mut places = vec![options(server, &server.bucket(true))];
    places.extend(named("VMTIDE_TEST_S3_LOCKED"));
    places
}

#[test]
fn what_is_kept_cannot_be_removed_and_its_time_is_only_extended() {
    for options in locked() {
        kept_and_extended(options);
    }
}

fn kept_and_extended(mut options: S3Options) {
    let store = S3Store::connect(&options).unwrap();
    let found = store.probe(ProbeDepth::Full).unwrap();
    assert_eq!(found.object_lock, ObjectLockState::On(None));
    assert_eq!(found.delete, Guarantee::Yes);
    let keep = |seconds| Retention { mode: RetentionMode::Compliance, until: in_seconds(seconds) };
    let put = |name: &str, length: usize, retention: &Retention, store: &S3Store| {
        let mut writer = store.create_retained(name, retention).unwrap();
        writer.write(&bytes(length)).unwrap();
        writer.finish().unwrap();
    };
    put("points/p", 100, &keep(600), &store);
    let until = store.retained_until("points/p").unwrap().unwrap();
    assert!((595..=601).contains(&until.duration_since(in_seconds(0)).as_secs()), "{until}");
    match store.remove("points/p") {
        Err(RepoError::Locked { object, until: told }) => {
            assert_eq!((object.as_str(), told), ("points/p", until));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(read_small(&store, "points/p", 100).unwrap(), bytes(100));
    store.retain("points/p", &keep(1200)).unwrap();
    let extended = store.retained_until("points/p").unwrap().unwrap();
    assert!(extended > until, "{extended}");
    // Large ones in parts, too.
    options.spool_directory = Some("/nonexistent".into());
    let in_parts = S3Store::connect(&options).unwrap();
    put("packs/ab/x", 12_000_000, &keep(600), &in_parts);
    assert!(matches!(in_parts.remove("packs/ab/x"), Err(RepoError::Locked { .. })));
    store.put("leases/l", b"free").unwrap();
    store.remove("leases/l").unwrap();
    assert!(matches!(store.retained_until("leases/none"), Err(RepoError::NotFound { .. })));
}
