//! `vmtide bench`: every stage is measured, and nothing is left in the store.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::common;
use crate::servers;

use common::{Place, files_below, finish};
use serde_json::Value;
use servers::{KEY_ID, SECRET_KEY, moto};

const MIB: usize = 1 << 20;

/// The stages, each with bytes or operations, and no rate that is none.
fn stages(summary: &Value) -> Vec<String> {
    let stages = summary["stages"].as_array().unwrap();
    for stage in stages {
        assert!(stage["operations"].as_u64().unwrap() > 0, "{stage}");
        assert!(stage["seconds"].as_f64().unwrap() > 0.0, "{stage}");
        assert!(stage["threads"].as_u64().unwrap() > 0, "{stage}");
    }
    stages.iter().map(|stage| stage["stage"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_directory_is_measured_and_left_as_it_was() {
    let place = Place::with_repository();
    place.image("web.raw", 4 * MIB);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let before = files_below(&place.repository());
    let bench = |more: &[&str]| {
        let line = ["bench", "--size", "8MiB", "--workers", "2"];
        // It asks for no password.
        finish(place.command(&[&line[..], more].concat()).env_remove("VMTIDE_PASSWORD"))
    };
    let summary = bench(&["--json"]).must_end_with(0).summary();
    let found = stages(&summary);
    assert!(found.iter().any(|stage| stage.contains("zstd")), "{found:?}");
    assert!(found.iter().any(|stage| stage.contains("backup")), "{found:?}");
    assert!(found.iter().any(|stage| stage.contains("restore")), "{found:?}");
    assert_eq!(files_below(&place.repository()), before, "something is left");
    // Of a disk, for people.
    let table = bench(&["--source", "web.raw"]).must_end_with(0).stdout;
    assert!(table.contains("STAGE") && table.contains("zstd"), "{table}");
    assert_eq!(files_below(&place.repository()), before, "something is left");
    place.run(&["verify", "--read-data"]).must_end_with(0);
    // Nothing to measure, nowhere to store.
    bench(&["-r", "nothing-here"]).must_end_with(6);
    bench(&["--source", "nothing.raw"]).must_end_with(6);
    bench(&["--size", "much"]).must_end_with(2);
    assert_eq!(files_below(&place.repository()), before, "something is left");
}

#[test]
fn a_bucket_is_measured_and_left_as_it_was() {
    let (place, server) = (Place::new(), moto());
    let bucket = server.bucket(false);
    let repository = format!("s3://{bucket}/vm");
    let run = |arguments: &[&str]| {
        finish(
            place
                .command(arguments)
                .env("VMTIDE_REPOSITORY", &repository)
                .env("AWS_ACCESS_KEY_ID", KEY_ID)
                .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
                .env("AWS_ENDPOINT_URL", &server.endpoint)
                .env("TMPDIR", place.directory.path()),
        )
    };
    run(&["init", &repository]).must_end_with(0);
    let listing = || server.ask("GET", &format!("{bucket}?list-type=2"), "", "");
    let keys = |listing: &str| -> Vec<String> {
        let keys = listing.split("<Key>").skip(1);
        keys.map(|rest| rest.split('<').next().unwrap().to_owned()).collect()
    };
    let before = keys(&listing());
    assert!(before.iter().any(|key| key == "vm/vmtide.repo"), "{before:?}");
    let made = server.puts(&repository);
    let summary = run(&["bench", "--size", "8MiB", "--json"]).must_end_with(0).summary();
    stages(&summary);
    assert!(server.puts(&repository) > made, "nothing was stored");
    assert_eq!(keys(&listing()), before, "something is left");
}
