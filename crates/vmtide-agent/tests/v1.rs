//! `/v1` as `docs/agent-protocol.md` promises it: every route, every limit; content is in `v1_content.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and one story is told in one piece"
)]

use crate::support::agent::Agent;
use crate::support::client::{Client, escape};
use crate::support::content::{DISK, content, framed, one_disk, until};
use crate::support::openapi::check_answer;
use crate::support::provider::{TestDisk, TestProvider};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmtide_agent::limits::Limits;
use vmtide_agent::stream::frame;
use vmtide_block::ByteRange;

#[test]
fn disks_are_described_made_and_tracked() {
    let (_, agent) = one_disk();
    let (reader, writer) = (agent.reader(), agent.writer());
    let path = escape(&agent.path("a.vhdx"));
    let info = reader.get(&format!("/v1/disks?path={path}")).json();
    assert_eq!(info["virtual_size_bytes"], DISK);
    assert_eq!(info["path"], agent.path("a.vhdx"));
    assert_eq!((&info["virtual_storage_type"], &info["format"]), (&json!(3), &json!("vhdx")));

    let tracking = format!("/v1/disks/tracking?path={path}");
    assert_eq!(reader.get(&tracking).json()["enabled"], true);
    let off = json!({"enabled": false});
    assert_eq!(reader.json("PUT", &tracking, &off).code(), "read_only_key");
    assert_eq!(writer.json("PUT", &tracking, &off).json()["enabled"], false);
    let checkpoints = format!("/v1/disks/tracking/checkpoints?path={path}");
    assert_eq!(writer.request("POST", &checkpoints, &[], b"").code(), "tracking_disabled");
    assert_eq!(writer.json("PUT", &tracking, &json!({"enabled": true})).status, 200);
    let sealed = writer.request("POST", &checkpoints, &[], b"");
    assert_eq!((sealed.status, &sealed.json()["tracking_id"]), (201, &json!("rctX:0:00000001")));
    assert_eq!(reader.get(&tracking).json()["most_recent_id"], "rctX:0:00000001");
    assert_eq!(reader.request("POST", &checkpoints, &[], b"").code(), "read_only_key");

    let new = format!("/v1/disks?path={}", escape(&agent.path("new.vhdx")));
    let wanted = json!({"format": "vhdx", "virtual_size_bytes": 1 << 20, "fixed": false});
    assert_eq!(reader.json("POST", &new, &wanted).code(), "read_only_key");
    let made = writer.json("POST", &new, &wanted);
    assert_eq!((made.status, &made.json()["virtual_size_bytes"]), (201, &json!(1 << 20)));
    assert_eq!(writer.json("POST", &new, &wanted).code(), "exists");
    let outside = format!("/v1/disks?path={}", escape("/etc/new.vhdx"));
    assert_eq!(writer.json("POST", &outside, &wanted).code(), "not_found");
    let half = json!({"format": "vhdx", "virtual_size_bytes": (1 << 20) + 1, "fixed": false});
    assert_eq!(writer.json("POST", &outside, &half).code(), "bad_request");
    let other = json!({"format": "qed", "virtual_size_bytes": 512, "fixed": false});
    let qed = format!("/v1/disks?path={}", escape(&agent.path("new.qed")));
    assert_eq!(writer.json("POST", &qed, &other).code(), "unsupported");
}

#[test]
fn errors_have_one_form_and_stable_codes() {
    let (disk, agent) = one_disk();
    let reader = agent.reader();
    let path = escape(&agent.path("a.vhdx"));
    let strange = Client { key: String::new(), ..reader.clone() };
    for target in ["/v1", "/v1/metrics", "/v1/openapi.json", "/v1/disks?path=/", "/v1/nothing"] {
        let refused = strange.get(target);
        assert_eq!((refused.status, refused.code().as_str()), (401, "unauthorized"), "{target}");
    }
    assert_eq!(strange.get("/v1/health").json(), json!({"status": "ok"}));
    let content = format!("/v1/disks/content?path={path}");
    for (target, code) in [
        ("/v1/nothing".to_owned(), "not_found"),
        ("/v1/disks".to_owned(), "bad_request"),
        ("/v1/disks?path=".to_owned(), "bad_request"),
        ("/v1/disks?path=%ff".to_owned(), "bad_request"),
        (format!("/v1/disks?path={path}&pat=1"), "bad_request"),
        (format!("/v1/disks?path={path}&path={path}"), "bad_request"),
        ("/v1/disks?path=%2Fetc%2Fpasswd".to_owned(), "not_found"),
        (format!("/v1/disks?path={path}x"), "not_found"),
        (format!("/v1/disks/changes?path={path}"), "bad_request"),
        (format!("/v1/disks/changes?path={path}&since=nope"), "unknown_tracking_id"),
        (format!("/v1/disks/changes?path={path}&since=nope&limit=x"), "bad_request"),
        (format!("{content}&ranges=1"), "bad_request"),
        (format!("{content}&ranges=0:{}", DISK + 1), "out_of_range"),
        (format!("{content}&ranges=18446744073709551615:2"), "out_of_range"),
        (format!("{content}&from={}", DISK + 1), "range_not_satisfiable"),
        (format!("{content}&format=xml"), "bad_request"),
        (format!("{content}&compress=lzma"), "bad_request"),
        ("/v1/freezes/00".to_owned(), "unknown_freeze"),
        ("/v1/freezes/00/disks/0/content".to_owned(), "unknown_freeze"),
        ("/v1/jobs/00".to_owned(), "unknown_job"),
    ] {
        assert_eq!(reader.get(&target).code(), code, "{target}");
    }
    assert_eq!(reader.request("PATCH", &content, &[], b"").code(), "method_not_allowed");
    assert_eq!(reader.request("POST", &content, &[], b"[]").code(), "unsupported_media_type");
    assert_eq!(reader.json("POST", &content, &json!({"a": 1})).code(), "bad_request");
    let twice = reader.json("POST", &format!("{content}&ranges=0:1"), &json!([]));
    assert_eq!(twice.code(), "bad_request");
    let large = vec![b' '; 65 << 10];
    let too_large = reader.request("POST", "/v1/freezes", &[], &large);
    assert_eq!(too_large.code(), "too_large");
    disk.faults.in_use.store(true, Ordering::SeqCst);
    assert_eq!(reader.get(&content).code(), "in_use");
}

#[test]
fn changes_come_in_pages_that_add_up() {
    let (disk, agent) = one_disk();
    let reader = agent.reader();
    let ranges: Vec<_> = (0..300).map(|at| ByteRange::new(at * 8192, 4096)).collect();
    disk.changed_since("rctX:1", ranges.clone());
    disk.changed_since("rctX:2", Vec::new());
    let url = format!("/v1/disks/changes?path={}", escape(&agent.path("a.vhdx")));
    let all = reader.get(&format!("{url}&since=rctX:1"));
    assert_eq!(all.json(), json!({"ranges": ranges, "next_cursor": null, "disk_size_bytes": DISK}));
    assert!(all.headers.contains_key("content-length"));
    assert_eq!(reader.get(&format!("{url}&since=rctX:2")).json()["ranges"], json!([]));
    for (limit, page_bytes) in [(7, 0), (7, 10_000), (1, 4096), (300, 5000)] {
        disk.faults.page_bytes.store(page_bytes, Ordering::SeqCst);
        let (mut got, mut cursor) = (Vec::new(), json!(0));
        while let Some(from) = cursor.as_u64() {
            let page =
                reader.get(&format!("{url}&since=rctX:1&limit={limit}&cursor={from}")).json();
            let ranges: Vec<ByteRange> = serde_json::from_value(page["ranges"].clone()).unwrap();
            assert!(ranges.len() <= limit);
            got.extend(ranges);
            cursor = page["next_cursor"].clone();
        }
        assert_eq!(got, ranges, "{limit} {page_bytes}");
    }
    disk.faults.processed_zero.store(true, Ordering::SeqCst);
    let lost = reader.get(&format!("{url}&since=rctX:1"));
    assert_eq!((lost.status, lost.code().as_str()), (409, "tracking_lost"));
}

#[test]
fn a_long_answer_with_changes_that_fails_is_cut() {
    let disk = TestDisk::pattern(1 << 40);
    let ranges = (0..20_000).map(|at| ByteRange::new(at << 20, 4096)).collect();
    disk.changed_since("rctX:1", ranges);
    let provider = TestProvider::new(&[("big.vhdx", Arc::clone(&disk))]);
    let agent = Agent::start(provider, Limits::default());
    let v1 = format!("/v1/disks/changes?path={}&since=rctX:1", escape(&agent.path("big.vhdx")));
    let contract = format!("/vdisk/{}/rct/rctX:1/changes", escape(&agent.path("big.vhdx")));
    disk.faults.page_bytes.store(1 << 32, Ordering::SeqCst);
    for target in [&v1, &contract] {
        let whole = agent.reader().get(target);
        assert!(whole.complete && whole.status == 200);
        let json = whole.json();
        let list = if json.is_array() { &json } else { &json["ranges"] };
        assert_eq!(list.as_array().unwrap().len(), 20_000);
    }
    disk.faults.changes_fail_from.store(15_000 << 20, Ordering::SeqCst);
    for target in [&v1, &contract] {
        let cut = agent.reader().get(target);
        assert!(cut.status == 200 && !cut.complete, "{target}");
    }
}

#[test]
fn lists_of_changes_that_nobody_reads_are_limited() {
    let disk = TestDisk::pattern(1 << 40);
    // Some 18 MB of text, more than connections take by themselves.
    let ranges = (0..400_000).map(|at| ByteRange::new(at << 21, 4096)).collect();
    disk.changed_since("rctX:1", ranges);
    disk.changed_since("rctX:2", Vec::new());
    let provider = TestProvider::new(&[("big.vhdx", Arc::clone(&disk))]);
    let limits = Limits { changes_per_client: 2, changes_total: 3, ..Limits::default() };
    let agent = Agent::start(provider, limits);
    let (reader, other) = (agent.reader(), agent.other());
    let path = escape(&agent.path("big.vhdx"));
    let long = format!("/v1/disks/changes?path={path}&since=rctX:1");
    let short = format!("/v1/disks/changes?path={path}&since=rctX:2");
    let mut held: Vec<_> = (0..2).map(|_| reader.send("GET", &long, &[], b"")).collect();
    let refused = reader.get(&short);
    assert_eq!((refused.status, refused.code().as_str()), (429, "too_many_streams"));
    assert!(refused.headers.contains_key("retry-after"));
    // Everything else is answered, to this client and to others.
    assert_eq!(reader.get(&format!("/v1/disks/content?path={path}&ranges=0:512")).status, 200);
    assert_eq!(other.get(&short).status, 200);
    held.push(other.send("GET", &long, &[], b""));
    assert_eq!(agent.writer().get(&short).code(), "busy");
    // A client of rct-service knows no such answer: it waits until there is room.
    let contract = format!("/vdisk/{path}/rct/rctX:2/changes");
    let waiting = std::thread::spawn({
        let writer = agent.writer();
        move || writer.get(&contract).status
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiting.is_finished());
    drop(held);
    assert_eq!(waiting.join().unwrap(), 200);
    until("room for a list", || reader.get(&short).status == 200);
}

#[test]
fn a_disk_whose_parent_lies_outside_is_not_touched() {
    let (disk, agent) = one_disk();
    disk.changed_since("rctX:1", Vec::new());
    let writer = agent.writer();
    let path = escape(&agent.path("a.vhdx"));
    let tracking = format!("/v1/disks/tracking?path={path}");
    for parent in ["/etc/passwd", "../other.vhdx", "missing.vhdx", "\\\\evil\\share\\p.vhdx"] {
        *disk.parent.lock() = Some(parent.into());
        // What it is, and so what it names, is told.
        assert_eq!(writer.get(&format!("/v1/disks?path={path}")).json()["parent_path"], parent);
        for target in [
            tracking.clone(),
            format!("/v1/disks/changes?path={path}&since=rctX:1"),
            format!("/v1/disks/content?path={path}"),
        ] {
            let refused = writer.get(&target);
            assert_eq!((refused.status, refused.code().as_str()), (403, "denied"), "{target}");
        }
        let off = json!({"enabled": false});
        assert_eq!(writer.json("PUT", &tracking, &off).code(), "denied");
        let freeze = json!({"disks": [agent.path("a.vhdx")]});
        assert_eq!(writer.json("POST", "/v1/freezes", &freeze).code(), "denied");
        for verb in ["rct", "rct/rctX:1/changes", "content?ranges=0:1"] {
            assert_eq!(writer.get(&format!("/vdisk/{path}/{verb}")).status, 403, "{verb}");
        }
    }
    assert!(disk.tracking.lock().is_some());
}

/// The character stands for what was no Unicode: the platform would look for another name than the agent.
#[test]
fn a_parent_whose_name_came_changed_is_refused() {
    let disk = TestDisk::memory(vec![0; 512]);
    let lossy = "ba\u{fffd}se.vhdx";
    let provider = TestProvider::new(&[
        ("a.vhdx", Arc::clone(&disk)),
        ("base.vhdx", TestDisk::memory(vec![0; 512])),
        (lossy, TestDisk::memory(vec![0; 512])),
    ]);
    let agent = Agent::start(provider, Limits::default());
    let target = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));
    for (parent, status) in [("base.vhdx", 200), (lossy, 403)] {
        *disk.parent.lock() = Some(parent.into());
        assert_eq!(agent.reader().get(&target).status, status, "{parent}");
    }
}

#[cfg(unix)]
#[test]
fn a_disk_is_frozen_once_by_whatever_names() {
    let (disk, agent) = one_disk();
    let path = agent.path("a.vhdx");
    let (link, hard) = (agent.path("link.vhdx"), agent.path("hard.vhdx"));
    std::os::unix::fs::symlink("a.vhdx", &link).unwrap();
    std::fs::hard_link(&path, &hard).unwrap();
    for other in [path.trim_start_matches('/').to_owned(), format!("/{path}"), link, hard] {
        let twice = json!({"disks": [path, other]});
        let refused = agent.reader().json("POST", "/v1/freezes", &twice);
        assert_eq!((refused.status, refused.code().as_str()), (400, "bad_request"), "{other}");
    }
    assert_eq!(disk.tracking.lock().as_ref().unwrap().sealed, 0, "nothing was frozen");
}

#[test]
fn the_audit_log_says_which_disks_were_frozen_and_read() {
    let disks = [("a.vhdx", TestDisk::memory(content())), ("b.vhdx", TestDisk::memory(content()))];
    let agent = Agent::start(TestProvider::new(&disks), Limits::default());
    let reader = agent.reader();
    let paths = [agent.path("a.vhdx"), agent.path("b.vhdx")];
    let made = reader.json("POST", "/v1/freezes", &json!({"disks": paths})).json();
    let id = made["id"].as_str().unwrap();
    let refused = json!({"disks": ["/etc/passwd"]});
    assert_eq!(reader.json("POST", "/v1/freezes", &refused).status, 404);
    let content = reader.get(&format!("/v1/freezes/{id}/disks/1/content"));
    assert!(content.complete);
    let since = made["disks"][0]["tracking_id"].as_str().unwrap();
    let changes = reader.get(&format!("/v1/freezes/{id}/disks/0/changes?since={since}"));
    assert_eq!(changes.status, 200);
    let log = agent.directory.path().join("state/audit.log");
    let lines = || -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    until("the last line", || lines().len() == 4);
    let lines = lines();
    let find = |end: &str| {
        lines.iter().find(|line| line["path"].as_str().unwrap().ends_with(end)).unwrap()
    };
    let created = lines.iter().find(|line| line["status"] == 201).unwrap();
    assert_eq!((&created["freeze"], &created["disks"]), (&json!(id), &json!(paths)));
    assert_eq!(created["key"], "reader");
    let denied = lines.iter().find(|line| line["status"] == 404).unwrap();
    assert_eq!((&denied["freeze"], &denied["disks"]), (&json!(null), &json!(["/etc/passwd"])));
    let (content, changes) = (find("/disks/1/content"), find("/disks/0/changes"));
    assert_eq!((&content["freeze"], &content["disk"]), (&json!(id), &json!(paths[1])));
    assert_eq!((&changes["freeze"], &changes["disk"]), (&json!(id), &json!(paths[0])));
}

#[test]
fn freezes_hold_a_moment_until_they_end() {
    let (a, b) = (TestDisk::memory(content()), TestDisk::memory(vec![5; 8192]));
    let provider = TestProvider::new(&[("a.vhdx", Arc::clone(&a)), ("b.vhdx", b)]);
    let frozen = Arc::clone(&provider.frozen);
    let limits = Limits { freezes_per_client: 2, disks_per_freeze: 2, ..Limits::default() };
    let agent = Agent::start(provider, limits);
    let (reader, other) = (agent.reader(), agent.other());
    let paths = [agent.path("a.vhdx"), agent.path("b.vhdx")];
    let made = reader.json("POST", "/v1/freezes", &json!({"disks": paths, "ttl_seconds": 30}));
    assert_eq!(made.status, 201);
    let made = made.json();
    assert_eq!(made["disks"][0]["tracking_id"], "rctX:0:00000001");
    assert_eq!((&made["disks"][1]["size_bytes"], &made["ttl_seconds"]), (&json!(8192), &json!(30)));
    let url = format!("/v1/freezes/{}", made["id"].as_str().unwrap());

    a.content.write_at(&[9; 4096], 0).unwrap();
    let then = reader.get(&format!("{url}/disks/0/content"));
    assert!(then.body == content());
    let list = reader.json(
        "POST",
        &format!("{url}/disks/1/content"),
        &json!([{"offset": 8191, "length": 1}]),
    );
    assert_eq!(list.body, [5]);
    a.changed_since("rctX:9", vec![ByteRange::new(0, 4096)]);
    let changes = reader.get(&format!("{url}/disks/0/changes?since=rctX:9")).json();
    assert_eq!(changes["ranges"], json!([{"offset": 0, "length": 4096}]));

    for (method, target) in
        [("GET", url.clone()), ("DELETE", url.clone()), ("GET", format!("{url}/disks/0/content"))]
    {
        assert_eq!(other.request(method, &target, &[], b"").code(), "unknown_freeze");
    }
    assert_eq!(reader.get(&format!("{url}/disks/2/content")).code(), "unknown_freeze");
    assert_eq!(reader.json("PUT", &url, &json!({"ttl_seconds": 60})).json()["ttl_seconds"], 60);
    assert_eq!(reader.json("PUT", &url, &json!({"ttl_seconds": 1})).code(), "bad_request");
    assert_eq!(reader.get("/v1/freezes").json()["freezes"].as_array().unwrap().len(), 1);

    for bad in [
        json!({"disks": []}),
        json!({"disks": [paths[0], paths[0]]}),
        json!({"disks": [1]}),
        json!({"disk": paths}),
    ] {
        assert_eq!(reader.json("POST", "/v1/freezes", &bad).code(), "bad_request", "{bad}");
    }
    let missing = json!({"disks": [paths[0], "/etc/passwd"]});
    assert_eq!(reader.json("POST", "/v1/freezes", &missing).code(), "not_found");
    let second = reader.json("POST", "/v1/freezes", &json!({"disks": [paths[0]]}));
    assert_eq!(second.status, 201);
    let third = reader.json("POST", "/v1/freezes", &json!({"disks": [paths[0]]}));
    assert_eq!((third.status, third.code().as_str()), (429, "too_many_freezes"));
    assert_eq!(frozen.load(Ordering::SeqCst), 2);

    assert_eq!(reader.request("DELETE", &url, &[], b"").status, 204);
    assert_eq!(reader.get(&url).code(), "unknown_freeze");
    until("the end of the freeze", || frozen.load(Ordering::SeqCst) == 1);
    drop(agent);
    assert_eq!(frozen.load(Ordering::SeqCst), 0, "an agent that ends holds nothing");
}

#[test]
fn every_route_of_the_document_answers_as_it_says() {
    let (disk, agent) = one_disk();
    disk.changed_since("rctX:1", vec![ByteRange::new(0, 4096)]);
    let writer = agent.writer();
    let document = writer.get("/v1/openapi.json").json();
    let path = escape(&agent.path("a.vhdx"));
    let freeze = || {
        let frozen =
            writer.json("POST", "/v1/freezes", &json!({"disks": [agent.path("a.vhdx")]})).json();
        frozen["id"].as_str().unwrap().to_owned()
    };
    let mut operations = 0;
    for (route, methods) in document["paths"].as_object().unwrap() {
        // Those are in vms.rs.
        if ["/v1/vms", "/v1/cim", "/v1/files"].iter().any(|start| route.starts_with(start)) {
            continue;
        }
        for (method, operation) in methods.as_object().unwrap() {
            let id = match route {
                route if route.starts_with("/v1/freezes/{id}") => freeze(),
                _ => writer.get(&format!("/v1/disks/content?path={path}")).headers["vmtide-job"]
                    .clone(),
            };
            let mut target = route.replace("{id}", &id).replace("{index}", "0");
            let mut separator = '?';
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let value = match parameter["name"].as_str().unwrap() {
                    "path" if operation["operationId"] == "createDisk" => {
                        escape(&agent.path("new.vhdx"))
                    }
                    "path" => path.clone(),
                    "since" => "rctX%3A1".into(),
                    _ => continue,
                };
                target.push_str(&format!(
                    "{separator}{}={value}",
                    parameter["name"].as_str().unwrap()
                ));
                separator = '&';
            }
            let body = &operation["requestBody"]["content"];
            let schema = body["application/json"]["schema"]["$ref"].as_str().unwrap_or_default();
            let (kind, body) = match schema.rsplit('/').next().unwrap() {
                "NewDisk" => (
                    "application/json",
                    json!({"format": "vhdx", "virtual_size_bytes": 4096, "fixed": false})
                        .to_string()
                        .into_bytes(),
                ),
                "TrackingSwitch" => ("application/json", b"{\"enabled\":true}".to_vec()),
                "NewFreeze" => (
                    "application/json",
                    json!({"disks": [agent.path("a.vhdx")]}).to_string().into_bytes(),
                ),
                "Renewal" => ("application/json", b"{}".to_vec()),
                "Ranges" => ("application/json", b"[{\"offset\":0,\"length\":512}]".to_vec()),
                "" if !body.is_null() => (frame::CONTENT_TYPE, framed(&[(0, b"abc")], &[])),
                "" => ("", Vec::new()),
                other => panic!("no example of {other}"),
            };
            let headers = [("content-type", kind)];
            let headers = if kind.is_empty() { &headers[..0] } else { &headers[..] };
            let answer = writer.request(&method.to_uppercase(), &target, headers, &body);
            check_answer(&document, operation, &answer, &target);
            if route.starts_with("/v1/freezes/{id}") {
                writer.request("DELETE", &format!("/v1/freezes/{id}"), &[], b"");
            }
            for frozen in writer.get("/v1/freezes").json()["freezes"].as_array().unwrap() {
                let id = frozen["id"].as_str().unwrap();
                writer.request("DELETE", &format!("/v1/freezes/{id}"), &[], b"");
            }
            operations += 1;
        }
    }
    assert!(operations >= 20, "{operations}");
}

/// What a metric says.
fn metric(client: &Client, name: &str) -> u64 {
    let text = String::from_utf8(client.get("/v1/metrics").body).unwrap();
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("{name}: {text}"))
}

#[test]
fn what_is_held_is_counted_and_given_back() {
    let disk = TestDisk::pattern(1 << 30);
    let provider = TestProvider::new(&[("a.vhdx", disk)]);
    let agent = Agent::start(provider, Limits::default());
    let reader = agent.reader();
    let names = ["transfers", "freezes", "open_disks", "blocking_threads"]
        .map(|name| format!("vmtide_agent_{name} "));
    let wait_for = |wanted: [std::ops::RangeInclusive<u64>; 4]| {
        let began = Instant::now();
        loop {
            let found = names.each_ref().map(|name| metric(&reader, name));
            if found.iter().zip(&wanted).all(|(found, wanted)| wanted.contains(found)) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{found:?} instead of {wanted:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_for([0..=0, 0..=0, 0..=0, 0..=0]);
    // A client that reads nothing: the disk is open, and its readers wait for it.
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));
    let stalled = reader.begin("GET", &url, &[]);
    wait_for([1..=1, 0..=0, 1..=1, 1..=4]);
    assert!(metric(&reader, "vmtide_agent_connections ") >= 2);
    drop(stalled);
    let frozen = reader.json("POST", "/v1/freezes", &json!({"disks": [agent.path("a.vhdx")]}));
    let freeze = frozen.json()["id"].as_str().unwrap().to_owned();
    wait_for([0..=0, 1..=1, 1..=1, 0..=0]);
    let ended = reader.request("DELETE", &format!("/v1/freezes/{freeze}"), &[], b"");
    assert_eq!(ended.status, 204);
    wait_for([0..=0, 0..=0, 0..=0, 0..=0]);
}

#[test]
fn metrics_count_without_naming_anybody() {
    let (_, agent) = one_disk();
    let reader = agent.reader();
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));
    assert!(reader.get(&url).complete);
    let answer = reader.get("/v1/metrics");
    assert!(answer.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    let text = String::from_utf8(answer.body).unwrap();
    let value = |name: &str| -> u64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name}: {text}"));
        line.trim().parse().unwrap()
    };
    assert_eq!(value("vmtide_agent_read_bytes_total"), DISK as u64);
    assert_eq!(value("vmtide_agent_requests_total{route=\"/v1/content\",status=\"200\"}"), 1);
    assert!(!text.contains("a.vhdx") && !text.contains("reader"));
}
