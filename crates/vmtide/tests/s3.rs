//! Repositories in S3, on real servers: from init to forget, byte for byte, and what it costs in
//! requests.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::common;
use crate::servers;

use assert_cmd::Command;
use common::{PASSWORD, Place, Run, finish};
use servers::{KEY_ID, SECRET_KEY, Server, moto, s3s_fs};

const MIB: usize = 1 << 20;

struct Job<'a> {
    place: Place,
    server: &'a Server,
    repository: String,
}

impl<'a> Job<'a> {
    fn new(server: &'a Server, object_lock: bool) -> Self {
        let repository = format!("s3://{}/vm", server.bucket(object_lock));
        Self { place: Place::new(), server, repository }
    }

    fn run(&self, arguments: &[&str]) -> Run {
        finish(&mut self.command(arguments))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.place.command(arguments);
        command
            .env("VMTIDE_REPOSITORY", &self.repository)
            .env("AWS_ACCESS_KEY_ID", KEY_ID)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .env("AWS_ENDPOINT_URL", &self.server.endpoint)
            .env("TMPDIR", self.place.directory.path());
        command
    }
}

/// Bytes that nothing compresses.
fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (seed ^ (seed >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 32)).to_le_bytes());
    }
    bytes
}

#[test]
fn a_disk_goes_into_a_bucket_and_comes_back_byte_for_byte() {
    for server in [s3s_fs(), moto()] {
        let job = Job::new(server, false);
        let made = job.run(&["init", &job.repository, "--json"]).must_end_with(0).summary();
        assert_eq!(made["guarantees"]["list_after_write"], "yes", "{made}");
        assert_eq!(made["guarantees"]["conditional_write"], "yes", "{made}");
        job.run(&["init", &job.repository]).must_end_with(1);
        let image = job.place.image("web.raw", 8 * MIB);
        job.run(&["backup", "web.raw"]).must_end_with(0);
        let mut changed = std::fs::read(&image).unwrap();
        changed[5 * MIB..6 * MIB].copy_from_slice(&noise(MIB, 1));
        std::fs::write(&image, &changed).unwrap();
        job.run(&["backup", "web.raw"]).must_end_with(0);
        job.run(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(0);
        assert!(std::fs::read(job.place.path("back.raw")).unwrap() == changed);
        job.run(&["verify", "--read-data"]).must_end_with(0);
        let doctor = job.run(&["doctor", &job.repository]);
        assert!(doctor.stdout.contains("list after removal yes"), "{}", doctor.stdout);
        job.run(&["forget", "--keep-last", "1"]).must_end_with(0);
        let points = job.run(&["points", "--json"]).must_end_with(0).summary();
        assert_eq!(points["points"].as_array().unwrap().len(), 1);
        job.run(&["prune", "--json"]).must_end_with(0);
        job.run(&["verify", "--read-data"]).must_end_with(0);
    }
}

#[test]
fn what_is_wrong_ends_with_its_own_code() {
    let server = s3s_fs();
    let job = Job::new(server, false);
    job.run(&["points"]).must_end_with(6);
    job.run(&["points", "-r", "s3://vmtide-is-not-there/x"]).must_end_with(6);
    job.run(&["points", "-r", "s3://KEY:SECRET@bucket/x"]).must_end_with(1);
    job.run(&["init", &job.repository]).must_end_with(0);
    let wrong = finish(
        job.place
            .command(&["points", "-r", &job.repository])
            .env("AWS_ACCESS_KEY_ID", KEY_ID)
            .env("AWS_SECRET_ACCESS_KEY", "ganz-geheim")
            .env("AWS_ENDPOINT_URL", &server.endpoint),
    );
    let wrong = wrong.must_end_with(4);
    assert!(!format!("{}{}", wrong.stdout, wrong.stderr).contains("geheim"), "{}", wrong.stderr);
    let unsafe_http = job.run(&["points", "--s3-endpoint", "http://minio.example"]);
    assert!(unsafe_http.must_end_with(1).stderr.contains("--s3-allow-http"));
}

#[test]
fn keys_come_from_a_profile_and_options_from_the_settings_file() {
    let server = s3s_fs();
    let job = Job::new(server, false);
    std::fs::create_dir(job.place.path(".aws")).unwrap();
    std::fs::write(
        job.place.path(".aws/credentials"),
        format!("[backup]\naws_access_key_id={KEY_ID}\naws_secret_access_key={SECRET_KEY}\n"),
    )
    .unwrap();
    std::fs::write(
        job.place.path("vmtide.toml"),
        format!(
            "repository = \"{}\"\ns3-endpoint = \"{}\"\ns3-profile = \"backup\"\ns3-path-style = true\n",
            job.repository, server.endpoint
        ),
    )
    .unwrap();
    let run = |arguments: &[&str]| {
        finish(
            job.place
                .command(arguments)
                .env_remove("VMTIDE_REPOSITORY")
                .env("VMTIDE_CONFIG", job.place.path("vmtide.toml")),
        )
    };
    run(&["init"]).must_end_with(0);
    run(&["points"]).must_end_with(0);
}

/// Nothing that a restore needs can be removed, with all rights on the bucket.
fn nothing_can_be_removed(job: &Job<'_>) {
    let bucket = job.repository.strip_prefix("s3://").unwrap().split('/').next().unwrap();
    let listing = job.server.ask("GET", &format!("{bucket}?versions="), "", "");
    let mut locked = 0;
    for version in listing.split("<Version>").skip(1) {
        let text = |tag: &str| {
            let (_, rest) = version.split_once(&format!("<{tag}>")).unwrap();
            rest.split('<').next().unwrap().to_owned()
        };
        let (key, id) = (text("Key"), text("VersionId"));
        if ["packs/", "maps/", "points/", "keys/", "vmtide.repo"]
            .iter()
            .any(|part| key.contains(part))
        {
            let path = format!("{bucket}/{key}?versionId={id}");
            let answer = job.server.ask("DELETE", &path, "", "");
            assert!(answer.starts_with("HTTP/1.1 403"), "{key}: {answer}");
            locked += 1;
        }
    }
    assert!(locked >= 6, "{listing}");
}

#[test]
fn what_is_immutable_stays_and_shows_until_when() {
    let server = moto();
    let job = Job::new(server, true);
    job.run(&["init", &job.repository]).must_end_with(0);
    job.place.image("web.raw", 4 * MIB);
    let lock = ["--immutable-for", "30d", "--immutability", "compliance"];
    let run = |more: &[&str]| job.run(&[&["backup", "web.raw"], more].concat());
    run(&lock).must_end_with(0);
    run(&["--immutable-for", "90d", "--immutability", "compliance"]).must_end_with(0);
    let points = job.run(&["points", "--json"]).must_end_with(0).summary();
    let points = points["points"].as_array().unwrap().clone();
    let until = |point: &serde_json::Value| {
        assert_eq!(point["immutable"]["mode"], "compliance");
        point["immutable"]["until"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap()
    };
    let now = jiff::Timestamp::now();
    assert!(until(&points[0]).duration_since(now).as_hours() >= 30 * 24 - 1);
    assert!(until(&points[1]).duration_since(now).as_hours() >= 90 * 24 - 1);
    let shown = job.run(&["show", "web@latest"]).must_end_with(0).stdout;
    assert!(shown.contains("immutable") && shown.contains("compliance"), "{shown}");
    nothing_can_be_removed(&job);
    let stats = job.run(&["stats", "--json", "--price-per-gb-month", "1"]).must_end_with(0);
    let stats = stats.summary();
    assert_eq!(stats["locked_bytes"], stats["pack_bytes"], "{stats}");
    assert_eq!(stats["locked_until"], points[1]["immutable"]["until"], "{stats}");
    assert!(stats["cost"]["locked_per_month"].as_f64().unwrap() > 0.0, "{stats}");
    job.run(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(0);
    assert!(
        std::fs::read(job.place.path("back.raw")).unwrap()
            == std::fs::read(job.place.path("web.raw")).unwrap()
    );
    // What is locked is normal to prune, and forgetting it is refused.
    let forget = job.run(&["forget", points[0]["id"].as_str().unwrap()]);
    assert!(forget.code != 0 && forget.stderr.contains("immutable"), "{}", forget.stderr);
    job.run(&["prune"]).must_end_with(0);
    job.run(&["verify", "--read-data"]).must_end_with(0);
    // Where a store cannot keep objects, nothing is promised.
    let local = Place::with_repository();
    local.image("web.raw", MIB);
    let refused = local.run(&[&["backup", "web.raw"][..], &lock].concat());
    assert!(refused.must_end_with(1).stderr.contains("Object Lock"));
}

#[test]
fn copies_are_immutable_where_the_originals_are_not() {
    let job = Job::new(moto(), true);
    job.run(&["init", &job.repository]).must_end_with(0);
    let local = job.place.text("local");
    job.run(&["init", &local]).must_end_with(0);
    job.place.image("web.raw", 2 * MIB);
    job.run(&["backup", "web.raw", "-r", &local]).must_end_with(0);
    std::fs::write(
        job.place.path("vmtide.toml"),
        "[copy]\nimmutable-for = \"30d\"\nimmutability = \"compliance\"\n",
    )
    .unwrap();
    let copy_to = |to: &str, more: &[&str]| {
        let line = ["copy", "-r", &local, "--to", to, "--all", "--json"];
        finish(
            job.command(&[&line[..], more].concat())
                .env("VMTIDE_TO_PASSWORD", PASSWORD)
                .env("VMTIDE_CONFIG", job.place.path("vmtide.toml")),
        )
    };
    let copy = |more: &[&str]| copy_to(&job.repository, more);
    // From the settings file.
    let first = copy(&[]).must_end_with(0).summary();
    let until = |point: &serde_json::Value| {
        assert_eq!(point["immutable"]["mode"], "compliance", "{point}");
        let until = point["immutable"]["until"].as_str().unwrap();
        until.parse::<jiff::Timestamp>().unwrap()
    };
    let day = |number: i64| jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24 * number);
    let early = until(&first["copied"][0]);
    assert!((day(29)..day(41)).contains(&early), "{first}");
    // From the command line, which goes before it; what was copied keeps the time it has.
    std::fs::write(job.place.path("web.raw"), noise(2 * MIB, 3)).unwrap();
    job.run(&["backup", "web.raw", "-r", &local]).must_end_with(0);
    let second = copy(&["--immutable-for", "90d"]).must_end_with(0).summary();
    assert!((day(89)..day(101)).contains(&until(&second["copied"][0])), "{second}");
    assert_eq!(until(&second["present"][0]), early, "{second}");
    // There they are kept, and here not.
    let points = job.run(&["points", "--json"]).must_end_with(0).summary();
    for point in points["points"].as_array().unwrap() {
        assert_eq!(point["immutable"]["mode"], "compliance", "{points}");
    }
    nothing_can_be_removed(&job);
    let here = job.run(&["points", "-r", &local, "--json"]).must_end_with(0).summary();
    assert_eq!(here["points"][0]["immutable"], serde_json::Value::Null, "{here}");
    job.run(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(0);
    assert!(std::fs::read(job.place.path("back.raw")).unwrap() == noise(2 * MIB, 3));
    // Where the store cannot keep them, nothing is copied.
    let other = job.place.text("other");
    job.run(&["init", &other]).must_end_with(0);
    let refused = copy_to(&other, &[]).must_end_with(1);
    assert!(refused.stdout.contains("Object Lock"), "{}", refused.stdout);
}

#[test]
fn what_was_copied_without_immutability_is_told() {
    let job = Job::new(moto(), true);
    job.run(&["init", &job.repository]).must_end_with(0);
    let local = job.place.text("local");
    job.run(&["init", &local]).must_end_with(0);
    job.place.image("web.raw", MIB);
    job.run(&["backup", "web.raw", "-r", &local]).must_end_with(0);
    let copy = |more: &[&str]| {
        let line = ["copy", "-r", &local, "--to", &job.repository, "--all"];
        finish(
            job.command(&[&line[..], more].concat())
                .env("VMTIDE_TO_PASSWORD", PASSWORD)
                .env("VMTIDE_TO_IMMUTABILITY", "compliance"),
        )
    };
    assert!(!copy(&[]).must_end_with(0).stderr.contains("removable"));
    let told = copy(&["--immutable-for", "30d"]).must_end_with(0);
    let said = format!("{}{}", told.stdout, told.stderr);
    assert!(said.contains("1 restore points") && said.contains("stay removable"), "{said}");
    copy(&["--immutable-for", "59min"]).must_end_with(1);
}

#[test]
fn a_backup_costs_few_puts() {
    let server = moto();
    let job = Job::new(server, false);
    job.run(&["init", &job.repository]).must_end_with(0);
    let before = server.puts(&job.repository);
    std::fs::write(job.place.path("web.raw"), noise(160 * MIB, 7)).unwrap();
    let summary = job.run(&["backup", "web.raw", "--json"]).must_end_with(0).summary();
    let stored = summary["disks"][0]["stored_bytes"].as_u64().unwrap();
    assert!(stored >= 160 << 20, "{stored}");
    let puts = (server.puts(&job.repository) - before) as u64;
    let limit = stored / (32 << 20) + 10;
    assert!(puts <= limit, "{puts} PUTs for {stored} bytes; {limit} are allowed");
}
